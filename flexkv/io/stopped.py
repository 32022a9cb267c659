"""A directory of the SSD tier while no engine has it: what is in it, and whether it is sound."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flexkv._ext import CopyPool, PageMap
from flexkv.common.errors import ConfigError
from flexkv.io import superblock
from flexkv.io.arena import Arena
from flexkv.io.files import lock
from flexkv.io.journal import Journal, cleared, erased

BATCH_BYTES = 64 << 20


class Checked(NamedTuple):
    """Rows that were read and compared."""

    rows: NDArray[np.int64]
    bad: NDArray[np.int64]


class StoppedTier:
    """One directory, locked: its superblock, and what its journal says."""

    def __init__(self, folder: Path) -> None:
        """Lock the directory.

        Raises:
            ConfigError: it is no directory of an SSD tier, or an engine has it.
        """
        found = superblock.read(folder)
        if found is None:
            raise ConfigError("directory", str(folder), "has no superblock of an SSD tier")
        self.folder, self.superblock = folder, found
        self._closing = ExitStack()
        self._closing.callback(os.close, lock(folder))
        self._journal = Journal(folder)
        self._closing.callback(self._journal.close)
        self.live = self._journal.live

    def __enter__(self) -> StoppedTier:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.close()

    @property
    def journal_bytes(self) -> int:
        """Give the length of the journal."""
        return self._journal.bytes

    @property
    def file_bytes(self) -> int:
        """Give what the block files take of the disk."""
        return sum(file.stat().st_blocks * 512 for file in self.folder.glob("blocks-*.flexkv"))

    def verify(self) -> Iterator[Checked]:
        """Read every row that the journal believes in, and compare its checksum."""
        stride = self.superblock.block_stride_bytes
        arena = Arena.open(max(1, BATCH_BYTES // stride), stride)
        pieces = np.array([[arena.address, stride, stride, 0]], np.int64)
        pages = PageMap(pieces, arena.num_blocks, arena.buffer, stride, None)
        pool = CopyPool(min(4, os.cpu_count() or 1))
        order = np.argsort(self.live.rows)
        rows, sums = self.live.rows[order], self.live.sums[order]
        try:
            with ExitStack() as files:
                fds: dict[int, int] = {}
                for at in range(0, len(rows), arena.num_blocks):
                    batch = rows[at : at + arena.num_blocks]
                    short = [self._read(fds, files, row, arena, n) for n, row in enumerate(batch)]
                    found = np.empty(len(batch), np.uint64)
                    pool.checksum(0, pages, np.arange(len(batch)), found, False)
                    select.select([pool.fileno()], [], [])
                    pool.reap()
                    bad = (found != sums[at : at + arena.num_blocks]) | np.array(short)
                    yield Checked(batch, batch[bad])
        finally:
            pool.close()
            del pages
            arena.close()

    def _read(
        self, fds: dict[int, int], files: ExitStack, row: int, arena: Arena, number: int
    ) -> bool:
        """Read one row into a block of memory; tells whether the file ended or failed before."""
        stride, per_file = self.superblock.block_stride_bytes, self.superblock.rows_per_file
        index, place = divmod(int(row), per_file) if per_file else (0, int(row))
        block = arena.buffer[number * stride : (number + 1) * stride]
        try:
            if index not in fds:
                fds[index] = os.open(self.folder / f"blocks-{index:04d}.flexkv", os.O_RDONLY)
                files.callback(os.close, fds[index])
            return os.preadv(fds[index], [block], place * stride) < stride
        except OSError:
            return True

    def drop(self, rows: NDArray[np.int64]) -> None:
        """Let nobody believe in some rows."""
        self._journal.append(erased(rows))
        self._journal.sync()

    def clear(self) -> None:
        """Let nobody believe in any row."""
        self._journal.append(cleared())
        self._journal.sync()
