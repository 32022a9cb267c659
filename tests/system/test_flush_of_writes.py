"""Tests that a flush misses no block that some put is writing to the SSD just then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from random import Random

import numpy as np
import pytest
from msgspec import structs
from numpy.typing import NDArray

from flexkv.actors.flight import Flight
from flexkv.common.errors import DeadlineError
from flexkv.common.request import Operation
from flexkv.common.terms import BLOCK_KEY_BYTES, Tier
from flexkv.engine.durability import FlushReport
from flexkv.engine.engine import Engine
from flexkv.front.layerwise import LayerProgress
from flexkv.index.keys import block_keys
from flexkv.io.ssd.journal import NAME, replay
from flexkv.testing.fake_backend import FakeBackend
from flexkv.testing.fakes import FakePort
from flexkv.testing.faults import FaultPlan
from tests.system.test_degraded import disk_of
from tests.system.test_keeping import on_engine
from tests.system.test_write_behind import BLOCKS, QUICK, prompt, put

WRITE_S = 1.0
LONGER = np.concatenate([prompt(1), prompt(2)])


def slow_to_write(disk: FakePort) -> None:
    """Make every write to a disk take `WRITE_S`, and syncs little time."""
    slow = disk._faults = FaultPlan(1, 0.0, WRITE_S, WRITE_S)

    async def sync() -> None:
        disk._faults = QUICK
        await FakePort.sync(disk)
        disk._faults = slow

    vars(disk)["sync"] = sync


async def only_in_host(engine: Engine) -> None:
    """Store a prompt in host memory alone: the disk has lost it and is not owed it."""
    await put(engine, 1)
    await engine.flush()
    engine.retention.clear(Tier.DISK)
    slow_to_write(disk_of(engine))


@asynccontextmanager
async def put_without_layers(
    engine: Engine, tokens: NDArray[np.int64] = LONGER
) -> AsyncIterator[asyncio.Task[Flight]]:
    """Put a prompt whose layers never come; the first half of `LONGER` is in host memory."""
    request = engine.requests.intake(Operation.PUT, tokens)
    ready = engine.requests.with_slots(request, np.arange(len(tokens)))
    assert ready is not None
    watched = structs.replace(ready, watch=LayerProgress(4, 0))
    stopped = asyncio.ensure_future(engine.requests.perform(watched))
    await asyncio.sleep(WRITE_S / 4)  # virtual
    try:
        yield stopped
    finally:
        stopped.cancel()
        with suppress(asyncio.CancelledError):
            await stopped


def safe_blocks(engine: Engine, number: int) -> int:
    """Return how many blocks of a prompt on SSD survive a loss of power at this moment."""
    backend = engine._backend
    assert isinstance(backend, FakeBackend)
    (files,) = backend.files
    live, _ = replay(files.remains(Random(0), power_loss=True)[NAME])
    keys = set(block_keys(engine.requests.intake(Operation.PREFETCH, prompt(number)).keys))
    safe = [row for row in live.rows.tolist() if disk_of(engine).is_synced(row)]
    named = dict(zip(live.rows.tolist(), live.blocks, strict=True))
    return sum(named[row][:BLOCK_KEY_BYTES].tobytes() in keys for row in safe)


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_a_flush_waits_for_what_a_put_without_its_layers_writes(is_cancelled: bool) -> None:
    """A put that waits for layers writes blocks of host memory: a flush waits for these writes.

    It waits as well if the put is cancelled, and never waits for the layers.
    """

    async def work(engine: Engine) -> None:
        await only_in_host(engine)
        async with put_without_layers(engine) as stopped:
            if is_cancelled:
                stopped.cancel()
            assert await engine.flush() == FlushReport()
            assert safe_blocks(engine, 1) == BLOCKS

    on_engine(work, host=16, disk=64, journals=1)


def test_a_flush_waits_for_a_put_without_its_layers_that_begins_meanwhile() -> None:
    """A flush that waits for one block also waits for what a put has begun to write by then."""

    async def work(engine: Engine) -> None:
        await only_in_host(engine)
        await put(engine, 3)
        flush = asyncio.ensure_future(engine.flush())
        await asyncio.sleep(WRITE_S / 4)  # virtual
        async with put_without_layers(engine):
            assert await flush == FlushReport()
            assert [safe_blocks(engine, number) for number in (1, 3)] == [BLOCKS] * 2

    on_engine(work, host=24, disk=64, journals=1)


@pytest.mark.parametrize("sync_s", [0.001, WRITE_S])
def test_a_flush_reports_what_a_put_begins_to_write_too_late(sync_s: float) -> None:
    """Blocks that are being written when the sync begins are not safe, so they are reported.

    They are reported even if their write ends before the sync does.
    """

    async def work(engine: Engine) -> None:
        await only_in_host(engine)
        disk = disk_of(engine)
        sync = vars(disk)["sync"]

        async def slow() -> None:
            await sync()
            await asyncio.sleep(sync_s)  # virtual

        vars(disk)["sync"] = slow
        flush = asyncio.ensure_future(engine.flush())
        await asyncio.sleep(WRITE_S / 4)  # virtual
        await put(engine, 2)
        assert (await flush).lacking_blocks == {"disk": BLOCKS}
        assert safe_blocks(engine, 1) == BLOCKS

    on_engine(work, host=16, disk=64, journals=1)


def test_a_flush_raises_if_a_put_without_its_layers_writes_to_a_disk_that_hangs() -> None:
    """A write that does not end in time fails a flush, whether it waits or begins later."""

    async def work(engine: Engine) -> None:
        await only_in_host(engine)
        disk_of(engine)._faults = FaultPlan(1, 0.0, 20.0, 20.0)
        async with put_without_layers(engine):
            for _ in range(2):
                with pytest.raises(DeadlineError):
                    async with asyncio.timeout(5.0):  # virtual
                        await engine.flush()

    on_engine(work, host=16, disk=64, journals=1, io_deadline_s=2.0)


def test_a_flush_reports_blocks_for_which_a_put_without_its_layers_has_the_places() -> None:
    """Blocks that host memory got again cannot be written while another put has their places."""

    async def work(engine: Engine) -> None:
        async with put_without_layers(engine, prompt(2)):
            engine.retention.clear(Tier.HOST)
            await put(engine, 2)
            assert (await engine.flush()).lacking_blocks == {"disk": BLOCKS}
        assert await engine.flush() == FlushReport()
        assert safe_blocks(engine, 2) == BLOCKS

    on_engine(work, host=16, disk=64, journals=1)
