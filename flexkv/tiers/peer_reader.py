"""The reader's side of a node: which holders may be read from, and how they are asked.

    its link is up ────────┐
    this node is not apart ┼──▶ hints name a holder, or avoid it
    its reads arrive ──────┘
"""

from __future__ import annotations

from collections.abc import Callable
from socket import socket

from flexkv.cluster.membership import Membership
from flexkv.cluster.peer import Node
from flexkv.cluster.peers import Peers
from flexkv.cluster.records import NodeRecord
from flexkv.cluster.wire import WANT_BLOCKS_MAX
from flexkv.common.errors import PeerError
from flexkv.index.hints import Hints
from flexkv.io.peer.port import Allowed, Wish
from flexkv.observe.logs import get_logger
from flexkv.tiers.peer_health import HolderHealth
from flexkv.tiers.peer_times import ReaderTimes
from flexkv.tiers.peer_transport import places_of

log = get_logger(__name__)


class PeerReader:
    """Asks other nodes: it is the `Holders` of a port.

    Attributes:
        peers: the links to others; to be set before anybody is asked.
    """

    def __init__(
        self,
        membership: Membership,
        hints: Hints,
        shares_nothing: Callable[[], bool],
        times: ReaderTimes,
    ) -> None:
        """Ask nobody yet.

        Args:
            membership: says which node has which number.
            hints: name only holders that may be read from.
            shares_nothing: returns whether this node shares nothing now.
            times: how long holders may take.
        """
        self._membership, self._hints = membership, hints
        self._shares_nothing, self._times = shares_nothing, times
        self.peers: Peers | None = None
        self._health = HolderHealth(self._update)

    @property
    def links(self) -> Peers:
        """Return the links to others."""
        assert self.peers is not None
        return self.peers

    # -- whom to ask ----------------------------------------------------------------------------

    def forget_failures(self) -> None:
        """Try all holders again: what they have refused before, they may grant now."""
        self._health.clear()
        for member in self._membership.members():
            self._update(member.holder)

    def link_changed(self, node: Node, _: bool) -> None:
        """Take note that the link to a node has failed, or is there again."""
        member = self._membership.member_of(node.life)
        if member is not None:
            self._update(member.holder)

    def joined(self, holder: int) -> None:
        """Use a number for a node that has joined."""
        self._health.forget(holder)
        self._hints.avoid(holder, self._shares_nothing())

    def left(self, holder: int, node: NodeRecord) -> None:
        """End the link to a node that has left; its number may be another node's later."""
        self._health.forget(holder)
        if self.peers is not None:
            self.peers.left(node)

    def is_up(self, holder: int) -> bool:
        """Return whether a holder may be read from now."""
        return self.links.is_up(holder) and self._health.is_usable(holder)

    def _update(self, holder: int) -> None:
        self._hints.avoid(holder, self._shares_nothing() or not self.is_up(holder))

    def stop(self) -> None:
        """End the links to all nodes; what waits for them fails at once."""
        for member in self._membership.members():
            self.left(member.holder, member.node)

    async def close(self) -> None:
        """End everything."""
        self._health.close()
        await self.links.close()

    # -- asking ---------------------------------------------------------------------------------

    def begin(self, holder: int, request: int) -> None:
        """Take note that a request reads from a holder: see `Holders`."""
        self._health.begin(holder, request)

    async def want(self, holder: int, wish: Wish) -> Allowed:
        """Ask a holder for blocks: see `Holders`."""
        if wish.last > WANT_BLOCKS_MAX:
            why = f"a prompt of {wish.last} blocks is too long: {WANT_BLOCKS_MAX} can be asked for"
            raise PeerError(str(holder), "asking", why)
        try:
            grant = await self.links.want(holder, *wish)
        except PeerError as error:
            # A link that is down has a breaker of its own.
            if not error.is_busy and self.links.is_up(holder):
                self._health.failed(holder)
            raise
        places = places_of(grant, self._times.places_s)
        return Allowed(grant.number, grant.count, grant.is_cut, places)

    def release(self, holder: int, number: int) -> None:
        """End a grant."""
        self.links.release(holder, number)

    def blame(self, holder: int, error: PeerError) -> None:
        """Take note that a holder did not lend or send anything: see `Holders`."""
        log.warning("peer_read_failed", peer=error.peer, reason=error.why)
        self._health.failed(holder)

    def arrived(self, holder: int) -> None:
        """Take note that a holder has sent blocks."""
        self._health.arrived(holder)

    async def data_connection(self, holder: int) -> tuple[socket, str]:
        """Return a new data connection to a holder, and its address: see `Connect`."""
        return await self.links.data_socket(holder), self.address_of(holder)

    def address_of(self, holder: int) -> str:
        """Return the address of the node of a number; the number if it has left."""
        node = self._membership.node(holder)
        return str(holder) if node is None else node.address
