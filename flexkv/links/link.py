"""One connection on an event loop, used at either end: it sends and receives frames."""

from __future__ import annotations

import asyncio
import select
import socket
from contextlib import suppress
from typing import Generic, TypeVar

import msgspec

from flexkv.links.framing import Framing
from flexkv.process import forks

T = TypeVar("T")

MESSAGES_A_TURN = 4
"""Once in this many messages, a receiver lets the other tasks of the loop run."""


class Link(Generic[T]):
    """A connected socket that carries whole messages.

    Attributes:
        unsent_bytes_max: a peer that leaves more unread is cut off; None: no peer is.
        frame_bytes_max: the longest message that the peer may send.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        framing: Framing,
        decoder: msgspec.msgpack.Decoder[T],
    ) -> None:
        self.unsent_bytes_max: int | None = None
        self.frame_bytes_max = framing.bytes_max
        self._taken, self._framing = 0, framing
        self._heard_s = asyncio.get_running_loop().time()
        self._reader, self._writer, self._decoder = reader, writer, decoder
        self._ended = self._aborted = False
        self._poll = select.poll()
        self._poll.register(writer.get_extra_info("socket").fileno(), select.POLLRDHUP)
        forks.on_fork(self._let_go_in_child)

    @classmethod
    async def over(
        cls, connected: socket.socket, framing: Framing, decoder: msgspec.msgpack.Decoder[T]
    ) -> Link[T]:
        """Return a link over a connected socket, which the link closes."""
        reader, writer = await asyncio.open_connection(sock=connected)
        return cls(reader, writer, framing, decoder)

    def _let_go_in_child(self) -> None:
        """Drop the child's copy of the socket, so that the peer notices when the parent ends."""
        forks.replace(self._writer.get_extra_info("socket").fileno())

    @property
    def is_open(self) -> bool:
        """Return whether anything can be sent."""
        return not self._ended and not self._writer.is_closing()

    @property
    def has_hung_up(self) -> bool:
        """Return whether the peer has closed its end, even if some of its data is unread."""
        if self._writer.is_closing():
            return True
        return bool(self._poll.poll(0))

    @property
    def silent_s(self) -> float:
        """Return for how long no message has arrived."""
        return asyncio.get_running_loop().time() - self._heard_s

    def send(self, message: msgspec.Struct) -> None:
        """Queue a message, which is sent soon; do nothing if the link is closed.

        A peer with more than `unsent_bytes_max` unread bytes is cut off: nobody waits for it.
        """
        if not self.is_open:
            return
        self._writer.write(self._framing.framed(message))
        if self.unsent_bytes_max is not None and self.unsent_bytes > self.unsent_bytes_max:
            self.abort()

    @property
    def unsent_bytes(self) -> int:
        """Return how many queued bytes the peer's socket has not accepted yet."""
        return self._writer.transport.get_write_buffer_size()

    async def ignore(self) -> None:
        """Discard what the peer sends, and return once its connection has ended."""
        with suppress(OSError):
            while await self._reader.read(1 << 16):
                pass

    def end(self) -> None:
        """Send what is queued, then the end of the stream. Messages can still be received."""
        if self.is_open:
            self._ended = True
            with suppress(OSError):
                self._writer.write_eof()

    def abort(self) -> None:
        """Close the connection at once; queued messages are lost, and nothing more is received."""
        self._aborted = True
        self._writer.transport.abort()

    async def receive(self) -> T | None:
        """Return the next message; None once the connection has ended, or was aborted.

        Raises the protocol's error if the peer sends something else, or too long a message.
        """
        self._taken += 1
        if not self._taken % MESSAGES_A_TURN:
            await asyncio.sleep(0)
        if self._aborted:
            return None
        try:
            head = await self._reader.readexactly(self._framing.head_bytes)
            length = self._framing.length_of(head, self.frame_bytes_max)
            body = await self._reader.readexactly(length)
        except (OSError, asyncio.IncompleteReadError):
            return None
        self._heard_s = asyncio.get_running_loop().time()
        self._framing.check(head, body)
        return self._framing.understood(self._decoder, body)

    async def wait_read(self) -> None:
        """Return once the peer has read most of what was sent, or its connection has ended."""
        with suppress(OSError):
            await self._writer.drain()

    def close(self) -> None:
        """Send what is queued, then close the socket; nothing more is sent."""
        with suppress(OSError):
            self._writer.close()

    async def wait_closed(self) -> None:
        """Return once the socket is closed."""
        with suppress(OSError):
            await self._writer.wait_closed()
