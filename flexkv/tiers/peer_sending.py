"""The owner's side of data connections: which bytes of host memory go to whom."""

from __future__ import annotations

from functools import partial
from socket import socket

from flexkv.cluster.grants import Grants, ReadStatus
from flexkv.cluster.wire import Introduction, PeerId
from flexkv.common.errors import MalformedError
from flexkv.io.memory.host_blocks import HostBlocks
from flexkv.io.peer.frames import Read, Status
from flexkv.io.peer.sender import Granted, Sender
from flexkv.io.peer.sockets import SocketRing, StreamEndedError
from flexkv.observe.logs import get_logger
from flexkv.tiers.out_rate import OutRate

log = get_logger(__name__)


class BlockSending:
    """Sends the blocks that are granted, and no other byte of host memory.

    Attributes:
        lent_bytes: how many bytes readers were let read; one that goes away takes fewer.
    """

    def __init__(
        self, ring: SocketRing, host: HostBlocks, grants: Grants, stall_s: float, rate: OutRate
    ) -> None:
        """Serve nobody yet.

        Args:
            ring: moves the bytes; host memory is lent to it.
            host: the blocks in host memory, and their sums.
            grants: say which blocks may be read by whom.
            stall_s: a reader that takes nothing for so long loses its connection.
            rate: bounds what is sent.
        """
        self._ring, self._host, self._grants, self._stall_s = ring, host, grants, stall_s
        self._rate, self.lent_bytes = rate, 0

    async def serve(self, connection: socket, introduction: Introduction) -> None:
        """Send blocks over a data connection until its reader closes it."""
        peer = introduction.peer_id
        with connection:  # the ring has a descriptor of its own
            index = self._ring.add(connection)
        try:
            sender = Sender(self._ring, self._stall_s, self._rate)
            await sender.serve(index, partial(self.lookup, peer))
        except (OSError, StreamEndedError, MalformedError, TimeoutError) as error:
            log.warning("peer_data_ended", peer=str(peer), reason=str(error) or "too slow")
        finally:
            await self._ring.remove(index)

    def lookup(self, peer: PeerId, read: Read) -> Granted | Status:
        """Return the blocks that a peer asks for, or why it does not get them."""
        group = self._grants.group_of(peer, read.number)
        if group is None:
            return Status.NO_GRANT
        if read.block_bytes != self._host.block_bytes[group]:
            return Status.OTHER_SIZE
        found = self._grants.blocks(peer, read.number, read.first, read.blocks)
        if isinstance(found, ReadStatus):
            return Status(int(found))
        arena = self._host.arena
        addresses = arena.address + found.block_ids * arena.block_stride_bytes
        self.lent_bytes += len(addresses) * read.block_bytes
        return Granted(addresses, self._host.sums[found.block_ids], found.ended)
