"""What of the SSD tier outlives the process: the journals' writer, and how a tier comes back.

The index is the truth while the engine runs; the ledger follows it. What was stored is noted when
its transfer ends, and reaches the journals a moment later, many blocks at once; nobody waits for
that but `flush`, and the write that is about to replace blocks in which a later run would believe.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import structlog
from numpy.typing import NDArray

from flexkv.actors.actor import Bell
from flexkv.common.errors import ClosedError, StorageError
from flexkv.common.terms import BlockIds, Tier
from flexkv.index.forest import forest
from flexkv.index.residency import Residency
from flexkv.io import journal
from flexkv.io.journal import RECORD_BYTES, Journal
from flexkv.io.sums import Sums

log = structlog.get_logger(__name__)

GATHER_S = 0.01
"""How long notes are gathered before they are written."""
KEPT_BYTES_MAX = 16 << 20
"""What is kept for a journal that takes no more at the moment; with more it is emptied."""
SCAN_BLOCKS = 1 << 16
"""Rows that are looked at in one go for blocks to check."""


def _thread(name: str) -> Executor:
    return ThreadPoolExecutor(1, thread_name_prefix=name)


class Ledger:
    """Notes what the SSD tier holds, in one journal for each directory.

    Block i of the tier is row i // n of directory i % n.

    Attributes:
        journal_bytes_min: a journal smaller than this is not written anew.
        snapshot_blocks: noted anew in one step, while a journal is written anew.
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
            num_blocks: of the tier.
            sums: uint64[num_blocks], that the port keeps.
            thread: gives a thread of that name, on which calls that block are made in turn.
        """
        self._journals = tuple(journals)
        self._sums = sums
        self._believed = np.zeros(num_blocks, np.bool_)
        self._unwritten = np.zeros(num_blocks, np.bool_)
        """Erased, and the journal does not say so yet."""
        self._erased: list[BlockIds] = []
        self._live = np.zeros(len(journals), np.int64)
        """How many blocks of each journal are believed in."""
        self._frames: list[list[bytes]] = [[] for _ in journals]
        self._kept = [b"" for _ in journals]
        """What journals did not take, in front of what is noted next; the thread's."""
        self._after: list[Callable[[], None]] = []
        self._flushes: list[asyncio.Future[None]] = []
        self._snapshot: list[int | None] = [None] * len(self._journals)
        self._bell = Bell()
        self._sequence = 0
        self._thread = thread("flexkv-journal")
        # A thread of its own: nobody who only writes waits for a device that syncs.
        self._syncing = thread("flexkv-journal-sync")
        self._residency: Residency | None = None
        self._closed = False
        self._told = False

    # -- coming back ----------------------------------------------------------------------------

    def restore(self, residency: Residency) -> int:
        """Fill the SSD tier of an empty index with what the journals say; gives how many blocks."""
        self._residency = residency
        count = len(self._journals)
        lives = self._lives()
        block_ids = np.concatenate([live.rows * count + n for n, live in enumerate(lives)])
        # In the order in which they were stored: of blocks that are there twice the last counts.
        sequences = np.concatenate([live.sequences for live in lives])
        self._sequence = int(sequences.max(initial=0)) + 1
        order = np.argsort(sequences, kind="stable")
        block_ids = block_ids[order]
        sums = np.concatenate([live.sums for live in lives])[order]
        blocks = np.concatenate([live.blocks for live in lives])[order]
        fits = block_ids < len(self._believed)
        self._unsay_what_does_not_fit()
        block_ids, sums, blocks = block_ids[fits], sums[fits], blocks[fits]
        # Whatever a journal says of a row has to be unsaid before the row is written.
        self._believed[block_ids] = True
        self._live += np.bincount(block_ids % count, minlength=count)
        self._sums[block_ids] = sums
        reached = forest(blocks)
        residency.restore(
            Tier.DISK, blocks[reached.order], reached.parents, block_ids[reached.order]
        )
        for each in self._journals:
            each.forget_live()
        return len(reached.order)

    def _unsay_what_does_not_fit(self) -> None:
        """Let a tier that is larger again not believe in rows that this one has cut off."""
        count = len(self._journals)
        for number, live in enumerate(self._lives()):
            beyond = live.rows[live.rows * count + number >= len(self._believed)]
            if len(beyond):
                self._frames[number].append(journal.erased(beyond))
                self._bell.ring()

    def _lives(self) -> list[journal.Live]:
        return [each.live for each in self._journals]

    def believed(self, first: int, count: int) -> BlockIds:
        """Give the next blocks from `first` on, round the end, that a later run would believe in.

        Few, or none, where few are within the blocks that are looked at.
        """
        places = (first + np.arange(min(SCAN_BLOCKS, len(self._believed)))) % len(self._believed)
        return places[self._believed[places]][:count]

    def believes(self, block_ids: BlockIds) -> NDArray[np.bool_]:
        """Tell of which blocks a later run would believe that they are there."""
        return self._believed[block_ids]

    # -- notes ----------------------------------------------------------------------------------

    def stored(self, block_ids: BlockIds) -> None:
        """Note that blocks are READY; those that are not any more are left out."""
        for number, (rows, ids) in enumerate(self._by_journal(block_ids)):
            if frames := self._stored_frames(rows, ids):
                self._frames[number].append(frames)
                self._bell.ring()

    def _stored_frames(self, rows: NDArray[np.int64], ids: BlockIds) -> bytes:
        if not len(ids) or self._residency is None:
            return b""
        blocks = self._residency.export(Tier.DISK, ids)
        there = blocks.any(axis=1)
        if not there.any():
            return b""
        fresh = ids[there][~self._believed[ids[there]]]
        self._believed[fresh] = True
        self._live += np.bincount(fresh % len(self._live), minlength=len(self._live))
        self._sequence += 1
        return journal.stored(rows[there], self._sums[ids[there]], blocks[there], self._sequence)

    def erased(self, block_ids: BlockIds) -> None:
        """Note that blocks are gone, those that anybody would believe in."""
        believed = block_ids[self._believed[block_ids]]
        self._believed[believed] = False
        if not len(believed):
            return
        self._unwritten[believed] = True
        self._erased.append(believed)
        self._live -= np.bincount(believed % len(self._live), minlength=len(self._live))
        for number, (rows, _) in enumerate(self._by_journal(believed)):
            if len(rows):
                self._frames[number].append(journal.erased(rows))
                self._bell.ring()

    def clear(self, root: bytes | None) -> None:
        """Let no later run find any block, or any of a namespace that is about to be cleared.

        Blocks, for as long as a file is cut or written to.

        Raises:
            StorageError: a journal could not be told.
        """
        if root is not None:
            assert self._residency is not None
            for tier, block_ids in self._residency.namespace_holdings(root):
                if tier is Tier.DISK:
                    self.erased(block_ids)
            self._forget_evicted(self._residency)
            self.write_now()
            return
        self._believed[:] = False
        self._live[:] = 0
        self._frames = [[] for _ in self._journals]
        failures = self._thread.submit(self._each, self._clear).result()
        if failures:
            raise failures[0]

    def _forget_evicted(self, residency: Residency) -> None:
        """Unsay what is not READY any more, though its bytes, of any namespace, may be there."""
        believed = np.flatnonzero(self._believed)
        for at in range(0, len(believed), self.snapshot_blocks):
            block_ids = believed[at : at + self.snapshot_blocks]
            there = residency.export(Tier.DISK, block_ids).any(axis=1)
            self.erased(block_ids[~there])

    def write_now(self) -> None:
        """Return once all that was noted is in the journals: a crash brings nothing of it back.

        Blocks, for as long as a write to a file takes. What a device has not got yet, a loss of
        power may bring back.

        Raises:
            StorageError: a journal takes no more; it is tried again with what is noted next.
        """
        self._told_failures(self._thread.submit(self._append, self._take_frames()).result())

    def _take_frames(self) -> list[bytes]:
        """Give what is to be written, and note that it is: writes come in this order."""
        frames = [b"".join(of_one) for of_one in self._frames]
        self._frames = [[] for _ in self._journals]
        return frames

    def _each(self, work: Callable[[Journal], None]) -> list[StorageError]:
        """Do something with every journal, and give what failed."""
        failures = []
        for each in self._journals:
            try:
                work(each)
            except StorageError as failure:
                failures.append(failure)
        return failures

    def _append(self, frames: Sequence[bytes]) -> dict[int, StorageError]:
        """Write, on the thread, what was kept and what was noted; keep what is not taken.

        Gives what failed, by journal.
        """
        failures = {}
        for number, of_one in enumerate(frames):
            if not (wanted := self._kept[number] + of_one):
                continue
            self._kept[number] = b""
            try:
                self._journals[number].append(wanted)
            except StorageError as failure:
                failures[number] = failure
                self._kept[number] = wanted
        return failures

    def _clear(self, each: Journal) -> None:
        self._kept[self._journals.index(each)] = b""
        each.clear()

    def _told_failures(self, failures: Mapping[int, StorageError]) -> None:
        """Empty the journals that have kept too much, and tell of what failed.

        Raises:
            StorageError: something could not be written.
        """
        for number in failures:
            if len(self._kept[number]) > KEPT_BYTES_MAX:
                self._believed[number :: len(self._journals)] = False
                self._live[number] = 0
                self._thread.submit(self._clear, self._journals[number])
        if not failures:
            self._told = False
            return
        failure = next(iter(failures.values()))
        if not self._told:
            log.error("journal_failed", path=failure.path, error=str(failure))
        self._told = True
        raise failure

    def forget(self, disk_ids: BlockIds, then: Callable[[], None]) -> bool:
        """Unsay what the journals say of places that are about to be written.

        Tells whether nothing is said; else `then` is called once it is unsaid.
        """
        self.erased(disk_ids)
        if not self._unwritten[disk_ids].any():
            return True
        self._after.append(then)
        self._bell.ring()
        return False

    def _by_journal(self, block_ids: BlockIds) -> list[tuple[NDArray[np.int64], BlockIds]]:
        """Give each journal's rows among some blocks, and these blocks."""
        count = len(self._journals)
        if count == 1:
            return [(block_ids, block_ids)]
        rows, directory = np.divmod(block_ids, count)
        return [(rows[directory == n], block_ids[directory == n]) for n in range(count)]

    # -- writing --------------------------------------------------------------------------------

    async def run(self) -> None:
        """Write notes until cancelled."""
        while True:
            await self._bell.wait()
            if not self._flushes and not self._after:
                await asyncio.sleep(GATHER_S)
            await self._write()

    async def _write(self) -> None:
        """Write what is noted by now, and tell who waits for it."""
        loop = asyncio.get_running_loop()
        frames, erased = self._take_frames(), self._erased
        self._erased = []
        after, self._after = self._after, []
        flushes, self._flushes = self._flushes, []
        error: Exception = ClosedError("the engine was closed before the flush was done")
        try:
            appended, ended = self._thread.submit(self._append, frames), loop.create_future()
            appended.add_done_callback(lambda _: loop.call_soon_threadsafe(_settle, ended, None))
            await ended  # whoever stops waiting for it: it is written in its turn, and once
            failures = appended.result()
            for block_ids in erased:
                self._unwritten[block_ids] = False
            for then in after:
                then()  # the checksums stand where the journal does not
            self._told_failures(failures)
            for flush in flushes:
                _settle(flush, None)
            await self._renew()
        except StorageError as failure:
            error = failure
        finally:
            for flush in flushes:
                _settle(flush, error)

    async def _sync(self) -> None:
        loop = asyncio.get_running_loop()
        failures = await loop.run_in_executor(self._syncing, self._each, Journal.sync)
        if failures:
            raise failures[0]

    async def _renew(self) -> None:
        """Go on writing anew the journals that have grown: a step of each."""
        loop = asyncio.get_running_loop()
        count = len(self._journals)
        for number, each in enumerate(self._journals):
            at = self._snapshot[number]
            if at is None:
                live_bytes = int(self._live[number]) * (RECORD_BYTES + 12)
                if each.bytes < max(self.journal_bytes_min, 4 * live_bytes):
                    continue
                await loop.run_in_executor(self._thread, each.begin_new)
                at = 0
            if not each.has_new:  # the directory takes none, or not so much
                self._snapshot[number] = None
                continue
            ids = np.arange(at, min(at + self.snapshot_blocks * count, len(self._believed)))
            ids = ids[(ids % count == number) & self._believed[ids]]
            frames = self._stored_frames(ids // count, ids)
            if frames:
                await loop.run_in_executor(self._thread, each.append_new, frames)
            at += self.snapshot_blocks * count
            if at >= len(self._believed):
                await loop.run_in_executor(self._thread, each.take_new)
                self._snapshot[number] = None
            else:
                self._snapshot[number] = at
                self._bell.ring()

    async def flush(self) -> None:
        """Return once all that was noted is on stable storage.

        Raises:
            StorageError: a journal takes no more, or its device refused.
            ClosedError: the engine was closed meanwhile.
        """
        self._check_open()
        written = asyncio.get_running_loop().create_future()
        self._flushes.append(written)
        self._bell.ring()
        await written
        self._check_open()
        await self._sync()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the engine was closed before the flush was done")

    def close(self) -> None:
        """Write what is noted, without waiting for the device, and close. Idempotent."""
        if self._closed:
            return
        self._closed = True
        with suppress(StorageError):  # told when it was noted
            self.write_now()
        self._thread.shutdown()
        self._syncing.shutdown(wait=False, cancel_futures=True)
        for flush in self._flushes:
            _settle(flush, ClosedError("the engine was closed before the flush was done"))
        for each in self._journals:
            each.close()


def _settle(flush: asyncio.Future[None], error: Exception | None) -> None:
    if flush.done():
        return
    if error is None:
        flush.set_result(None)
    else:
        flush.set_exception(error)
