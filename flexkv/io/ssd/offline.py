"""A directory of the SSD tier while no engine uses it: its content, and whether it is intact."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flexkv.common.errors import ConfigError
from flexkv.io.private import open_file
from flexkv.io.ssd import superblock
from flexkv.io.ssd.file_calls import KernelCalls
from flexkv.io.ssd.files import FILE_PATTERN, Striping, file_name
from flexkv.io.ssd.folders import lock_folder, open_folder, open_ours
from flexkv.io.ssd.journal import Journal, cleared, erased, groups_of
from flexkv.io.ssd.verify import BlockVerifier

BATCH_BYTES = 64 << 20


class Checked(NamedTuple):
    """Rows that were read and compared, and those of them whose checksum differs."""

    rows: NDArray[np.int64]
    bad: NDArray[np.int64]


class OfflineSsd:
    """One locked directory: its superblock, and what its journal says."""

    def __init__(self, folder: Path) -> None:
        """Lock the directory.

        Raises:
            ConfigError: it is not a directory of an SSD tier, an engine uses it, or others may
                write to it or to a file in it.
        """
        with ExitStack() as undo:
            self._folder = open_folder(folder, undo)
            found = superblock.read(self._folder)
            if found is None:
                why = "is not a directory of an SSD tier: superblock.flexkv is missing"
                raise ConfigError("directory", str(folder), why)
            lock_folder(self._folder, undo)
            for name in self._block_files():
                os.close(open_ours(self._folder, name, os.O_RDONLY))
            self._journal = Journal(self._folder.path, KernelCalls(self._folder))
            undo.callback(self._journal.close)
            self._closing = undo.pop_all()
        self.superblock, self.live = found, self._journal.live

    def __enter__(self) -> OfflineSsd:
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
        """Return the length of the journal."""
        return self._journal.bytes

    @property
    def file_bytes(self) -> int:
        """Return the space that the block files take on the disk."""
        fd, names = self._folder.fd, self._block_files()
        return sum(
            os.stat(name, dir_fd=fd, follow_symlinks=False).st_blocks * 512 for name in names
        )

    def _block_files(self) -> list[str]:
        return [name for name in os.listdir(self._folder.fd) if fnmatch(name, FILE_PATTERN)]

    def verify(self) -> Iterator[Checked]:
        """Read every row that the journal names, compare its checksum, and yield the results."""
        order = np.argsort(self.live.rows)
        rows, sums = self.live.rows[order], self.live.sums[order]
        groups, stride = groups_of(self.live.blocks[order]), self.superblock.block_stride_bytes
        with ExitStack() as closing:
            reader = BlockVerifier(stride, BATCH_BYTES, self.superblock.block_bytes or [stride])
            closing.callback(reader.close)
            count = len(rows)
            striping = Striping(1, count, self.superblock.rows_per_file or 1 << 62)

            @cache
            def fd_of(index: int) -> int | None:
                with suppress(OSError):  # else its rows count as bad
                    fd = open_file(self._folder.fd, file_name(index), os.O_RDONLY)
                    closing.callback(os.close, fd)
                    return fd
                return None

            for at in range(0, count, reader.num_blocks):
                batch = rows[at : at + reader.num_blocks]
                files, places = striping.file_of(batch)
                at_bytes = (places * stride).tolist()
                fds = map(fd_of, files.tolist())
                of_batch = groups[at : at + reader.num_blocks]
                found, whole = reader.sums(zip(fds, at_bytes, strict=True), of_batch)
                bad = (found != sums[at : at + reader.num_blocks]) | ~whole
                yield Checked(batch, batch[bad])

    def drop(self, rows: NDArray[np.int64]) -> None:
        """Erase rows in the journal, for good."""
        self._journal.append(erased(rows))
        self._journal.sync()

    def clear(self) -> None:
        """Erase all rows in the journal, for good."""
        self._journal.append(cleared())
        self._journal.sync()
