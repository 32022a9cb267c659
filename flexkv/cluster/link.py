"""One end of a control link: it sends and receives whole messages."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import Generic, TypeVar

import msgspec

from flexkv.cluster.wire import (
    FRAME_BYTES_MAX,
    LENGTH_BYTES,
    Message,
    framed,
    length_of,
    understood,
)
from flexkv.process import forks

T = TypeVar("T")

UNSENT_BYTES_MAX = 16 * FRAME_BYTES_MAX
"""A node that leaves this much unread is cut off: nobody waits for it."""
MESSAGES_A_TURN = 4
"""Once in this many messages, a receiver lets the other tasks of the loop run."""
PING_S, SILENCE_S = 1.0, 4.0
"""A reader sends a Ping this often; a link on which nothing arrives for so long is closed."""


class Link(Generic[T]):
    """A connected socket that carries whole messages.

    Attributes:
        heard_s: the loop's time when the last message arrived.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        decoder: msgspec.msgpack.Decoder[T],
    ) -> None:
        self._reader, self._writer, self._decoder = reader, writer, decoder
        self._taken = 0
        self.heard_s = asyncio.get_running_loop().time()
        forks.on_fork(self._let_go_in_child)

    @classmethod
    async def over(cls, connected: socket.socket, decoder: msgspec.msgpack.Decoder[T]) -> Link[T]:
        """Return a link over a connected socket, which the link closes."""
        reader, writer = await asyncio.open_connection(sock=connected)
        return cls(reader, writer, decoder)

    def _let_go_in_child(self) -> None:
        """Drop the child's copy of the socket, so that the peer notices when the parent ends."""
        forks.replace(self._writer.get_extra_info("socket").fileno())

    @property
    def is_open(self) -> bool:
        """Return whether anything can be sent."""
        return not self._writer.is_closing()

    @property
    def silent_s(self) -> float:
        """Return for how long nothing has arrived."""
        return asyncio.get_running_loop().time() - self.heard_s

    def send(self, message: Message) -> None:
        """Queue a message, which is sent soon; do nothing if the link is closed."""
        if not self.is_open:
            return
        self._writer.write(framed(message))
        if self._writer.transport.get_write_buffer_size() > UNSENT_BYTES_MAX:
            self.abort()

    async def receive(self) -> T | None:
        """Return the next message; None once the connection has ended, or was aborted.

        Raises:
            PeerProtocolError: the peer sent something that is not a message, or is too long.
        """
        self._taken += 1
        if not self._taken % MESSAGES_A_TURN:
            await asyncio.sleep(0)
        if not self.is_open:
            return None
        try:
            head = await self._reader.readexactly(LENGTH_BYTES)
            body = await self._reader.readexactly(length_of(head))
        except (OSError, asyncio.IncompleteReadError):
            return None
        self.heard_s = asyncio.get_running_loop().time()
        return understood(self._decoder, body)

    def abort(self) -> None:
        """Close the connection at once; queued messages are lost."""
        self._writer.transport.abort()

    def close(self) -> None:
        """Send what is queued, then close the socket; nothing more is sent or received."""
        with suppress(OSError):
            self._writer.close()

    async def wait_closed(self) -> None:
        """Return once the socket is closed."""
        with suppress(OSError):
            await self._writer.wait_closed()
