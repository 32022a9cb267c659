"""How clients and agents connect: a blocking socket, a `Hello`, and the server's answer."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import NamedTuple

from flexkv.common.errors import ClosedError, ConfigError
from flexkv.io.memory.arena import Arena
from flexkv.links.framing import LENGTH_BYTES
from flexkv.server.address import socket_paths
from flexkv.server.listen import is_same_user, peer_of
from flexkv.server.wire import (
    FROM_SERVER,
    PROTOCOL_VERSION,
    FromServer,
    Hello,
    ProtocolError,
    Welcome,
    framed,
    length_of,
    understood,
)

ANSWER_S = 5.0
"""How long a server may take to answer."""


class Connected(NamedTuple):
    """A connection to a server that has accepted us."""

    socket: socket.socket
    welcome: Welcome
    arena_fd: int | None
    """Descriptor of the host memory, if the server sent one; the caller closes it."""


def connect(address: str, hello: Hello, answer_s: float = ANSWER_S) -> Connected:
    """Connect to the server at an address, which may take `answer_s` to answer.

    Nothing is sent to a server of another user, who would get our KV.

    Raises:
        OSError: nobody listens there, or nobody answers in time.
        ConfigError: the server there is another user's or not FlexKV's, or refuses us and says why.
        ClosedError: the server is closing.
    """
    peer, path = _reached(address, answer_s)
    fds: list[int] = []
    try:
        _check_server(peer, path)
        peer.sendall(framed(hello))
        head, fds, _, _ = socket.recv_fds(peer, LENGTH_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        head += read(peer, LENGTH_BYTES - len(head))
        welcome = _taken(understood(FROM_SERVER, read(peer, length_of(head))))
    except BaseException as error:
        peer.close()
        for fd in fds:
            os.close(fd)
        if isinstance(error, ProtocolError):
            why = "the process that listens there is not a FlexKV server"
            raise ConfigError("server_recv_port", address, why) from error
        raise
    return Connected(peer, welcome, fds[0] if fds else None)


def _reached(address: str, answer_s: float) -> tuple[socket.socket, Path]:
    """Connect to whoever listens at an address; return the socket and its path.

    Raises:
        OSError: nobody listens there; the error names the path.
        ConfigError: the address is not valid.
    """
    *others, last = socket_paths(address)
    for path in (*others, last):
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            peer.settimeout(answer_s)
            peer.connect(str(path))
        except OSError as error:
            peer.close()
            is_absent = isinstance(error, FileNotFoundError | ConnectionRefusedError)
            if is_absent and path != last:
                continue
            if error.errno is None:  # it timed out
                raise
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        else:
            return peer, path
    raise AssertionError("an address names at least one socket")


def _check_server(peer: socket.socket, path: Path) -> None:
    """Check that the server belongs to our user or root.

    Raises:
        ConfigError: it belongs to another user.
    """
    if not is_same_user(peer):
        pid, uid = peer_of(peer)
        why = (
            f"is served by user {uid} (process {pid}), who is neither us (user {os.geteuid()})"
            " nor root: nothing was sent"
        )
        raise ConfigError("server_recv_port", str(path), why)


def _taken(answer: FromServer) -> Welcome:
    """Return the answer of a server that accepts us.

    Raises:
        ConfigError: the server refuses us, or speaks another version of the protocol.
        ProtocolError: the message is not a `Welcome`.
    """
    if not isinstance(answer, Welcome):
        raise ProtocolError("the answer to a Hello must be a Welcome")
    if answer.refusal is not None:
        raise ConfigError(*answer.refusal)
    if answer.version != PROTOCOL_VERSION:
        why = f"this process speaks version {PROTOCOL_VERSION}: use the same FlexKV everywhere"
        raise ConfigError("protocol_version", answer.version, why)
    return answer


def read(peer: socket.socket, count: int) -> bytes:
    """Read exactly `count` bytes.

    Raises:
        OSError: the peer did not send them in time.
        ClosedError: the peer closed the connection first.
    """
    got = bytearray()
    while len(got) < count:
        more = peer.recv(count - len(got))
        if not more:
            raise ClosedError("the server closed the connection")
        got += more
    return bytes(got)


def message(peer: socket.socket) -> FromServer:
    """Read one message.

    Raises:
        OSError: the server did not send it in time.
        ClosedError: the server closed the connection first.
        ProtocolError: the server sent something that is not a message.
    """
    return understood(FROM_SERVER, read(peer, length_of(read(peer, LENGTH_BYTES))))


def attached_arena(connected: Connected) -> Arena:
    """Map the host memory of a server.

    Raises:
        OSError: it cannot be mapped, or does not match what the server says about it.
        ProtocolError: the server sent no descriptor of it.
    """
    welcome, fd = connected.welcome, connected.arena_fd
    if fd is None:
        raise ProtocolError("the server sent no descriptor of its host memory")
    return Arena.attach(
        fd, welcome.num_host_blocks, welcome.block_stride_bytes, welcome.fd_offset_bytes
    )
