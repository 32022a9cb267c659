"""The SSD tier's files: preallocated, bounded, striped over directories.

    block i → directory i mod n; within a directory, file after file, block after block:

    directory 0    file 0 [0][2][4]    file 2 [6][8]
    directory 1    file 1 [1][3][5]    file 3 [7]

One block is one extent, and I/O is direct (O_DIRECT) if possible. A lock on each directory keeps
two engines apart. Directories and files that others may write to are refused (`private.py`). Space
that files have from an earlier run is not allocated again (`allocation.py`), and nothing is cut,
removed or grown before the free space has been checked.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from errno import EDQUOT, EFBIG, EISDIR, EMFILE, ENFILE, ENOENT, ENOSPC, ENOTDIR, ESTALE
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flexkv.common.config_cache import GivenSize
from flexkv.common.config_keys import as_gb
from flexkv.common.errors import ClosedError, ConfigError, StorageError
from flexkv.common.terms import BlockIds
from flexkv.io.private import Folder
from flexkv.io.ssd.allocation import (
    Gap,
    allocate,
    allocated_beyond,
    gaps,
    kind_of_file_system,
    lacking_bytes,
    room,
)
from flexkv.io.ssd.folders import lock_folder, open_folder, open_ours, refusal
from flexkv.process import forks

DIRECT_ALIGNMENT_BYTES = 4096
"""The alignment of offset, length and address that every file system with O_DIRECT accepts."""
FILE_PATTERN = "blocks-*.flexkv"
_GONE = {ENOENT, ENOTDIR, ESTALE}


@dataclass(frozen=True, slots=True)
class FileOptions:
    """How files get their space.

    Attributes:
        preallocate: allocate all space now; otherwise writes allocate it, and may then fail.
        given: the setting that an error about the size names; None: the number of blocks.
        reserved_bytes: memory needed later, which files on a file system in memory must leave.
        pause: called repeatedly while files are made; may raise to stop that.
        check: called with each directory once all are locked, before anything in one is changed;
            raises ConfigError to refuse it.
    """

    preallocate: bool = True
    given: GivenSize | None = None
    reserved_bytes: int = 0
    pause: Callable[[], None] = lambda: None
    check: Callable[[Folder], None] = lambda folder: None


class Missing(NamedTuple):
    """A directory, or a file in it, that is no longer where it was opened."""

    directory: str
    path: str
    why: str


@dataclass(frozen=True, slots=True)
class _Striping:
    """How blocks are spread over directories and files."""

    directories: int
    blocks: int
    blocks_per_file: int

    def file_of(self, ids: BlockIds) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the index of each block's file, and the block's number in that file."""
        row, directory = np.divmod(ids, self.directories)
        file_row, place = np.divmod(row, self.blocks_per_file)
        return file_row * self.directories + directory, place

    def blocks_by_file(self) -> list[int]:
        """Return how many blocks each file holds."""
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
        fds: one descriptor per file, owned by this object.
        paths: the paths of the files, in the same order.
        folders: the locked directories, owned by this object.
        direct: whether I/O bypasses the page cache.
        why: the reason if it does not.
        may_block: whether a call may wait even if the kernel is told not to wait: some file systems
            in user space are as slow as the process behind them.
        identity_lasts: whether an open file and its path keep the same inode number.
    """

    def __init__(self, striping: _Striping, block_stride_bytes: int, closing: ExitStack) -> None:
        """Create it without files; `open` adds them."""
        self.num_blocks = striping.blocks
        self.block_stride_bytes = block_stride_bytes
        self.fds: list[int] = []
        self.paths: list[str] = []
        self.folders: list[Folder] = []
        self.direct = False
        self.why = ""
        self._striping = striping
        self._closing = closing
        self._given = GivenSize("num_ssd_blocks", striping.blocks)
        self._reserved_bytes = 0
        self._directories: list[Path] = []
        self._names: list[tuple[Folder, str]] = []
        """The directory and the name of each file."""
        self.identity_lasts = True
        self.may_block = False
        self._is_open = True
        forks.on_fork(self._let_go_in_child)

    @classmethod
    def open(
        cls,
        directories: Sequence[str | os.PathLike[str]],
        num_blocks: int,
        block_stride_bytes: int,
        max_file_size_bytes: int | None = None,
        options: FileOptions = FileOptions(),
    ) -> StripedFiles:
        """Lock the directories, and create, adopt or resize the files in them.

        A file of an earlier run keeps its bytes; files that are no longer needed are removed.

        Args:
            directories: at least one; the last component of each is created if it is missing.
            num_blocks: the number of blocks in all directories.
            block_stride_bytes: bytes from one block to the next.
            max_file_size_bytes: the largest size of one file, which holds at least one block.
            options: how the files get their space.

        Raises:
            ConfigError: for `ssd_cache_dir`, a directory is missing, read-only, in use or not a
                directory, or others may write to it or its files; for the size, there is no space.
        """
        assert num_blocks >= 1, num_blocks
        if not directories:
            raise ConfigError("ssd_cache_dir", list(directories), "must name a directory")
        blocks_per_file = num_blocks
        if max_file_size_bytes is not None:
            blocks_per_file = max(1, max_file_size_bytes // block_stride_bytes)
        striping = _Striping(len(directories), num_blocks, blocks_per_file)
        with ExitStack() as closing, ExitStack() as failing:
            files = cls(striping, block_stride_bytes, closing)
            failing.callback(files._note_closed)
            files._given = options.given or files._given
            files._reserved_bytes = options.reserved_bytes
            files._directories = [Path(directory).absolute() for directory in directories]
            for directory in files._directories:
                folder = open_folder(directory, closing, make=True)
                lock_folder(folder, closing)
                files.folders.append(folder)
            for folder in files.folders:
                options.check(folder)
            files._open_all(options, failing)
            files.why = files._go_direct()
            files.direct = not files.why
            files.identity_lasts = files.missing() is None
            kinds = [kind_of_file_system(os.fstat(folder.fd).st_dev) for folder in files.folders]
            files.may_block = any(kind.startswith("fuse") for kind in kinds)
            files._closing = closing.pop_all()
            failing.pop_all()
        return files

    def locate(self, ids: BlockIds) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the file index and the byte offset of each block: int64[n] both."""
        file_index, place = self._striping.file_of(ids)
        return file_index, place * self.block_stride_bytes

    def place_of(self, block_id: int) -> tuple[str, int]:
        """Return the path and the byte offset of one block."""
        file_index, offset = self.locate(np.array([block_id]))
        return self.paths[file_index[0]], int(offset[0])

    def positions(self, ids: BlockIds) -> NDArray[np.int64]:
        """Return numbers that count up by one exactly where blocks are adjacent in one file."""
        file_index, place = self._striping.file_of(ids)
        return file_index * (self._striping.blocks_per_file + 1) + place

    def sync(self) -> None:
        """Return once all writes are on stable storage. Blocks: call it in a thread.

        Raises:
            StorageError: a device reported an error.
            ClosedError: the files were closed meanwhile.
        """
        for fd, path in zip(self.fds, self.paths, strict=True):
            if not self._is_open:  # by now its number may be another file's
                raise ClosedError("the SSD files were closed before they were synced")
            try:
                os.fdatasync(fd)
            except OSError as error:
                raise StorageError(path, 0, error.errno or 0) from error

    def close(self) -> None:
        """Close the files and unlock the directories. Idempotent."""
        self._note_closed()
        self._closing.close()

    def _note_closed(self) -> None:
        """Keep a forked child from replacing our descriptors, whose numbers will be reused."""
        self._is_open = False

    def _let_go_in_child(self) -> None:
        if self._is_open:
            for fd in (*self.fds, *(folder.fd for folder in self.folders)):
                forks.replace(fd)

    def missing(self) -> Missing | None:
        """Return what was removed, replaced, or hidden by a mount; None if all is in place.

        Blocks: call it in a thread.
        """
        try:
            return next(self._all_missing(), None)
        except OSError:
            return None  # it cannot be checked now, which proves nothing

    def _all_missing(self) -> Iterator[Missing]:
        for directory, folder in zip(self._directories, self.folders, strict=True):
            if why := self._differs(directory, folder.fd):
                yield Missing(str(folder.path), str(folder.path), why)
        for (folder, name), fd, path in zip(self._names, self.fds, self.paths, strict=True):
            if why := self._differs(Path(name), fd, folder.fd):
                yield Missing(str(folder.path), path, why)

    def _differs(self, path: Path, fd: int, folder_fd: int | None = None) -> str:
        """Return why the file open as `fd` is no longer at a path; empty if it is there."""
        try:
            there = os.stat(path, dir_fd=folder_fd, follow_symlinks=folder_fd is None)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            return "was removed or moved away"
        if self.identity_lasts and not os.path.samestat(there, os.fstat(fd)):
            return "was replaced, hidden by a mount, or unmounted"
        return ""

    def _open_all(self, options: FileOptions, failing: ExitStack) -> None:
        """Open every file and set its size, with all its space allocated if that is wanted.

        If the tier is not opened after all, `failing` cuts the files that have grown.
        """
        wanted = [count * self.block_stride_bytes for count in self._striping.blocks_by_file()]
        count = len(self.folders)
        self._names = [(self.folders[i % count], file_name(i // count)) for i in range(len(wanted))]
        leftovers = [each for folder in self.folders for each in self._leftovers(folder)]
        for folder, name in leftovers:
            if stat.S_ISDIR(os.lstat(name, dir_fd=folder.fd).st_mode):
                raise _irremovable(folder, name, os.strerror(EISDIR))
        for folder, name in self._names:
            options.pause()
            fd = self._open(folder, name, len(wanted))
            self._closing.callback(os.close, fd)
            self.fds.append(fd)
            self.paths.append(str(folder.path / name))
        lacking: list[list[Gap]] = [[] for _ in wanted]
        if options.preallocate:
            lacking = [gaps(fd, size) for fd, size in zip(self.fds, wanted, strict=True)]
            self._check_room(wanted, lacking, leftovers)
        for folder, name in leftovers:
            _remove(folder, name)
        failing.callback(self._give_back, [os.fstat(fd).st_size for fd in self.fds])
        for resize in (self._cut, self._grow):  # cut first, which frees space
            for number, size in enumerate(wanted):
                try:
                    resize(self.fds[number], size, lacking[number], options.pause)
                except (OSError, OverflowError) as error:
                    raise self._refusal(number, size, error) from error

    def _open(self, folder: Folder, name: str, file_count: int) -> int:
        try:
            return open_ours(folder, name)
        except ConfigError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in (EMFILE, ENFILE):
                why = f"needs {file_count} open files, more than the limit allows: raise the limit"
                why += " (ulimit -n), or set max_file_size_gb higher"
                raise ConfigError(*self._given, why) from error
            raise

    def _give_back(self, earlier: list[int]) -> None:
        """Restore the earlier size of files that have grown, as the tier is not opened."""
        for fd, size in zip(self.fds, earlier, strict=True):
            with suppress(OSError):
                if os.fstat(fd).st_size > size:
                    os.truncate(fd, size)

    @staticmethod
    def _cut(fd: int, size: int, _: list[Gap], __: Callable[[], None]) -> None:
        if os.fstat(fd).st_size > size:
            os.truncate(fd, size)

    @staticmethod
    def _grow(fd: int, size: int, lacking: list[Gap], pause: Callable[[], None]) -> None:
        # A file grows only as it gets space: after an interruption, its size shows what it lacks.
        allocate(fd, lacking, pause)
        if os.fstat(fd).st_size != size:
            os.truncate(fd, size)

    def _leftovers(self, folder: Folder) -> list[tuple[Folder, str]]:
        """Return the block files of a directory that this tier does not use."""
        used = {name for each, name in self._names if each is folder}
        try:
            names = sorted(os.listdir(folder.fd))
        except OSError as error:
            raise refusal(folder.path, error) from error
        return [(folder, n) for n in names if fnmatch(n, FILE_PATTERN) and n not in used]

    def _check_room(
        self, wanted: list[int], lacking: list[list[Gap]], leftovers: list[tuple[Folder, str]]
    ) -> None:
        """Raise ConfigError unless each file system has space for what its files still lack."""
        missing: dict[int, int] = {}
        for fd, size, found in zip(self.fds, wanted, lacking, strict=True):
            file = os.fstat(fd)
            change = lacking_bytes(file, size, found) - allocated_beyond(file, size)
            missing[file.st_dev] = missing.get(file.st_dev, 0) + change
        for folder, name in leftovers:
            file = os.stat(name, dir_fd=folder.fd, follow_symlinks=False)
            missing[file.st_dev] = missing.get(file.st_dev, 0) - allocated_beyond(file, 0)
        for number, fd in enumerate(self.fds):
            wanted_bytes = missing.pop(os.fstat(fd).st_dev, 0)
            free = room(fd, self._reserved_bytes) if wanted_bytes > 0 else None
            if free is not None and wanted_bytes > free.free_bytes:
                raise self._no_space(number, wanted_bytes)

    def _no_space(self, number: int, wanted_bytes: int) -> ConfigError:
        folder = self._names[number][0]
        free = room(self.fds[number], self._reserved_bytes)
        has = "it is full" if free is None else f"{free.limited_by} has {as_gb(free.free_bytes)}"
        why = f"needs {as_gb(wanted_bytes)} more in {folder.path}, but {has}"
        return ConfigError(*self._given, f"{why}: set {self._given.key} lower")

    def _refusal(self, number: int, size: int, error: OSError | OverflowError) -> ConfigError:
        """Return the error for a file that cannot be given its size."""
        if isinstance(error, OverflowError) or error.errno == EFBIG:
            why = f"{self._names[number][0].path} cannot hold a file of {size} bytes: set "
            return ConfigError(*self._given, why + f"max_file_size_gb or {self._given.key} lower")
        if error.errno == EDQUOT:
            why = f"needs {size} bytes in {self._names[number][0].path}, more than the quota allows"
            return ConfigError(*self._given, f"{why}: set {self._given.key} lower")
        if error.errno == ENOSPC:
            return self._no_space(number, size)
        why = f"cannot be resized to {size} bytes ({error.strerror})"
        return ConfigError("ssd_cache_dir", self.paths[number], why)

    def _go_direct(self) -> str:
        """Turn O_DIRECT on for all files or none; return why not, or an empty string."""
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


def _remove(folder: Folder, name: str) -> None:
    try:
        os.unlink(name, dir_fd=folder.fd)
    except OSError as error:
        raise _irremovable(folder, name, error.strerror) from error


def _irremovable(folder: Folder, name: str, reason: str | None) -> ConfigError:
    return ConfigError("ssd_cache_dir", str(folder.path / name), f"cannot be removed ({reason})")
