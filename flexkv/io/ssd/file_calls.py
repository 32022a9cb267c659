"""The file system calls that a journal needs, behind a protocol that a simulation can implement."""

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
    """Files of one directory, which are only appended to or cut. Every call may raise OSError."""

    def open(self, path: Path) -> int:
        """Open or create a file of ours, and return its descriptor.

        Raises:
            ConfigError: it cannot be opened, or others may write to it.
        """
        ...

    def read(self, fd: int) -> bytes:
        """Return the whole content of a file."""
        ...

    def write(self, fd: int, data: memoryview) -> int:
        """Append data, and return how many bytes were written."""
        ...

    def size(self, fd: int) -> int:
        """Return the size of a file in bytes."""
        ...

    def cut(self, fd: int, size: int) -> None:
        """Cut a file to its first `size` bytes."""
        ...

    def sync(self, fd: int) -> None:
        """Return once the content of a file is on stable storage."""
        ...

    def close(self, fd: int) -> None:
        """Close a file."""
        ...

    def rename(self, old: Path, new: Path) -> None:
        """Rename a file, which replaces another in the same directory."""
        ...

    def remove(self, path: Path) -> None:
        """Remove a file, if it exists."""
        ...

    def sync_folder(self, folder: Path) -> None:
        """Return once the names in a directory are on stable storage."""
        ...

    def is_at(self, path: Path, fd: int) -> bool:
        """Return whether an open file is still the one at a path."""
        ...


class KernelCalls:
    """File calls that go to the kernel.

    Files are opened through the descriptor of their directory, so that nobody who may rename the
    directory can put another in its place.
    """

    def __init__(self, folder: Folder | None = None) -> None:
        """Take the open directory of all files; None: open a path's directory for each call."""
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
        """Open or create a file, and return its descriptor."""
        with self._folder_of(path) as folder:
            fd = open_ours(folder, path.name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        self._fds.add(fd)
        return fd

    def read(self, fd: int) -> bytes:
        """Return the whole content of a file, from the device if the kernel allows that.

        If a sync of an earlier process failed, the kernel still caches what it could not write,
        and treats it as written. So the cached bytes are dropped before the file is read.
        """
        with suppress(OSError):
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        with open(fd, "rb", closefd=False) as file:
            file.seek(0)
            return file.read()

    def write(self, fd: int, data: memoryview) -> int:
        """Append data, and return how many bytes were written."""
        return os.write(fd, data)

    def size(self, fd: int) -> int:
        """Return the size of a file in bytes."""
        return os.fstat(fd).st_size

    def cut(self, fd: int, size: int) -> None:
        """Cut a file to its first `size` bytes."""
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
        """Remove a file, if it exists."""
        with self._folder_of(path) as folder, suppress(FileNotFoundError):
            os.unlink(path.name, dir_fd=folder.fd)

    def sync_folder(self, folder: Path) -> None:
        """Return once the names in a directory are on stable storage."""
        with self._folder_of(folder / "any") as opened:
            sync_directory(opened.fd)

    def is_at(self, path: Path, fd: int) -> bool:
        """Return whether an open file is still the one at a path."""
        with self._folder_of(path) as folder:
            try:
                there = os.stat(path.name, dir_fd=folder.fd, follow_symlinks=False)
            except FileNotFoundError:
                return False
            return os.path.samestat(there, os.fstat(fd))


KERNEL = KernelCalls()
