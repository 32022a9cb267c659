"""Writes the journals of the SSD tier, and restores the tier from them.

While the engine runs, the index is the truth and the ledger follows it. A block is noted when its
transfer ends, and reaches a journal a moment later, together with others. Only `flush`, a durable
clear, and a write that is about to replace blocks in which a later run would believe wait for that.
A run *believes* in a block if a journal says that the block is there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from errno import EIO, ENOSPC
from typing import ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from flexkv.actors.supervisor import Bell
from flexkv.common.errors import ClosedError, StorageError
from flexkv.common.terms import BlockIds, Tier
from flexkv.index.forest import forest
from flexkv.index.residency import Residency
from flexkv.io.ports import Sums
from flexkv.io.ssd import journal
from flexkv.io.ssd.files import Missing
from flexkv.io.ssd.journal import RECORD_BYTES, Journal
from flexkv.io.ssd.journals import Journals
from flexkv.observe.logs import get_logger
from flexkv.process.stoppable import failure_within
from flexkv.process.workers import Workers

log = get_logger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

GATHER_S = 0.01
"""How long notes are gathered before they are written."""
FINISH_S, CLOSE_S = 5.0, 1.0
"""How long `finish` waits for the journals, and how long `close` blocks for their thread."""
SCAN_BLOCKS = 1 << 16
"""Places that are searched in one step for blocks to check."""


def _thread(name: str) -> Executor:
    return Workers(1, name)


class Ledger:
    """Records what the SSD tier holds, in one journal for each directory.

    With n directories, block i of the tier is row i // n of directory i % n.

    Attributes:
        journal_bytes_min: a journal smaller than this is not written anew.
        snapshot_blocks: blocks that are recorded in one step while a journal is written anew.
    """

    journal_bytes_min = 8 << 20
    snapshot_blocks = 8192

    def __init__(
        self,
        journals: Sequence[Journal],
        num_blocks: int,
        sums: Sums,
        thread: Callable[[str], Executor] = _thread,
    ) -> None:
        """Take open journals, which the ledger closes.

        Args:
            journals: one for each directory.
            num_blocks: the number of blocks of the tier.
            sums: uint64[num_blocks], which the tier's actor keeps.
            thread: returns an executor of one thread with the given name, for calls that block.
        """
        self._journals = Journals(journals)
        self._sums = sums
        self._journaled = np.zeros(num_blocks, np.bool_)
        self._groups = np.zeros(num_blocks, np.uint8)
        """The KV group of each block that a journal names."""
        self._unsynced = np.zeros(num_blocks, np.bool_)
        """Blocks stored since the last sync of the disk that the journals name."""
        self._unwritten = np.zeros(num_blocks, np.bool_)
        """Blocks that were erased, while the journal does not say so yet."""
        self._erased: list[BlockIds] = []
        self._emptied: set[int] = set()
        """Journals that were emptied since they refused too much; they lack blocks of the tier."""
        self._clears = self._is_missed = False
        """Whether the next write empties the journals, and calls `note_missed` before."""
        self.note_missed: Callable[[], None] | None = None
        """Records that an unused directory misses a clear; None if all are used. It may block."""
        self._forgets_evicted = False
        self._live = np.zeros(len(journals), np.int64)
        """The number of believed blocks of each journal."""
        self._frames: list[list[bytes]] = [[] for _ in journals]
        self._after: list[Callable[[], None]] = []
        self._flushes: list[asyncio.Future[None]] = []
        self._snapshot: list[int | None] = [None] * len(journals)
        self._renewals: list[asyncio.Future[None]] = []
        """Callers that wait until suspect journals are written anew."""
        self._bell = Bell()
        self._sequence = 0
        self._thread = thread("flexkv-journal")
        # A thread of its own, so that a write never waits for a sync.
        self._syncing = thread("flexkv-journal-sync")
        self._residency: Residency | None = None
        self._closed = False
        self._is_told = False

    # -- coming back ----------------------------------------------------------------------------

    def restore(self, residency: Residency) -> int:
        """Fill the SSD tier of an empty index from the journals; return the number of blocks."""
        self._residency = residency
        count = len(self._journals)
        lives = self._journals.lives()
        block_ids = np.concatenate([live.rows * count + n for n, live in enumerate(lives)])
        # In the order of storing: if a block is there twice, the last one counts.
        sequences = np.concatenate([live.sequences for live in lives])
        self._sequence = int(sequences.max(initial=self._sequence))
        order = np.argsort(sequences, kind="stable")
        block_ids = block_ids[order]
        sums = np.concatenate([live.sums for live in lives])[order]
        blocks = np.concatenate([live.blocks for live in lives])[order]
        fits = block_ids < len(self._journaled)
        self._unsay_what_does_not_fit()
        block_ids, sums, blocks = block_ids[fits], sums[fits], blocks[fits]
        # Whatever a journal says of a row must be erased there before the row is written.
        self._journaled[block_ids] = True
        self._live += np.bincount(block_ids % count, minlength=count)
        self._sums[block_ids], self._groups[block_ids] = sums, journal.groups_of(blocks)
        reached = forest(blocks, residency.groups)
        residency.restore(
            Tier.DISK, blocks[reached.order], reached.parents, block_ids[reached.order]
        )
        self._journals.forget_lives()
        return len(reached.order)

    def _unsay_what_does_not_fit(self) -> None:
        """Erase rows beyond the tier's end from the journals, so that no larger tier uses them."""
        count = len(self._journals)
        for number, live in enumerate(self._journals.lives()):
            beyond = live.rows[live.rows * count + number >= len(self._journaled)]
            if len(beyond):
                self._frames[number].append(journal.erased(beyond))
                self._bell.ring()

    def journaled(self, first: int, count: int) -> BlockIds:
        """Return up to `count` blocks in which a later run would believe.

        Only `SCAN_BLOCKS` places are searched, from `first` on and round the end, so the result may
        be short or empty.
        """
        places = (first + np.arange(min(SCAN_BLOCKS, len(self._journaled)))) % len(self._journaled)
        return places[self._journaled[places]][:count]

    def are_journaled(self, block_ids: BlockIds) -> NDArray[np.bool_]:
        """Return in which blocks a later run would believe: bool[n]."""
        return self._journaled[block_ids]

    def groups_of(self, block_ids: BlockIds) -> NDArray[np.uint8]:
        """Return the KV groups, uint8[n], of blocks that a journal names."""
        return self._groups[block_ids]

    # -- notes ----------------------------------------------------------------------------------

    def stored(self, block_ids: BlockIds) -> None:
        """Record that blocks are READY, except for those that no longer are."""
        for number, (rows, ids) in enumerate(self._by_journal(block_ids)):
            if frames := self._stored_frames(rows, ids):
                self._frames[number].append(frames)
                self._bell.ring()
        self._unsynced[block_ids] = self._journaled[block_ids]

    def _stored_frames(self, rows: NDArray[np.int64], ids: BlockIds) -> bytes:
        if not len(ids) or self._residency is None:
            return b""
        blocks = self._residency.export(Tier.DISK, ids)
        there = blocks.any(axis=1)
        if not there.any():
            return b""
        fresh = ids[there][~self._journaled[ids[there]]]
        self._journaled[fresh] = True
        self._groups[ids[there]] = journal.groups_of(blocks[there])
        self._live += np.bincount(fresh % len(self._live), minlength=len(self._live))
        self._sequence += 1
        return journal.stored(rows[there], self._sums[ids[there]], blocks[there], self._sequence)

    def erased(self, block_ids: BlockIds) -> None:
        """Record that blocks are gone, as far as a later run would believe in them."""
        journaled = block_ids[self._journaled[block_ids]]
        self._journaled[journaled] = self._unsynced[journaled] = False
        if not len(journaled):
            return
        self._unwritten[journaled] = True
        self._erased.append(journaled)
        self._live -= np.bincount(journaled % len(self._live), minlength=len(self._live))
        for number, (rows, _) in enumerate(self._by_journal(journaled)):
            if len(rows):
                self._frames[number].append(journal.erased(rows))
                self._bell.ring()

    def clear(self, root: bytes | None) -> None:
        """Remove all blocks, or those of a namespace about to be cleared, from the journals.

        The journals are written in the background; `written` returns once they are. Until then a
        crash may bring blocks back.
        """
        self._bell.ring()
        self._is_missed = self.note_missed is not None
        if root is not None:
            assert self._residency is not None
            for tier, block_ids in self._residency.namespace_holdings(root):
                if tier is Tier.DISK:
                    self.erased(block_ids)
            self._forgets_evicted = True
            return
        journaled = np.flatnonzero(self._journaled)
        self._erased.append(journaled)
        self._unwritten[journaled] = True
        self._journaled[:] = self._unsynced[:] = False
        self._live[:] = 0
        self._frames = [[] for _ in self._journals.each]
        self._clears = True

    async def _forget_evicted(self) -> None:
        """Erase blocks of any namespace that are not READY any more, but may still be on disk."""
        assert self._residency is not None
        journaled = np.flatnonzero(self._journaled)
        for at in range(0, len(journaled), self.snapshot_blocks):
            block_ids = journaled[at : at + self.snapshot_blocks]
            there = self._residency.export(Tier.DISK, block_ids).any(axis=1)
            self.erased(block_ids[~there])
            await asyncio.sleep(0)

    def _take_frames(self) -> list[bytes]:
        """Return the frames to write, and count them as written: writes come in this order."""
        frames = [b"".join(of_one) for of_one in self._frames]
        self._frames = [[] for _ in self._journals.each]
        return frames

    def _told(self, failures: Mapping[int, StorageError]) -> StorageError | None:
        """Empty journals that refused too much, log a new failure, and return the first failure."""
        for number in failures:
            if self._journals.has_kept_too_much(number):
                self._journaled[number :: len(self._journals)] = False
                self._live[number] = 0
                self._emptied.add(number)
                self._thread.submit(self._journals.empty, number)
        failure = next(iter(failures.values()), None)
        if failure is not None and not self._is_told:
            log.error("journal_failed", path=failure.path, error=str(failure))
        self._is_told = failure is not None
        return failure

    def forget(self, disk_ids: BlockIds, then: Callable[[], None]) -> bool:
        """Erase from the journals what they say of places that are about to be written.

        Returns:
            Whether they say nothing already; if not, `then` is called once they say nothing.
        """
        self.erased(disk_ids)
        if not self._unwritten[disk_ids].any():
            return True
        self._after.append(then)
        self._bell.ring()
        return False

    def _by_journal(self, block_ids: BlockIds) -> list[tuple[NDArray[np.int64], BlockIds]]:
        """Return, for each journal, the rows of its blocks, and these blocks."""
        count = len(self._journals)
        if count == 1:
            return [(block_ids, block_ids)]
        rows, directory = np.divmod(block_ids, count)
        return [(rows[directory == n], block_ids[directory == n]) for n in range(count)]

    # -- writing --------------------------------------------------------------------------------

    async def run(self) -> None:
        """Write the journals until cancelled."""
        while True:
            await self._bell.wait()
            if not self._flushes and not self._after and not self._renewals:
                await asyncio.sleep(GATHER_S)
            await self._write()

    async def _write(self) -> None:
        """Write everything noted by now, and wake those who wait for it."""
        if self._forgets_evicted:
            self._forgets_evicted = False
            await self._forget_evicted()
        frames, erased, clears = self._take_frames(), self._erased, self._clears
        self._erased, self._clears = [], False
        after, self._after = self._after, []
        flushes, self._flushes = self._flushes, []
        error: Exception | None = ClosedError("the engine was closed before the flush was done")
        try:
            missed = await self._on_thread(self._note_missed) if self._is_missed else None
            failures = await self._on_thread(self._journals.append, frames, clears)
            for block_ids in erased:
                self._unwritten[block_ids] = False
            for then in after:
                then()  # even after a failure: checksums then tell that blocks were replaced
            error = self._told(failures) or missed
        finally:
            for flush in flushes:
                _settle(flush, error)
        await self._renew()

    def _note_missed(self) -> StorageError | None:
        """Record a clear that an absent directory misses; return the error if that fails."""
        if not self._is_missed or self.note_missed is None:
            return None
        try:
            self.note_missed()
        except OSError as error:
            return StorageError(str(self._journals.each[0].path), 0, error.errno or EIO)
        self._is_missed = False
        return None

    async def _on_thread(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return the result of a call that is made on the thread of the journals.

        Cancellation: the wait ends; the call is still made in its turn, once.
        """
        loop = asyncio.get_running_loop()
        made, ended = self._thread.submit(call, *args, **kwargs), loop.create_future()
        made.add_done_callback(lambda _: loop.call_soon_threadsafe(_settle, ended, None))
        await ended
        return made.result()

    async def _renew(self) -> None:
        """Take one more step in writing anew each journal that has grown or is suspect."""
        error: StorageError | None = None
        for number, each in enumerate(self._journals.each):
            at = self._snapshot[number]
            if at is None:
                live_bytes = int(self._live[number]) * (RECORD_BYTES + 12)
                has_grown = each.bytes >= max(self.journal_bytes_min, 4 * live_bytes)
                if not has_grown and not (each.is_suspect and self._renewals):
                    continue
                await self._on_thread(each.begin_new)
                at = 0
            self._snapshot[number] = await self._renew_step(number, at)
            if each.is_suspect and self._snapshot[number] is None:
                error = StorageError(str(each.path), 0, EIO)
        if self._renewals and all(at is None for at in self._snapshot):
            renewals, self._renewals = self._renewals, []
            for renewal in renewals:
                _settle(renewal, error)

    async def _renew_step(self, number: int, at: int) -> int | None:
        """Write the blocks from `at` on to a new journal; return where to continue, or None."""
        each, count = self._journals.each[number], len(self._journals)
        if not each.has_new:  # the directory takes no new journal
            return None
        ids = np.arange(at, min(at + self.snapshot_blocks * count, len(self._journaled)))
        ids = ids[(ids % count == number) & self._journaled[ids]]
        if frames := self._stored_frames(ids // count, ids):
            await self._on_thread(each.append_new, frames)
        at += self.snapshot_blocks * count
        if at < len(self._journaled):
            self._bell.ring()
            return at
        await self._on_thread(each.take_new)
        return None

    # -- stable storage -------------------------------------------------------------------------

    async def written(self) -> None:
        """Return once all that was noted is in the journals, so that no crash undoes it.

        A loss of power may still undo what the disk has not synced.

        Raises:
            StorageError: a journal could not be written; the next write tries again.
            ClosedError: the engine was closed meanwhile.
        """
        await self._noted(self._flushes)

    async def _noted(self, waiting: list[asyncio.Future[None]]) -> None:
        self._check_open()
        noted = asyncio.get_running_loop().create_future()
        waiting.append(noted)
        self._bell.ring()
        await noted
        self._check_open()

    async def flush(self) -> None:
        """Return once everything that was noted is on stable storage.

        Raises:
            StorageError: a journal could not be written or synced.
            ClosedError: the engine was closed meanwhile.
        """
        await self._note_anew()
        await self.written()
        for number in self._emptied:
            raise StorageError(str(self._journals.each[number].path), 0, ENOSPC)
        if any(each.is_suspect for each in self._journals.each):
            await self._noted(self._renewals)
        loop = asyncio.get_running_loop()
        failures = await loop.run_in_executor(self._syncing, self._journals.sync)
        if failures:
            raise next(iter(failures.values()))

    async def _note_anew(self) -> None:
        """Record again the blocks that emptied journals lack, since they may take them now."""
        count = len(self._journals)
        for number in list(self._emptied):
            self._emptied.discard(number)
            for at in range(number, len(self._journaled), self.snapshot_blocks * count):
                end = min(at + self.snapshot_blocks * count, len(self._journaled))
                ids = np.arange(at, end, count)
                self.stored(ids[~self._journaled[ids]])
                await asyncio.sleep(0)

    def begin_sync(self) -> BlockIds:
        """Return and reset the blocks stored since the last sync; call it right before a sync."""
        unsynced = np.flatnonzero(self._unsynced)
        self._unsynced[unsynced] = False
        return unsynced

    def sync_failed(self, unsynced: BlockIds) -> BlockIds:
        """Remove from the journals, and return, the blocks that a failed sync may have lost.

        They are the blocks that `begin_sync` returned and those stored since: the kernel counts
        what it could not write as written.
        """
        self._unsynced[unsynced] = True
        lost = np.flatnonzero(self._unsynced & self._journaled)
        self.erased(lost)
        self._unsynced[:] = False
        return lost

    async def missing(self) -> Missing | None:
        """Return the first journal that is not where it was opened; None if all are."""
        return await self._on_thread(self._journals.missing)

    # -- the end --------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the engine was closed before the flush was done")

    async def finish(self) -> None:
        """Write everything noted to the journals, within `FINISH_S`."""
        if reason := await failure_within(FINISH_S, self.written(), StorageError):
            log.warning("journal_not_finished", reason=reason)

    def close(self) -> None:
        """Close the journals; wait `CLOSE_S` at most for a thread that hangs. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for flush in (*self._flushes, *self._renewals):
            _settle(flush, ClosedError("the engine was closed before the flush was done"))
        self._syncing.shutdown(wait=False, cancel_futures=True)
        self._thread.submit(self._note_missed)
        self._thread.submit(self._journals.append, self._take_frames(), self._clears)
        # Queued behind the thread's current call, which uses the files.
        closing = self._thread.submit(self._journals.close)
        with suppress(TimeoutError):
            closing.result(CLOSE_S)
        self._thread.shutdown(wait=False)


def _settle(flush: asyncio.Future[None], error: Exception | None) -> None:
    if flush.done():
        return
    with suppress(RuntimeError):  # its loop may be closed, and then nobody waits there
        if error is None:
            flush.set_result(None)
        else:
            flush.set_exception(error)
