"""A lock on a directory: one process has it, and removing a file does not take it away.

What is locked is the directory itself (`flock` on its descriptor). A file `lock.flexkv` in it
carries the number of the holder's process for messages, and is locked as well, so that releases
which lock only this file, and other machines on a shared file system, are kept out too. Removing
the file changes nothing. On a full disk the file may lack, or lack the number; where directories
cannot be locked (NFS), the file is.

`flock` belongs to the open file, which a forked child shares. Three rules keep a child from
holding the lock: a child closes its copies as it is forked; `release` unlocks explicitly, which
counts for all copies; and only the process that took the lock may unlock it.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from errno import EAGAIN, EBADF, EDQUOT, EINVAL, ENOLCK, ENOSPC, ENOSYS, ENOTSUP, EOPNOTSUPP
from pathlib import Path

from flexkv.io.private import open_file

NOTE_NAME = "lock.flexkv"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_TRIES = 16
"""How often a directory may be replaced while it is being locked, before that is given up."""
_CANNOT_LOCK = {EBADF, EINVAL, ENOLCK, ENOSYS, ENOTSUP, EOPNOTSUPP}
_FULL = {EDQUOT, ENOSPC}


class DirectoryLock:
    """A directory that this process has locked.

    Attributes:
        fd: names the directory, and holds its lock; -1 once released, and in a forked child.
    """

    def __init__(self, fd: int, note_fd: int) -> None:
        """Take locked descriptors, which this object closes."""
        self.fd, self._note_fd = fd, note_fd
        self._process = os.getpid()
        _held.add(self)

    def release(self) -> None:
        """Let others lock the directory, even if children were forked. Idempotent."""
        _held.discard(self)
        for fd in (self._note_fd, self.fd):
            if fd >= 0:
                if os.getpid() == self._process:  # a child must not unlock what its parent has
                    with suppress(OSError):
                        fcntl.flock(fd, fcntl.LOCK_UN)
                with suppress(OSError):
                    os.close(fd)
        self.fd = self._note_fd = -1


_held: set[DirectoryLock] = set()


def _drop_in_child() -> None:
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_drop_in_child)


def lock_directory(path: Path) -> DirectoryLock:
    """Lock a directory until the lock is released or this process ends.

    Its owner is not checked: see `private.open_directory`.

    Raises:
        BlockingIOError: another holder has it; its `strerror` says which process.
        OSError: it is no directory, or cannot be opened or locked.
    """
    for _ in range(_TRIES):
        fd = os.open(path, _DIRECTORY)
        try:
            lock = lock_open_directory(fd, path)
        finally:
            os.close(fd)
        if _is_at(path, lock.fd):
            return lock
        lock.release()  # another directory took its place before it was locked
    raise BlockingIOError(EAGAIN, "is being replaced again and again", str(path))


def lock_open_directory(folder_fd: int, path: Path) -> DirectoryLock:
    """Lock a directory that is open; the descriptor stays the caller's, `path` is for messages.

    Raises:
        BlockingIOError: another holder has it; its `strerror` says which process.
        OSError: it cannot be locked.
    """
    fd = note_fd = -1
    try:
        fd = os.open(".", _DIRECTORY, dir_fd=folder_fd)  # a lock of its own, not a copy's
        is_locked = _locks(fd)
        note_fd = _open_note(fd)
        _lock_note(note_fd, is_locked)
    except BaseException as error:
        for each in (fd, note_fd):
            if each >= 0:
                os.close(each)
        if isinstance(error, BlockingIOError):
            why = f"is in use by {_holder(folder_fd)}"
            raise BlockingIOError(error.errno, why, str(path)) from error
        raise
    return DirectoryLock(fd, note_fd)


def _locks(fd: int) -> bool:
    """Lock a file or directory; return False if its file system has no locks.

    Raises:
        BlockingIOError: another holder has it.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _CANNOT_LOCK:
            raise
        return False
    return True


def _open_note(folder_fd: int) -> int:
    """Open the note; return -1 if it does not exist and there is no room to make it."""
    try:
        return open_file(folder_fd, NOTE_NAME, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        return -1


def _lock_note(note_fd: int, is_folder_locked: bool) -> None:
    """Lock the note, and write the number of this process to it, unless the disk is full.

    Raises:
        BlockingIOError: another holder has it.
        OSError: it cannot be locked, and the directory could not be either.
    """
    if not (note_fd >= 0 and _locks(note_fd)) and not is_folder_locked:
        raise OSError(ENOLCK, "neither it nor a file in it can be locked")
    if note_fd < 0:
        return
    try:
        os.ftruncate(note_fd, 0)
        os.pwrite(note_fd, str(os.getpid()).encode(), 0)
    except OSError as error:
        if error.errno not in _FULL:
            raise


def _holder(fd: int) -> str:
    """Return a name of the process that has the lock, as far as the note shows."""
    with suppress(OSError):
        note_fd = open_file(fd, NOTE_NAME, os.O_RDONLY)
        try:
            number = os.pread(note_fd, 32, 0).decode("ascii", "replace").strip()
        finally:
            os.close(note_fd)
        if number.isdecimal():
            return f"process {number}"
    return "another process"


def _is_at(path: Path, fd: int) -> bool:
    """Return whether the directory that is open as `fd` is still the one at `path`."""
    with suppress(OSError):
        return os.path.samestat(os.stat(path), os.fstat(fd))
    return False
