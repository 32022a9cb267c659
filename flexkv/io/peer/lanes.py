"""Connections over which blocks of other nodes are read: a few for each, opened when needed."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

from flexkv.common.errors import PeerError
from flexkv.io.peer.receiver import Receiver
from flexkv.io.peer.sockets import SocketRing

LANES = 2
"""Connections for each node: one more lets bytes arrive while those of the other are summed."""

Connect = Callable[[int], Awaitable[tuple[socket.socket, str]]]
"""Returns a data connection to a holder, and the holder's address. Raises PeerError."""


class _Lane:
    """One connection, when it is open.

    Attributes:
        error: why the last attempt to open it failed.
    """

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.error: PeerError | None = None
        self.receiver: Receiver | None = None


class Lanes:
    """The connections to all nodes that blocks are read from."""

    def __init__(self, ring: SocketRing, connect: Connect, stall_s: float) -> None:
        """Open none yet.

        Args:
            ring: moves the bytes.
            connect: makes connections.
            stall_s: how long the next bytes of an answer may take to arrive.
        """
        self._ring, self._connect, self._stall_s = ring, connect, stall_s
        self._lanes: dict[int, list[_Lane]] = {}
        self._is_stopped = False

    async def lane(self, holder: int, number: int) -> Receiver:
        """Return the connection of this number, modulo `LANES`, to a holder, and open it if needed.

        All that wait for one attempt to open it share its failure: one after the other, they would
        wait for longer than a load may take.

        Raises:
            PeerError: the holder cannot be reached.
        """
        lanes = self._lanes.setdefault(holder, [_Lane() for _ in range(LANES)])
        lane = lanes[number % LANES]
        before = lane.error
        async with lane.lock:
            if lane.receiver is not None and lane.receiver.is_broken:
                await self._close(lane)
            if lane.receiver is None:
                if lane.error is not None and lane.error is not before:
                    raise PeerError(lane.error.peer, "connecting", lane.error.why)
                try:
                    lane.receiver = await self._opened(holder)
                except PeerError as error:
                    lane.error = error
                    raise
            return lane.receiver

    async def _opened(self, holder: int) -> Receiver:
        """Return a new connection."""
        connection, peer = await self._connect(holder)
        with connection:  # the ring has a descriptor of its own
            index = self._ring.add(connection)
        receiver = Receiver(self._ring, index, peer, self._stall_s)
        if self._is_stopped:  # while it was being made
            receiver.stop()
        return receiver

    def stop(self, holder: int | None = None) -> None:
        """Break the connections to a holder, or to all for good: what is read fails soon."""
        self._is_stopped = self._is_stopped or holder is None
        for each, lanes in self._lanes.items():
            if holder is None or holder == each:
                for lane in lanes:
                    if lane.receiver is not None:
                        lane.receiver.stop()

    async def forget(self, holder: int) -> None:
        """Close the connections to a holder, whose number may be another node's later."""
        for lane in self._lanes.pop(holder, ()):
            async with lane.lock:
                await self._close(lane)

    async def _close(self, lane: _Lane) -> None:
        """Close a connection; nothing is written over it any more afterwards."""
        receiver, lane.receiver = lane.receiver, None
        if receiver is not None:
            await self._ring.remove(receiver.index)
