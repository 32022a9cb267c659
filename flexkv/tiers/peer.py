"""The peers' tier: blocks of other nodes, and what this node does for them in return.

    hints ◀── follower ◀── Redis ◀── publisher ◀── changes of our spans
    transfers ──▶ PeerPort ──▶ links, transport ══▶ another node's grants, its sender or mover

Everything that a node says is a hint; the owner's grant decides, and then the checksums.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from random import Random
from socket import socket

from flexkv.actors.actor import Window
from flexkv.actors.shares import Shares
from flexkv.cluster import tcp
from flexkv.cluster.grants import GrantLimits, Grants
from flexkv.cluster.handshake import Identity
from flexkv.cluster.listener import BACKLOG, Listener, ListenerHooks
from flexkv.cluster.membership import Membership
from flexkv.cluster.peers import PeerHooks, Peers
from flexkv.cluster.plane import MetadataPlane
from flexkv.cluster.publisher import SpanStep
from flexkv.cluster.records import NodeRecord
from flexkv.cluster.redis_commands import RedisCommands
from flexkv.cluster.redis_store import RedisStore
from flexkv.cluster.secret import cluster_key
from flexkv.cluster.sessions import Sessions
from flexkv.cluster.wire import PeerId
from flexkv.common.config import MB, CacheConfig, CacheSizes
from flexkv.common.space import rules_of
from flexkv.common.terms import Tier, Transfer
from flexkv.index.hints import Hints, holders_of
from flexkv.index.keys import block_identity
from flexkv.index.span_changes import SpanChange, SpanChanges
from flexkv.io.memory.arena import Arena
from flexkv.io.memory.host_blocks import HostBlocks
from flexkv.io.peer.port import PeerPort, PeerReads
from flexkv.io.peer.sockets import SocketRing
from flexkv.io.ports import Sums
from flexkv.io.remote.names import Pool, PoolDescription
from flexkv.observe.logs import get_logger
from flexkv.process.descriptors import raise_limit
from flexkv.tiers.far import keep_time
from flexkv.tiers.generation import NOTE, Generation
from flexkv.tiers.generation_changes import GenerationChanges, NodeActions
from flexkv.tiers.out_rate import OutRate
from flexkv.tiers.parts import ClusterStatistics, TierHooks, TierParts, Work
from flexkv.tiers.peer_reader import PeerReader
from flexkv.tiers.peer_sending import BlockSending
from flexkv.tiers.peer_times import reader_times
from flexkv.tiers.peer_transport import PeerTransport
from flexkv.tiers.remote import RemoteTier
from flexkv.tiers.ssd_note import SsdNote
from flexkv.tiers.unavailable import Unavailable

log = get_logger(__name__)

SOCKETS_MAX = 4096
"""Data connections of one node, in both directions."""
BLOCKS_LENT = 256
"""At least so many blocks are lent to peers at once, if they are no more than half of all."""
CHANGES_MAX = 1 << 14
"""How many changes of blocks may wait until they are told; beyond it, others take a snapshot."""
WINDOW_SHARES = 3
"""A peer may have this part of `p2p_read_window_mb` in flight, so that one that hangs, or two, do
not fill it; two spans may always be."""
PREFETCHES, PREFETCHES_EACH = 32, 16
"""How many requests of other nodes, and of each of them, wait for our SSD at once. A prompt of a
model with several KV groups makes a request for each."""


class PeerTier:
    """The peers' tier of one engine."""

    def __init__(
        self,
        cache: CacheConfig,
        sizes: CacheSizes,
        unavailable: Unavailable,
        hints: Hints | None,
        remote: RemoteTier,
    ) -> None:
        """Take the configuration, and what else the tier needs of its backend.

        Args:
            cache: the configuration.
            sizes: of the tiers.
            unavailable: where to note what cannot be used.
            hints: of all far tiers; None if there is none.
            remote: which goes from generation to generation with the cluster.
        """
        self._cache, self._sizes, self._unavailable = cache, sizes, unavailable
        self._hints, self._remote = hints, remote

    def open(self, arena: Arena, sums: Sums, undo: ExitStack) -> TierParts | None:
        """Listen for other nodes, without answering yet; return None if nothing is shared.

        Args:
            arena: the host memory.
            sums: of its blocks: uint64[blocks].
            undo: takes callbacks that close what is opened.

        Raises:
            ConfigError: the address cannot be listened on, or Mooncake's configuration is wrong.
            BackendUnavailableError: the client of Redis, or Mooncake, is not installed.
        """
        cache, sizes, hints = self._cache, self._sizes, self._hints
        if not cache.has_peers or hints is None:
            SsdNote(cache.ssd_cache_dir if cache.enable_ssd else (), NOTE).forget()
            return None
        commands = RedisCommands(
            cache.redis_host, cache.redis_port, cache.redis_password.get_secret_value()
        )
        try:
            ring = SocketRing([arena.buffer], SOCKETS_MAX)
        except OSError as error:
            self._unavailable.lose_tier(Tier.PEER, f"io_uring cannot be used: {error}")
            return None
        undo.callback(ring.close)
        raise_limit()
        listening = tcp.listening(cache.local_ip, cache.p2p_port, BACKLOG)
        undo.callback(listening.close)
        host = HostBlocks(arena, sums, tuple(sizes.block_bytes))
        node = _Node(cache, sizes, hints, commands, (ring, host, listening))
        node.remote = self._remote
        undo.callback(node.port.close)
        span_bytes = hints.span_blocks * sizes.block_stride_bytes
        window = Window(max(int(cache.p2p_read_window_mb * MB), span_bytes), span_bytes)
        share_bytes = max(window.bytes_max // WINDOW_SHARES, 2 * span_bytes)
        return TierParts(
            Tier.PEER,
            None,
            node.port,
            window,
            Window(span_bytes, span_bytes),
            node.generation,
            work=node.work,
            cluster=node,
            stop=node.stop,
            leave=node.transports.leave,
            waiting_since_s=lambda _: asyncio.get_running_loop().time(),  # each peer has its limits
            shares=Shares(_holder_of, share_bytes),
        )


def _holder_of(transfer: Transfer, block: int) -> int:
    """Return the holder of a block that is to be read."""
    return int(holders_of(transfer.source_ids[block]))


class _Node:
    """This node: it is the listener of its membership.

    Attributes:
        port: reads blocks of others.
        transports: move them.
        generation: of this node's blocks.
        remote: see `PeerTier`.
    """

    def __init__(
        self,
        cache: CacheConfig,
        sizes: CacheSizes,
        hints: Hints,
        commands: RedisCommands,
        opened: tuple[SocketRing, HostBlocks, socket],
    ) -> None:
        self._ring, self._host, listening = opened
        self._cache, self._sizes, self._hints, self._commands = cache, sizes, hints, commands
        secret = cache.key_secret.get_secret_value()
        description = PoolDescription(
            block_identity(sizes.spaces, secret), tuple(sizes.block_bytes), hints.span_blocks
        )
        self._pool = Pool(description)
        self._key = cluster_key(
            cache.cluster_secret.get_secret_value(),
            secret,
            cache.redis_password.get_secret_value(),
        )
        generation = self.generation = Generation(cache.ssd_cache_dir if cache.enable_ssd else ())
        self.remote: RemoteTier | None = None
        address = tcp.address_of(*listening.getsockname()[:2])
        own = NodeRecord(secrets.token_bytes(16), secrets.randbits(63), address, cache.p2p_zone)
        self._listening = listening
        self._membership = Membership(hints, own, cache.node_ttl_seconds)
        self._membership.listeners.append(self)
        self._identity = Identity(
            PeerId(own.id, own.life),
            self._pool.name,
            _facts(sizes, hints),
            lambda: generation.shared,
        )
        times = reader_times(cache.io_deadline_s)
        reader = PeerReader(self._membership, hints, lambda: not generation.is_sharing, times)
        self._reader = reader
        transports = self.transports = PeerTransport(
            cache, self._ring, self._host, reader.data_connection
        )
        ratios = [1, *(rule.ratio for rule in rules_of(sizes.spaces))]
        self.port = PeerPort(
            transports.transport,
            transports.copier,
            reader,
            self._host,
            ratios,
            times.asking_s,
        )
        self._hooks: TierHooks | None = None
        self._read_of_gone: Counter[str] = Counter()

    # -- work -----------------------------------------------------------------------------------

    def work(self, hooks: TierHooks) -> Work:
        """Return the tasks of the tier."""
        self.port.spawn, self._hooks = hooks.spawn, hooks
        cache, own = self._cache, self._membership.own
        blocks = self._sizes.num_host_blocks
        least = min(BLOCKS_LENT, blocks // 2)
        pinned_blocks = max(1, least, int(cache.p2p_pinned_max * blocks))
        fetches = PREFETCHES if cache.enable_p2p_ssd else 0
        limit, clock = cache.p2p_out_mb_per_s, asyncio.get_running_loop().time
        out_bytes_s, stall_s = None if limit is None else limit * MB, self.transports.times.stall_s
        rate = OutRate(out_bytes_s, self._host.block_bytes, clock, stall_s)
        self._grants = Grants(
            hooks.owner,
            GrantLimits(pinned_blocks, prefetches=fetches, prefetches_per_peer=PREFETCHES_EACH),
            hooks.spawn,
            self.transports.locate,
            rate,
        )
        self._sending = BlockSending(self._ring, self._host, self._grants, stall_s, rate)
        peers = self._reader.peers = Peers(
            self._key,
            self._identity,
            PeerHooks(self._membership.node, self._reader.link_changed, hooks.spawn),
            Random(own.life),
            self.transports.times.links,
        )
        spans = SpanChanges(hooks.changes, self._hints.span_blocks, CHANGES_MAX)
        self._spans = _Spans(spans, cache, self.generation)
        blocks = self._sizes.num_host_blocks + self._sizes.num_disk_blocks
        pool = f"{self._pool.name}:{cache.p2p_zone}"
        self.plane = MetadataPlane(
            RedisStore(self._commands, pool, cache.node_ttl_seconds),
            self._membership,
            self._hints,
            self._spans,
            peers,
            blocks // self._hints.span_blocks + 1,
        )
        self._sessions = Sessions(
            self._grants, self._identity.generation, self.plane.publisher.snapshot
        )
        self._listener = Listener(
            self._listening,
            self._key,
            self._identity,
            ListenerHooks(self._sessions.serve, self._sending.serve, hooks.spawn_session),
        )
        time = {} if cache.has_remote else {"hints": keep_time(self._hints)}
        actions = NodeActions(
            hooks.clear,
            hooks.ssd_cleared,
            self._end_before_clear,
            self._reader.forget_failures,
            self._sessions.close,
        )
        changes = GenerationChanges(self.generation, self.plane, self.remote, actions)
        noting = {"cluster generation": changes.note()}
        tasks = {**self.plane.work(hooks.spawn), **self.transports.work(), **noting, **time}
        return {"peers": self._share(), **tasks}

    def _end_before_clear(self) -> None:
        """End what other nodes read here, and what is read of them: it is of before a clear."""
        self._grants.clear()
        self.port.cleared()

    async def _share(self) -> None:
        """Serve other nodes until cancelled, and leave the cluster then."""
        self._listener.listen()
        log.info("peers_listening", address=self._listener.address)
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self._listener.close()
            self._sessions.close()
            await self._listener.wait_closed()
            self._grants.close()
            await self._reader.close()
            await self.plane.leave()
            await self._commands.close()
            self._spans.close()

    def stop(self) -> None:
        """End what is being read from others soon: the engine is being closed."""
        self.port.stop()
        self._reader.stop()

    # -- cluster --------------------------------------------------------------------------------

    async def reset(self) -> int:
        """Begin a new generation of the cluster: see `Cluster`."""
        return await self.plane.advance(0 if self.remote is None else self.remote.era)

    def address_of(self, holder: int) -> str:
        """Return the address of the node of a number: see `Cluster`."""
        return self._reader.address_of(holder)

    def statistics(self) -> ClusterStatistics:
        """Return what is known of the cluster now."""
        generation, is_up = self.generation, self._reader.is_up
        members = list(self._membership.members())
        read, in_all = {}, Counter(self._read_of_gone)
        for holder, counts in list(self.port.counts.items()):
            in_all.update(counts)
            if (node := self._membership.node(holder)) is not None:
                read[node.address] = PeerReads(**counts)
        return ClusterStatistics(
            self._listener.address,
            None if generation.is_apart else generation.number,
            self.plane.state(),
            self._grants.counts,
            len(self._listener),
            self._sending.lent_bytes,
            tuple(each.node.address for each in members if not is_up(each.holder)),
            read,
            PeerReads(**in_all),
            self.transports.counts,
        )

    # -- members --------------------------------------------------------------------------------

    def joined(self, holder: int, node: NodeRecord) -> None:
        """Use a number for a node that has joined."""
        self._reader.joined(holder)

    def left(self, holder: int, node: NodeRecord) -> None:
        """Close the connections to a node that has left."""
        self._read_of_gone.update(self.port.counts.pop(holder, {}))
        transport = self.transports.transport
        transport.stop(holder)
        self._reader.left(holder, node)
        if self._hooks is not None:
            self._hooks.spawn("peer lanes", transport.forget(holder))


class _Spans:
    """What this node has, as far as it is shared: the `SpanSource` of its publisher."""

    def __init__(self, spans: SpanChanges, cache: CacheConfig, generation: Generation) -> None:
        self._changes, self._with_disk = spans, cache.enable_p2p_ssd
        self._generation = generation

    def changes(self) -> list[SpanChange] | None:
        """Return what has changed since the last call; nothing comes while this node is apart."""
        changes, is_shared = self._changes.take(), not self._generation.is_apart
        if changes is None or (self._with_disk and is_shared):
            return changes
        with_disk = self._with_disk and is_shared
        return [
            SpanChange(key, on_host and is_shared, on_disk and with_disk)
            for key, on_host, on_disk in changes
        ]

    def steps(self) -> Iterator[SpanStep]:
        """Walk through all spans."""
        if not self._generation.is_sharing:
            return
        for states in self._changes.walk():
            only_disk = ~states.on_host & self._with_disk
            yield SpanStep(states.keys[states.on_host].tobytes(), states.keys[only_disk].tobytes())

    def close(self) -> None:
        """Read no more changes."""
        self._changes.close()


def _facts(sizes: CacheSizes, hints: Hints) -> dict[str, int | str]:
    """Return what two nodes must have alike, by name."""
    facts = {name: str(value) for name, value in sizes.spaces[0].facts.items()}
    return {**facts, "span_blocks": hints.span_blocks, "block_bytes": str(sizes.block_bytes)}
