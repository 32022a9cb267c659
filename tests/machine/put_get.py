"""Store a prompt, drop host memory, load it again, and print what the manager used, as JSON.

python tests/machine/put_get.py '{"ssd_cache_dir": "/data/kv"}'
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import numpy as np
import structlog

from flexkv.common.config import CacheConfig
from flexkv.common.errors import FlexKVError
from flexkv.common.terms import Tier
from flexkv.kvmanager import KVManager
from tests.system.conftest import MODEL, PER_BLOCK, bytes_of, kv_caches, slots_of

BLOCKS = 16
PROMPT = np.arange(BLOCKS * PER_BLOCK)


async def put_get(changes: dict[str, Any]) -> dict[str, Any]:
    """Return how many tokens came back, what flush said, and what memory and I/O the tiers use."""
    values = {"tokens_per_block": PER_BLOCK, "num_cpu_blocks": 64, **changes}
    async with KVManager(MODEL, CacheConfig(**values)) as manager:
        caches = kv_caches()
        manager.register_kv_caches(caches)
        restored = manager.statistics().restored_blocks
        await manager.put(PROMPT, slots_of(range(BLOCKS)))
        try:
            report: Any = (await manager.flush()).missing_tiers
        except FlexKVError as error:
            report = str(error)
        wanted = bytes_of(caches, range(BLOCKS))
        if Tier.DISK.label in manager.statistics().tiers:
            manager.clear(Tier.HOST)
        loaded = await manager.get(PROMPT, slots_of(range(32, 32 + BLOCKS)))
        found = bytes_of(caches, range(32, 32 + BLOCKS))
        tiers = manager.statistics().tiers
        return {
            "tokens": int(loaded.return_mask.sum()),
            "same": bool(np.array_equal(found, wanted)),
            "restored": restored,
            "flush": report,
            "backing": {name: tier.backing for name, tier in tiers.items()},
            "why": manager.engine._backend.arena.why,
        }


def main() -> None:
    """Print one line of JSON: the result of `put_get`, or the error."""
    structlog.configure(
        processors=[structlog.processors.JSONRenderer()],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    try:
        told = asyncio.run(put_get(json.loads(sys.argv[1])))
    except FlexKVError as error:
        told = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(told))  # noqa: T201 -- it is a command


if __name__ == "__main__":
    main()
