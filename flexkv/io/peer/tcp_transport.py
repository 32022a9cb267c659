"""Blocks of other nodes over TCP connections of our own, straight into host memory."""

from __future__ import annotations

from flexkv.common.errors import PeerError
from flexkv.io.memory.copier import Copier
from flexkv.io.memory.host_blocks import HostBlocks
from flexkv.io.peer.checked_reads import CheckedReads
from flexkv.io.peer.lanes import Connect, Lanes
from flexkv.io.peer.sockets import SocketRing
from flexkv.io.peer.transport import Fetched, Part


class TcpTransport:
    """A transport over sockets; a closed socket is its fence."""

    name = "tcp"

    def __init__(
        self, ring: SocketRing, connect: Connect, host: HostBlocks, copier: Copier, stall_s: float
    ) -> None:
        """Connect to nobody yet.

        Args:
            ring: the sockets', to which the arena is lent; closed with this.
            connect: makes connections.
            host: the blocks in host memory.
            copier: the threads that sum them; whoever made it closes it, after this.
            stall_s: how long the next bytes of an answer may take to arrive.
        """
        self._ring = ring
        self._lanes = Lanes(ring, connect, stall_s)
        self._reads = CheckedReads(host, copier)

    def connect(self) -> None:
        """Attach to the running loop."""
        self._ring.connect()

    def wants_places(self, holder: int) -> bool:
        """Return False: it asks by positions."""
        return False

    async def fetch(self, part: Part) -> Fetched:
        """Read blocks into host blocks; see `Transport`."""
        try:
            async with self._lanes.borrowed(part.holder, part.lane) as receiver:
                return await self._reads.fetch(
                    receiver, part.number, part.first, part.host_ids, part.group
                )
        except PeerError as error:
            return Fetched(0, error)

    def stop(self, holder: int | None = None) -> None:
        """Break the connections to a holder, or to all."""
        self._lanes.stop(holder)

    async def forget(self, holder: int) -> None:
        """Close the connections to a holder."""
        await self._lanes.forget(holder)

    def close(self) -> None:
        """End everything. The arena is released once the copier is closed, too. Idempotent."""
        self._lanes.close()
        self._ring.close()
        self._reads.close()
