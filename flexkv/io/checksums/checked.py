"""A disk port that checks: what comes back from disk has the sum of what went there.

    write   submit ─▶ the ledger forgets what was there ─▶ inner port ─▶ the sum is kept
    read    submit ─▶ inner port ─▶ sum ─▶ equal to what was kept? else CorruptBlockError

A write takes the sum that the block has had since its bytes reached host memory, so what went wrong
there counts too.
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
    """Makes sure that no later run believes in blocks whose places are about to be written."""

    def __call__(self, disk_ids: BlockIds, then: Callable[[], None]) -> bool:
        """Tell whether nobody believes in them; if not, `then` is called once that is so."""
        ...


class _Write(NamedTuple):
    disk_ids: BlockIds
    sums: Sums


class CheckedDiskPort:
    """A durable port over another, with a sum for each block.

    Attributes:
        sums: uint64[disk blocks], of what was last written to each place.
        forget: asked before every write; None where nobody would believe in anything.
    """

    def __init__(
        self,
        inner: DurablePort,
        summer: Checksummer,
        num_blocks: int,
        place_of: Callable[[int], tuple[str, int]],
    ) -> None:
        """Take both ports, which are closed with this one.

        Args:
            inner: moves the bytes.
            summer: sums host blocks, and knows the sums of those that are there.
            num_blocks: of the disk.
            place_of: gives path and byte offset of a disk block, for errors.
        """
        self.sums: Sums = np.zeros(num_blocks, np.uint64)
        self.forget: Forget | None = None
        self._inner = inner
        self._summed = SummedPort(inner, summer)
        self._place_of = place_of
        self._reading: dict[int, Transfer] = {}
        self._writing: dict[int, _Write] = {}
        self._forgotten: list[Transfer] = []
        self._wake: Callable[[], None] = lambda: None
        self._closed = False

    @property
    def block_bytes(self) -> int:
        """Give the bytes moved for one block."""
        return self._inner.block_bytes

    @property
    def arrived_bytes(self) -> int:
        """Give the bytes that were read and are being summed."""
        return self._summed.arrived_bytes

    @property
    def adapter(self) -> str:
        """Name what moves the bytes."""
        return type(self._inner).__name__

    def connect(self, wake: Callable[[], None]) -> None:
        """Attach to the running event loop."""
        self._wake = wake
        self._summed.connect(wake)

    def submit(self, transfer: Transfer) -> None:
        """Start one transfer.

        Raises:
            ClosedError: after `close`.
            InvariantError: ids out of range, or of unequal length.
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
        """Give every transfer that ended since the last call, each exactly once."""
        forgotten, self._forgotten = self._forgotten, []
        for transfer in forgotten:
            self._summed.submit(transfer)
        return [self._ended(completion) for completion in self._summed.reap()]

    def _ended(self, completion: Completion) -> Completion:
        """Compare what was read, and keep the sums of what was written."""
        op_id, error = completion
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
        error = CorruptBlockError(*self._place_of(bad[0]), bad) if bad else None
        return Completion(transfer.op_id, error)

    async def sync(self) -> None:
        """Return once every completed write is on stable storage."""
        await self._inner.sync()

    def close(self) -> None:
        """Close both ports. Only legal with nothing in flight. Idempotent.

        Raises:
            InvariantError: transfers were in flight; nobody was told of their ends.
        """
        self._closed = True
        self._summed.close()
        if left := len(self._writing) + len(self._reading):
            raise InvariantError(f"checked disk port closed with {left} transfers unreaped")
