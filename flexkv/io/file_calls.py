"""The calls of the file system that a journal needs, so that a simulation can stand in for it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from flexkv.io.files import open_regular


class FileCalls(Protocol):
    """Files of one directory, written at their ends only. Every call may raise OSError."""

    def open(self, path: Path) -> int:
        """Open a file, or create it; never what is no file of ours.

        Raises:
            ConfigError: it cannot be opened, or is none.
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


class KernelCalls:
    """Calls the kernel."""

    def open(self, path: Path) -> int:
        """Open a file, or create it."""
        return open_regular(path, os.O_APPEND)

    def read(self, fd: int) -> bytes:
        """Return all that is in a file, from the device where the kernel lets us.

        An earlier process's sync may have failed. What it could not write is still cached, and
        taken for written: it is dropped before the file is read.
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
        os.close(fd)

    def rename(self, old: Path, new: Path) -> None:
        """Let a file take the place of another."""
        old.rename(new)

    def remove(self, path: Path) -> None:
        """Remove a file, if it is there."""
        path.unlink(missing_ok=True)

    def sync_folder(self, folder: Path) -> None:
        """Return once the names in a directory are on stable storage."""
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


KERNEL = KernelCalls()
