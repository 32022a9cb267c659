"""Reads that fail in part: the leading blocks that arrived stay, and go on to the device."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from errno import EIO
from typing import Any

import numpy as np
import pytest

from flexkv.actors.actor import Window
from flexkv.common.config import CacheConfig
from flexkv.common.errors import StorageError
from flexkv.common.request import KVResponse, Operation
from flexkv.common.terms import BLOCK_KEY_BYTES, Tier, Transfer
from flexkv.engine.engine import Engine
from flexkv.engine.tickets import RequestSpec
from flexkv.front.layerwise import LayerProgress
from flexkv.io.ports import Completion
from flexkv.testing.fake_backend import FakeBackend, empty
from flexkv.testing.faults import FaultPlan
from flexkv.testing.virtual_time import run_virtual
from tests.system.test_keeping import MODEL, TOKENS_PER_BLOCK

BLOCKS = 8
PROMPT = np.arange(BLOCKS * TOKENS_PER_BLOCK)


class Bench:
    """An engine whose SSD tier alone has a prompt, and whose reads of one of its blocks fail.

    Attributes:
        bad_id: the place of that block.
        tells: whether the port reports how many blocks before it have arrived.
    """

    def __init__(self, piece_blocks: int) -> None:
        cache = CacheConfig(
            tokens_per_block=TOKENS_PER_BLOCK, num_cpu_blocks=32, num_ssd_blocks=32,
            ssd_cache_dir="unused", evict_ratio=0.0,
        )  # fmt: skip
        self.backend = FakeBackend(32, FaultPlan(1, 0.0, 0.0001, 0.001), empty(32, 1))
        window = Window(1 << 20, piece_blocks * BLOCK_KEY_BYTES)
        self.backend.windows = window, window
        self.engine = Engine(MODEL, cache, self.backend)
        self.device = np.zeros((32, BLOCK_KEY_BYTES), np.uint8)
        self.bad_id, self.tells = -1, False

    async def open(self) -> None:
        """Open the engine, and leave the prompt on the SSD tier only."""
        await self.engine.open()
        self.engine.register_kv_caches([self.device])
        self.device[:BLOCKS] = np.arange(1, BLOCKS + 1)[:, None]
        await self.perform(Operation.PUT)
        await self.engine.flush()
        self.engine.residency.clear(Tier.HOST)
        self.device[:] = 0
        self._fail_reads()

    async def perform(self, operation: Operation) -> KVResponse:
        """Run a request for the prompt, at the device's first blocks."""
        request = self.engine.requests.intake(operation, PROMPT)
        if operation is not Operation.PREFETCH:
            ready = self.engine.requests.with_slots(request, np.arange(len(PROMPT)))
            assert ready is not None
            request = ready
        response = (await self.engine.requests.perform(request)).response
        assert response is not None
        return response

    def spoil(self, position: int) -> None:
        """Make reads of the block at a position of the prompt fail."""
        keys = self.engine.requests.intake(Operation.PREFETCH, PROMPT).keys
        holdings = self.engine.residency.find(keys).holdings
        (ids,) = [block_ids for tier, block_ids in holdings if tier is Tier.DISK]
        self.bad_id = int(ids[position])

    def ready(self, tier: Tier) -> int:
        """Return how many leading blocks of the prompt a tier has ready."""
        keys = self.engine.requests.intake(Operation.PREFETCH, PROMPT).keys
        found = self.engine.residency.find(keys).ready.get(tier)
        return 0 if found is None else found.block_count

    def _fail_reads(self) -> None:
        port: Any = self.backend.port
        submit, reap = port.submit, port.reap
        failing: dict[int, int] = {}

        def submitting(transfer: Transfer) -> None:
            if transfer.route.source is Tier.DISK and self.bad_id in transfer.source_ids:
                number = transfer.source_ids.tolist().index(self.bad_id)
                failing[transfer.op_id] = number if self.tells else 0
            submit(transfer)

        def reaping() -> list[Completion]:
            return [
                Completion(end.op_id, StorageError("injected", 0, EIO), failing[end.op_id])
                if end.op_id in failing
                else end
                for end in reap()
            ]

        port.submit, port.reap = submitting, reaping


def on_bench(work: Callable[[Bench], Awaitable[None]], piece_blocks: int = 1) -> None:
    """Run something on an open bench, on a virtual clock, and close it."""

    async def run() -> None:
        bench = Bench(piece_blocks)
        await bench.open()
        await work(bench)
        await bench.engine.close()

    run_virtual(run())


@pytest.mark.parametrize("piece_blocks", [1, 3])
@pytest.mark.parametrize("position", range(BLOCKS))
def test_a_get_loads_the_blocks_before_the_one_that_cannot_be_read(
    position: int, piece_blocks: int
) -> None:
    """The response's mask, the device and host memory have the blocks before the bad one."""

    async def work(bench: Bench) -> None:
        bench.spoil(position)
        response = await bench.perform(Operation.GET)
        count = int(response.return_mask.sum()) // TOKENS_PER_BLOCK
        assert count <= position
        assert count > position - piece_blocks, "only the bad block's own piece is lost"
        assert (bench.device[:count] == np.arange(1, count + 1)[:, None]).all()
        assert isinstance(response.error, StorageError)
        assert bench.ready(Tier.HOST) == count
        moved = bench.engine.statistics().routes
        assert moved["disk→host"].blocks == count
        assert moved["disk→host"].failed_ops == 1
        if count:
            assert moved["host→device"].blocks == count

    on_bench(work, piece_blocks)


@pytest.mark.parametrize("position", range(BLOCKS))
def test_a_tier_that_tells_how_far_it_came_loses_the_bad_block_alone(position: int) -> None:
    """The blocks before it in its piece are checked, and loaded."""

    async def work(bench: Bench) -> None:
        bench.tells = True
        bench.spoil(position)
        response = await bench.perform(Operation.GET)
        assert int(response.return_mask.sum()) == position * TOKENS_PER_BLOCK
        assert (bench.device[:position] == np.arange(1, position + 1)[:, None]).all()
        assert bench.ready(Tier.HOST) == position
        bench.engine.residency.clear(Tier.HOST)
        assert bench.ready(Tier.DISK) == position

    on_bench(work, piece_blocks=BLOCKS)


def test_a_prefetch_keeps_the_blocks_before_the_one_that_cannot_be_read() -> None:
    """They are in host memory, and the response says which came."""

    async def work(bench: Bench) -> None:
        bench.spoil(5)
        response = await bench.perform(Operation.PREFETCH)
        assert int(response.return_mask.sum()) == 5 * TOKENS_PER_BLOCK
        assert bench.ready(Tier.HOST) == 5

    on_bench(work)


def test_blocks_that_were_read_stay_on_ssd() -> None:
    """Only the bad block, and what continues it, is forgotten: a put brings these anew."""

    async def work(bench: Bench) -> None:
        bench.spoil(5)
        await bench.perform(Operation.PREFETCH)
        bench.engine.residency.clear(Tier.HOST)
        assert bench.ready(Tier.DISK) == 5
        bench.bad_id = -1
        bench.device[:BLOCKS] = np.arange(1, BLOCKS + 1)[:, None]
        await bench.perform(Operation.PUT)
        bench.device[:] = 0
        response = await bench.perform(Operation.GET)
        assert response.return_mask.all()
        assert (bench.device[:BLOCKS] == np.arange(1, BLOCKS + 1)[:, None]).all()

    on_bench(work)


def test_no_layer_is_there_if_a_planned_block_is_not() -> None:
    """A request that goes layer by layer claims no layer, but its leading blocks stay in memory."""

    async def work(bench: Bench) -> None:
        bench.spoil(5)
        progress = LayerProgress(1, 1)
        spec = RequestSpec(Operation.GET, PROMPT, np.arange(len(PROMPT)), None, None, progress)
        response = await bench.engine.submit(spec).run()
        progress.end()
        assert not progress.has(0)
        assert not response.return_mask.any()
        assert not bench.device.any()
        assert bench.ready(Tier.HOST) == 5

    on_bench(work)
