"""Bytes between stream sockets and memory, without copies in between, for an event loop.

    add(socket) ─▶ index     receive(index, extents), send(index, extents)     remove(index)
                                     │ awaits the end of the ring's move             │
                                     ▼                                               ▼
                              shutdown when cancelled                      shutdown, then the fence

A receive writes only to the memory that it is given. When it returns or raises, however it ended,
the kernel writes nothing there any more: if it was cancelled, its socket is shut down, which ends
the move, and the end is awaited. So the connection of a cancelled move is lost.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from errno import EIO, EMFILE
from itertools import count

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

from flexkv._ext import Ring
from flexkv.common.errors import ClosedError, InvariantError
from flexkv.io.peer.fence import Fence
from flexkv.io.ssd.uring import try_nothing
from flexkv.process import forks

Extents = NDArray[np.int64]
"""Ranges of memory: int64[n, 2], address and bytes of each."""
NO_EXTENTS: Extents = np.zeros((0, 2), np.int64)
HEAD_BYTES_MAX = 1024
"""The most bytes of a move that may be outside the lent memory."""
WAKE_BYTES_MAX = 512 << 10
"""While more bytes are due, the kernel copies what has arrived in steps of at least this size: it
costs a tenth less CPU time, at both ends, than to be woken for every packet."""

SLOWEST_BYTES_S = 2 << 20
"""A connection that is slower is given up: blocks would be computed long before they arrive."""
STALL_NOTICED = 1.5
"""A stall is noticed after 1 to 1.5 times its limit: see `SocketRing.unless_stalled`."""

_MOVED, _MOVED_AT = struct.Struct("=QQ"), 120
"""Bytes acknowledged and bytes received, in the kernel's struct tcp_info since Linux 4.1."""
_TCP_INFO_BYTES = _MOVED_AT + _MOVED.size


class StreamEndedError(EOFError):
    """The peer closed the connection, or it was shut down, before all bytes were moved.

    Attributes:
        moved_bytes: how many were.
    """

    def __init__(self, moved_bytes: int) -> None:
        super().__init__(f"the stream ended after {moved_bytes} bytes")
        self.moved_bytes = moved_bytes


@dataclass(slots=True)
class _Place:
    """A socket of the ring: a copy of the caller's, so that it can always be shut down.

    Attributes:
        slot: its number in the ring; another socket may get it when this one is removed.
        wake_bytes: how many bytes must have arrived for the kernel to go on copying.
        moves: those under way.
    """

    socket: socket.socket
    slot: int
    is_tcp: bool = False
    wake_bytes: int = 1
    is_stopped: bool = False
    moves: list[_Move] = field(default_factory=list)

    def wake_at(self, nbytes: int) -> None:
        """Have what waits for bytes woken only when so many have arrived."""
        nbytes = max(1, nbytes)
        if self.is_tcp and nbytes != self.wake_bytes:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, nbytes)
            self.wake_bytes = nbytes

    def stop(self) -> None:
        """Shut the socket down, which ends its moves."""
        self.is_stopped = True
        with suppress(OSError):  # it is not connected any more: then its moves end by themselves
            self.socket.shutdown(socket.SHUT_RDWR)


@dataclass(slots=True)
class _Move:
    """A receive or send under way."""

    number: int
    place: _Place
    write: bool
    extents: Extents
    result: int = 0
    fence: Fence = field(default_factory=Fence)


class SocketRing:
    """An io_uring for the sockets of one event loop.

    Only the loop's thread may use it. A socket has at most one receive and one send at a time.
    """

    def __init__(self, buffers: Sequence[Buffer], entries: int, in_background: bool = True) -> None:
        """Open a ring.

        Args:
            buffers: the memory that bytes may be moved from and to, held until `close`.
            entries: how many sockets it has room for.
            in_background: whether kernel threads copy the bytes; else the loop's thread does.

        Raises:
            OSError: the kernel refused io_uring, or an operation that is needed.
        """
        self._ring = Ring(entries, in_background=in_background)
        self._heads = np.zeros((entries, 2, HEAD_BYTES_MAX), np.uint8)
        try:
            try_nothing(self._ring)
            self._ring.lend([*buffers, self._heads], False)
            self._ring.reserve_sockets(entries)
        except OSError:
            self._ring.close()
            raise
        self._free = list(reversed(range(entries)))
        self._places: dict[int, _Place] = {}
        self._indices = count()
        self._moves: dict[int, _Move] = {}
        self._waiting: deque[_Move] = deque()
        self._numbers = count()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False
        forks.on_fork(self._let_go_in_child)

    def connect(self) -> None:
        """Attach to the running loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._ring.fileno(), self._reap)

    def add(self, connection: socket.socket) -> int:
        """Return the index of a connected stream socket, which the caller may close at any time.

        The connection lives until `remove`.

        Raises:
            OSError: the ring has no room for it (EMFILE), or the kernel refused.
        """
        if self._is_closed:
            raise ClosedError("the ring of sockets is closed")
        if connection.type != socket.SOCK_STREAM:
            raise ValueError(f"{connection}: it is no stream")
        if not self._free:
            raise OSError(EMFILE, os.strerror(EMFILE))
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        own = connection.dup()
        try:
            self._ring.set_socket(self._free[-1], own.fileno())
        except OSError:
            own.close()
            raise
        index, is_tcp = next(self._indices), own.family in (socket.AF_INET, socket.AF_INET6)
        self._places[index] = _Place(own, self._free.pop(), is_tcp)
        return index

    @asynccontextmanager
    async def unless_stalled(
        self, index: int, stall_s: float, nbytes: int = 0
    ) -> AsyncIterator[None]:
        """Let a move of some bytes over a socket go on as long as bytes keep moving, if slowly.

        Raises:
            TimeoutError: nothing has moved over the socket for `stall_s`, or half as long again;
                or the move took longer than twice that, and its bytes at `SLOWEST_BYTES_S`.
        """
        loop, moved = asyncio.get_running_loop(), self._moved_bytes(index)
        last_s = loop.time() + 2 * stall_s + nbytes / SLOWEST_BYTES_S
        async with asyncio.timeout(stall_s) as limit:

            def look() -> None:
                nonlocal moved
                if (now := self._moved_bytes(index)) != moved and not limit.expired():
                    moved = now
                    limit.reschedule(min(loop.time() + stall_s, last_s))
                timers.append(loop.call_later(stall_s / 2, look))
                del timers[:-1]

            timers = [loop.call_later(stall_s / 2, look)]
            try:
                yield
            finally:
                timers[-1].cancel()

    def _moved_bytes(self, index: int) -> int:
        """Return how many bytes have arrived over a TCP socket, and were taken by its peer."""
        place = self._places.get(index)
        if place is None or not place.is_tcp:
            return 0
        try:
            told = place.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        except OSError:
            return 0
        return sum(_MOVED.unpack_from(told, _MOVED_AT)) if len(told) == _TCP_INFO_BYTES else 0

    def has_hung_up(self, index: int) -> bool:
        """Return whether the other end of a socket has closed it, or its half of it."""
        if (place := self._places.get(index)) is None or self._is_closed:
            return True
        poll = select.poll()
        poll.register(place.socket, select.POLLRDHUP)
        return bool(poll.poll(0))

    def stop(self, index: int) -> None:
        """Shut a socket down: what is under way on it ends soon, what comes later fails at once.

        It may have been removed already.
        """
        if (place := self._places.get(index)) is not None:
            self._stop(place)

    def _stop(self, place: _Place) -> None:
        """Shut a socket down, and end its moves that the kernel has not accepted yet."""
        place.stop()
        for move in [each for each in self._waiting if each.place is place]:
            self._waiting.remove(move)
            _end(move, 0)

    async def remove(self, index: int) -> None:
        """Shut a socket down, and return once nothing is in flight on it; its room is free then.

        Cancellation: takes effect when the socket is removed.
        """
        place, cancelled = self._places.pop(index), None
        self._stop(place)
        while place.moves:
            try:
                await place.moves[0].fence.passed()
            except asyncio.CancelledError as error:
                cancelled = error
        self._let_go(place)
        if cancelled is not None:
            raise cancelled

    def drop(self, index: int) -> None:
        """Remove a socket on which nothing is in flight.

        Raises:
            InvariantError: something is.
        """
        place = self._places[index]
        if place.moves:
            raise InvariantError(f"{len(place.moves)} moves are in flight on a socket")
        del self._places[index]
        place.stop()
        self._let_go(place)

    def _let_go(self, place: _Place) -> None:
        """Free the room of a socket on which nothing is in flight any more."""
        if not self._is_closed:
            with suppress(OSError):  # then the kernel keeps it until its slot is used again
                self._ring.set_socket(place.slot, -1)
        place.socket.close()
        self._free.append(place.slot)

    async def receive(
        self, index: int, extents: Extents, head_bytes: int = 0, due_bytes: int = 0
    ) -> bytes:
        """Fill the head and then the extents, in order; return the head.

        `due_bytes` is how many bytes follow for certain: the more, the less often is the kernel
        woken to copy what has arrived.

        Cancellation: shuts the socket down; the task is cancelled when nothing is written any more.

        Raises:
            StreamEndedError: the stream ended before.
            OSError: the connection broke.
        """
        place = self._open_place(index)
        head = self._heads[place.slot, 0, :head_bytes]
        place.wake_at(min(due_bytes, WAKE_BYTES_MAX))
        await self._move(place, False, _with_head(head, extents))
        return head.tobytes()

    async def send(self, index: int, extents: Extents, head: bytes = b"") -> None:
        """Send the head and then the extents, in order; for the rest see `receive`."""
        place = self._open_place(index)
        own = self._heads[place.slot, 1, : len(head)]
        own[:] = np.frombuffer(head, np.uint8)
        await self._move(place, True, _with_head(own, extents))

    def _open_place(self, index: int) -> _Place:
        if self._is_closed or self._loop is None:
            raise ClosedError("the ring of sockets is closed, or not connected")
        place = self._places.get(index)
        if place is None or place.is_stopped:
            raise StreamEndedError(0)
        return place

    async def _move(self, place: _Place, write: bool, extents: Extents) -> None:
        move = _Move(next(self._numbers), place, write, extents)
        self._start(move)
        move.fence.begin()
        place.moves.append(move)
        await move.fence.passed(on_cancel=lambda: self._stop(place))
        if move.result < 0:
            raise OSError(-move.result, os.strerror(-move.result))
        if move.result < extents[:, 1].sum():
            raise StreamEndedError(move.result)

    def _start(self, move: _Move) -> None:
        """Hand a move to the ring, now or, if the kernel is short of memory, after the next end."""
        if self._ring.stream(move.number, move.write, move.place.slot, move.extents):
            self._moves[move.number] = move
        else:
            self._waiting.append(move)

    def _reap(self) -> None:
        for number, result in self._ring.reap():
            _end(self._moves.pop(number), result)
        waiting, self._waiting = self._waiting, deque()
        for move in waiting:
            try:
                self._start(move)
            except OSError as error:
                _end(move, -(error.errno or EIO))

    def _let_go_in_child(self) -> None:
        if not self._is_closed:
            for place in self._places.values():
                forks.close_socket(place.socket)
            self._ring.close()

    def close(self) -> None:
        """Detach from the loop, shut all sockets down, and release the memory. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._loop is not None:
            self._loop.remove_reader(self._ring.fileno())
        for place in self._places.values():
            place.stop()
        self._ring.close()
        for number, result in self._ring.reap():
            _end(self._moves.pop(number), result)
        for move in self._waiting:
            _end(move, 0)
        for place in self._places.values():
            place.socket.close()


def _end(move: _Move, result: int) -> None:
    move.result = result
    move.place.moves.remove(move)
    move.fence.end()


def _with_head(head: NDArray[np.uint8], extents: Extents) -> Extents:
    if not len(head):
        return extents
    own = np.array([[head.ctypes.data, len(head)]], np.int64)
    return np.concatenate([own, extents])
