"""The server's socket: one server for an address, readable by its user only."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import struct
from contextlib import suppress
from pathlib import Path

from flexkv.common.errors import ConfigError

BACKLOG = 128


class Listener:
    """A listening unix socket, and the lock that says whose it is."""

    def __init__(self, path: Path) -> None:
        """Take the address, in place of a server that died; `path` is made with mode 0600.

        Raises:
            ConfigError: another server listens there, or it cannot be made.
        """
        self.path = path
        self._lock_path = path.with_name(path.name + ".lock")
        self._lock = _locked(self._lock_path, path)
        self._is_bound = False
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._bind(path)
        except OSError as error:
            self.close()
            raise ConfigError("server_recv_port", str(path), error.strerror or "") from error

    def _bind(self, path: Path) -> None:
        if path.exists() and not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(17, "is there, and is no socket")
        path.unlink(missing_ok=True)  # its server is gone: it had the lock
        before = os.umask(0o177)
        try:
            self.socket.bind(str(path))
        finally:
            os.umask(before)
        self._is_bound = True

    def listen(self) -> None:
        """Take connections: until then they are refused, as if nobody were there."""
        self.socket.listen(BACKLOG)
        self.socket.setblocking(False)

    def close(self) -> None:
        """Listen no more."""
        for path in (self.path, self._lock_path) if self._is_bound else (self._lock_path,):
            with suppress(OSError):
                path.unlink()
        self.socket.close()
        os.close(self._lock)


def _locked(lock_path: Path, path: Path) -> int:
    """Give the descriptor of the lock once it is ours.

    Raises:
        ConfigError: another server has it, or it cannot be made.
    """
    while True:
        try:
            lock = os.open(lock_path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            why = f"its lock cannot be made: {error.strerror}"
            raise ConfigError("server_recv_port", str(path), why) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            why = "is in use by another server: instances that share it must not launch their own"
            raise ConfigError("server_recv_port", str(path), why) from error
        with suppress(FileNotFoundError):
            if os.fstat(lock).st_ino == lock_path.stat().st_ino:
                return lock
        os.close(lock)  # its owner took it away as it ended: once more


def is_same_user(peer: socket.socket) -> bool:
    """Tell whether who connected is our user, or root."""
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return uid in (0, os.getuid())
