"""Directories and files that only we may write to, opened so that nobody can swap them.

A directory is checked once it is open, on its descriptor; files in it are opened by their name
relative to that descriptor. Whoever may write to one of its parents can therefore move the
directory away, or keep us from starting, but cannot make us read or write anything else.

A directory given as a symbolic link is followed, if we or root made the link; a file in a
directory never is.

Some file systems (FAT, CIFS, some of FUSE) fix the modes when they are mounted, and refuse chmod.
What nobody else may write to is used there all the same; that others may read it is told.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from errno import EACCES, EBADF, EINVAL, ENOSYS, EOPNOTSUPP, EPERM, EROFS
from pathlib import Path
from typing import NamedTuple

from flexkv.observe.logs import get_logger

log = get_logger(__name__)

DIRECTORY_MODE, FILE_MODE = 0o700, 0o600
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OTHERS_READ = stat.S_IRGRP | stat.S_IROTH
_OTHERS_ENTER = stat.S_IXGRP | stat.S_IXOTH
_NO_SYNC = {EBADF, EINVAL, ENOSYS, EOPNOTSUPP}
_NO_CHMOD = {EACCES, EINVAL, ENOSYS, EOPNOTSUPP, EPERM, EROFS}


class NotPrivateError(PermissionError):
    """Others can change a file or directory; `strerror` says how: "belongs to user …"."""

    def __init__(self, why: str, name: str) -> None:
        super().__init__(EPERM, why, name)

    def __reduce__(self) -> tuple[type[NotPrivateError], tuple[str, str], dict[str, object]]:
        return type(self), (str(self.strerror), str(self.filename)), self.__dict__


class Folder(NamedTuple):
    """An open directory."""

    path: Path
    """For messages."""
    fd: int


def open_directory(path: Path) -> int:
    """Return a descriptor of a directory that nobody but us and root may write to.

    Raises:
        NotPrivateError: somebody else may.
        OSError: it cannot be opened, or is no directory.
    """
    link = os.lstat(path)
    if stat.S_ISLNK(link.st_mode) and not _is_ours(link):
        raise NotPrivateError(f"is a link made by user {link.st_uid}", str(path))
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _check_access(os.fstat(fd), str(path))
    except BaseException:
        os.close(fd)
        raise
    return fd


def make_directory(path: Path) -> int:
    """Return a descriptor of such a directory; one that is missing is made, with mode 0700.

    Only the last component of the path is made.

    Raises:
        FileNotFoundError: its parent does not exist.
        NotPrivateError: somebody else may write to it.
        OSError: it cannot be made or opened, or is no directory.
    """
    try:
        os.mkdir(path, DIRECTORY_MODE)
    except FileExistsError:
        return open_directory(path)
    fd = open_directory(path)
    try:
        _set_mode(fd, DIRECTORY_MODE)  # the umask took bits away
    except BaseException:
        os.close(fd)
        raise
    return fd


def _set_mode(fd: int, mode: int) -> bool:
    """Set the mode of a file or directory of ours; return whether it has that mode now."""
    try:
        os.fchmod(fd, mode)
    except OSError as error:
        if error.errno not in _NO_CHMOD:
            raise
    return stat.S_IMODE(os.fstat(fd).st_mode) == mode


def sync_directory(fd: int) -> None:
    """Return once the names in a directory are on stable storage, if its file system can sync.

    Some file systems cannot. There the names are as safe as the file system makes them.

    Raises:
        OSError: the device refused.
    """
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def open_file(folder_fd: int, name: str, flags: int) -> int:
    """Return a descriptor of a regular file that nobody but us and root may write to.

    A file that others may read is made private; one that is created (`os.O_CREAT`) has mode 0600.

    Args:
        folder_fd: the directory, as from `open_directory`.
        name: of the file in it.
        flags: for `os.open`.

    Raises:
        FileNotFoundError: there is none, and `flags` create none.
        NotPrivateError: somebody else may write to it, or it is no regular file, or it has
            another name as well.
        OSError: it cannot be opened.
    """
    try:
        # Opening a device or a pipe may do something already.
        _check_file(os.stat(name, dir_fd=folder_fd, follow_symlinks=False), name)
    except FileNotFoundError:
        if not flags & os.O_CREAT:
            raise
    fd = os.open(name, flags | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE, dir_fd=folder_fd)
    try:
        found = os.fstat(fd)
        _check_file(found, name)
        mode = stat.S_IMODE(found.st_mode)
        is_private = mode == FILE_MODE or (
            found.st_uid == os.geteuid() and _set_mode(fd, FILE_MODE)
        )
        if not is_private and mode & _OTHERS_READ and os.fstat(folder_fd).st_mode & _OTHERS_ENTER:
            why = "its file system refuses chmod, or it belongs to root: mount it with umask=077"
            log.warning("others_may_read", file=name, mode=f"{mode:04o}", reason=why)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_file(found: os.stat_result, name: str) -> None:
    if stat.S_ISLNK(found.st_mode):
        raise NotPrivateError("is a symbolic link", name)
    if not stat.S_ISREG(found.st_mode):
        raise NotPrivateError("is not a regular file", name)
    if found.st_nlink > 1:
        raise NotPrivateError("has another name as well (a hard link)", name)
    _check_access(found, name)


def _check_access(found: os.stat_result, name: str) -> None:
    if not _is_ours(found):
        why = f"belongs to user {found.st_uid}, not to us (user {os.geteuid()}) or root"
        raise NotPrivateError(why, name)
    mode = stat.S_IMODE(found.st_mode)
    if mode & _OTHERS_WRITE:
        helps = "chmod go-w, or umask=077 if the mount sets the modes"
        raise NotPrivateError(f"may be written to by others (mode {mode:04o}): {helps}", name)


def _is_ours(found: os.stat_result) -> bool:
    return found.st_uid in (0, os.geteuid())


def new_name(name: str) -> str:
    """Return the name under which `replace_file` writes a file, before it takes its place."""
    return f"{name}.new"


def replace_file(folder: Folder, name: str, content: bytes) -> None:
    """Give a file in a directory new content, at once and for good.

    Raises:
        OSError: the directory takes no file.
    """
    new = new_name(name)
    with suppress(FileNotFoundError):
        os.unlink(new, dir_fd=folder.fd)  # left by a process that was killed here
    fd = open_file(folder.fd, new, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    with open(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fdatasync(fd)
    os.rename(new, name, src_dir_fd=folder.fd, dst_dir_fd=folder.fd)
    sync_directory(folder.fd)
