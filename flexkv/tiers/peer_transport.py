"""What moves blocks between this node and others: connections of our own, and Mooncake if asked.

own TCP    always: others may have no Mooncake, and it serves while Mooncake fails
Mooncake   with `mooncake_config_path`: the mover lends host memory to other engines, and reads
           theirs into its window
"""

from __future__ import annotations

import asyncio

import msgspec
import numpy as np

from flexkv.cluster.wire import Grant, GrantedPlaces
from flexkv.common.config import MB, CacheConfig
from flexkv.common.terms import BlockIds
from flexkv.io.memory.arena import Arena
from flexkv.io.memory.copier import Copier
from flexkv.io.memory.host_blocks import HostBlocks
from flexkv.io.peer.lanes import Connect
from flexkv.io.peer.mooncake import MooncakeCounts, MooncakeTransport
from flexkv.io.peer.port import read_blocks
from flexkv.io.peer.preferred import PreferredTransport
from flexkv.io.peer.sockets import SocketRing
from flexkv.io.peer.tcp_transport import TcpTransport
from flexkv.io.peer.transport import Places, Transport
from flexkv.mover.engine_config import load_engine_config
from flexkv.mover.installed import check_installed
from flexkv.mover.life import MoverSizes
from flexkv.mover.mover import Mover
from flexkv.mover.wire import Lent
from flexkv.tiers.parts import Work
from flexkv.tiers.peer_times import reader_times

COPY_THREADS = 2
HUNG_S = 60.0
"""A mover whose engine has not ended a read for so long hangs. Until then, its slot is lost."""


def lends_memory(cache: CacheConfig) -> bool:
    """Return whether another process maps host memory, to lend it to other nodes."""
    return cache.has_peers and bool(cache.mooncake_config_path)


class PeerTransport:
    """The transports of a node.

    Attributes:
        transport: the one that its port uses.
        copier: the threads that sum what arrives.
        times: how long its reads may take.
    """

    def __init__(
        self, cache: CacheConfig, ring: SocketRing, host: HostBlocks, connect: Connect
    ) -> None:
        """Open them; no process is started yet.

        Raises:
            ConfigError: the configuration of Mooncake cannot be read, or a field is wrong.
            BackendUnavailableError: Mooncake is configured, and not installed.
        """
        times = self.times = reader_times(cache.io_deadline_s)
        self._host = host
        self._mover = _mover(cache, host)
        self.copier = Copier(COPY_THREADS)
        tcp = TcpTransport(ring, connect, host, self.copier, times.stall_s)
        self.transport: Transport = tcp
        self._mooncake: MooncakeTransport | None = None
        self._preferred: PreferredTransport | None = None
        if self._mover is not None:
            limit_s = times.mooncake_s
            self._mooncake = MooncakeTransport(self._mover, host, self.copier, limit_s)
            self.transport = self._preferred = PreferredTransport(self._mooncake, tcp)

    @property
    def counts(self) -> MooncakeCounts | None:
        """Return what was read by Mooncake; None if it is not configured."""
        if self._mooncake is None or self._preferred is None:
            return None
        return msgspec.structs.replace(
            self._mooncake.counts, fallbacks=self._preferred.fallbacks
        )

    def locate(self, block_ids: BlockIds) -> GrantedPlaces | None:
        """Return where other engines find host blocks, if ours runs; -1 stands for no block."""
        return None if self._mooncake is None else located(self._mooncake, self._host, block_ids)

    def work(self) -> Work:
        """Return the tasks that keep the transports running."""
        return {} if self._mover is None else {"mover": self._mover.keep()}

    async def leave(self) -> None:
        """Let the mover end, without blocking the loop."""
        if self._mover is not None:
            await self._mover.leave()


def located(
    mooncake: MooncakeTransport, host: HostBlocks, block_ids: BlockIds
) -> GrantedPlaces | None:
    """Return where other engines find host blocks; None while ours does not run."""
    found = mooncake.places(block_ids * host.arena.block_stride_bytes)
    if found is None:
        return None
    endpoint, addresses = found
    sums = host.sums[block_ids].astype("<u8").tobytes()
    return GrantedPlaces(endpoint, addresses.astype("<i8").tobytes(), sums)


def places_of(grant: Grant, within_s: float) -> Places | None:
    """Return where the blocks of a grant are, which has just arrived; they are used for a time."""
    if grant.places is None:
        return None
    endpoint, addresses, sums = grant.places.endpoint, grant.places.addresses, grant.places.sums
    until_s = asyncio.get_running_loop().time() + within_s
    return Places(
        endpoint,
        np.frombuffer(addresses, "<i8").astype(np.int64),
        np.frombuffer(sums, "<u8").astype(np.uint64),
        until_s,
    )


def _mover(cache: CacheConfig, host: HostBlocks) -> Mover | None:
    if not lends_memory(cache):
        return None
    config = load_engine_config(cache.mooncake_config_path, cache.p2p_trusted_network)
    check_installed("Mooncake's TransferEngine")
    slot_bytes = max(read_blocks(size) * size for size in host.block_bytes)
    slots = -(-int(cache.p2p_read_window_mb * MB) // slot_bytes)
    hung_s = max(HUNG_S, 2 * cache.io_deadline_s)
    peer_s = reader_times(cache.io_deadline_s).mooncake_s
    sizes = MoverSizes(slots + max(4, slots // 4), slot_bytes, hung_s, peer_s)
    return Mover(config, sizes, _lent(host.arena))


def _lent(arena: Arena) -> Lent:
    assert arena.fd is not None, "the arena is private"
    nbytes = arena.num_blocks * arena.block_stride_bytes
    return Lent(arena.fd, arena.fd_offset_bytes, nbytes)
