"""Connections over which blocks of other nodes are read: a few for each.

none ──a read begins──▶ open, in use ──it ends──▶ open ──unused for a minute──▶ none
                            ▲                      │
                            └──── a read begins ───┘
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from flexkv.common.errors import PeerError
from flexkv.io.peer.receiver import Receiver
from flexkv.io.peer.sockets import SocketRing
from flexkv.observe.logs import get_logger

log = get_logger(__name__)

LANES = 2
"""Connections for each node: one more lets bytes arrive while those of the other are summed."""
IDLE_S = 60.0
"""How long a connection may be unused before it is closed."""

Connect = Callable[[int], Awaitable[tuple[socket.socket, str]]]
"""Returns a data connection to a holder, and the holder's address. Raises PeerError."""


class _Lane:
    """One connection, when it is open.

    Attributes:
        lock: held while it is opened or closed.
        error: why the last attempt to open it failed.
        users: how many reads are under way.
        used_s: the loop's time when the last one ended.
    """

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.error: PeerError | None = None
        self.receiver: Receiver | None = None
        self.users, self.used_s = 0, 0.0

    @property
    def is_unused(self) -> bool:
        """Return whether it is open, and nobody reads, or is about to."""
        return self.receiver is not None and not self.users and not self.lock.locked()


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
        self._is_stopped = self._is_closed = False
        self._timer: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def borrowed(self, holder: int, number: int) -> AsyncIterator[Receiver]:
        """Lend the connection of this number, modulo `LANES`, to a holder; open it if needed.

        It stays open meanwhile, unless it breaks.

        Raises:
            PeerError: the holder cannot be reached.
        """
        lanes = self._lanes.setdefault(holder, [_Lane() for _ in range(LANES)])
        lane = lanes[number % LANES]
        receiver = await self._taken(lane, holder)
        try:
            yield receiver
        finally:
            lane.users -= 1
            lane.used_s = asyncio.get_running_loop().time()
            self._arm()

    async def _taken(self, lane: _Lane, holder: int) -> Receiver:
        """Return the connection of a lane, which has one more user.

        All that wait for one attempt to open it share its failure: one after the other, they would
        wait for longer than a load may take.
        """
        before = lane.error
        async with lane.lock:
            if lane.receiver is not None and lane.receiver.is_broken:
                await self._close(lane)
            if lane.receiver is None:
                if (error := lane.error) is not None and error is not before:
                    raise PeerError(error.peer, "connecting", error.why, is_own=error.is_own)
                try:
                    lane.receiver = await self._opened(holder)
                except PeerError as error:
                    lane.error = error
                    if error.is_own:
                        log.warning("peer_not_connected", reason=error.why)
                    raise
            lane.users += 1
            return lane.receiver

    async def _opened(self, holder: int) -> Receiver:
        """Return a new connection."""
        connection, peer = await self._connect(holder)
        with connection:  # the ring has a descriptor of its own
            try:
                index = self._ring.add(connection)
            except OSError as error:
                why = f"this node has no room for another connection: {error}"
                raise PeerError(peer, "connecting", why, is_own=True) from error
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

    def _arm(self) -> None:
        """Start the timer for the connection that is unused for the longest, if none is running."""
        if self._timer is not None or self._is_closed:
            return
        used_s = [each.used_s for lanes in self._lanes.values() for each in lanes if each.is_unused]
        if used_s:
            due_s = min(used_s) + IDLE_S
            self._timer = asyncio.get_running_loop().call_at(due_s, self._close_idle)

    def _close_idle(self) -> None:
        """Close the connections that nobody has used for too long."""
        self._timer = None
        last_s = asyncio.get_running_loop().time() - IDLE_S
        for lanes in self._lanes.values():
            for lane in lanes:
                if lane.is_unused and lane.used_s <= last_s:
                    assert lane.receiver is not None
                    self._ring.drop(lane.receiver.index)
                    lane.receiver = None
        self._arm()

    def close(self) -> None:
        """Close no connection any more that is unused: the ring is being closed. Idempotent."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()

    async def _close(self, lane: _Lane) -> None:
        """Close a connection; nothing is written over it any more afterwards."""
        receiver, lane.receiver = lane.receiver, None
        if receiver is not None:
            await self._ring.remove(receiver.index)
