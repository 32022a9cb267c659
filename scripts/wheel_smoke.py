"""A test of an installed FlexKV on any Python: put, get, SSD, restart, exit.

Run `python scripts/wheel_smoke.py` outside the source tree's own environment; only numpy is needed.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from flexkv.common.config import CacheConfig, ModelConfig
from flexkv.common.request import KVResponseStatus
from flexkv.kvmanager import KVManager

PER_BLOCK, BLOCKS = 16, 32
MODEL = ModelConfig(num_layers=4, num_kv_heads=2, head_size=16, dtype="float16", model_id="smoke")
PROMPT = np.arange(BLOCKS * PER_BLOCK)
EXITS = Path(__file__).parents[1] / "tests/system/exit_cases.py"


def slots_of(first_block: int) -> np.ndarray:
    """Return the slots of a prompt that fills the device blocks from `first_block` on."""
    return np.arange(BLOCKS * PER_BLOCK) + first_block * PER_BLOCK


def caches() -> list[np.ndarray]:
    """Return the device memory of every layer, with the prompt's bytes in its first half."""
    shape = (2, 2 * BLOCKS, PER_BLOCK, MODEL.num_kv_heads, MODEL.head_size)
    random = np.random.default_rng(5)
    layers = [random.integers(0, 1 << 16, shape, np.uint16) for _ in range(MODEL.num_layers)]
    for layer in layers:
        layer[:, BLOCKS:] = 0
    return [layer.view(np.float16) for layer in layers]


def check_loaded(layers: list[np.ndarray]) -> None:
    """Check that the second half of the device memory has the bytes of the first."""
    for layer in layers:
        assert (layer[:, :BLOCKS].view(np.uint16) == layer[:, BLOCKS:].view(np.uint16)).all()


async def on_a_loop(cache: CacheConfig) -> None:
    """Put, get and flush to SSD through the async form."""
    layers = caches()
    async with KVManager(MODEL, cache) as manager:
        manager.register_kv_caches(layers)
        assert (await manager.put(PROMPT, slots_of(0))).return_mask.all()
        assert (await manager.get(PROMPT, slots_of(BLOCKS))).return_mask.all()
        check_loaded(layers)
        assert not (await manager.flush()).lacking_blocks


def in_a_thread(cache: CacheConfig) -> None:
    """Get through the task-id form what an earlier run stored."""
    layers = caches()
    manager = KVManager(MODEL, cache)
    manager.start()
    manager.register_kv_caches(layers)
    assert manager.match(PROMPT).tokens == len(PROMPT)
    (response,) = manager.wait(manager.get_async(PROMPT, slots_of(BLOCKS))).values()
    assert response.status is KVResponseStatus.SUCCESS, response
    check_loaded(layers)
    manager.shutdown()


def main() -> None:
    """Run all checks, and print the versions that they ran on."""
    with tempfile.TemporaryDirectory(prefix=".flexkv-smoke-", dir=".") as folder:
        cache = CacheConfig(num_cpu_blocks=64, num_ssd_blocks=64, ssd_cache_dir=f"{folder}/ssd")
        asyncio.run(on_a_loop(cache))
        in_a_thread(cache)
        exits = [sys.executable, "-W", "always::ResourceWarning", str(EXITS), folder]
        told = subprocess.run(exits, capture_output=True, text=True, check=True).stdout
        cases = [json.loads(line) for line in told.splitlines()]
        assert all(case["faults"] == [] for case in cases), told
    version, numpy = sys.version.split()[0], np.__version__
    sys.stdout.write(f"Python {version}, numpy {numpy}: bytes came back, {len(cases)} exits\n")


if __name__ == "__main__":
    main()
