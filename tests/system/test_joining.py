"""Tests of requests that wait for blocks that many other requests bring."""

from __future__ import annotations

import asyncio
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv.common.config import CacheConfig
from flexkv.common.request import KVResponse, KVResponseStatus, Operation
from flexkv.common.terms import BLOCK_KEY_BYTES, Tier
from flexkv.engine.engine import Engine
from flexkv.graph.ops import CHUNKS_MAX
from flexkv.index.keys import block_keys
from flexkv.testing.fake_backend import FakeBackend, empty
from flexkv.testing.faults import FaultPlan
from flexkv.testing.simulated_groups import MODEL, TOKENS_PER_BLOCK
from flexkv.testing.virtual_time import run_virtual

DEVICE_BLOCKS = 256
STRIDE_MB = 4096 / 2**20


class Bench:
    """An engine over fakes, with device blocks whose bytes derive from their keys."""

    def __init__(self, disk: int = 0, chunk_blocks: int = 4) -> None:
        self.device = np.zeros((DEVICE_BLOCKS, BLOCK_KEY_BYTES), np.uint8)
        cache = CacheConfig(
            tokens_per_block=TOKENS_PER_BLOCK, num_cpu_blocks=DEVICE_BLOCKS, evict_ratio=0.0,
            num_ssd_blocks=disk, ssd_cache_dir="unused", chunk_mb=chunk_blocks * STRIDE_MB,
        )  # fmt: skip
        faults = FaultPlan(1, 0.0, 0.001, 0.01)
        self.engine = Engine(MODEL, cache, FakeBackend(DEVICE_BLOCKS, faults, empty(disk)))

    async def perform(self, operation: Operation, blocks: int, first: int = 0) -> KVResponse:
        """Perform an operation on blocks `first` to `blocks` of a prompt.

        A get uses the last blocks of the device, a put those of the same numbers.
        """
        mask = np.arange(blocks * TOKENS_PER_BLOCK) >= first * TOKENS_PER_BLOCK
        tokens = list(range(blocks * TOKENS_PER_BLOCK))
        request = self.engine.requests.intake(operation, tokens, mask)
        begin = DEVICE_BLOCKS - blocks if operation is Operation.GET else first
        slots = np.arange(begin * TOKENS_PER_BLOCK, (begin + blocks - first) * TOKENS_PER_BLOCK)
        ready = self.engine.requests.with_slots(request, slots)
        assert ready is not None
        if operation is Operation.PUT:
            contents = [np.frombuffer(key, np.uint8) for key in block_keys(request.keys)[first:]]
            self.device[begin : begin + blocks - first] = contents
        response = (await self.engine.requests.perform(ready)).response
        assert response is not None
        return response

    async def check_get(self, blocks: int, wanted: int) -> None:
        """Get a prompt; check that `wanted` blocks come, and their bytes."""
        response = await self.perform(Operation.GET, blocks)
        assert response.status is KVResponseStatus.SUCCESS
        mask = response.return_mask.reshape(-1, TOKENS_PER_BLOCK).all(axis=1)
        assert mask.tolist() == [True] * wanted + [False] * (blocks - wanted)
        begin = DEVICE_BLOCKS - blocks
        assert np.array_equal(self.device[begin : begin + wanted], self.device[:wanted])

    async def open(self) -> None:
        """Open the engine, and register its device."""
        await self.engine.open()
        self.engine.register_kv_caches([self.device])


@given(st.lists(st.integers(1, 2), min_size=CHUNKS_MAX - 2, max_size=CHUNKS_MAX + 12))
def test_a_get_that_joins_many_ends_at_the_last_that_it_may_join(sizes: list[int]) -> None:
    """A get waits for at most as many puts as a leg has chunks, and returns their blocks.

    More puts are under way, each with a few blocks of the prompt. A later get returns all blocks.
    """

    async def run() -> None:
        bench = Bench()
        await bench.open()
        ends = list(accumulate(sizes))
        async with asyncio.TaskGroup() as group:
            for end, size in zip(ends, sizes, strict=True):
                group.create_task(bench.perform(Operation.PUT, end, end - size))
            await asyncio.sleep(0)
            await bench.check_get(ends[-1], ends[:CHUNKS_MAX][-1])
        await bench.check_get(ends[-1], ends[-1])
        await bench.engine.close()

    run_virtual(run())


@pytest.mark.parametrize("blocks", [1, 31, 32, 33, 63, 64, 65, 120])
def test_a_request_has_no_more_chunks_than_it_may(blocks: int) -> None:
    """However small the chunks are, the ops of a request are bounded, and all bytes are right."""

    async def run() -> None:
        bench = Bench(disk=DEVICE_BLOCKS, chunk_blocks=1)
        await bench.open()
        await bench.perform(Operation.PUT, blocks)
        await bench.engine.flush()
        bench.engine.residency.clear(Tier.HOST)
        await bench.check_get(blocks, blocks)
        routes = bench.engine.statistics().routes
        for name in ("device→host", "host→disk", "disk→host", "host→device"):
            assert routes[name].blocks == blocks
            assert routes[name].bytes == blocks * BLOCK_KEY_BYTES
            assert routes[name].ops <= CHUNKS_MAX
        await bench.engine.close()

    run_virtual(run())
