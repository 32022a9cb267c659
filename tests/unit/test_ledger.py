"""What the ledger keeps when a journal refuses it, and what becomes of that."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flexkv.common.errors import ClosedError, StorageError
from flexkv.common.terms import Tier
from flexkv.io.ssd.journal import RECORD_BYTES, Journal
from flexkv.testing.faults import FaultPlan
from flexkv.testing.lossy_files import LossyFiles
from flexkv.testing.virtual_time import VirtualThread, run_virtual
from flexkv.tiers import ledger as ledger_module
from flexkv.tiers.ledger import Ledger

BLOCKS, DELAY_S = 8, 0.01


class Index:
    """An index in which every block is resident, under a key made of its id."""

    groups = 1

    def export(self, tier: Tier, block_ids: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return a record for each block."""
        return np.repeat(block_ids[:, None] + 1, RECORD_BYTES, axis=1).astype(np.uint8)

    def namespace_holdings(self, root: bytes) -> list[tuple[Tier, NDArray[np.int64]]]:
        """Return all blocks."""
        return [(Tier.DISK, np.arange(BLOCKS))]

    def restore(self, *args: Any) -> None:
        """Ignore what is restored."""


class Rig:
    """A ledger of one journal on lossy files; its thread takes 10 ms for each call."""

    def __init__(self, failing_writes: int) -> None:
        self.files = LossyFiles(FaultPlan(0))
        self.journal = Journal(Path("fake"), self.files)
        write, self.failing = self.files.write, failing_writes
        self.on_failure: Callable[[], object] = lambda: None

        def failing(fd: int, data: memoryview) -> int:
            if self.failing > 0:
                self.failing -= 1
                self.on_failure()
                raise OSError(28, "full")
            return write(fd, data)

        vars(self.files)["write"] = failing
        sums = np.arange(BLOCKS, dtype=np.uint64)
        self.ledger = Ledger([self.journal], BLOCKS, sums, lambda _: VirtualThread(lambda: DELAY_S))
        self.ledger._residency = Index()  # type: ignore[assignment]

    def rows(self) -> list[int]:
        """Return the rows that the next run would restore."""
        contents = {name: bytes(file.content) for name, file in self.files._names.items()}
        again = Journal(Path("fake"), LossyFiles(FaultPlan(0), contents))
        return sorted(again.live.rows.tolist())


@pytest.mark.parametrize("root", [None, b"namespace"])
def test_what_a_full_journal_kept_does_not_survive_a_clear(root: bytes | None) -> None:
    """A clear also drops frames whose append has just failed."""

    async def work() -> None:
        rig = Rig(failing_writes=1)
        writing = asyncio.ensure_future(rig.ledger.run())
        rig.ledger.stored(np.array([3]))
        loop = asyncio.get_running_loop()
        # The append is still in its thread: the loop does not know the result.
        rig.on_failure = lambda: loop.call_soon(rig.ledger.clear, root)
        await asyncio.sleep(1)
        assert rig.rows() == []
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        rig.ledger.close()
        assert rig.rows() == []

    run_virtual(work())


def test_what_a_full_journal_kept_comes_before_what_is_noted_next() -> None:
    """Frames that failed, however often, are written before later ones; `written` raises."""

    async def work() -> None:
        rig = Rig(failing_writes=3)
        writing = asyncio.ensure_future(rig.ledger.run())
        rig.ledger.stored(np.array([1, 2]))
        await asyncio.sleep(0.1)
        with pytest.raises(StorageError):
            await rig.ledger.flush()
        rig.ledger.erased(np.array([2]))
        with pytest.raises(StorageError):
            await rig.ledger.written()
        rig.ledger.stored(np.array([5]))
        await rig.ledger.flush()
        assert rig.rows() == [1, 5]
        rig.ledger.erased(np.array([1]))
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        rig.ledger.close()
        assert rig.rows() == [5]

    run_virtual(work())


def test_a_write_that_nobody_waits_for_any_more_is_made_once() -> None:
    """A write that is under way when the loop stops is made exactly once."""

    async def work() -> None:
        rig = Rig(failing_writes=0)
        writing = asyncio.ensure_future(rig.ledger.run())
        rig.ledger.stored(np.array([4]))
        await asyncio.sleep(DELAY_S * 1.5)  # gathered, given to the thread, not written
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        rig.ledger.close()
        assert rig.rows() == [4]
        assert rig.files.open_files == 0

    run_virtual(work())


def test_a_flush_does_not_wait_for_more_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush is written at once, without the pause in which other changes gather."""
    monkeypatch.setattr(ledger_module, "GATHER_S", 60.0)

    async def work() -> None:
        rig = Rig(failing_writes=0)
        writing = asyncio.ensure_future(rig.ledger.run())
        await rig.ledger.flush()
        assert asyncio.get_running_loop().time() < 1.0, "of virtual time"
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        rig.ledger.close()

    run_virtual(work())


def test_a_journal_cut_short_or_not_is_whole_again() -> None:
    """A torn frame is cut off before the next frame is written; until then appends fail."""
    files = LossyFiles(FaultPlan(0))
    one = Journal(Path("fake"), files)
    write, cut, fails = files.write, files.cut, [True]

    def torn(fd: int, data: memoryview) -> int:
        if fails[0]:
            write(fd, data[:3])
            raise OSError(28, "full")
        return write(fd, data)

    def stuck(fd: int, size: int) -> None:
        if fails[0]:
            raise OSError(5, "no")
        cut(fd, size)

    vars(files).update(write=torn, cut=stuck)
    for _ in range(2):
        with pytest.raises(StorageError):
            one.append(b"frame")
    fails[0] = False
    one.append(b"good")
    assert bytes(files._names["journal.flexkv"].content) == b"good"
    one.close()


def test_a_name_that_could_not_be_synced_is_not_believed_by_a_later_sync() -> None:
    """A journal whose name was not synced must be written anew before a sync succeeds."""
    files = LossyFiles(FaultPlan(0))
    one = Journal(Path("fake"), files)
    one.begin_new()
    one.append_new(b"new")
    sync_folder = files.sync_folder

    def refused(folder: Path) -> None:
        files._dirty_names = dict(files._durable_names)
        raise OSError(5, "no")

    vars(files)["sync_folder"] = refused
    one.take_new()
    vars(files)["sync_folder"] = sync_folder
    for _ in range(2):
        with pytest.raises(StorageError):
            one.sync()
    one.begin_new()
    one.append_new(b"newer")
    one.take_new()
    one.sync()
    assert files._durable_names["journal.flexkv"].durable == b"newer"
    one.close()
    assert files.open_files == 0


@pytest.mark.parametrize("fails", ["file", "folder"])
def test_what_a_failed_sync_lost_is_written_anew_before_a_flush_succeeds(fails: str) -> None:
    """After a failed sync, the next successful flush has everything on stable storage.

    The flush whose sync fails raises. The journal is written anew, and a loss of power takes
    nothing.
    """

    async def work() -> None:
        rig = Rig(failing_writes=0)
        writing = asyncio.ensure_future(rig.ledger.run())
        rig.ledger.stored(np.array([1, 2]))
        await rig.ledger.flush()
        rig.ledger.stored(np.array([3]))
        await asyncio.sleep(0.1)
        faults = rig.files._faults
        faults.failure_probability = 1.0
        with pytest.raises(StorageError):
            await rig.ledger.flush()
        if fails == "folder":  # the journal is written anew, but its name is not synced
            sync_folder = rig.files.sync_folder
            vars(rig.files)["sync_folder"] = lambda folder: _refuse(rig.files)
            faults.failure_probability = 0.0
            with pytest.raises(StorageError):
                await rig.ledger.flush()
            vars(rig.files)["sync_folder"] = sync_folder
        faults.failure_probability = 0.0
        await rig.ledger.flush()
        for seed in range(20):
            left = rig.files.remains(Random(seed), power_loss=True)
            again = Journal(Path("fake"), LossyFiles(FaultPlan(0), left))
            assert sorted(again.live.rows.tolist()) == [1, 2, 3]
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        rig.ledger.close()
        assert rig.files.open_files == 0

    run_virtual(work())


def _refuse(files: LossyFiles) -> None:
    files._dirty_names = dict(files._durable_names)
    raise OSError(5, "no")


def test_blocks_that_a_failed_sync_may_have_lost_are_unsaid() -> None:
    """A failed sync erases the blocks stored since the last good sync or during it, no others."""

    async def work() -> None:
        rig = Rig(failing_writes=0)
        ledger = rig.ledger
        writing = asyncio.ensure_future(ledger.run())
        ledger.stored(np.array([1]))
        assert ledger.begin_sync().tolist() == [1]
        ledger.stored(np.array([2, 3, 4]))
        unsynced = ledger.begin_sync()
        ledger.erased(np.array([3]))
        ledger.stored(np.array([5]))
        assert ledger.sync_failed(unsynced).tolist() == [2, 4, 5]
        await ledger.written()
        assert rig.rows() == [1]
        assert ledger.begin_sync().tolist() == []
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        ledger.close()

    run_virtual(work())


def test_nothing_is_believed_behind_a_clear() -> None:
    """After a clear no earlier block is believed, or counted by the next sync."""

    async def work() -> None:
        ledger = Rig(failing_writes=0).ledger
        ledger.stored(np.array([1, 2]))
        assert ledger.journaled(0, BLOCKS).tolist() == [1, 2]
        ledger.clear(None)
        assert ledger.journaled(0, BLOCKS).tolist() == []
        ledger.stored(np.array([3]))
        assert ledger.begin_sync().tolist() == [3]
        ledger.close()

    run_virtual(work())


def test_who_waits_for_an_erasure_that_is_being_written_is_told() -> None:
    """A waiter for an erasure that is being written is notified, even if nothing else follows."""

    async def work() -> None:
        ledger, told = Rig(failing_writes=0).ledger, []
        writing = asyncio.ensure_future(ledger.run())
        ledger.stored(np.array([1]))
        await ledger.written()
        ledger.erased(np.array([1]))
        await asyncio.sleep(DELAY_S * 1.5)  # gathered, given to the thread, not written
        assert not ledger.forget(np.array([1]), lambda: told.append("written"))
        await asyncio.sleep(1.0)  # in virtual time
        assert told == ["written"]
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        ledger.close()

    run_virtual(work())


def test_a_journal_is_written_anew_once_it_is_four_times_what_it_says() -> None:
    """A journal is written anew at four times its live content, also when that is empty."""

    async def work() -> None:
        rig = Rig(failing_writes=0)
        rig.ledger.journal_bytes_min = 1
        writing = asyncio.ensure_future(rig.ledger.run())
        sizes = []
        for _ in range(12):
            rig.ledger.stored(np.arange(BLOCKS))
            await rig.ledger.flush()
            sizes.append(rig.journal.bytes)
        assert sizes[:3] == [sizes[0], 2 * sizes[0], 3 * sizes[0]]
        assert max(sizes) <= 5 * sizes[0]
        assert sizes[-1] < 4 * sizes[0]
        assert rig.rows() == list(range(BLOCKS))
        rig.ledger.erased(np.arange(BLOCKS))
        await rig.ledger.flush()
        await rig.ledger.flush()
        assert rig.journal.bytes == 0
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        rig.ledger.close()

    run_virtual(work())


def test_a_closed_ledger_promises_nothing() -> None:
    """Waiting on a closed ledger raises ClosedError at once."""

    async def work() -> None:
        rig = Rig(failing_writes=0)
        rig.ledger.close()
        for wait in (rig.ledger.flush, rig.ledger.written):
            with pytest.raises(ClosedError):
                await wait()

    run_virtual(work())


def test_what_a_journal_said_is_let_go_once_it_is_restored() -> None:
    """The rows that a journal named take no memory after the index was filled with them."""

    async def work() -> None:
        rig = Rig(failing_writes=0)
        rig.ledger.stored(np.arange(BLOCKS))
        rig.ledger.close()
        contents = {name: bytes(file.content) for name, file in rig.files._names.items()}
        again = Journal(Path("fake"), LossyFiles(FaultPlan(0), contents))
        assert len(again.live.rows) == BLOCKS
        sums = np.zeros(BLOCKS, np.uint64)
        ledger = Ledger([again], BLOCKS, sums, lambda _: VirtualThread(lambda: DELAY_S))
        ledger.restore(Index())  # type: ignore[arg-type]
        assert ledger.journaled(0, BLOCKS).tolist() == list(range(BLOCKS))
        assert len(again.live.rows) == 0
        ledger.close()

    run_virtual(work())
