"""Two engines of different machines, or one after the other, that share a store.

    python examples/shared_store.py              # the store is the directory ./flexkv-example
    python examples/shared_store.py s3://bucket/prefix endpoint=http://127.0.0.1:9000 …
    python examples/shared_store.py mooncake:/etc/flexkv/mooncake.json

Each engine has a `KVManager` with host memory of its own. The first computes a prompt; the second
asks for it, and fetches it from the store. More words are options of the store's client.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import numpy as np

from flexkv.common.config import CacheConfig, ModelConfig
from flexkv.kvmanager import KVManager
from flexkv.tiers.parts import StoreStatistics

MOONCAKE = "mooncake:"
MODEL = ModelConfig(num_layers=4, num_kv_heads=8, head_size=64, dtype="float16", model_id="example")
PER_BLOCK, DEVICE_BLOCKS = 16, 64
PROMPT = np.arange(512)
SLOTS = np.arange(len(PROMPT))


def random_caches(seed: int) -> list[np.ndarray]:
    """Return the KV caches of an engine, one for each layer."""
    random = np.random.default_rng(seed)
    shape = (2, DEVICE_BLOCKS, PER_BLOCK, MODEL.num_kv_heads, MODEL.head_size)
    return [random.random(shape, np.float32).astype(np.float16) for _ in range(MODEL.num_layers)]


def config_of(words: list[str]) -> CacheConfig:
    """Return the configuration of an engine over the store that a command line names."""
    url, *options = words or [f"file://{Path('flexkv-example').absolute()}"]
    remote: dict[str, Any] = {
        "remote_cache_path": url,
        "remote_config_custom": dict(option.split("=", 1) for option in options),
    }
    if url.startswith(MOONCAKE):
        path = url.removeprefix(MOONCAKE)
        remote = {"use_mooncake_store_backend": True, "mooncake_store_config_path": path}
    return CacheConfig(
        tokens_per_block=PER_BLOCK, num_cpu_blocks=256, num_ssd_blocks=0, enable_remote=True,
        **remote,
    )  # fmt: skip


def is_known(store: StoreStatistics) -> bool:
    """Return whether an engine knows what its store has, or can ask for it."""
    return store.is_joined and (store.listed_rounds > 0 or store.where.startswith(MOONCAKE))


async def main(words: list[str]) -> bool:
    """Run the example; return whether every byte came over."""
    cache, ours, theirs = config_of(words), random_caches(1), random_caches(2)
    async with KVManager(MODEL, cache) as first:
        first.register_kv_caches(ours)
        print("first engine, put:", await first.put(PROMPT, SLOTS))
        await first.flush()  # what is written behind is in the store from here on

    async with KVManager(MODEL, cache) as second:
        second.register_kv_caches(theirs)
        # It lists the store when it starts, and learns later what others add, round after round.
        # Mooncake is asked, once it has answered at all.
        while not is_known(second.statistics().stores["remote"]):  # noqa: ASYNC110 -- no event
            await asyncio.sleep(0.01)
        print("second engine, get:", await second.get(PROMPT, SLOTS))
        print("fetched:", second.statistics().routes["remote→host"].blocks, "blocks")
    blocks = slice(len(PROMPT) // PER_BLOCK)
    pairs = zip(ours, theirs, strict=True)
    equal = all(np.array_equal(one[:, blocks], other[:, blocks]) for one, other in pairs)
    print("every byte is there" if equal else "BYTES DIFFER")
    return equal


if __name__ == "__main__":
    sys.exit(0 if asyncio.run(main(sys.argv[1:])) else 1)
