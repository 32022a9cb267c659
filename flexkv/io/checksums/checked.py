"""A disk port that checks every block it reads against the checksum with which it was written.

    write   submit ─▶ forget the blocks that were there ─▶ inner port ─▶ keep the sums
    read    submit ─▶ inner port ─▶ sum ─▶ compare with the kept sums; CorruptBlockError if unequal

A write keeps the sum that was computed when the block's bytes reached host memory, so a read also
finds damage that happened in host memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from flexkv.common.errors import ClosedError, CorruptBlockError, InvariantError
from flexkv.common.extents import check_ids
from flexkv.common.terms import BlockIds, Tier, Transfer
from flexkv.io.checksums.summed import SummedPort
from flexkv.io.checksums.sums import Checksummer, Sums
from flexkv.io.ports import Completion, DurablePort


class Forget(Protocol):
    """Makes the journals forget the blocks whose places are about to be overwritten."""

    def __call__(self, disk_ids: BlockIds, then: Callable[[], None]) -> bool:
        """Return True if no journal names the places; else call `then` once none does."""
        ...


class _Write(NamedTuple):
    disk_ids: BlockIds
    sums: Sums


class CheckedDiskPort:
    """A durable port that wraps another, and keeps a checksum for each block.

    Attributes:
        sums: uint64[disk blocks], the sum of what was last written to each place.
        forget: called before every write; None if the tier keeps no journals.
    """

    def __init__(
        self,
        inner: DurablePort,
        checksummer: Checksummer,
        num_blocks: int,
        place_of: Callable[[int], tuple[str, int]],
    ) -> None:
        """Wrap a port; it and the checksummer are closed with this one.

        Args:
            inner: the port that moves the bytes.
            checksummer: sums host blocks, and holds the sums of those in host memory.
            num_blocks: number of disk blocks.
            place_of: returns the path and byte offset of a disk block, for errors.
        """
        self.sums: Sums = np.zeros(num_blocks, np.uint64)
        self.forget: Forget | None = None
        self._inner = inner
        self._summed = SummedPort(inner, checksummer, block_bytes=inner.block_bytes)
        self._place_of = place_of
        self._reading: dict[int, Transfer] = {}
        self._writing: dict[int, _Write] = {}
        self._forgotten: list[Transfer] = []
        self._wake: Callable[[], None] = lambda: None
        self._closed = False

    @property
    def block_bytes(self) -> int:
        """Return the bytes moved for one block."""
        return self._inner.block_bytes

    @property
    def arrived_bytes(self) -> int:
        """Return the bytes that were read and are being summed."""
        return self._summed.arrived_bytes

    @property
    def adapter(self) -> str:
        """Return the name of what moves the bytes."""
        return self._inner.adapter

    def connect(self, wake: Callable[[], None]) -> None:
        """Attach to the running event loop."""
        self._wake = wake
        self._summed.connect(wake)

    def submit(self, transfer: Transfer) -> None:
        """Start one transfer.

        Raises:
            ClosedError: after `close`.
            InvariantError: an id is out of range, or the id lists differ in length.
        """
        if self._closed:
            raise ClosedError("the checked disk port is closed")
        if transfer.route.source is not Tier.HOST:
            self._summed.submit(transfer)
            self._reading[transfer.op_id] = transfer
            return
        check_ids(transfer, len(self._summed.sums), len(self.sums))
        sums = self._summed.sums[transfer.source_ids]
        self._writing[transfer.op_id] = _Write(transfer.target_ids, sums)
        if self.forget is None or self.forget(
            transfer.target_ids, lambda: self._was_forgotten(transfer)
        ):
            self._summed.submit(transfer)

    def _was_forgotten(self, transfer: Transfer) -> None:
        self._forgotten.append(transfer)
        self._wake()

    def reap(self) -> list[Completion]:
        """Return every transfer that ended since the last call, each exactly once."""
        forgotten, self._forgotten = self._forgotten, []
        for transfer in forgotten:
            self._summed.submit(transfer)
        return [self._ended(completion) for completion in self._summed.reap()]

    def _ended(self, completion: Completion) -> Completion:
        """Check a read or keep the sums of a write, and return the completion to report."""
        op_id, error, _ = completion
        transfer = self._reading.pop(op_id, None)
        if transfer is None:
            write = self._writing.pop(op_id)
            if error is None:
                self.sums[write.disk_ids] = write.sums
        elif error is None:
            return self._checked(transfer)
        return completion

    def _checked(self, transfer: Transfer) -> Completion:
        disk_ids = transfer.source_ids
        wrong = self._summed.sums[transfer.target_ids] != self.sums[disk_ids]
        bad = disk_ids[wrong].tolist()
        if not bad:
            return Completion(transfer.op_id, None)
        error = CorruptBlockError(*self._place_of(bad[0]), bad)
        return Completion(transfer.op_id, error, int(wrong.argmax()))

    async def sync(self) -> None:
        """Return once every completed write is on stable storage."""
        await self._inner.sync()

    def close(self) -> None:
        """Close the inner port and the checksummer. Only legal with nothing in flight. Idempotent.

        Raises:
            InvariantError: transfers were in flight; their ends were not reported.
        """
        self._closed = True
        self._summed.close()
        if left := len(self._writing) + len(self._reading):
            raise InvariantError(f"checked disk port closed with {left} transfers unreaped")
