"""The calls of the file system that a journal needs, so that a simulation can stand in for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from flexkv.io.private import Folder, open_directory, sync_directory
from flexkv.io.ssd.folders import open_ours
from flexkv.process import forks


class FileCalls(Protocol):
    """Files of one directory, written at their ends only. Every call may raise OSError."""

    def open(self, path: Path) -> int:
        """Open a file of ours, or create it.

        Raises:
            ConfigError: it cannot be opened, or others may write to it.
        """
        ...

    def read(self, fd: int) -> bytes:
        """Give all that is in a file."""
        ...

    def write(self, fd: int, data: memoryview) -> int:
        """Append; gives how many bytes were."""
        ...

    def size(self, fd: int) -> int:
        """Give how many bytes a file has."""
        ...

    def cut(self, fd: int, size: int) -> None:
        """Drop what is behind the first `size` bytes."""
        ...

    def sync(self, fd: int) -> None:
        """Return once the content of a file is on stable storage."""
        ...

    def close(self, fd: int) -> None:
        """Close a file."""
        ...

    def rename(self, old: Path, new: Path) -> None:
        """Let a file take the place of another."""
        ...

    def remove(self, path: Path) -> None:
        """Remove a file, if it is there."""
        ...

    def sync_folder(self, folder: Path) -> None:
        """Return once the names in a directory are on stable storage."""
        ...

    def is_at(self, path: Path, fd: int) -> bool:
        """Return whether an open file is the one at a path."""
        ...


class KernelCalls:
    """Calls the kernel.

    Files are reached through the descriptor of their directory, so that nobody who may rename the
    directory can put another in its place.
    """

    def __init__(self, folder: Folder | None = None) -> None:
        """Take the open directory of all files; without one it is opened for each call."""
        self._folder = folder
        self._fds: set[int] = set()
        forks.on_fork(self._let_go_in_child)

    def _let_go_in_child(self) -> None:
        for fd in self._fds:
            forks.replace(fd)

    @contextmanager
    def _folder_of(self, path: Path) -> Iterator[Folder]:
        if self._folder is not None:
            assert path.parent == self._folder.path, path
            yield self._folder
            return
        fd = open_directory(path.parent)
        try:
            yield Folder(path.parent, fd)
        finally:
            os.close(fd)

    def open(self, path: Path) -> int:
        """Open a file, or create it."""
        with self._folder_of(path) as folder:
            fd = open_ours(folder, path.name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        self._fds.add(fd)
        return fd

    def read(self, fd: int) -> bytes:
        """Return all that is in a file, from the device where the kernel lets us.

        If a sync of an earlier process failed, the kernel still caches what it could not write,
        and takes it for written. So the cached bytes are dropped before the file is read.
        """
        with suppress(OSError):
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        with open(fd, "rb", closefd=False) as file:
            file.seek(0)
            return file.read()

    def write(self, fd: int, data: memoryview) -> int:
        """Append."""
        return os.write(fd, data)

    def size(self, fd: int) -> int:
        """Give how many bytes a file has."""
        return os.fstat(fd).st_size

    def cut(self, fd: int, size: int) -> None:
        """Drop what is behind the first `size` bytes."""
        os.ftruncate(fd, size)

    def sync(self, fd: int) -> None:
        """Return once the content of a file is on stable storage."""
        os.fdatasync(fd)

    def close(self, fd: int) -> None:
        """Close a file."""
        self._fds.discard(fd)
        os.close(fd)

    def rename(self, old: Path, new: Path) -> None:
        """Replace a file by another in the same directory."""
        with self._folder_of(old) as folder:
            os.rename(old.name, new.name, src_dir_fd=folder.fd, dst_dir_fd=folder.fd)

    def remove(self, path: Path) -> None:
        """Remove a file, if it is there."""
        with self._folder_of(path) as folder, suppress(FileNotFoundError):
            os.unlink(path.name, dir_fd=folder.fd)

    def sync_folder(self, folder: Path) -> None:
        """Return once the names in a directory are on stable storage."""
        with self._folder_of(folder / "any") as opened:
            sync_directory(opened.fd)

    def is_at(self, path: Path, fd: int) -> bool:
        """Return whether an open file is the one at a path."""
        with self._folder_of(path) as folder:
            try:
                there = os.stat(path.name, dir_fd=folder.fd, follow_symlinks=False)
            except FileNotFoundError:
                return False
            return os.path.samestat(there, os.fstat(fd))


KERNEL = KernelCalls()
