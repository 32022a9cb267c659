"""Reads the blocks on SSD in idle time, at a bounded rate, and reports those that have changed.

No row is written while the ledger believes in it, so a block that is read from such a row is whole.
If the ledger stops believing in the row meanwhile, or the block gets another checksum, the result
of the read is ignored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from flexkv.common.errors import CorruptBlockError
from flexkv.common.terms import BlockIds
from flexkv.io.ports import Sums
from flexkv.io.ssd.files import StripedFiles
from flexkv.io.ssd.verify import BlockVerifier
from flexkv.process.workers import Workers
from flexkv.tiers.ledger import CLOSE_S, SCAN_BLOCKS, Ledger

BATCH_BYTES = 8 << 20


class Scrubber:
    """Checks the blocks of the SSD tier, over and over.

    Attributes:
        checked_blocks: blocks read and compared since the start.
    """

    def __init__(
        self,
        files: StripedFiles,
        sums: Sums,
        ledger: Ledger,
        bytes_per_s: float,
        block_bytes: Sequence[int],
    ) -> None:
        """Take what is to be checked.

        Args:
            files: the block files.
            sums: uint64[blocks], kept by the tier's actor.
            ledger: knows which blocks have valid sums, and the KV groups of these blocks.
            bytes_per_s: the most that is read, in bytes per second.
            block_bytes: the bytes of a block of each KV group.
        """
        self.checked_blocks = 0
        self._files, self._sums, self._ledger = files, sums, ledger
        self._reader = BlockVerifier(files.block_stride_bytes, BATCH_BYTES, block_bytes)
        self._pause_s = self._reader.num_blocks * files.block_stride_bytes / bytes_per_s
        self._thread = Workers(1, "flexkv-scrub")
        self._next = 0
        self._is_closed = False

    async def run(
        self, is_idle: Callable[[], bool], bad: Callable[[CorruptBlockError], None]
    ) -> None:
        """Check blocks until cancelled; call `bad` with an error that lists changed blocks."""
        while True:
            await asyncio.sleep(self._pause_s)
            if is_idle() and (error := await self.step()) is not None:
                bad(error)

    async def step(self) -> CorruptBlockError | None:
        """Check the next blocks; return an error that lists those that have changed, if any."""
        ids = self._ledger.journaled(self._next, self._reader.num_blocks)
        if not len(ids):
            self._next += SCAN_BLOCKS
            return None
        self._next = int(ids[-1]) + 1
        expected, groups = self._sums[ids], self._ledger.groups_of(ids)
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._thread, self._read, ids, groups, expected)
        self.checked_blocks += len(ids)
        same = self._ledger.are_journaled(ids) & (self._sums[ids] == expected)
        changed = ids[same & (found != expected)].tolist()
        if not changed:
            return None
        return CorruptBlockError(*self._files.place_of(changed[0]), changed)

    def _read(self, ids: BlockIds, groups: NDArray[np.uint8], expected: Sums) -> Sums:
        """Return the blocks' sums; an unreadable block counts as right, since loads report it."""
        files, offsets = self._files.locate(ids)
        fds = [self._files.fds[file] for file in files.tolist()]
        found, whole = self._reader.sums(zip(fds, offsets.tolist(), strict=True), groups)
        return np.where(whole, found, expected)

    def close(self) -> None:
        """Release all memory once the read under way has ended. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            closing = self._thread.submit(self._reader.close)
            self._thread.shutdown(wait=False)
            with suppress(TimeoutError):  # a disk that hangs: the thread is left alone
                closing.result(CLOSE_S)
