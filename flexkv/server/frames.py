"""A client's socket to a server: sends frames, receives whole messages, waits only on request.

The socket never blocks, and no call changes its mode: each change would be one more system call,
and each system call may let another thread take the interpreter's lock.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator
from contextlib import suppress

from flexkv.common.errors import ClosedError
from flexkv.links.framing import LENGTH_BYTES
from flexkv.process import forks
from flexkv.server.wire import (
    FROM_SERVER,
    FromServer,
    Message,
    framed,
    length_of,
    understood,
)

READ_BYTES = 1 << 16


class FrameSocket:
    """One connection to a server.

    Attributes:
        unsent: queued bytes that the server's socket has not accepted yet.
        is_drained: whether the last `receive` read everything that had arrived.
    """

    def __init__(self, connected: socket.socket) -> None:
        """Take over a connected socket, which `close` closes."""
        connected.setblocking(False)
        self._socket = connected
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(connected, select.POLLIN)
        self._writable.register(connected, select.POLLOUT)
        self._read, self._unread = bytearray(READ_BYTES), bytearray()
        self.unsent, self.is_drained = bytearray(), True

    @property
    def fd(self) -> int:
        """Return the socket's descriptor."""
        return self._socket.fileno()

    def queue(self, message: Message) -> None:
        """Queue a message for `flush`.

        Raises:
            ConfigError: the message is longer than the server accepts.
        """
        self.unsent += framed(message)

    def flush(self, wait_s: float) -> bool:
        """Send what is queued, as far as the server's socket accepts it within `wait_s`.

        Returns:
            Whether any bytes were sent.

        Raises:
            OSError: the connection is broken.
        """
        until_s = time.monotonic() + wait_s
        has_taken = False
        while self.unsent:
            try:
                del self.unsent[: self._socket.send(self.unsent)]
                has_taken = True
            except BlockingIOError:
                if not self._writable.poll(1e3 * max(0.0, until_s - time.monotonic())):
                    break
        return has_taken

    def receive(self, wait_s: float) -> Iterator[FromServer] | None:
        """Return the messages that have arrived; None if nothing arrives within `wait_s`.

        The caller must iterate over all of them before the next call.

        Raises:
            OSError: the connection is broken.
            ClosedError: the server has closed the connection.
            ProtocolError: the server sent something that is not a message. The iterator raises
                this, after the messages before it.
        """
        if wait_s and not self._readable.poll(1e3 * wait_s):
            return None
        try:
            count = self._socket.recv_into(self._read)
        except BlockingIOError:
            return None
        if not count:
            raise ClosedError("the server closed the connection")
        self.is_drained = count < READ_BYTES
        self._unread += memoryview(self._read)[:count]
        return self._whole()

    def _whole(self) -> Iterator[FromServer]:
        """Yield the messages that have arrived in full."""
        unread, at = self._unread, 0
        while len(unread) - at >= LENGTH_BYTES:
            begin = at + LENGTH_BYTES
            end = begin + length_of(unread[at:begin])
            if len(unread) < end:
                break
            yield understood(FROM_SERVER, unread[begin:end])
            at = end
        del unread[:at]

    def let_go_in_child(self) -> None:
        """Close this process's copy of the socket; its connection goes on in the parent."""
        forks.close_socket(self._socket)

    def close(self) -> None:
        """Disconnect; queued messages are lost."""
        with suppress(OSError):
            self._socket.close()
