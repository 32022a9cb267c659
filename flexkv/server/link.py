"""One connection, from either end, on an event loop: frames out and in."""

from __future__ import annotations

import asyncio
import select
import socket
from contextlib import suppress
from typing import Generic, TypeVar

import msgspec

from flexkv.process import forks
from flexkv.server.wire import (
    FRAME_BYTES_MAX,
    LENGTH_BYTES,
    Message,
    framed,
    length_of,
    understood,
)

T = TypeVar("T")

MESSAGES_A_TURN = 4
"""After so many that were there already, a receiver lets the other tasks of the loop go on."""


class Link(Generic[T]):
    """A connected socket, of which whole messages are read."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        decoder: msgspec.msgpack.Decoder[T],
    ) -> None:
        self.unsent_bytes_max: int | None = None
        self.frame_bytes_max = FRAME_BYTES_MAX
        self._taken = 0
        self._reader, self._writer, self._decoder = reader, writer, decoder
        self._ended = False
        self._poll = select.poll()
        self._poll.register(writer.get_extra_info("socket").fileno(), select.POLLRDHUP)
        forks.on_fork(self._let_go_in_child)

    @classmethod
    async def over(cls, connected: socket.socket, decoder: msgspec.msgpack.Decoder[T]) -> Link[T]:
        """Take a connected socket."""
        reader, writer = await asyncio.open_unix_connection(sock=connected)
        return cls(reader, writer, decoder)

    def _let_go_in_child(self) -> None:
        """Let the peer see the end when the parent ends, whatever the child does."""
        forks.replace(self._writer.get_extra_info("socket").fileno())

    @property
    def is_open(self) -> bool:
        """Tell whether anything can be sent."""
        return not self._ended and not self._writer.is_closing()

    @property
    def has_hung_up(self) -> bool:
        """Tell whether the peer has closed its end, whatever of it is still to be received."""
        if self._writer.is_closing():
            return True
        return bool(self._poll.poll(0))

    def send(self, message: Message) -> None:
        """Send, some time soon; over a link that is closed nothing happens.

        A peer that has left `unsent_bytes_max` unread is cut off: nobody else waits for it.
        """
        if not self.is_open:
            return
        self._writer.write(framed(message))
        if self.unsent_bytes_max is not None and self.unsent_bytes > self.unsent_bytes_max:
            self.abort()

    @property
    def unsent_bytes(self) -> int:
        """Count what the peer's socket does not take yet."""
        return self._writer.transport.get_write_buffer_size()

    async def ignore(self) -> None:
        """Return once the peer has ended, whatever it sends until then."""
        with suppress(OSError):
            while await self._reader.read(1 << 16):
                pass

    def end(self) -> None:
        """Send what is queued, then the end. What the peer still sends is received."""
        if self.is_open:
            self._ended = True
            with suppress(OSError):
                self._writer.write_eof()

    def abort(self) -> None:
        """Be gone at once."""
        self._writer.transport.abort()

    async def receive(self) -> T | None:
        """Return the next message; None when there will be none.

        Raises:
            ProtocolError: the peer sends something else than messages, or longer ones than it may.
        """
        self._taken += 1
        if not self._taken % MESSAGES_A_TURN:
            await asyncio.sleep(0)
        try:
            head = await self._reader.readexactly(LENGTH_BYTES)
            length = length_of(head, self.frame_bytes_max)
            body = await self._reader.readexactly(length)
        except (OSError, asyncio.IncompleteReadError):
            return None
        return understood(self._decoder, body)

    async def wait_read(self) -> None:
        """Return once the peer has read most of what it was sent, or its connection has ended."""
        with suppress(OSError):
            await self._writer.drain()

    def close(self) -> None:
        """Send what is queued, and neither send nor receive more."""
        with suppress(OSError):
            self._writer.close()

    async def wait_closed(self) -> None:
        """Return once the socket is gone."""
        with suppress(OSError):
            await self._writer.wait_closed()
