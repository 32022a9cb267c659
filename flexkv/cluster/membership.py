"""Which nodes there are, and the numbers by which hints know them.

    registered ──▶ joined: has a number ──▶ left: its number is retired ──▶ scrubbed ──▶ used again
                                 ▲   a new life of the node │ a farewell │ gone for ABSENT_TTLS
                                 └── from the registry, as read again and again

Nothing is concluded from a registry that cannot be read. After the registry was lost, nodes have
time to register again. No clocks of two machines are compared: a node is heard of when the reader,
by its own clock, sees that its beat is another one, or reads an entry of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from flexkv.cluster.records import Beat, NodeRecord
from flexkv.index.hints import HOLDERS_MAX, Hints
from flexkv.observe.logs import get_logger

log = get_logger(__name__)

ABSENT_TTLS = 1 / 2
"""After a loss of the registry, nodes register themselves within a third of a TTL."""
NODES_MAX = 350
"""How many nodes one store carries, if all follow each other: beyond, use more zones."""


@dataclass
class Member:
    """A node that has joined.

    Attributes:
        holder: its number in hints.
        beat: the latest that was seen.
        heard_s: when it was heard of last, by our clock.
        absent_since_s: since when the registry lacks it; None while it does not.
        is_gone: whether it has left.
    """

    holder: int
    beat: Beat
    heard_s: float
    absent_since_s: float | None = None
    is_gone: bool = False

    @property
    def node(self) -> NodeRecord:
        """Return who it is."""
        return self.beat.node


class MembershipListener(Protocol):
    """Is told about nodes that join and leave, on the engine's loop."""

    def joined(self, holder: int, node: NodeRecord) -> None:
        """Use a number for a node."""
        ...

    def left(self, holder: int, node: NodeRecord) -> None:
        """Stop using a number; it may be another node's later."""
        ...


class Membership:
    """The nodes besides the own one.

    Attributes:
        own: who this node is.
        ttl_s: how long a beat is valid.
        listeners: are told about each change.
    """

    def __init__(self, hints: Hints, own: NodeRecord, ttl_s: float) -> None:
        """Begin with no other node."""
        self.own, self.ttl_s = own, ttl_s
        self.listeners: list[MembershipListener] = []
        self._hints = hints
        self._lives: dict[int, Member] = {}
        self._holders: dict[int, Member] = {}
        self._unused = iter(range(1, HOLDERS_MAX))
        self._retired: list[int] = []
        self._is_over = False

    def __len__(self) -> int:
        return len(self._lives)

    def members(self) -> Iterable[Member]:
        """Return the nodes that have joined."""
        return self._lives.values()

    def member_of(self, life: int) -> Member | None:
        """Return the node that has this life."""
        return self._lives.get(life)

    def node(self, holder: int) -> NodeRecord | None:
        """Return the node that has this number."""
        member = self._holders.get(holder)
        return None if member is None else member.node

    def saw(self, beats: Iterable[Beat], now_s: float) -> list[bytes]:
        """Take what the registry has now; return the ids of nodes that are gone from it for good.

        Args:
            beats: all of them.
            now_s: our time at which they were read.
        """
        lives = {beat.node.life: beat for beat in beats if beat.node.life != self.own.life}
        ids = {beat.node.id: life for life, beat in lives.items()}
        gone = []
        for life, member in list(self._lives.items()):
            if (beat := lives.pop(life, None)) is not None:
                if beat != member.beat:
                    member.beat, member.heard_s = beat, now_s
                member.absent_since_s = None
            elif ids.get(member.node.id) is not None:
                self._leave(member, "it was started again")
            else:
                if member.absent_since_s is None:
                    member.absent_since_s = now_s
                if now_s - member.absent_since_s >= self.ttl_s * ABSENT_TTLS:
                    self._leave(member, "its registration has ended")
                    gone.append(member.node.id)
        for beat in lives.values():
            self._join(beat, now_s)
        return gone

    def farewell(self, life: int) -> None:
        """Take note that a node has left."""
        if (member := self._lives.get(life)) is not None:
            self._leave(member, "it has said so")

    def _join(self, beat: Beat, now_s: float) -> None:
        holder = self._number()
        if holder is None:
            log.warning("cluster_node_not_followed", node=beat.node.id.hex(), reason="too many")
            return
        member = Member(holder, beat, now_s)
        self._lives[beat.node.life] = self._holders[holder] = member
        self._warn_if_many()
        log.info("cluster_node_joined", node=beat.node.id.hex(), address=beat.node.address)
        for listener in self.listeners:
            listener.joined(holder, beat.node)

    def _leave(self, member: Member, reason: str) -> None:
        node, holder = member.node, member.holder
        member.is_gone = True
        del self._lives[node.life], self._holders[holder]
        self._hints.retire(holder)
        self._retired.append(holder)
        log.info("cluster_node_left", node=node.id.hex(), address=node.address, reason=reason)
        for listener in self.listeners:
            listener.left(holder, node)

    def _number(self) -> int | None:
        """Return a number that no pair has; None if all are in use, or not scrubbed yet."""
        if (new := next(self._unused, None)) is not None:
            return new
        for position, holder in enumerate(self._retired):
            if not self._hints.pairs_of(holder):
                del self._retired[position]
                self._hints.revive(holder)
                return holder
        return None

    def _warn_if_many(self) -> None:
        if not self._is_over and len(self) + 1 > NODES_MAX:
            self._is_over = True
            log.warning(
                "cluster_too_large",
                nodes=len(self) + 1,
                nodes_max=NODES_MAX,
                reason="one store carries no more: use several, one for each zone",
            )
