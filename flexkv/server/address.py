"""Finds the sockets that an address names, and checks that strangers cannot replace them.

The default address, `own`, is a directory that belongs to the user alone. Processes of one engine
may have different environments (Ray workers, systemd units and cron jobs lack `XDG_RUNTIME_DIR`),
so the directories have a fixed order: a server uses the first that exists, clients try each.

    $XDG_RUNTIME_DIR/flexkv/server     if that directory exists and is ours
    /run/user/UID/flexkv/server        likewise: what XDG_RUNTIME_DIR usually is
    /tmp/flexkv-UID/server
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from errno import ELOOP, EPERM
from pathlib import Path

from flexkv.common.errors import ConfigError
from flexkv.io.private import DIRECTORY_MODE, make_directory

OWN = "own"
"""The address of this user's own server."""
SOCKET_NAME = "server"
RUNTIME, SHARED = Path("/run/user"), Path("/tmp")
PATH_BYTES_MAX = 100
"""Longest path of a socket; `sun_path` has 108 bytes."""
_LINKS_MAX = 40


def socket_paths(address: str, environ: Mapping[str, str] = os.environ) -> tuple[Path, ...]:
    """Return the sockets at which the server of an address may listen, in the order to try them.

    Raises:
        ConfigError: the address is not valid.
    """
    if address in ("", OWN):
        return tuple(folder / SOCKET_NAME for folder in own_folders(environ))
    scheme, separator, rest = address.partition("://")
    if not separator:
        rest = address
    elif scheme not in ("ipc", "unix"):
        why = "must be a unix socket (ipc:///path): a server serves only its own machine"
        raise ConfigError("server_recv_port", address, why)
    path = Path(rest)
    if not path.is_absolute() or len(os.fsencode(rest)) > PATH_BYTES_MAX or "\0" in rest:
        why = f"must be {OWN!r}, or an absolute path of at most {PATH_BYTES_MAX} bytes"
        raise ConfigError("server_recv_port", address, why)
    return (path,)


def socket_path(address: str, environ: Mapping[str, str] = os.environ) -> Path:
    """Return the socket on which a server at an address listens.

    Raises:
        ConfigError: the address is not valid.
    """
    return socket_paths(address, environ)[0]


def own_folders(environ: Mapping[str, str] = os.environ) -> tuple[Path, ...]:
    """Return the directories in which this user's own server may have its socket."""
    uid = os.geteuid()
    told = environ.get("XDG_RUNTIME_DIR", "")
    bases = [Path(told)] if told.startswith("/") else []
    bases.append(RUNTIME / str(uid))
    folders = [base / "flexkv" for base in bases if _is_own(base)]
    folders.append(SHARED / f"flexkv-{uid}")
    fitting = (f for f in folders if len(os.fsencode(f / SOCKET_NAME)) <= PATH_BYTES_MAX)
    return tuple(dict.fromkeys(fitting))


def _is_own(folder: Path) -> bool:
    """Return whether a directory is ours alone; after `su` the variable may still be another's."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    return is_ours and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def prepare_folder(folder: Path, environ: Mapping[str, str] = os.environ) -> None:
    """Create a socket's directory if it is one of `own_folders`, and check who may write to it.

    Raises:
        OSError: the directory does not exist, or a stranger could replace it or the socket.
    """
    if folder in own_folders(environ):
        _make_own(folder)
    check_folder(folder)


def _make_own(folder: Path) -> None:
    """Create a directory with mode 0700; an existing one must be ours, and is made private."""
    fd = make_directory(folder)
    try:
        found = os.fstat(fd)
        if stat.S_ISLNK(folder.lstat().st_mode):
            raise PermissionError(EPERM, "is a symbolic link", str(folder))
        if found.st_uid != os.geteuid():
            why = f"belongs to user {found.st_uid}, not to us (user {os.geteuid()})"
            raise PermissionError(EPERM, why, str(folder))
        os.fchmod(fd, DIRECTORY_MODE)
    finally:
        os.close(fd)


def check_folder(folder: Path) -> None:
    """Check that no stranger can replace a directory or a socket in it.

    Every directory from the root on, and every symbolic link on the way, must belong to us or root.
    A directory to which others may write must have the sticky bit.

    Raises:
        PermissionError: a stranger can; the error says where and why.
        OSError: the directory does not exist.
    """
    at, ahead, links = Path("/"), list(folder.parts[1:]), 0
    _check_entry(at, at.lstat())
    while ahead:
        name = ahead.pop(0)
        if name == "..":
            at = at.parent
            continue
        entry = at / name
        found = entry.lstat()
        if not stat.S_ISLNK(found.st_mode):
            at = entry
            _check_entry(at, found)
            continue
        _check_owner(entry, found)
        links += 1
        if links > _LINKS_MAX:
            raise OSError(ELOOP, os.strerror(ELOOP), str(folder))
        target = entry.readlink()
        if target.is_absolute():
            at = Path("/")
        ahead[:0] = [part for part in target.parts if part != "/"]


def _check_entry(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(f"{path} is not a directory")
    _check_owner(path, found)
    mode = stat.S_IMODE(found.st_mode)
    if _others_write(path, found) and not mode & stat.S_ISVTX:
        why = f"is writable by others (mode {mode:04o}): run chmod go-w, or chmod +t"
        raise PermissionError(EPERM, why, str(path))


def _check_owner(path: Path, found: os.stat_result) -> None:
    # In a user namespace root may have another id: that of the owner of /.
    if found.st_uid not in (0, os.geteuid(), Path("/").lstat().st_uid):
        why = f"belongs to user {found.st_uid}, not to us (user {os.geteuid()}) or root"
        raise PermissionError(EPERM, why, str(path))


def _others_write(path: Path, found: os.stat_result) -> bool:
    """Return whether another user may write to a directory.

    A group with the owner's id has no other members, by the custom of `useradd`. But if there is
    an access control list, the group's bits stand for the list.
    """
    if found.st_mode & stat.S_IWOTH:
        return True
    if not found.st_mode & stat.S_IWGRP:
        return False
    try:
        has_list = "system.posix_acl_access" in os.listxattr(path)
    except OSError:
        has_list = False
    return has_list or found.st_gid != found.st_uid
