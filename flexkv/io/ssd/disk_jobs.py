"""What both disk adapters share: transfers as extents, and the count of extents that ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flexkv.common.errors import ShortTransferError, StorageError, TransferError
from flexkv.common.extents import check_ids, coalesce
from flexkv.common.terms import BlockIds, Tier, Transfer
from flexkv.io.memory.arena import Arena
from flexkv.io.ports import Completion
from flexkv.io.ssd.files import StripedFiles

BLOCK_IO_BYTES_MAX = 8 << 20
"""A block up to this size is one I/O, even if `io_bytes_max` is smaller."""
SLICE_BYTES_MAX = 1 << 30
"""The largest buffer that the kernel registers; no extent crosses from one slice to the next."""


class Extent(NamedTuple):
    """One I/O: between a range of a file and a range of memory."""

    file_index: int
    offset_bytes: int
    address: int
    bytes: int


@dataclass(slots=True)
class DiskJob:
    """A transfer that is being carried out.

    `extents` is int64[n, 4], one `Extent` in each row; the name of extent i is `base` + i. The
    first `taken` extents were started, `remaining` have not ended. `error` is the first error.
    """

    op_id: int
    write: bool
    extents: NDArray[np.int64]
    base: int
    taken: int = 0
    remaining: int = field(init=False)
    error: TransferError | None = None

    def __post_init__(self) -> None:
        self.remaining = len(self.extents)

    def extent(self, name: int) -> Extent:
        """Return the extent of this name."""
        return Extent(*self.extents[name - self.base].tolist())

    def end_one(self, name: int, moved: int, path: str) -> bool:
        """Record the end of one extent, and return whether that ended the job.

        Args:
            name: the name of the extent.
            moved: the bytes moved, or -errno.
            path: the path of the extent's file, for the error.
        """
        extent = self.extent(name)
        if moved != extent.bytes and self.error is None:
            if moved < 0:
                self.error = StorageError(path, extent.offset_bytes, -moved, self.op_id)
            else:
                self.error = ShortTransferError(path, extent.offset_bytes, extent.bytes, moved)
        self.remaining -= 1
        return self.remaining == 0

    @property
    def completion(self) -> Completion:
        """Return the end of this job, as `reap` reports it."""
        return Completion(self.op_id, self.error)


class DiskGeometry:
    """Turns transfers between one arena and one set of files into extents."""

    def __init__(self, arena: Arena, files: StripedFiles, io_bytes_max: int) -> None:
        """Take both ends, which must have the same stride, and the largest size of one I/O."""
        stride = files.block_stride_bytes
        assert arena.block_stride_bytes == stride, (arena.block_stride_bytes, stride)
        self.block_bytes = stride
        self._files = files
        self._host_blocks = arena.num_blocks
        self._host_address = arena.address
        # A block that is too large for one I/O is an extent of its own, until `_split` cuts it.
        self._blocks_max = max(1, io_bytes_max // stride) if stride <= BLOCK_IO_BYTES_MAX else 1
        self._slice_blocks = max(1, SLICE_BYTES_MAX // stride)

    def slices(self, arena: Arena) -> list[memoryview]:
        """Return the arena in pieces that are small enough to be registered."""
        step = self._slice_blocks * self.block_bytes
        return [arena.buffer[start : start + step] for start in range(0, len(arena.buffer), step)]

    def job(self, transfer: Transfer, base: int) -> DiskJob:
        """Return a transfer as a job; its extents are contiguous in memory and in one file.

        Raises:
            InvariantError: an id is out of range, or the id lists differ in length.
        """
        write = transfer.route.source is Tier.HOST
        host_ids, disk_ids = transfer.sides
        check_ids(transfer, self._host_blocks, self._files.num_blocks)
        if len(host_ids) == 1:
            return DiskJob(transfer.op_id, write, self._extents_of_one(host_ids, disk_ids), base)
        # A number is left out between two slices, so that no run crosses from one to the next.
        places = host_ids + host_ids // self._slice_blocks
        starts, counts = coalesce(places, self._files.positions(disk_ids), self._blocks_max)
        file_index, offset = self._files.locate(disk_ids[starts])
        address = self._host_address + host_ids[starts] * self.block_bytes
        extents = np.stack((file_index, offset, address, counts * self.block_bytes), axis=1)
        return DiskJob(transfer.op_id, write, self._bounded(extents), base)

    def _extents_of_one(self, host_ids: BlockIds, disk_ids: BlockIds) -> NDArray[np.int64]:
        """Return the extents of one block, without `coalesce`, which is slow for single blocks."""
        file_index, offset = self._files.locate(disk_ids[0])
        address = self._host_address + int(host_ids[0]) * self.block_bytes
        row = (int(file_index), int(offset), address, self.block_bytes)
        return self._bounded(np.array((row,), np.int64))

    def _bounded(self, extents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return extents, with those cut that are longer than one I/O may be."""
        if self.block_bytes > BLOCK_IO_BYTES_MAX:
            return _split(extents, self.block_bytes)
        return extents


def _split(extents: NDArray[np.int64], block_bytes: int) -> NDArray[np.int64]:
    """Return extents of one large block each, cut into parts no longer than one I/O may be."""
    steps = np.arange(0, block_bytes, BLOCK_IO_BYTES_MAX)
    parts = np.repeat(extents, len(steps), axis=0)
    done = np.tile(steps, len(extents))
    parts[:, 1] += done
    parts[:, 2] += done
    parts[:, 3] = np.minimum(parts[:, 3] - done, BLOCK_IO_BYTES_MAX)
    return parts
