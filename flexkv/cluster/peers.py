"""All peers that this node reads from."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from itertools import count
from random import Random
from socket import socket
from typing import NamedTuple

from flexkv.cluster import tcp
from flexkv.cluster.handshake import Identity
from flexkv.cluster.peer import Dial, Node, Peer, PeerTimes, Surroundings
from flexkv.cluster.records import SpanTags
from flexkv.cluster.wants import Wish
from flexkv.cluster.wire import Grant, PeerId
from flexkv.common.errors import ClosedError, PeerError
from flexkv.process.spawning import Spawn


class PeerHooks(NamedTuple):
    """What peers need of their engine.

    Attributes:
        node_of: returns the node of a holder's number; None if it is not in the cluster any more.
        changed: called with a node when it goes down, and when it is up again.
        spawn: starts a task.
        dial: connects to an address.
    """

    node_of: Callable[[int], Node | None]
    changed: Callable[[Node, bool], None]
    spawn: Spawn
    dial: Dial = tcp.connected


class Peers:
    """The links to the peers of this node, by life: each is connected when it is first asked."""

    def __init__(
        self,
        key: bytes,
        identity: Identity,
        hooks: PeerHooks,
        random: Random,
        times: PeerTimes = PeerTimes(),  # noqa: B008 -- it is immutable
    ) -> None:
        """Connect to nobody yet; `random` spreads the pauses between attempts."""
        self._node_of = hooks.node_of
        self._shared = Surroundings(
            key, identity, hooks.spawn, hooks.dial, hooks.changed, random, count(1), times
        )
        self._peers: dict[PeerId, Peer] = {}
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._peers)

    async def want(
        self,
        holder: int,
        keys: bytes,
        first: int,
        last: int,
        group: int = 0,
        with_places: bool = False,
    ) -> Grant:
        """Ask a holder to keep blocks of a prompt, so that they can be read from it.

        Args:
            holder: its number.
            keys: root and keys of the prompt's blocks.
            first: a position.
            last: a position, exclusive.
            group: the KV group.
            with_places: whether to say where its TransferEngine has them.

        Returns:
            What it keeps until `release`, until its link ends, or until nothing was read for a
            while. The count is 0 if it does not have the blocks any more.

        Raises:
            PeerError: the holder is away, busy, refuses, or did not answer in time.

        Cancellation:
            The blocks are released.
        """
        return await self._peer_of(holder).want(Wish(keys, first, last, group, with_places))

    def release(self, holder: int, number: int) -> None:
        """End a grant, if it has not ended yet."""
        node = self._node_of(holder)
        peer = None if node is None else self._peers.get(PeerId(node.id, node.life))
        if peer is not None:
            peer.release(number)

    async def data_socket(self, holder: int) -> socket:
        """Return a new data connection to a holder: a bare socket that does not block.

        Raises:
            PeerError: the holder is away, or refuses.
        """
        return await self._peer_of(holder).data_socket()

    def parts(self, node: Node) -> AsyncGenerator[SpanTags, None]:
        """Return the parts of a node's snapshot; it sends one at a time, when it is asked for.

        Raises:
            PeerError: the node is away, refuses, or did not answer in time.
        """
        return self._peer(node).parts()

    def is_up(self, holder: int) -> bool:
        """Return whether a holder may be asked."""
        node = self._node_of(holder)
        if node is None or self._is_closed:
            return False
        peer = self._peers.get(PeerId(node.id, node.life))
        return peer is None or peer.is_up

    def left(self, node: Node) -> None:
        """End the link to a node's life, which is over; what waits for it fails at once."""
        peer = self._peers.pop(PeerId(node.id, node.life), None)
        if peer is not None:
            peer.leave()

    async def close(self) -> None:
        """End every link, and return when their tasks are over."""
        self._is_closed = True
        tasks = [peer.task for peer in self._peers.values() if peer.task is not None]
        for peer in self._peers.values():
            peer.leave()
        self._peers.clear()
        if tasks:
            await asyncio.wait(tasks)

    def _peer_of(self, holder: int) -> Peer:
        node = self._node_of(holder)
        if node is None:
            raise PeerError(f"number {holder}", "asking", "it is not in the cluster any more")
        return self._peer(node)

    def _peer(self, node: Node) -> Peer:
        if self._is_closed:
            raise ClosedError("this node is closing")
        peer_id = PeerId(node.id, node.life)
        peer = self._peers.get(peer_id)
        if peer is None:
            peer = self._peers[peer_id] = Peer(node, self._shared)
        return peer
