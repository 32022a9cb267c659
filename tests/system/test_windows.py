"""Tests of the disk's window: writes go on under reads, and slow checksums pile up no bytes."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import numpy as np
import pytest

from flexkv.actors.actor import TransferActor
from flexkv.actors.checks import BlockChecks, KeptSums
from flexkv.common.config import CacheConfig
from flexkv.common.request import KVResponseStatus, Operation
from flexkv.common.terms import BLOCK_KEY_BYTES, Tier, Transfer
from flexkv.engine.engine import Engine
from flexkv.io.ports import DurablePort
from flexkv.testing.fake_backend import FakeBackend, empty
from flexkv.testing.fakes import FakeChecksummer, FakePort
from flexkv.testing.faults import FaultPlan
from flexkv.testing.simulated_groups import MODEL, TOKENS_PER_BLOCK
from flexkv.testing.virtual_time import run_virtual
from flexkv.tiers.backend import Progress
from flexkv.tiers.limits import disk_windows
from flexkv.tiers.parts import TierParts
from tests.system.test_keeping import perform

BLOCK_MB = BLOCK_KEY_BYTES / 2**20
STRIDE_MB = 4096 / 2**20
PROMPT_BLOCKS, PROMPTS = 8, 16
QUICK = FaultPlan(1, 0.0, 0.0001, 0.0002)


def prompt(number: int) -> list[int]:
    """Return one of the prompts; no two of them share a block."""
    return [1000 * number + n for n in range(PROMPT_BLOCKS * TOKENS_PER_BLOCK)]


class Metered:
    """A port that counts the blocks that are lent in each direction, now and at most.

    Blocks are lent from `submit` until the actor has done with them, summed and all.
    """

    def __init__(self, inner: DurablePort) -> None:
        self._inner = inner
        self.actor: TransferActor | None = None
        self.blocks_max = {True: 0, False: 0}
        self.connect, self.close, self.sync = inner.connect, inner.close, inner.sync
        self.reap, self.adapter = inner.reap, "Metered"

    @property
    def block_bytes(self) -> int:
        """Return how many bytes the port moves for a block."""
        return self._inner.block_bytes

    @property
    def blocks(self) -> dict[bool, int]:
        """Return how many blocks are lent in each direction."""
        assert self.actor is not None
        lent_bytes = self.actor.in_flight_bytes
        return {inbound: lent_bytes[inbound] // self.block_bytes for inbound in lent_bytes}

    def submit(self, transfer: Transfer) -> None:
        """Start a transfer, and count the blocks that are lent by now, its own among them."""
        for inbound, count in self.blocks.items():
            self.blocks_max[inbound] = max(self.blocks_max[inbound], count)
        self._inner.submit(transfer)


class MeteredBackend(FakeBackend):
    """A fake backend with a quick, metered disk whose blocks are summed slowly."""

    def __init__(self, host_blocks: int, sums: FaultPlan = QUICK) -> None:
        super().__init__(host_blocks, QUICK, empty(PROMPTS * PROMPT_BLOCKS))
        self._slow = sums

    def open(self, undo: ExitStack, progress: Progress | None) -> None:
        """Open the disk port."""
        self.port = FakePort(self._store, self.memory, self.faults, BLOCK_KEY_BYTES)
        checksummer = FakeChecksummer(self.memory, self._slow)
        self._sums = checksummer.sums
        blocks = len(self._store)
        checks = BlockChecks(checksummer, KeptSums(blocks, lambda at: ("fake", at)))
        undo.callback(self.port.close)
        self.meter = Metered(self.port)
        self._tiers = [TierParts(Tier.DISK, blocks, self.meter, *self.windows, checks=checks)]


async def put(engine: Engine, number: int) -> None:
    """Store a prompt from the first blocks of the device."""
    await perform(engine, Operation.PUT, prompt(number))


async def prefetch(engine: Engine, number: int) -> None:
    """Bring a prompt from disk to host memory."""
    request = engine.requests.intake(Operation.PREFETCH, prompt(number))
    flight = await engine.requests.perform(request)
    assert flight.response is not None
    assert flight.response.status is KVResponseStatus.SUCCESS, flight.response


async def opened(backend: MeteredBackend, host: int, **changes: float) -> Engine:
    """Return an open engine whose disk has all prompts but the last, and whose host has none."""
    cache = CacheConfig(
        tokens_per_block=TOKENS_PER_BLOCK, num_cpu_blocks=host, evict_ratio=0.0,
        num_ssd_blocks=PROMPTS * PROMPT_BLOCKS, ssd_cache_dir="unused", **changes,
    )  # fmt: skip
    backend.windows = disk_windows(cache)
    engine = Engine(MODEL, cache, backend)
    await engine.open()
    backend.meter.actor = engine._actors[Tier.DISK]
    engine.register_kv_caches([np.zeros((PROMPT_BLOCKS, BLOCK_KEY_BYTES), np.uint8)])
    for number in range(PROMPTS - 1):
        await put(engine, number)
        await engine.flush()
    engine.residency.clear(Tier.HOST)
    return engine


def test_writes_go_on_under_reads_that_never_let_up() -> None:
    """While reads always wait for the window, puts still reach the disk, one write at a time."""

    async def run() -> None:
        backend = MeteredBackend(PROMPTS * PROMPT_BLOCKS)
        engine = await opened(
            backend, PROMPTS * PROMPT_BLOCKS, disk_read_window_mb=BLOCK_MB, chunk_mb=STRIDE_MB
        )
        over = asyncio.Event()

        async def read(number: int) -> None:
            while not over.is_set():
                await prefetch(engine, number)
                keys = engine.requests.intake(Operation.PREFETCH, prompt(number)).keys
                engine.residency.forget(*engine.residency.find(keys).holdings[0])

        async with asyncio.TaskGroup() as group:
            for number in range(6):
                group.create_task(read(number))
            await asyncio.sleep(0.01)
            backend.meter.blocks_max[False] = 0
            await put(engine, PROMPTS - 1)
            async with asyncio.timeout(1.0):
                await engine.flush()
            assert backend.meter.blocks[True], "the reads let up"
            assert backend.meter.blocks_max[False] == 1
            assert engine.statistics().tiers["disk"].ready_blocks == PROMPTS * PROMPT_BLOCKS
            over.set()
        await engine.close()

    run_virtual(run())


@pytest.mark.parametrize("window_blocks", [2, 4, 8])
def test_slow_sums_pile_up_one_window_of_reads_and_no_more(window_blocks: int) -> None:
    """With slow sums at most two windows of reads are in flight.

    Blocks that were read and wait for their sums are discounted up to one window, so that the disk
    does not wait for sums.
    """

    async def run() -> None:
        slow = FaultPlan(2, 0.0, 0.05, 0.1)
        backend = MeteredBackend(PROMPTS * PROMPT_BLOCKS, slow)
        window_mb = window_blocks * BLOCK_MB
        engine = await opened(
            backend, PROMPTS * PROMPT_BLOCKS, disk_read_window_mb=window_mb, chunk_mb=STRIDE_MB
        )
        async with asyncio.TaskGroup() as group:
            for number in range(PROMPTS - 1):
                group.create_task(prefetch(engine, number))
        assert backend.meter.blocks_max[True] == 2 * window_blocks
        await engine.close()

    run_virtual(run())
