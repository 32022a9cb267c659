"""What of the SSD tier outlives the process: the journals' writer, and how a tier comes back.

The index is the truth while the engine runs; the ledger follows it. What was stored is noted when
its transfer ends, and reaches the journals a moment later, many blocks at once; nobody waits for
that but `flush`, and the write that is about to replace blocks in which a later run would believe.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import structlog
from numpy.typing import NDArray

from flexkv.actors.actor import Bell
from flexkv.common.errors import StorageError
from flexkv.common.terms import BlockIds, Tier
from flexkv.index.forest import forest
from flexkv.index.residency import Residency
from flexkv.io import journal
from flexkv.io.checked import Sums
from flexkv.io.journal import RECORD_BYTES, Journal

log = structlog.get_logger(__name__)

GATHER_S = 0.01
"""How long notes are gathered before they are written."""
SNAPSHOT_BLOCKS = 8192
"""Blocks noted anew in one step, while a journal is written anew."""
JOURNAL_BYTES_MIN = 8 << 20
"""A journal smaller than this is not written anew."""


class Ledger:
    """Notes what the SSD tier holds, in one journal for each directory.

    Block i of the tier is row i // n of directory i % n.
    """

    def __init__(self, journals: Sequence[Journal], num_blocks: int, sums: Sums) -> None:
        """Take open journals, which the ledger closes, and the sums that the port keeps."""
        self._journals = tuple(journals)
        self._sums = sums
        self._believed = np.zeros(num_blocks, np.bool_)
        self._unwritten = np.zeros(num_blocks, np.bool_)
        """Erased, and the journal does not say so yet."""
        self._erased: list[BlockIds] = []
        self._live = np.zeros(len(journals), np.int64)
        """How many blocks of each journal are believed in."""
        self._frames: list[list[bytes]] = [[] for _ in journals]
        self._after: list[Callable[[], None]] = []
        self._flushes: list[asyncio.Future[None]] = []
        self._snapshot: list[int | None] = [None] * len(self._journals)
        self._bell = Bell()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="flexkv-journal")
        self._residency: Residency | None = None
        self._closed = False
        self.failed: StorageError | None = None

    # -- coming back ----------------------------------------------------------------------------

    def restore(self, residency: Residency) -> int:
        """Fill the SSD tier of an empty index with what the journals say; gives how many blocks."""
        self._residency = residency
        count = len(self._journals)
        ids = [live.rows * count + n for n, live in enumerate(self._lives())]
        sums = np.concatenate([live.sums for live in self._lives()])
        blocks = np.concatenate([live.blocks for live in self._lives()])
        block_ids = np.concatenate(ids)
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
        return journal.stored(rows[there], self._sums[ids[there]], blocks[there])

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

    def cleared(self) -> None:
        """Note that all blocks are gone."""
        self._believed[:] = False
        self._live[:] = 0
        for frames in self._frames:
            frames.append(journal.cleared())

    def write_now(self) -> None:
        """Return once all that was noted is in the journals: a crash brings nothing of it back.

        Blocks. What a device has not got yet, a loss of power may bring back.
        """
        frames = self._take_frames()
        try:
            self._thread.submit(self._append, frames, False).result()
        except StorageError as failure:
            self._note_failure(failure)

    def _take_frames(self) -> list[bytes]:
        """Give what is to be written, and note that it is: writes come in this order."""
        frames = [b"".join(of_one) for of_one in self._frames]
        self._frames = [[] for _ in self._journals]
        return frames

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
        error: StorageError | None = None
        try:
            await loop.run_in_executor(self._thread, self._append, frames, bool(flushes))
            await self._renew()
        except StorageError as failure:
            error = failure
            self._note_failure(failure)
        for block_ids in erased:
            self._unwritten[block_ids] = False
        for then in after:
            then()  # the checksums stand where the journal does not
        for flush in flushes:
            if not flush.done():
                flush.set_exception(error) if error else flush.set_result(None)

    def _append(self, frames: Sequence[bytes], durable: bool) -> None:
        for each, of_one in zip(self._journals, frames, strict=True):
            if of_one:
                each.append(of_one)
            if durable:
                each.sync()

    def _note_failure(self, failure: StorageError) -> None:
        if self.failed is None:
            log.error("journal_failed", path=failure.path, error=str(failure))
        self.failed = failure

    async def _renew(self) -> None:
        """Go on writing anew the journals that have grown: a step of each."""
        loop = asyncio.get_running_loop()
        count = len(self._journals)
        for number, each in enumerate(self._journals):
            at = self._snapshot[number]
            if at is None:
                live_bytes = int(self._live[number]) * (RECORD_BYTES + 12)
                if each.bytes < max(JOURNAL_BYTES_MIN, 4 * live_bytes):
                    continue
                await loop.run_in_executor(self._thread, each.begin_new)
                at = 0
            ids = np.arange(at, min(at + SNAPSHOT_BLOCKS * count, len(self._believed)))
            ids = ids[(ids % count == number) & self._believed[ids]]
            frames = self._stored_frames(ids // count, ids)
            if frames:
                await loop.run_in_executor(self._thread, each.append_new, frames)
            at += SNAPSHOT_BLOCKS * count
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
        """
        flush = asyncio.get_running_loop().create_future()
        self._flushes.append(flush)
        self._bell.ring()
        await flush

    def close(self) -> None:
        """Write what is noted, without waiting for the device, and close. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.write_now()
        self._thread.shutdown()
        for each in self._journals:
            each.close()
