"""The SSD tier's files: preallocated, bounded, striped over directories.

    block i → directory i mod n; within a directory, file after file, block after block:

    directory 0    file 0 [0][2][4]    file 2 [6][8]
    directory 1    file 1 [1][3][5]    file 3 [7]

One block is one extent, aligned for O_DIRECT. A lock on each directory keeps two engines apart.
Directories and files to which others may write are refused (`private.py`).
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flexkv import forks
from flexkv.common.errors import ConfigError, StorageError
from flexkv.common.terms import BlockIds
from flexkv.io.locks import NOTE_NAME, lock_open_directory
from flexkv.io.private import Folder, NotPrivateError, make_directory, open_directory, open_file

DIRECT_ALIGNMENT_BYTES = 4096
"""What every filesystem that knows O_DIRECT accepts for offset, length and address."""
FILE_PATTERN = "blocks-*.flexkv"


@dataclass(frozen=True, slots=True)
class _Striping:
    """Where each block is."""

    directories: int
    blocks: int
    blocks_per_file: int

    def file_of(self, ids: BlockIds) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Give the index of the file of each block, and its place in that file."""
        row, directory = np.divmod(ids, self.directories)
        file_row, place = np.divmod(row, self.blocks_per_file)
        return file_row * self.directories + directory, place

    def blocks_by_file(self) -> list[int]:
        """Give how many blocks each file holds."""
        full_rows, rest = divmod(self.blocks, self.directories)
        counts = []
        for first_row in range(0, -(-self.blocks // self.directories), self.blocks_per_file):
            for directory in range(self.directories):
                rows = full_rows + (directory < rest) - first_row
                if rows > 0:
                    counts.append(min(rows, self.blocks_per_file))
        return counts


class StripedFiles:
    """Open files that hold the blocks of the SSD tier.

    Attributes:
        num_blocks: blocks that they hold.
        block_stride_bytes: bytes from one block to the next in a file.
        fds: one per file; they stay the property of this object.
        paths: of the files, by the same index.
        folders: the directories, locked; they stay the property of this object.
        direct: whether I/O goes past the page cache.
        why: the reason if it does not.
    """

    def __init__(self, striping: _Striping, block_stride_bytes: int, closing: ExitStack) -> None:
        """Start with no files; `open` fills them in."""
        self.num_blocks = striping.blocks
        self.block_stride_bytes = block_stride_bytes
        self.fds: list[int] = []
        self.paths: list[str] = []
        self.folders: list[Folder] = []
        self.direct = False
        self.why = ""
        self._striping = striping
        self._closing = closing
        self._is_open = True
        forks.on_fork(self._let_go_in_child)

    @classmethod
    def open(
        cls,
        directories: Sequence[str | os.PathLike[str]],
        num_blocks: int,
        block_stride_bytes: int,
        max_file_size_bytes: int | None = None,
        preallocate: bool = True,
    ) -> StripedFiles:
        """Lock the directories, and create, adopt or resize the files in them.

        A file of an earlier run keeps its bytes; files that are no longer needed are removed.

        Args:
            directories: at least one; the last component of each is created when missing.
            num_blocks: blocks over all directories.
            block_stride_bytes: bytes from one block to the next.
            max_file_size_bytes: bound of one file; at least one block is in each.
            preallocate: take all the space now; else as it is written to, and a write may fail.

        Raises:
            ConfigError: a directory is missing, read-only, in use or full, or is none; or others
                may write to it or to a file in it.
        """
        assert num_blocks >= 1, num_blocks
        if not directories:
            raise ConfigError("ssd_cache_dir", list(directories), "no directory is given")
        blocks_per_file = num_blocks
        if max_file_size_bytes is not None:
            blocks_per_file = max(1, max_file_size_bytes // block_stride_bytes)
        striping = _Striping(len(directories), num_blocks, blocks_per_file)
        with ExitStack() as closing:
            files = cls(striping, block_stride_bytes, closing)
            for directory in directories:
                folder = open_folder(Path(directory), closing, make=True)
                lock_folder(folder, closing)
                files.folders.append(folder)
            files._open_all(preallocate)
            files.why = files._go_direct()
            files.direct = not files.why
            files._closing = closing.pop_all()
        return files

    def locate(self, ids: BlockIds) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Give the file index and the byte offset of each block: int64[n] both."""
        file_index, place = self._striping.file_of(ids)
        return file_index, place * self.block_stride_bytes

    def locate_one(self, block_id: int) -> tuple[int, int]:
        """Give the file index and the byte offset of one block."""
        file_index, offset = self.locate(np.array([block_id]))
        return int(file_index[0]), int(offset[0])

    def positions(self, ids: BlockIds) -> NDArray[np.int64]:
        """Give numbers that count up by one exactly where blocks are neighbours in one file."""
        file_index, place = self._striping.file_of(ids)
        return file_index * (self._striping.blocks_per_file + 1) + place

    def sync(self) -> None:
        """Return once all that was written is on stable storage. Blocks: call it in a thread.

        Raises:
            StorageError: a device refused.
        """
        for fd, path in zip(self.fds, self.paths, strict=True):
            try:
                os.fdatasync(fd)
            except OSError as error:
                raise StorageError(path, 0, error.errno or 0) from error

    def close(self) -> None:
        """Close the files and unlock the directories. Idempotent."""
        self._is_open = False
        self._closing.close()

    def _let_go_in_child(self) -> None:
        if self._is_open:
            for fd in (*self.fds, *(folder.fd for folder in self.folders)):
                forks.replace(fd)

    def _open_all(self, preallocate: bool) -> None:
        """Open every file at its size, with all its space allocated if that is wanted."""
        wanted = [count * self.block_stride_bytes for count in self._striping.blocks_by_file()]
        places = [
            (self.folders[index % len(self.folders)], file_name(index // len(self.folders)))
            for index in range(len(wanted))
        ]
        paths = [folder.path / name for folder, name in places]
        for folder in self.folders:
            _remove_leftovers(folder, paths)
        for folder, name in places:
            fd = open_ours(folder, name)
            self._closing.callback(os.close, fd)
            self.fds.append(fd)
            self.paths.append(str(folder.path / name))
        if preallocate:
            self._check_space(wanted)
        for fd, path, size in zip(self.fds, paths, wanted, strict=True):
            try:
                if os.fstat(fd).st_size != size:
                    os.truncate(fd, size)
                if preallocate:
                    os.posix_fallocate(fd, 0, size)
            except OSError as error:
                if error.errno in (ENOSPC, EDQUOT):
                    raise self._no_space(path.parent, size, _free_bytes(fd)) from error
                raise ConfigError("ssd_cache_dir", str(path), error.strerror or "") from error

    def _check_space(self, wanted: list[int]) -> None:
        """Check that each filesystem has room for what its files still lack."""
        missing: dict[int, int] = {}
        for fd, size in zip(self.fds, wanted, strict=True):
            file = os.fstat(fd)
            allocated_bytes = file.st_blocks * 512
            missing[file.st_dev] = missing.get(file.st_dev, 0) + size - allocated_bytes
        for fd, path in zip(self.fds, self.paths, strict=True):
            wanted_bytes, free_bytes = missing[os.fstat(fd).st_dev], _free_bytes(fd)
            if wanted_bytes > free_bytes:
                raise self._no_space(Path(path).parent, wanted_bytes, free_bytes)

    def _no_space(self, folder: Path, wanted_bytes: int, free_bytes: int) -> ConfigError:
        return ConfigError(
            "num_ssd_blocks",
            self.num_blocks,
            f"needs {wanted_bytes} more bytes in {folder}, {free_bytes} are free: "
            "lower num_ssd_blocks or ssd_cache_gb",
        )

    def _go_direct(self) -> str:
        """Turn O_DIRECT on for all files, or for none; give why not, or nothing."""
        if self.block_stride_bytes % DIRECT_ALIGNMENT_BYTES:
            return f"blocks of {self.block_stride_bytes} bytes are not aligned for O_DIRECT"
        buffered = [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in self.fds]
        with mmap.mmap(-1, DIRECT_ALIGNMENT_BYTES) as page:
            for fd, path, flags in zip(self.fds, self.paths, buffered, strict=True):
                try:
                    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
                    os.preadv(fd, [page], 0)
                except OSError as error:
                    for each, before in zip(self.fds, buffered, strict=True):
                        fcntl.fcntl(each, fcntl.F_SETFL, before)
                    return f"O_DIRECT refused for {path} ({error.strerror})"
        return ""


def file_name(row_of_files: int) -> str:
    """Return the name of a directory's n-th block file."""
    return f"blocks-{row_of_files:04d}.flexkv"


def open_folder(path: Path, closing: ExitStack, make: bool = False) -> Folder:
    """Open a directory of the SSD tier until `closing` ends.

    Args:
        path: of the directory.
        closing: the stack that closes it.
        make: whether one that is missing is made (its last component only).

    Raises:
        ConfigError: it is missing, or no directory, or others may write to it.
    """
    try:
        fd = make_directory(path) if make else open_directory(path)
    except OSError as error:
        raise _refusal(path, error) from error
    closing.callback(os.close, fd)
    return Folder(path, fd)


def lock_folder(folder: Folder, closing: ExitStack) -> None:
    """Lock a directory until `closing` ends.

    Raises:
        ConfigError: another process has it, or it cannot be locked.
    """
    try:
        lock = lock_open_directory(folder.fd, folder.path)
    except BlockingIOError as error:
        raise ConfigError("ssd_cache_dir", str(folder.path), str(error.strerror)) from error
    except OSError as error:
        raise _refusal(folder.path / NOTE_NAME, error) from error
    closing.callback(lock.release)


def open_ours(folder: Folder, name: str, flags: int = os.O_RDWR | os.O_CREAT) -> int:
    """Open or create a file of ours; refuse a link, a pipe or a directory in its place.

    Raises:
        ConfigError: it cannot be opened, or others may write to it.
    """
    try:
        return open_file(folder.fd, name, flags)
    except OSError as error:
        raise _refusal(folder.path / name, error) from error


def _refusal(path: Path, error: OSError) -> ConfigError:
    """Return an error that says what is wrong with a directory or a file of the SSD tier."""
    why = f"cannot be used ({error.strerror})"
    if isinstance(error, NotPrivateError):
        why = str(error.strerror)
    elif isinstance(error, NotADirectoryError):
        why = "is not a directory" if path.exists() else f"{path.parent} is not a directory"
    elif isinstance(error, FileNotFoundError):
        why = "does not exist" if path.parent.exists() else f"{path.parent} does not exist"
    return ConfigError("ssd_cache_dir", str(path), why)


def _remove_leftovers(folder: Folder, wanted: list[Path]) -> None:
    """Remove the block files of a directory that this tier does not use."""
    for name in os.listdir(folder.fd):
        path = folder.path / name
        if fnmatch(name, FILE_PATTERN) and path not in wanted:
            try:
                os.unlink(name, dir_fd=folder.fd)
            except OSError as error:
                why = f"cannot be removed ({error.strerror})"
                raise ConfigError("ssd_cache_dir", str(path), why) from error


def _free_bytes(fd: int) -> int:
    filesystem = os.fstatvfs(fd)
    return filesystem.f_bavail * filesystem.f_frsize
