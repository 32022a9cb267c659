"""The owner's end of a data socket: it answers each READ with blocks, straight from host memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from flexkv.common.errors import InvariantError, MalformedError
from flexkv.io.peer.frames import HEADER_BYTES, Read, Status, messages, unpack_read
from flexkv.io.peer.sockets import NO_EXTENTS, SocketRing, StreamEndedError
from flexkv.io.ports import Sums

MESSAGE_BYTES = 32 << 20
"""What is handed to the kernel at once: large, since each message costs CPU time."""
REFUSED_S = 0.01
"""The pause after a READ that is refused: an honest reader causes few, and a faulty one must not
take up the owner's loop."""


class Granted(NamedTuple):
    """Blocks that may be sent.

    Attributes:
        addresses: where each begins, int64[count].
        sums: their checksums, uint64[count].
        ended: called once when the kernel reads the blocks no more; until then they must not
            change.
    """

    addresses: NDArray[np.int64]
    sums: Sums
    ended: Callable[[], None]


Lookup = Callable[[Read], Granted | Status]
"""Returns the blocks that a reader asks for, or why it does not get them."""


class Turns(Protocol):
    """Says when messages may be sent."""

    async def turn(self, nbytes: int) -> float:
        """Return when a message of so many bytes may begin, and the time."""
        ...

    def unsent(self, begun_s: float, sent_bytes: int) -> None:
        """Take note that only so many bytes were sent of the message that had a turn then."""
        ...


class AtOnce:
    """No message waits."""

    async def turn(self, nbytes: int) -> float:
        """Return at once."""
        return 0.0

    def unsent(self, begun_s: float, sent_bytes: int) -> None:
        """Do nothing."""


class Sender:
    """Sends blocks to readers."""

    def __init__(self, ring: SocketRing, stall_s: float, turns: Turns | None = None) -> None:
        """Take the ring, to which the blocks' memory is lent.

        Args:
            ring: moves the bytes.
            stall_s: a reader that takes nothing for so long loses its connection.
            turns: say when each message may be sent; None: at once.
        """
        self._ring, self._stall_s, self._turns = ring, stall_s, turns or AtOnce()

    async def serve(self, index: int, lookup: Lookup) -> None:
        """Answer the READs of one socket until its reader closes it; it is shut down then.

        The caller removes it from the ring.

        Cancellation: the task is cancelled when the kernel reads no block any more.

        Raises:
            MalformedError: the reader broke the rules of the protocol.
            TimeoutError: it did not take what it had asked for.
            OSError, StreamEndedError: the connection broke.
        """
        try:
            while (read := await self._next(index)) is not None:
                await self._answer(index, read, lookup(read))
        finally:
            self._ring.stop(index)

    async def _next(self, index: int) -> Read | None:
        """Return the next READ; None if the reader has closed the connection."""
        try:
            return unpack_read(await self._ring.receive(index, NO_EXTENTS, HEADER_BYTES))
        except StreamEndedError as error:
            if error.moved_bytes:
                raise MalformedError(error.moved_bytes, "it is only part of a READ") from error
            return None

    async def _answer(self, index: int, read: Read, found: Granted | Status) -> None:
        if isinstance(found, Status):
            if found is Status.OK:
                raise InvariantError("blocks are needed for this status")
            await self._send(index, NO_EXTENTS, read.answer(found))
            await asyncio.sleep(REFUSED_S)
            return
        try:
            if not len(found.addresses) == len(found.sums) == read.blocks:
                raise InvariantError(f"{len(found.addresses)} blocks were found for {read}")
            head = read.answer(Status.OK) + found.sums.astype("<u8").tobytes()
            for extents in messages(found.addresses, read.block_bytes, MESSAGE_BYTES):
                await self._send_in_turn(index, extents, head)
                head = b""
        finally:
            found.ended()

    async def _send_in_turn(self, index: int, extents: NDArray[np.int64], head: bytes) -> None:
        begun_s = await self._turns.turn(int(extents[:, 1].sum()))
        if self._ring.has_hung_up(index):
            self._turns.unsent(begun_s, 0)
            raise StreamEndedError(0)
        try:
            await self._send(index, extents, head)
        except StreamEndedError as error:
            self._turns.unsent(begun_s, error.moved_bytes)
            raise

    async def _send(self, index: int, extents: NDArray[np.int64], head: bytes) -> None:
        nbytes = len(head) + int(extents[:, 1].sum())
        async with self._ring.unless_stalled(index, self._stall_s, nbytes):
            await self._ring.send(index, extents, head)
