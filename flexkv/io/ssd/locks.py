"""A lock on a directory, which one process holds, and which no removal of a file releases.

The directory itself is locked (`flock` on its descriptor). A file in it, `lock.flexkv`, has the
number of the holder's process, for messages. It is locked as well, to keep out releases of FlexKV
that lock only this file, and other machines on a shared file system. Removing it changes nothing.
On a full disk the file, or the number in it, may be missing. Where directories cannot be locked
(NFS), the lock on the file suffices.

A `flock` belongs to the open file, which a forked child shares. Three rules keep a child from
holding the lock: a child closes its copies when it is forked; `release` unlocks explicitly, which
works for all copies; and only the process that took the lock may unlock it.
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
"""How often locking is tried if the directory is replaced meanwhile."""
_CANNOT_LOCK = {EBADF, EINVAL, ENOLCK, ENOSYS, ENOTSUP, EOPNOTSUPP}
_FULL = {EDQUOT, ENOSPC}


class DirectoryLock:
    """A directory that this process has locked.

    Attributes:
        fd: the directory's descriptor, which holds its lock; -1 once released, and in a child.
    """

    def __init__(self, fd: int, note_fd: int) -> None:
        """Take ownership of locked descriptors."""
        self.fd, self._note_fd = fd, note_fd
        self._process = os.getpid()
        _held.add(self)

    def release(self) -> None:
        """Release the lock, even if forked children have copies of it. Idempotent."""
        _held.discard(self)
        for fd in (self._note_fd, self.fd):
            if fd >= 0:
                if os.getpid() == self._process:  # a child must not release its parent's lock
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

    Does not check who owns the directory: see `private.open_directory`.

    Raises:
        BlockingIOError: another process holds it; `strerror` says which.
        OSError: it is not a directory, or cannot be opened or locked.
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
    raise BlockingIOError(EAGAIN, "is replaced again and again, so it cannot be locked", str(path))


def lock_open_directory(folder_fd: int, path: Path) -> DirectoryLock:
    """Lock an open directory; the caller still owns the descriptor, `path` is for messages.

    Raises:
        BlockingIOError: another process holds it; `strerror` says which.
        OSError: it cannot be locked.
    """
    fd = note_fd = -1
    try:
        fd = os.open(".", _DIRECTORY, dir_fd=folder_fd)  # a copy would share the lock
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
        BlockingIOError: another process holds it.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _CANNOT_LOCK:
            raise
        return False
    return True


def _open_note(folder_fd: int) -> int:
    """Open the lock file; return -1 if it is missing and the disk is too full to create it."""
    try:
        return open_file(folder_fd, NOTE_NAME, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        return -1


def _lock_note(note_fd: int, is_folder_locked: bool) -> None:
    """Lock the lock file, and write the number of this process to it, unless the disk is full.

    Raises:
        BlockingIOError: another process holds it.
        OSError: neither it nor the directory can be locked.
    """
    if not (note_fd >= 0 and _locks(note_fd)) and not is_folder_locked:
        raise OSError(ENOLCK, "neither the directory nor its lock file can be locked")
    if note_fd < 0:
        return
    try:
        os.ftruncate(note_fd, 0)
        os.pwrite(note_fd, str(os.getpid()).encode(), 0)
    except OSError as error:
        if error.errno not in _FULL:
            raise


def _holder(fd: int) -> str:
    """Return a name for the process that holds the lock, from the lock file if possible."""
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
    """Return whether the directory open as `fd` is still the one at `path`."""
    with suppress(OSError):
        return os.path.samestat(os.stat(path), os.fstat(fd))
    return False
