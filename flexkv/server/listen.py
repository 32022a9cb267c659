"""The server's socket: one server per address, accessible to its user only.

An address is locked by a read lock on one byte of its *directory*. Removing files does not release
the lock; the end of the process does. Directories take no write locks, so a server first takes its
read lock, and then asks whether another process has one in the range of this address:

    byte = hash of the socket's name << 32 | process id   (so that an error can name the process)

Servers with other names in the directory use other ranges, and an engine whose SSD tier is in it
uses another kind of lock (`flock`). If the whole directory was removed, or locks do not work there,
two other signs show a live server: it answers at the path, or at a name in the abstract namespace,
which is not a file (the *witness*). Only answers of our user or root count.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import struct
import time
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from random import uniform
from typing import NamedTuple

from flexkv.common.errors import ConfigError
from flexkv.observe.logs import get_logger
from flexkv.server.address import own_folders, prepare_folder

log = get_logger(__name__)

BACKLOG = 128
SOCKET_MODE = 0o600
LOCK_TRIES, LOCK_PAUSE_S = 20, 0.01
"""Two servers that start at once may each see the other's lock: both release it and try again."""
_FLOCK = "hhqqi4x"
"""C's `struct flock`: type, whence, start, length, pid."""
_UCRED = "iII"
"""C's `struct ucred`: pid, uid, gid."""
_RANGE = 1 << 32


class Peer(NamedTuple):
    """The process and the user at the other end of a unix socket."""

    pid: int
    uid: int


class Listener:
    """A listening unix socket, and the lock on its address."""

    def __init__(self, path: Path) -> None:
        """Bind the address with mode 0600, in place of any server that died.

        Raises:
            ConfigError: another server has the address, a stranger may write to its directory, or
                it cannot be bound.
        """
        self.path = path
        self._process = os.getpid()
        self._folder_fd: int | None = None
        self._socket_at: os.stat_result | None = None
        self._told = ""
        self.socket = _new_socket()
        self._witness = _new_socket()
        try:
            self._bind_witness()
            self._take()
        except BaseException:
            self.close()
            raise
        _open.add(self)

    def listen(self) -> None:
        """Start to accept connections; until then they are refused, as if there were no server."""
        self.socket.listen(BACKLOG)
        self.socket.setblocking(False)

    def renew(self) -> bool:
        """Bind anew if the socket's file was removed; return whether `socket` has changed.

        The caller then closes the old socket. If another file has taken the place of the socket's,
        it is left alone, and that is logged once.
        """
        found = _stat(self.path)
        if found is not None:
            is_ours = self._socket_at is not None and os.path.samestat(found, self._socket_at)
            self._tell("" if is_ours else "another file has taken the place of the socket")
            return False
        before, self.socket = self.socket, _new_socket()
        try:
            self._take()
            self.listen()
        except (ConfigError, OSError) as error:
            self.socket.close()
            self.socket = before
            self._tell(str(error))
            return False
        log.warning("address_bound_anew", path=str(self.path), reason="its socket was removed")
        self._told = ""
        return True

    def _tell(self, what: str) -> None:
        """Log once why nobody new can connect at the address; `what` is empty if all is well."""
        if what and what != self._told:
            log.error("address_lost", path=str(self.path), reason=what)
        self._told = what

    def close(self) -> None:
        """Stop listening, even if children were forked; in a child, only close its descriptors."""
        _open.discard(self)
        if os.getpid() == self._process:
            found = _stat(self.path)
            if found and self._socket_at and os.path.samestat(found, self._socket_at):
                with suppress(OSError):
                    self.path.unlink()
            _end(self.socket)
            _end(self._witness)
            if self._folder_fd is not None:
                with suppress(OSError):
                    _set_lock(self._folder_fd, fcntl.F_UNLCK, 0, 0)
        self._socket_at = None
        self.drop()

    def drop(self) -> None:
        """Close the descriptors, and leave the files as they are."""
        self.socket.close()
        self._witness.close()
        if self._folder_fd is not None:
            os.close(self._folder_fd)
            self._folder_fd = None

    # -- taking the address ---------------------------------------------------------------------

    def _take(self) -> None:
        """Lock the directory that exists now, and bind.

        Raises:
            ConfigError: another server has the address, or it cannot be bound.
        """
        try:
            prepare_folder(self.path.parent)
            self._look_elsewhere()
            self._lock_folder()
            self._bind()
        except OSError as error:
            where = f"{error.filename} " if error.filename else ""
            why = f"{where}{error.strerror or error}"
            raise ConfigError("server_recv_port", str(self.path), why) from error

    def _look_elsewhere(self) -> None:
        """Raise ConfigError if our user's server listens in another of its possible directories."""
        folders = own_folders()
        if self.path.parent in folders:
            for folder in folders:
                if folder != self.path.parent:
                    self._refuse_if_served(str(folder / self.path.name))

    def _lock_folder(self) -> None:
        fd = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        unused: int | None = fd
        try:
            locked = self._folder_fd
            if locked is None or not os.path.samestat(os.fstat(fd), os.fstat(locked)):
                self._lock(fd)
                unused, self._folder_fd = locked, fd
        finally:
            if unused is not None:
                os.close(unused)

    def _lock(self, fd: int) -> None:
        start = _range_of(self.path.name)
        for _ in range(LOCK_TRIES):
            try:
                _set_lock(fd, fcntl.F_RDLCK, start + self._process, 1)
                holder = _holder(fd, start)
            except OSError as error:
                log.warning("address_not_locked", path=str(self.path), reason=str(error))
                return
            if holder is None:
                return
            _set_lock(fd, fcntl.F_UNLCK, 0, 0)
            time.sleep(uniform(0.5, 1.5) * LOCK_PAUSE_S)
        who = f"process {holder}"
        if os.fstat(fd).st_mode & (stat.S_IRGRP | stat.S_IROTH):
            who += ", unless another user who may read its directory holds its lock"
        raise self._in_use(who)

    def _bind(self) -> None:
        path = self.path
        if (found := _stat(path)) is not None:
            if not stat.S_ISSOCK(found.st_mode):
                raise FileExistsError(17, "exists and is not a socket")
            if (peer := self._refuse_if_served(str(path))) is not None:
                why = f"is served by user {peer.uid} (process {peer.pid}), a different user"
                raise ConfigError("server_recv_port", str(path), why)
            path.unlink()  # its server is gone
        self.socket.bind(str(path))
        self._socket_at = path.lstat()
        # Nobody can connect before `listen`, so the mode that the umask left does no harm.
        # (Setting the umask instead would affect files that other threads make meanwhile.)
        path.chmod(SOCKET_MODE)

    def _bind_witness(self) -> None:
        """Bind the witness; only log it if that fails for another reason than a server of ours."""
        name = _witness_name(self.path)
        try:
            self._witness.bind(name)
            self._witness.listen()
        except OSError as error:
            peer = self._refuse_if_served(name)
            who = str(error) if peer is None else f"user {peer.uid} has bound its name"
            log.warning("abstract_name_not_bound", path=str(self.path), reason=who)

    def _refuse_if_served(self, address: str) -> Peer | None:
        """Return the process of another user that listens at an address; None if none does.

        Raises:
            ConfigError: our user or root listens there.
        """
        with _new_socket() as ours:
            ours.setblocking(False)
            try:
                ours.connect(address)
            except BlockingIOError:  # its backlog is full
                if not address.startswith("\0"):
                    raise self._in_use("a process that accepts no connection") from None
                return None
            except OSError:
                return None
            peer = peer_of(ours)
        if is_trusted(peer):
            raise self._in_use(f"process {peer.pid}")
        return peer

    def _in_use(self, who: str) -> ConfigError:
        why = (
            f"is in use by another server ({who}): stop it, or set another server_recv_port; if "
            "engines share a server, only one of them may launch it"
        )
        return ConfigError("server_recv_port", str(self.path), why)


_open: set[Listener] = set()


def _drop_in_child() -> None:
    for listener in list(_open):
        listener.drop()


os.register_at_fork(after_in_child=_drop_in_child)


def _new_socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)


def _end(listening: socket.socket) -> None:
    """Refuse further connections, even at a forked child's copy of the socket."""
    with suppress(OSError):
        listening.shutdown(socket.SHUT_RDWR)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except OSError:
        return None


def _witness_name(path: Path) -> str:
    """Return a name in the abstract namespace for a path, as this user's processes see the path.

    Containers may share that namespace (with the host's network), but not the files.
    """
    root = os.stat("/")
    mounts = 0
    with suppress(OSError):
        mounts = os.stat("/proc/self/ns/mnt").st_ino
    text = f"{os.geteuid()} {mounts} {root.st_dev} {root.st_ino} {path}"
    return "\0flexkv/" + blake2b(os.fsencode(text), digest_size=16).hexdigest()


def _range_of(name: str) -> int:
    """Return the first byte of the range in a directory that locks a socket's name."""
    digest = blake2b(os.fsencode(name), digest_size=4).digest()
    return (int.from_bytes(digest, "little") >> 2) * _RANGE


def _set_lock(fd: int, kind: int, start: int, length: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, kind, 0, start, length, 0))


def _holder(fd: int, start: int) -> int | None:
    """Return the id of another process with a lock in an address's range; None if none has."""
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, 0, start, _RANGE, 0)
    kind, _, at, _, _ = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))
    return None if kind == fcntl.F_UNLCK else at - start


def peer_of(connected: socket.socket) -> Peer:
    """Return the peer of a unix socket: who it was when it connected, or began to listen."""
    size = struct.calcsize(_UCRED)
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    pid, uid, _ = struct.unpack(_UCRED, credentials)
    return Peer(pid, uid)


def is_trusted(peer: Peer) -> bool:
    """Return whether a peer is our user, or root."""
    return peer.uid in (0, os.geteuid())


def is_same_user(peer: socket.socket) -> bool:
    """Return whether the peer of a socket is our user, or root."""
    return is_trusted(peer_of(peer))
