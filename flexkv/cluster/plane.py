"""What a node knows of its cluster, and tells it: the tasks, and the state that they keep.

Registration ──▶ Membership ──▶ Follower ──▶ hints
      ▲                            ▲
      └── beats ── ClusterStore ───┘◀── entries ── Publisher ◀── changes of this node's spans
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from typing import Any

import msgspec

from flexkv.cluster.follower import Follower, Snapshots
from flexkv.cluster.membership import Member, Membership
from flexkv.cluster.publisher import Publisher, SpanSource
from flexkv.cluster.registration import Registration
from flexkv.cluster.store import ClusterStore, ClusterStoreError
from flexkv.index.hints import Hints
from flexkv.observe.logs import get_logger
from flexkv.process.spawning import Spawn

log = get_logger(__name__)


class NodeState(msgspec.Struct, frozen=True):
    """What is known of another node.

    Attributes:
        id: in hexadecimal.
        life: in hexadecimal.
        address: where it answers.
        zone: where it is.
        holder: its number in hints.
        spans: how many spans it is said to have.
        stale_s: how long ago it was heard of, by our clock.
        is_behind: whether a snapshot of it is needed, or under way.
    """

    id: str
    life: str
    address: str
    zone: str
    holder: int
    spans: int
    stale_s: float
    is_behind: bool


class ClusterState(msgspec.Struct, frozen=True):
    """What a node knows of its cluster.

    Attributes:
        store: names the store, without credentials.
        is_store_up: whether it has answered last.
        store_error: what it did not do; "" if it is up.
        is_registered: whether this node is registered.
        id: of this node, in hexadecimal.
        life: of this node, in hexadecimal.
        zone: of this node.
        generation: the latest that was seen.
        published_seq: the number of the latest entry that the store has of this node.
        pending_spans: for how many spans a change is not told yet.
        gaps: how often changes were dropped because the store was away for too long.
        entries: how many entries were read since the start.
        entries_per_s: how many were read a second, on average over some ten seconds.
        malformed_entries: how many could not be decoded.
        snapshots: how many snapshots were taken.
        log_bytes: what the log takes in the store's memory.
        nodes: the other nodes.
    """

    store: str
    is_store_up: bool
    store_error: str
    is_registered: bool
    id: str
    life: str
    zone: str
    generation: int
    published_seq: int
    pending_spans: int
    gaps: int
    entries: int
    entries_per_s: float
    malformed_entries: int
    snapshots: int
    log_bytes: int
    nodes: tuple[NodeState, ...]


class MetadataPlane:
    """A node's part in its cluster's metadata.

    Attributes:
        membership: which other nodes there are.
        publisher: tells them what this node has.
        follower: takes what they tell.
        registration: keeps this node registered; its `refused` says if another one has its id.
    """

    def __init__(
        self,
        store: ClusterStore,
        membership: Membership,
        hints: Hints,
        source: SpanSource,
        snapshots: Snapshots,
        spans_max: int,
    ) -> None:
        """Take what the plane is made of; nothing is sent before the tasks run.

        Args:
            store: which all nodes of the cluster use.
            membership: of this node, without any other one.
            hints: which are kept in step with what the others tell.
            source: what this node has.
            snapshots: asks other nodes for what they have.
            spans_max: how many spans this node may have, about.
        """
        self.membership = membership
        self.publisher = Publisher(
            store, membership.own, source, spans_max, lambda: 1 + len(membership)
        )
        self.follower = Follower(store, membership, hints, snapshots)
        self.registration = Registration(store, membership, self.publisher, self.follower, hints)
        self._store, self._hints = store, hints
        self._error: ClusterStoreError | None = None
        self._is_up = False
        self._loop: asyncio.AbstractEventLoop | None = None
        generations = self.follower.generations
        self.publisher.may_send = lambda: self.registration.is_registered and generations.is_known
        self.follower.on_stranger = self.follower.on_need = self.registration.look_soon
        for task in (self.follower, self.registration):
            task.on_failure, task.on_success = self._failed, self._answered

    def work(self, spawn: Spawn) -> Mapping[str, Coroutine[Any, Any, None]]:
        """Return the tasks, by name; `spawn` starts those that take a snapshot."""
        self._loop = asyncio.get_running_loop()
        return {
            "cluster registration": self.registration.run(),
            "cluster publisher": self.publisher.run(),
            "cluster follower": self.follower.run(),
            "cluster snapshots": self.follower.take_snapshots(spawn),
        }

    def _failed(self, error: ClusterStoreError) -> None:
        if self._error is None:
            log.warning("cluster_store_lost", store=self._store.where, error=str(error))
        self._error, self._is_up = error, False

    def _answered(self) -> None:
        if self._error is not None:
            log.info("cluster_store_back", store=self._store.where)
            self.registration.look_soon()  # it may have lost everything
        self._error, self._is_up = None, True

    async def advance(self, known: int = 0) -> int:
        """Begin a new generation of the whole cluster; return its number.

        Args:
            known: what it must be later than, besides what this node has heard of.

        Raises:
            ClusterStoreError: the store did not do it, or it is not known whether it did.
        """
        return await self._store.advance(max(known, self.follower.generations.number))

    async def leave(self) -> None:
        """Leave the cluster, for a bounded time; call it once the tasks have ended."""
        with suppress(ClusterStoreError):
            await self._store.leave(self.membership.own)
            await self.publisher.farewell()

    def state(self) -> ClusterState:
        """Return what is known now; any thread may call this."""
        assert self._loop is not None
        now_s, own = self._loop.time(), self.membership.own
        return ClusterState(
            store=self._store.where,
            is_store_up=self._is_up,
            store_error=str(self._error or ""),
            is_registered=self.registration.is_registered,
            id=own.id.hex(),
            life=f"{own.life:016x}",
            zone=own.zone,
            generation=self.follower.generations.number,
            published_seq=self.publisher.sent_seq,
            pending_spans=self.publisher.pending_spans,
            gaps=self.publisher.gaps,
            entries=self.follower.entries,
            entries_per_s=self.follower.entries_per_s(now_s),
            malformed_entries=self.follower.malformed,
            snapshots=self.follower.snapshots_taken,
            log_bytes=self.registration.log_bytes,
            nodes=tuple(self._node(member, now_s) for member in list(self.membership.members())),
        )

    def _node(self, member: Member, now_s: float) -> NodeState:
        node = member.node
        return NodeState(
            id=node.id.hex(),
            life=f"{node.life:016x}",
            address=node.address,
            zone=node.zone,
            holder=member.holder,
            spans=self._hints.spans_of(member.holder),
            stale_s=now_s - member.heard_s,
            is_behind=self.follower.is_behind(node.life),
        )
