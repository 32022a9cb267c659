"""A client's socket to a server: frames out, whole messages in, and no waits but those asked for.

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
from flexkv.process import forks
from flexkv.server.wire import (
    FROM_SERVER,
    LENGTH_BYTES,
    FromServer,
    Message,
    framed,
    length_of,
    understood,
)

READ_BYTES = 1 << 16


class FrameSocket:
    """One connection.

    Attributes:
        unsent: what was queued and the server's socket has not taken.
        is_drained: whether the last `receive` has taken all that had come.
    """

    def __init__(self, connected: socket.socket) -> None:
        """Take a connected socket, which is closed with this."""
        connected.setblocking(False)
        self._socket = connected
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(connected, select.POLLIN)
        self._writable.register(connected, select.POLLOUT)
        self._read, self._unread = bytearray(READ_BYTES), bytearray()
        self.unsent, self.is_drained = bytearray(), True

    def queue(self, message: Message) -> None:
        """Queue a message for `flush`.

        Raises:
            ConfigError: it is longer than the server accepts.
        """
        self.unsent += framed(message)

    def flush(self, wait_s: float) -> bool:
        """Send what is queued, as far as the server takes it within `wait_s`.

        Returns:
            Whether the server has taken any of it, if anything was queued.

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
        """Return the messages that have come; None if nothing has come within `wait_s`.

        All of them have to be taken before the next call.

        Raises:
            OSError: the connection is broken.
            ClosedError: the server has closed it.
            ProtocolError: the server sends something else than messages. The messages before that
                can be taken.
        """
        if wait_s and not self._readable.poll(1e3 * wait_s):
            return None
        try:
            count = self._socket.recv_into(self._read)
        except BlockingIOError:
            return None
        if not count:
            raise ClosedError("it closed the connection")
        self.is_drained = count < READ_BYTES
        self._unread += memoryview(self._read)[:count]
        return self._whole()

    def _whole(self) -> Iterator[FromServer]:
        """Yield the messages that are there in full."""
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
        """Disconnect; what is queued is lost."""
        with suppress(OSError):
            self._socket.close()
