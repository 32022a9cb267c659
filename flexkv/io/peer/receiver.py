"""The reader's end of a data socket: blocks arrive straight in host memory.

    read 1 ─▶ READ ──────▶ its answer arrives, message by message ─▶ sums
    read 2 ─────▶ READ ──────(waits for its turn)──────────────────▶ its answer arrives …

Several reads of one socket are asked for at once, and answered in order. A read that fails or is
cancelled while its answer is due breaks the connection, since the rest of the stream has no meaning
without it. A refusal breaks nothing.

A read may take 1.5 times `stall_s`, and in addition what its bytes take at `SLOWEST_BYTES_S`, and
those of the reads before it. So an owner may wait for its turn, or the network may be busy, but a
trickle of bytes holds nobody for long.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from flexkv.common.errors import InvariantError, MalformedError, PeerError
from flexkv.io.peer.frames import (
    BLOCKS_MAX,
    HEADER_BYTES,
    SUM_BYTES,
    Read,
    Status,
    messages,
    unpack_answer,
)
from flexkv.io.peer.sockets import (
    NO_EXTENTS,
    SLOWEST_BYTES_S,
    STALL_NOTICED,
    Extents,
    SocketRing,
    StreamEndedError,
)
from flexkv.io.ports import Sums
from flexkv.process.descriptors import is_lack

MESSAGE_BYTES = 8 << 20
"""What is received at once: small enough that summing overlaps with receiving."""
Arrived = Callable[[int, Sums], None]
"""Called with the number of leading blocks that have arrived, unchecked, and the sums of all."""


class Receiver:
    """Reads blocks of one peer over one socket.

    Attributes:
        index: of the socket in the ring; whoever added it there removes it.
        peer: the owner's address, for errors.
        is_broken: whether nothing can be read any more.
    """

    def __init__(self, ring: SocketRing, index: int, peer: str, stall_s: float) -> None:
        """Take a socket that was added to the ring.

        Args:
            ring: moves the bytes; the memory of the blocks must be lent to it.
            index: of the socket.
            peer: the owner's address, for errors.
            stall_s: for how long nothing may arrive.
        """
        self._ring, self._stall_s = ring, stall_s
        self.index, self.peer, self.is_broken = index, peer, False
        self._asking, self._due_bytes = asyncio.Lock(), 0
        self._last_over = asyncio.Event()
        self._last_over.set()

    async def read(
        self,
        read: Read,
        addresses: NDArray[np.int64],
        arrived: Arrived = lambda _count, _sums: None,
    ) -> Sums:
        """Read blocks into memory, and return the sums that their owner has for them: uint64[n].

        Args:
            read: what is asked for.
            addresses: where each block is to be, int64[count].
            arrived: called whenever more blocks have arrived.

        Cancellation: when the task is cancelled, nothing is written to the memory any more. Once
        the READ was sent, this breaks the connection.

        Raises:
            PeerError: the peer refused, did not answer in time, broke the rules, or is gone.
                Nothing is written to the memory any more.
        """
        if len(addresses) != read.blocks or not 1 <= read.blocks <= BLOCKS_MAX:
            raise InvariantError(f"{len(addresses)} addresses for {read}")
        over, is_asked = asyncio.Event(), False
        nbytes = read.blocks * read.block_bytes
        self._due_bytes += nbytes
        limit_s = STALL_NOTICED * self._stall_s + self._due_bytes / SLOWEST_BYTES_S
        limit = asyncio.timeout(limit_s)
        try:
            async with limit:
                async with self._asking:
                    self._check_whole()
                    before, self._last_over, is_asked = self._last_over, over, True
                    await self._send(read.packed())
                await before.wait()
                self._check_whole()
                status, sums = await self._answer(read, addresses, arrived)
        except (OSError, StreamEndedError, MalformedError) as error:
            self.stop()
            slow = f"its blocks took longer than {limit_s:.1f} s"
            why = slow if limit.expired() else str(error) or f"nothing moved for {self._stall_s} s"
            raise self._failed(why, is_lack(error)) from error
        except BaseException:
            if is_asked:
                self.stop()
            raise
        finally:
            self._due_bytes -= nbytes
            over.set()
        if status is not Status.OK:
            raise self._failed(status.why)
        return sums

    def stop(self) -> None:
        """Break the connection: every read of it fails soon."""
        self.is_broken = True
        self._ring.stop(self.index)

    def _check_whole(self) -> None:
        if self.is_broken:
            raise self._failed("the connection is broken")

    def _failed(self, why: str, is_own: bool = False) -> PeerError:
        return PeerError(self.peer, "reading blocks", why, is_own=is_own)

    async def _answer(
        self, read: Read, addresses: NDArray[np.int64], arrived: Arrived
    ) -> tuple[Status, Sums]:
        """Receive what the peer sends for a READ."""
        status = unpack_answer(await self._receive(NO_EXTENTS, HEADER_BYTES), read)
        sums: Sums = np.zeros(0, np.uint64)
        if status is not Status.OK:
            return status, sums
        count, head_bytes = 0, SUM_BYTES * read.blocks
        for extents in messages(addresses, read.block_bytes, MESSAGE_BYTES):
            due_bytes = (read.blocks - count - len(extents)) * read.block_bytes
            head = await self._receive(extents, head_bytes, due_bytes)
            if head_bytes:
                sums, head_bytes = np.frombuffer(head, "<u8").astype(np.uint64), 0
            count += len(extents)
            arrived(count, sums)
        return status, sums

    async def _receive(self, extents: Extents, head_bytes: int, due_bytes: int = 0) -> bytes:
        nbytes = head_bytes + int(extents[:, 1].sum())
        async with self._ring.unless_stalled(self.index, self._stall_s, nbytes):
            return await self._ring.receive(self.index, extents, head_bytes, due_bytes)

    async def _send(self, header: bytes) -> None:
        async with self._ring.unless_stalled(self.index, self._stall_s):
            await self._ring.send(self.index, NO_EXTENTS, header)
