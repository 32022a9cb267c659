"""What tests of the links between nodes need: fake engines, nodes, and ways to connect them."""

from __future__ import annotations

import asyncio
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from random import Random
from typing import Any, NamedTuple

import numpy as np

from flexkv.actors.supervisor import Supervisor
from flexkv.cluster import tcp
from flexkv.cluster.grants import GrantLimits, Grants, Held
from flexkv.cluster.handshake import Identity
from flexkv.cluster.listener import Listener, ListenerHooks
from flexkv.cluster.peer import Node, PeerTimes
from flexkv.cluster.peers import PeerHooks, Peers
from flexkv.cluster.records import SpanTags
from flexkv.cluster.sessions import Sessions
from flexkv.cluster.wire import Introduction, PeerId
from flexkv.common.terms import BLOCK_KEY_BYTES

KEY = b"k" * 32
FACTS: Mapping[str, int | str] = {"model": "tiny", "tokens_per_block": 16, "span_blocks": 8}


def keys_of(prompt: int, blocks: int) -> bytes:
    """Return the root and keys of a prompt's blocks."""
    return b"".join(
        n.to_bytes(8, "little") + prompt.to_bytes(8, "little") for n in range(blocks + 1)
    )


class FakeOwner:
    """An engine that has blocks in host memory and on disk, and counts what is held.

    Attributes:
        host: the host block of each key.
        disk: keys that a prefetch brings to host memory.
        holds: how many holds keep each host block.
        held_max: the most blocks that were ever held at once.
        prefetch_s: how long the disk takes.
    """

    def __init__(self) -> None:
        self.host: dict[bytes, int] = {}
        self.disk: set[bytes] = set()
        self.holds: Counter[int] = Counter()
        self.held_max = self.prefetching = self.prefetching_max = 0
        self.prefetch_s = 0.1
        self.prefetch_error: Exception | None = None

    def put(self, keys: bytes, first: int = 0, last: int | None = None) -> None:
        """Put blocks of a prompt in host memory."""
        for key in _rows(keys, first, last):
            self.host.setdefault(key, len(self.host))

    def put_on_disk(self, keys: bytes, first: int = 0, last: int | None = None) -> None:
        """Put blocks of a prompt on disk."""
        self.disk.update(_rows(keys, first, last))

    def hold(self, keys: bytes, first: int, last: int, group: int) -> Held:
        """Hold the leading run in host memory; of other groups, what there is."""
        wanted = _rows(keys, first, last)
        if group:
            found = [self.host.get(key, -1) for key in wanted]
            while found and found[-1] < 0:
                found.pop()
        else:
            found = []
            for key in wanted:
                if key not in self.host:
                    break
                found.append(self.host[key])
        on_disk = 0
        for key in wanted[len(found) :]:
            if key not in self.disk:
                break
            on_disk += 1
        ids = np.array(found, np.int64)
        kept = ids[ids >= 0].tolist()
        self.holds.update(kept)
        self.held_max = max(self.held_max, len(+self.holds))
        return Held(ids, on_disk, kept)

    def release(self, held: Held) -> None:
        """End a hold; ending it twice fails."""
        assert isinstance(held.pins, list)
        self.holds.subtract(held.pins)
        assert min(self.holds.values(), default=0) >= 0
        self.holds += Counter()

    async def prefetch(self, keys: bytes, first: int, last: int, group: int) -> None:
        """Bring blocks to host memory, after a while."""
        self.prefetching += 1
        self.prefetching_max = max(self.prefetching_max, self.prefetching)
        try:
            await asyncio.sleep(self.prefetch_s)
            if self.prefetch_error is not None:
                raise self.prefetch_error
            for key in _rows(keys, first, last):
                if key in self.disk:
                    self.host.setdefault(key, len(self.host))
        finally:
            self.prefetching -= 1


def _rows(keys: bytes, first: int, last: int | None) -> list[bytes]:
    rows = [keys[at : at + BLOCK_KEY_BYTES] for at in range(0, len(keys), BLOCK_KEY_BYTES)][1:]
    return rows[first:last]


class FakeNode(NamedTuple):
    """What a reader knows of a node."""

    id: bytes
    life: int
    address: str


Dial = Callable[[str], Any]


class Network:
    """Nodes in one process, connected by TCP or, on a virtual clock, by socket pairs.

    Data crosses a socket pair at once, so that virtual time does not pass meanwhile.

    Attributes:
        listeners: by address.
        dialed: both ends of each connection that was made, in order.
        cut: addresses at which connections are refused.
    """

    def __init__(self, is_tcp: bool = False) -> None:
        self.is_tcp = is_tcp
        self.listeners: dict[str, Listener] = {}
        self.dialed: list[tuple[str, socket.socket, socket.socket]] = []
        self.cut: set[str] = set()
        self._next = 0

    def listening(self) -> tuple[socket.socket, str]:
        """Return a listening socket, and its address if it has none of its own."""
        self._next += 1
        if self.is_tcp:
            return tcp.listening("127.0.0.1", 0, 16), ""
        return socket.socket(socket.AF_UNIX), f"192.0.2.1:{self._next}"

    async def dial(self, address: str) -> socket.socket:
        """Connect to an address."""
        if address in self.cut:
            raise ConnectionRefusedError(111, "refused")
        if self.is_tcp:
            return await tcp.connected(address)
        if address not in self.listeners:
            raise ConnectionRefusedError(111, "refused")
        ours, theirs = pair()
        self.dialed.append((address, ours, theirs))
        self.listeners[address].arrived(theirs, "pair")
        return ours


def pair() -> tuple[socket.socket, socket.socket]:
    """Return two connected sockets that do not block."""
    ends = socket.socketpair()
    for each in ends:
        each.setblocking(False)
    return ends


class ClusterNode:
    """A node with a fake engine.

    Attributes:
        failures: what its tasks raised; must stay empty.
        data: the data connections that others made.
        open_snapshots: how many snapshots of this node are being read.
        changes: the peers that went down or up.
    """

    def __init__(self, network: Network, number: int, life: int = 1, **others: Any) -> None:
        self.network, self.owner, self.random = network, FakeOwner(), Random(number)
        self.failures: list[BaseException] = []
        self.supervisor = Supervisor(self.failures.append)
        self.generation = 0
        self.id = PeerId(number.to_bytes(16, "little"), life)
        facts = others.get("facts", FACTS)
        self.identity = Identity(self.id, "pool", facts, lambda: self.generation)
        self.limits = others.get("limits", GrantLimits(1000))
        self.nodes: dict[int, Node] = {}
        self.changes: list[tuple[bytes, bool]] = []
        self.data: list[socket.socket] = []
        self.parts = parts(1)
        self.open_snapshots = 0
        spawn = self.supervisor.spawn
        self.grants = Grants(self.owner, self.limits, spawn)
        self.sessions = Sessions(self.grants, lambda: self.generation, self._snapshot)
        sock, address = network.listening()
        hooks = ListenerHooks(self.sessions.serve, self._serve_data, spawn)
        key = others.get("key", KEY)
        self.listener = Listener(sock, key, self.identity, hooks)
        self.listener.address = self.listener.address or address
        self.peers = Peers(
            key,
            self.identity,
            PeerHooks(lambda holder: self.nodes.get(holder), self._changed, spawn, network.dial),
            self.random,
            others.get("times", PeerTimes()),
        )

    def _changed(self, node: Node, is_up: bool) -> None:
        self.changes.append((node.id, is_up))

    @property
    def node(self) -> FakeNode:
        """Return what others know of this node."""
        return FakeNode(self.id.node_id, self.id.life, self.listener.address)

    def meet(self, *others: ClusterNode) -> None:
        """Number other nodes by their order, from 1."""
        self.nodes = {number: other.node for number, other in enumerate(others, 1)}

    async def start(self) -> None:
        """Accept connections."""
        await self.supervisor.start()
        self.network.listeners[self.listener.address] = self.listener
        if self.network.is_tcp:
            self.listener.listen()

    async def _serve_data(self, connected: socket.socket, introduction: Introduction) -> None:
        """Hold a data connection open until its reader closes it."""
        self.data.append(connected)
        with suppress(OSError):
            while await asyncio.get_running_loop().sock_recv(connected, 1):
                pass

    def _snapshot(self) -> Iterator[SpanTags]:
        self.open_snapshots += 1
        try:
            yield from self.parts
        finally:
            self.open_snapshots -= 1

    async def stop(self) -> None:
        """Close everything, and check that nothing is left."""
        self.network.listeners.pop(self.listener.address, None)
        self.listener.close()
        await self.peers.close()
        self.sessions.close()
        await self.listener.wait_closed()
        self.grants.close()
        await self.supervisor.stop()
        assert not self.failures
        assert not len(self.sessions)
        assert not self.open_snapshots
        assert not self.owner.holds
        assert not self.grants.counts.grants
        assert not self.grants.counts.pinned_blocks


def open_descriptors() -> int:
    """Return how many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))


async def turns(count: int = 50) -> None:
    """Let other tasks run, without time passing."""
    for _ in range(count):
        await asyncio.sleep(0)


def tasks_of(supervisor: Supervisor) -> int:
    """Return how many tasks of a node are running."""
    return len(supervisor._tasks)


def parts(count: int) -> list[SpanTags]:
    """Return a snapshot in this many parts."""
    return [SpanTags(7, bytes([n]) * 8, b"", n == count - 1) for n in range(count)]
