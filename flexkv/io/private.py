"""Directories and files that only we and root may write to, opened so that nobody can swap them.

A directory is opened first, and checked on its descriptor; files in it are opened by name relative
to that descriptor. Somebody who may write to one of its parents can therefore move the directory
away, or keep us from starting, but cannot make us read or write anything else.

A directory given as a symbolic link is followed if we or root made the link; a file that is a
symbolic link is refused.

Some file systems (FAT, CIFS, some of FUSE) fix the modes at mount time and refuse chmod. Files
there are used if nobody else may write to them; a warning is logged if others may read them.
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
    """A file or directory that others can change; `strerror` says how: "belongs to user …"."""

    def __init__(self, why: str, name: str) -> None:
        super().__init__(EPERM, why, name)

    def __reduce__(self) -> tuple[type[NotPrivateError], tuple[str, str], dict[str, object]]:
        return type(self), (str(self.strerror), str(self.filename)), self.__dict__


class Folder(NamedTuple):
    """An open directory."""

    path: Path
    """Names it in messages; its files are opened by `fd`."""
    fd: int


def open_directory(path: Path) -> int:
    """Return a descriptor of a directory that nobody but us and root may write to.

    Raises:
        NotPrivateError: somebody else may write to it.
        OSError: it cannot be opened, or is not a directory.
    """
    link = os.lstat(path)
    if stat.S_ISLNK(link.st_mode) and not _is_ours(link):
        raise NotPrivateError(f"is a symbolic link made by user {link.st_uid}", str(path))
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _check_access(os.fstat(fd), str(path))
    except BaseException:
        os.close(fd)
        raise
    return fd


def make_directory(path: Path) -> int:
    """Return a descriptor of a private directory, and create it with mode 0700 if it is missing.

    Only the last component of the path is created.

    Raises:
        FileNotFoundError: its parent does not exist.
        NotPrivateError: somebody else may write to it.
        OSError: it cannot be created or opened, or is not a directory.
    """
    try:
        os.mkdir(path, DIRECTORY_MODE)
    except FileExistsError:
        return open_directory(path)
    fd = open_directory(path)
    try:
        _set_mode(fd, DIRECTORY_MODE)  # the umask may have removed bits
    except BaseException:
        os.close(fd)
        raise
    return fd


def _set_mode(fd: int, mode: int) -> bool:
    """Try to set the mode of a file or directory of ours; return whether it has it now."""
    try:
        os.fchmod(fd, mode)
    except OSError as error:
        if error.errno not in _NO_CHMOD:
            raise
    return stat.S_IMODE(os.fstat(fd).st_mode) == mode


def sync_directory(fd: int) -> None:
    """Return once the names in a directory are on stable storage, if its file system can sync.

    If it cannot, the names are as safe as the file system makes them.

    Raises:
        OSError: the device reported an error.
    """
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def open_file(folder_fd: int, name: str, flags: int) -> int:
    """Return a descriptor of a regular file that nobody but us and root may write to.

    A file that others may read is set to mode 0600; one that is created (`os.O_CREAT`) gets it too.

    Args:
        folder_fd: the directory, as from `open_directory`.
        name: the file's name in that directory.
        flags: those of `os.open`.

    Raises:
        FileNotFoundError: it is missing, and `flags` do not create it.
        NotPrivateError: somebody else may write to it, it is not a regular file, or it has a
            second name.
        OSError: it cannot be opened.
    """
    try:
        # Checked before it is opened, because opening a device or a pipe has side effects.
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
            why = "chmod is refused, or the file belongs to root: mount the disk with umask=077"
            log.warning("file_readable_by_others", file=name, mode=f"{mode:04o}", reason=why)
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
        raise NotPrivateError("has a second name (a hard link)", name)
    _check_access(found, name)


def _check_access(found: os.stat_result, name: str) -> None:
    if not _is_ours(found):
        why = f"belongs to user {found.st_uid}, not to us (user {os.geteuid()}) or root"
        raise NotPrivateError(why, name)
    mode = stat.S_IMODE(found.st_mode)
    if mode & _OTHERS_WRITE:
        helps = "run chmod go-w, or mount with umask=077 if the mount sets the modes"
        raise NotPrivateError(f"is writable by others (mode {mode:04o}): {helps}", name)


def _is_ours(found: os.stat_result) -> bool:
    return found.st_uid in (0, os.geteuid())


def new_name(name: str) -> str:
    """Return the name under which `replace_file` writes a file before it renames it."""
    return f"{name}.new"


def replace_file(folder: Folder, name: str, content: bytes) -> None:
    """Replace a file's content atomically, and sync it to stable storage.

    Raises:
        OSError: the file cannot be written.
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
