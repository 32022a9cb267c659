"""Put known blocks and print what was flushed, until the test kills this process."""

from __future__ import annotations

import asyncio
import sys
from random import Random

import numpy as np
from numpy.typing import NDArray

from flexkv.common.config import CacheConfig, ModelConfig
from flexkv.index.keys import KeyChain, block_keys
from flexkv.kvmanager import KVManager
from flexkv.testing.known_bytes import KnownDevice

PER_BLOCK, DEVICE_BLOCKS, PROMPT_BLOCKS = 4, 256, 24
MODEL = ModelConfig(num_layers=3, num_kv_heads=2, head_size=32, dtype="float16")
CHAIN = KeyChain(MODEL.spaces(PER_BLOCK)[0])


BURST_PROMPTS, BURST_HOST_BLOCKS = 40, 60
"""A burst has ten times the blocks of host memory; two of them may be queued for the SSD."""


def config(directory: str, ssd_blocks: int, in_bursts: bool = False) -> CacheConfig:
    """Return a configuration whose SSD tier is written in small chunks, as soon as possible."""
    more = {}
    if in_bursts:
        more = {"num_cpu_blocks": BURST_HOST_BLOCKS, "write_behind_max_gb": 2 * 4096 / 2**30}
    return CacheConfig(
        **{"num_cpu_blocks": 256, **more}, tokens_per_block=PER_BLOCK, num_ssd_blocks=ssd_blocks,
        ssd_cache_dir=directory, chunk_mb=4096 * 4 / 2**20,
    )  # fmt: skip


def prompt(seed: int, number: int) -> NDArray[np.int64]:
    """Return a prompt; three of four continue the one before it."""
    random = Random(f"{seed} {number // 4}")
    start = random.randrange(1 << 31)
    length = PER_BLOCK * (PROMPT_BLOCKS // 4) * (1 + number % 4)
    return np.arange(start, start + length)


def slots_of(first: int, blocks: int) -> NDArray[np.int64]:
    """Return the slots of neighbouring device blocks."""
    return np.arange(first * PER_BLOCK, (first + blocks) * PER_BLOCK)


def say(*words: object) -> None:
    """Print a line and flush it, since this process may be killed at any moment."""
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


async def write(directory: str, seed: int, ssd_blocks: int) -> None:
    """Put one prompt after the other; flush sometimes, and print how many are safe then."""
    random = Random(seed)
    device = KnownDevice(MODEL, PER_BLOCK, DEVICE_BLOCKS)
    async with KVManager(MODEL, config(directory, ssd_blocks)) as manager:
        manager.register_kv_caches(device.kv_caches)
        say("open")
        number = 0
        while True:
            tokens = prompt(seed, number)
            keys = block_keys(CHAIN.keys(tokens))
            device.fill(range(len(keys)), keys)
            await manager.put(tokens, slots_of(0, len(keys)))
            say("put", number)
            number += 1
            if random.random() < 0.2:
                await manager.flush()
                say("flushed", number)
            elif random.random() < 0.3:
                await asyncio.sleep(random.random() * 0.03)


async def write_in_bursts(directory: str, seed: int, ssd_blocks: int) -> None:
    """Put many prompts in a burst, flush, and print how many blocks of each are resident then."""
    device = KnownDevice(MODEL, PER_BLOCK, DEVICE_BLOCKS)
    async with KVManager(MODEL, config(directory, ssd_blocks, in_bursts=True)) as manager:
        manager.register_kv_caches(device.kv_caches)
        say("open")
        number = 0
        while True:
            for _ in range(BURST_PROMPTS):
                tokens = prompt(seed, number)
                keys = block_keys(CHAIN.keys(tokens))
                device.fill(range(len(keys)), keys)
                await manager.put(tokens, slots_of(0, len(keys)))
                say("put", number)
                number += 1
            await manager.flush()
            for each in range(number - BURST_PROMPTS, number):
                say("resident", each, manager.match(prompt(seed, each)).tokens // PER_BLOCK)


def main() -> None:
    """Run one of the works with the directory, seed and tier size of the command line."""
    directory, seed, ssd_blocks, work = sys.argv[1:]
    works = {"write": write, "write_in_bursts": write_in_bursts}
    asyncio.run(works[work](directory, int(seed), int(ssd_blocks)))
