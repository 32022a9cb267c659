"""Tests that no layer is read or reported too early, on a virtual clock."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from random import Random

import numpy as np
import pytest

from flexkv.common.config import CacheConfig, ModelConfig
from flexkv.common.errors import ConfigError
from flexkv.common.request import KVResponseStatus
from flexkv.common.terms import BLOCK_KEY_BYTES
from flexkv.kvmanager import KVManager
from flexkv.testing.fake_backend import FakeBackend, empty
from flexkv.testing.faults import FaultPlan
from flexkv.testing.virtual_time import run_virtual

PER_BLOCK = 2
BLOCKS = 6
UNWRITTEN = 0xEE
"""The byte of device blocks that the model has not written yet."""


def slots(first: int, blocks: int = BLOCKS) -> np.ndarray:
    """Return the slots of neighbouring device blocks."""
    return np.arange(first * PER_BLOCK, (first + blocks) * PER_BLOCK)


def columns(begin: int, end: int, layers: int) -> slice:
    """Return the bytes of a block that belong to some layers, as the fake device moves them."""
    return slice(BLOCK_KEY_BYTES * begin // layers, BLOCK_KEY_BYTES * end // layers)


class Put:
    """A put of one prompt, whose layers are written a few at a time at random moments."""

    def __init__(self, number: int, layers: int, random: Random, device: np.ndarray) -> None:
        self.tokens = np.arange(BLOCKS * PER_BLOCK) + 1000 * number
        self.content = np.frombuffer(random.randbytes(BLOCKS * BLOCK_KEY_BYTES), np.uint8)
        self.content = self.content.reshape(BLOCKS, BLOCK_KEY_BYTES)
        self.first = number * BLOCKS
        self._layers, self._random, self._device = layers, random, device

    async def run(self, manager: KVManager) -> None:
        """Store the prompt."""
        put = manager.put_layerwise(self.tokens, slots(self.first))
        count = self._random.randint(1, self._layers)
        ends = sorted(self._random.sample(range(1, self._layers), min(count, self._layers - 1)))
        for begin, end in pairwise((0, *ends, self._layers)):
            await asyncio.sleep(self._random.choice([0.0, 0.001, 0.01]))
            at = columns(begin, end, self._layers)
            self._device[self.first : self.first + BLOCKS, at] = self.content[:, at]
            put.layer_written(end - 1)
        assert (await put).return_mask.all()


async def check(manager: KVManager, put: Put, layers: int, target: np.ndarray) -> None:
    """Get a prompt into device blocks, and check each layer once it is reported."""
    target[:] = UNWRITTEN
    get = manager.get_layerwise(put.tokens, slots(30))
    for layer in range(layers):
        assert await get.layer(layer)
        at = columns(0, layer + 1, layers)
        assert np.array_equal(target[:, at], put.content[:, at])
    assert (await get).return_mask.all()
    assert np.array_equal(target, put.content)


@pytest.mark.parametrize("layers", [16, 32, 33, 48, 80, 128])
@pytest.mark.parametrize("seed", range(8))
def test_no_layer_is_read_before_it_is_said_to_be_written(layers: int, seed: int) -> None:
    """Stored bytes are those written before their layer was reported as written.

    Each layer has other bytes before that. There are one or several layers in a piece, and several
    puts at once. A layer of a get is there once it is reported.
    """
    random = Random(seed)
    model = ModelConfig(num_layers=layers, num_kv_heads=1, head_size=4, dtype="int8")
    cache = CacheConfig(
        tokens_per_block=PER_BLOCK, num_cpu_blocks=64, num_ssd_blocks=0,
        device_window_mb=random.choice([1, 40, 4000]) / 2**20,
    )  # fmt: skip
    device = np.full((40, BLOCK_KEY_BYTES), UNWRITTEN, np.uint8)
    backend = FakeBackend(64, FaultPlan(seed, 0.0, 0.0001, 0.002), empty(0))

    async def run() -> None:
        async with KVManager(model, cache, backend=backend) as manager:
            manager.register_kv_caches([device])
            puts = [Put(number, layers, random, device) for number in range(3)]
            async with asyncio.TaskGroup() as group:
                for put in puts:
                    group.create_task(put.run(manager))
            device[:] = UNWRITTEN
            for put in puts:
                await check(manager, put, layers, device[30 : 30 + BLOCKS])

    run_virtual(run())


@pytest.mark.parametrize("layers", [16, 32, 33, 100])
def test_the_first_layers_are_there_long_before_the_last(layers: int) -> None:
    """If only one piece may be in flight, layers arrive at as many moments as there are pieces.

    There are at least sixteen.
    """
    model = ModelConfig(num_layers=layers, num_kv_heads=1, head_size=4, dtype="int8")
    cache = CacheConfig(
        tokens_per_block=PER_BLOCK, num_cpu_blocks=64, num_ssd_blocks=0,
        device_window_mb=1 / 2**20,
    )  # fmt: skip
    device = np.zeros((40, BLOCK_KEY_BYTES), np.uint8)
    backend = FakeBackend(64, FaultPlan(1, 0.0, 0.001, 0.002), empty(0))

    async def run() -> None:
        async with KVManager(model, cache, backend=backend) as manager:
            manager.register_kv_caches([device])
            tokens = np.arange(BLOCKS * PER_BLOCK)
            await manager.put(tokens, slots(0))
            get = manager.get_layerwise(tokens, slots(30))
            moments = set()
            for layer in range(layers):
                assert await get.layer(layer)
                moments.add(asyncio.get_running_loop().time())
            assert (await get).return_mask.all()
            for missing in (-1, layers):
                with pytest.raises(ConfigError, match=f"layer={missing}: must be from 0"):
                    await get.layer(missing)
            assert len(moments) == -(-layers // (layers // 16))

    run_virtual(run())


def test_nobody_waits_for_a_put_whose_layers_are_not_written() -> None:
    """Requests treat blocks of a put as absent until all of its layers are written.

    Their caller may be the engine that has to write them. They wait for an earlier put's blocks,
    and for these once all layers are written.
    """
    model = ModelConfig(num_layers=32, num_kv_heads=1, head_size=4, dtype="int8")
    cache = CacheConfig(tokens_per_block=PER_BLOCK, num_cpu_blocks=64, num_ssd_blocks=0)
    device = np.zeros((40, BLOCK_KEY_BYTES), np.uint8)
    backend = FakeBackend(64, FaultPlan(1, 0.0, 0.001, 0.002), empty(0))

    async def run() -> None:
        async with KVManager(model, cache, backend=backend) as manager:
            manager.register_kv_caches([device])
            before = np.arange(2 * PER_BLOCK)
            first = asyncio.create_task(manager.put(before, slots(0, 2)))
            await asyncio.sleep(0)
            tokens = np.arange(BLOCKS * PER_BLOCK)
            put = manager.put_layerwise(tokens, slots(0))
            put.layer_written(30)
            await asyncio.sleep(0.0001)  # virtual: the second put begins, the first does not end
            match = manager.match(tokens)
            assert (match.tokens, match.pending_tokens) == (len(before), len(before))
            async with asyncio.timeout(10.0):
                got = await manager.get(tokens, slots(20))
                assert got.return_mask.sum() == len(before)
                brought = await manager.prefetch(tokens)
                assert brought.status is KVResponseStatus.SUCCESS
            put.layer_written(31)
            await asyncio.sleep(0)  # the engine receives the report
            assert manager.match(tokens).pending_tokens == len(tokens) - len(before)
            assert (await manager.get(tokens, slots(20))).return_mask.all()
            assert (await put).return_mask[len(before) :].all()
            assert (await first).return_mask.all()

    run_virtual(run())
