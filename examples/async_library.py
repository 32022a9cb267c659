"""FlexKV in an async program: store the KV of a prompt, and load it for one that begins like it.

    python examples/async_library.py             # SSD tier in ./flexkv-example; or name a directory

The "engine" is a list of numpy arrays, one for each layer, in blocks of 16 tokens: FlexKV reads and
fills them as it would an engine's KV caches (numpy arrays or torch tensors, on the CPU or a GPU).
"""

from __future__ import annotations

import asyncio
import sys

import numpy as np

from flexkv.common.config import CacheConfig, ModelConfig
from flexkv.kvmanager import KVManager

MODEL = ModelConfig(num_layers=4, num_kv_heads=8, head_size=64, dtype="float16", model_id="example")
PER_BLOCK, DEVICE_BLOCKS = 16, 256


def slots_of(first_block: int, tokens: int) -> np.ndarray:
    """Return the slots of `tokens` tokens that fill device blocks from `first_block` on."""
    return np.arange(tokens) + first_block * PER_BLOCK


async def main(directory: str) -> bool:
    """Run the example; return whether every byte came back."""
    cache = CacheConfig(
        tokens_per_block=PER_BLOCK, num_cpu_blocks=256, num_ssd_blocks=1024, ssd_cache_dir=directory
    )
    random = np.random.default_rng(0)
    shape = (2, DEVICE_BLOCKS, PER_BLOCK, MODEL.num_kv_heads, MODEL.head_size)
    kv_caches = [random.random(shape, np.float32).astype(np.float16) for _ in range(4)]
    async with KVManager(MODEL, cache) as manager:
        manager.register_kv_caches(kv_caches)

        prompt = np.arange(64)  # token ids; their KV is in device blocks 0 to 3
        stored = await manager.put(prompt, slots_of(0, 64))
        print("put:", stored)

        longer = np.arange(100)  # begins with the same 64 tokens
        found = manager.match(longer)
        print("match:", found)

        # Suppose that the device has none of it: load what is stored, and compute the rest.
        loaded = await manager.get(longer[: found.tokens], slots_of(100, found.tokens))
        print("get:", loaded)
        equal = all(np.array_equal(layer[:, 100:104], layer[:, 0:4]) for layer in kv_caches)

        await manager.flush()  # what was stored survives a restart from here on
        print("flushed:", manager.statistics().tiers["disk"].ready_blocks, "blocks on SSD")
    print("every byte is back" if equal else "BYTES DIFFER")
    return equal


if __name__ == "__main__":
    folder = sys.argv[1] if len(sys.argv) > 1 else "flexkv-example"
    sys.exit(0 if asyncio.run(main(folder)) else 1)
