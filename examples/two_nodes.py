"""Two nodes that share host memory: what one has computed, the other one loads from it.

    python examples/two_nodes.py                    # starts a Redis of its own (redis-server)
    python examples/two_nodes.py 10.0.0.9:6379      # uses one that runs; REDIS_PASSWORD if it asks

Both nodes are in this process, each with host memory of its own; usually they are engines on
different machines. The first computes a prompt. The second learns of it over Redis, and fetches its
blocks from the first one over TCP.
"""

from __future__ import annotations

import asyncio
import os
import sys

import numpy as np

from flexkv.common.config import CacheConfig, ModelConfig
from flexkv.common.terms import Tier
from flexkv.kvmanager import KVManager
from flexkv.testing.redis_server import RedisServer

MODEL = ModelConfig(num_layers=4, num_kv_heads=8, head_size=64, dtype="float16", model_id="example")
PER_BLOCK, DEVICE_BLOCKS = 16, 64
PROMPT = np.arange(512)
SLOTS = np.arange(len(PROMPT))


def random_caches(seed: int) -> list[np.ndarray]:
    """Return the KV caches of an engine, one for each layer."""
    random = np.random.default_rng(seed)
    shape = (2, DEVICE_BLOCKS, PER_BLOCK, MODEL.num_kv_heads, MODEL.head_size)
    return [random.random(shape, np.float32).astype(np.float16) for _ in range(MODEL.num_layers)]


async def share(host: str, port: int, password: str) -> bool:
    """Run two nodes; return whether every byte came over."""
    cache = CacheConfig(
        tokens_per_block=PER_BLOCK, num_cpu_blocks=256, num_ssd_blocks=0, enable_p2p_cpu=True,
        redis_host=host, redis_port=port, redis_password=password,
    )  # fmt: skip
    ours, theirs = random_caches(1), random_caches(2)
    async with KVManager(MODEL, cache) as first, KVManager(MODEL, cache) as second:
        first.register_kv_caches(ours)
        second.register_kv_caches(theirs)
        print("first node, put:", await first.put(PROMPT, SLOTS))
        # The second node hears of it within p2p_publish_ms and a moment.
        while not second.match(PROMPT).far_tokens_by_tier.get(Tier.PEER):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        print("second node, match:", second.match(PROMPT))
        print("second node, get:", await second.get(PROMPT, SLOTS))
        cluster = second.statistics().cluster
        assert cluster is not None
        for address, read in cluster.read.items():
            print(f"read from {address}: {read.blocks} blocks, {read.bytes / 1e6:.1f} MB")
    blocks = slice(len(PROMPT) // PER_BLOCK)
    pairs = zip(ours, theirs, strict=True)
    equal = all(np.array_equal(one[:, blocks], other[:, blocks]) for one, other in pairs)
    print("every byte is there" if equal else "BYTES DIFFER")
    return equal


def main(words: list[str]) -> bool:
    """Run the example with the Redis that the command line names, or one of its own."""
    if words:
        host, _, port = words[0].partition(":")
        password = os.environ.get("REDIS_PASSWORD", "")
        return asyncio.run(share(host, int(port or 6379), password))
    redis = RedisServer(password="of this example")
    redis.start()
    try:
        return asyncio.run(share("127.0.0.1", redis.port, redis.password))
    finally:
        redis.close()


if __name__ == "__main__":
    sys.exit(0 if main(sys.argv[1:]) else 1)
