"""Tests that a flush returns only when disk and journals have the blocks, after any failure."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from errno import EIO, ENOSPC

import numpy as np
import pytest

from flexkv.common.errors import StorageError
from flexkv.common.terms import Tier
from flexkv.engine.engine import Engine
from flexkv.testing.fake_backend import FakeBackend
from flexkv.testing.fakes import FakePort
from flexkv.testing.faults import FaultPlan
from tests.system.test_degraded import disk_of
from tests.system.test_keeping import on_engine
from tests.system.test_write_behind import BLOCKS, QUICK, on_disk, put


def sync_failing(engine: Engine) -> Callable[[], None]:
    """Make every sync of the disk fail and lose its writes; return a function that undoes this."""
    disk = disk_of(engine)

    async def failed() -> None:
        disk._lost |= (disk._store != disk._durable).any(axis=1)
        raise StorageError("planted", 0, EIO)

    vars(disk)["sync"] = failed
    return lambda: vars(disk).pop("sync")


def test_what_a_failed_sync_has_lost_is_owed_anew() -> None:
    """Blocks that a failed sync lost are written again without a flush, before the host evicts."""

    async def work(engine: Engine) -> None:
        await put(engine, 0)
        await asyncio.sleep(1.0)  # virtual
        heal = sync_failing(engine)
        with pytest.raises(StorageError):
            await engine.flush()
        heal()
        for number in range(1, 9):
            await put(engine, number)
        await asyncio.sleep(1.0)  # virtual
        assert on_disk(engine, 0) == [BLOCKS]

    on_engine(work, host=16, disk=64, journals=1)


@pytest.mark.parametrize("later_s", [0.2, 0.9])
def test_a_flush_hears_of_the_sync_of_another_that_failed_meanwhile(later_s: float) -> None:
    """A flush that began during another's failing sync raises too, since its blocks may be lost."""

    async def work(engine: Engine) -> None:
        disk = disk_of(engine)
        await put(engine, 0)
        await asyncio.sleep(1.0)  # virtual

        async def failed() -> None:
            await asyncio.sleep(1.0)  # virtual
            del vars(disk)["sync"]
            raise StorageError("planted", 0, EIO)

        vars(disk)["sync"] = failed
        first = asyncio.ensure_future(engine.flush())
        await asyncio.sleep(later_s)  # virtual
        disk._faults = FaultPlan(1, 0.0, 0.3, 0.3)
        await put(engine, 1)
        second = asyncio.ensure_future(engine.flush())
        for flush in (first, second):
            with pytest.raises(StorageError):
                await flush
        assert (await engine.flush()).lacking_blocks == {}
        assert on_disk(engine, 0, 1) == [BLOCKS] * 2

    on_engine(work, host=32, disk=64, journals=1)


def test_what_is_being_written_while_a_sync_fails_is_not_believed() -> None:
    """A block being written during a failed sync is written again before a flush returns."""

    async def work(engine: Engine) -> None:
        disk, device = disk_of(engine), engine.devices._by_rank[0].port
        assert isinstance(device, FakePort)
        device._store[:] = 7
        disk._faults = FaultPlan(3, 0.0, 1.0, 1.0)
        await put(engine, 0)
        await asyncio.sleep(0.9)  # virtual
        (job,) = disk._jobs.values()
        assert not job.copies, "it has been written, and has not ended"
        heal = sync_failing(engine)
        assert await engine._durability._synced() is not None
        heal()
        disk._faults = QUICK
        assert (await engine.flush()).lacking_blocks == {}
        records = engine.residency.export(Tier.DISK, np.arange(64))
        places = np.flatnonzero(records.any(axis=1))
        assert len(places) == BLOCKS
        assert (disk._durable[places] == 7).all(), "a flush returned, and the device lacks a block"

    on_engine(work, host=16, disk=64, journals=1, io_deadline_s=100.0)


def test_a_journal_that_was_emptied_fails_the_flush_until_it_has_all_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a journal had to be emptied, flushes raise until it has all blocks again."""
    monkeypatch.setattr("flexkv.io.ssd.journals.KEPT_BYTES_MAX", 300)

    async def work(engine: Engine) -> None:
        backend = engine._backend
        assert isinstance(backend, FakeBackend)
        assert backend.ledger is not None
        (files,) = backend.files

        def full(fd: int, data: memoryview) -> int:
            raise OSError(ENOSPC, "planted")

        vars(files)["write"] = full
        for number in range(6):
            await put(engine, number)
            await asyncio.sleep(0.1)  # virtual
        for _ in range(2):
            with pytest.raises(StorageError):
                await engine.flush()
        del vars(files)["write"]
        await put(engine, 6)
        await engine.flush()
        places = engine.residency.export(Tier.DISK, np.arange(128)).any(axis=1)
        assert places.sum() == 7 * BLOCKS
        assert backend.ledger.are_journaled(np.flatnonzero(places)).all()

    on_engine(work, host=64, disk=128, journals=1)
