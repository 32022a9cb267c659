"""A port to one other node, over each transport; both nodes are in this process."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from itertools import count

import numpy as np

from flexkv.actors.supervisor import Supervisor
from flexkv.cluster.grants import GrantLimits, Grants, Lent
from flexkv.cluster.wire import Busy, Grant, GrantedPlaces, PeerId, Want
from flexkv.common.errors import PeerError, RemoteError
from flexkv.common.terms import BlockIds, BlockNames, Positions, Route, Tier, Transfer
from flexkv.index.keys import leaf_keys
from flexkv.io.memory.arena import Arena
from flexkv.io.memory.copier import Copier
from flexkv.io.memory.host_blocks import HostBlocks
from flexkv.io.peer.checked_reads import CheckedReads
from flexkv.io.peer.frames import Read, Status
from flexkv.io.peer.mooncake import MooncakeTransport
from flexkv.io.peer.port import Allowed, PeerPort, Wish, read_blocks
from flexkv.io.peer.preferred import PreferredTransport
from flexkv.io.peer.sender import Granted, Sender
from flexkv.io.peer.sockets import Extents, SocketRing
from flexkv.io.peer.tcp_transport import TcpTransport
from flexkv.io.peer.transport import Transport
from flexkv.io.ports import Completion
from flexkv.mover.engine_config import EngineConfig
from flexkv.mover.life import MoverSizes
from flexkv.mover.mover import Mover
from flexkv.mover.wire import Lent as LentMemory
from flexkv.tiers.peer_transport import located, places_of
from tests.cluster_rigs import FakeOwner

BLOCKS, STRIDE_BYTES = 96, 40_960
BLOCK_BYTES, LEAF_BYTES, RATIO = 40_000, 8_000, 4
LEAVES = 64
"""Host blocks of the owner from here on are leaves."""
STALL_S, PATIENCE_S = 5.0, 60.0
BUSY_FOR_S = 0.3
READER, HOLDER = PeerId(b"r" * 16, 1), 3
ROUTE = Route(Tier.PEER, Tier.HOST)
CONFIG = EngineConfig("127.0.0.1", 0, "tcp", "")
SLOT_BYTES = read_blocks(BLOCK_BYTES) * BLOCK_BYTES
SIZES = MoverSizes(8, SLOT_BYTES, 30.0, 1.0)


class Memory:
    """Host memory of a node, with random bytes and their sums."""

    def __init__(self, seed: int) -> None:
        self.arena = Arena.open(BLOCKS, STRIDE_BYTES, shared=True)
        random = np.random.default_rng(seed)
        self.arena.array[:] = random.integers(0, 256, self.arena.array.shape, np.uint8)
        self.host = HostBlocks(self.arena, np.zeros(BLOCKS, np.uint64), (BLOCK_BYTES, LEAF_BYTES))

    def close(self) -> bool:
        """Return whether nobody else has it any more."""
        return self.arena.close()

    @property
    def lent(self) -> LentMemory:
        """Return it as a mover lends it."""
        assert self.arena.fd is not None
        return LentMemory(self.arena.fd, self.arena.fd_offset_bytes, BLOCKS * STRIDE_BYTES)


class HushedRing(SocketRing):
    """The owner's ring: it sends nothing while the owner is silent."""

    def __init__(self, memory: Memory) -> None:
        super().__init__([memory.arena.buffer], 16)
        self.speaks = asyncio.Event()
        self.speaks.set()

    async def send(self, index: int, extents: Extents, head: bytes = b"") -> None:
        """Send when the owner speaks."""
        await self.speaks.wait()
        await super().send(index, extents, head)


class Rig:
    """A reader's port, and an owner that grants its blocks.

    Attributes:
        owner: says which blocks there are.
        is_gone: whether the owner answers nothing any more.
        busy: how many more Wants it puts off.
        is_cut: whether it ends our connections at once.
        on_grant: called when it has granted something, before we hear of it.
    """

    def __init__(self, kind: str) -> None:
        self.kind, self.theirs, self.ours = kind, Memory(1), Memory(2)
        self.failures: list[BaseException] = []
        self.supervisor = Supervisor(self.failures.append)
        self.owner = FakeOwner()
        self.is_gone = self.is_cut = False
        self.busy = 0
        self.on_grant: Callable[[], None] = lambda: None
        self._numbers, self._ops = count(1), count(1)
        self._ended = asyncio.Event()
        self._servers: list[socket.socket] = []
        self._ring = HushedRing(self.theirs)
        self._ring.connect()
        self.lending = Mover(CONFIG, SIZES, self.theirs.lent)
        self.reading = Mover(CONFIG, SIZES)
        self.copier = Copier(2)
        self._lender = MooncakeTransport(self.lending, self.theirs.host, self.copier, STALL_S)
        self.transport = self._transport()
        self.port = PeerPort(
            self.transport, self.copier, self, self.ours.host, [1, RATIO], BUSY_FOR_S
        )
        self.port.spawn = self.supervisor.spawn
        self.grants = Grants(self.owner, GrantLimits(1000), self.supervisor.spawn, self._locate)

    def _transport(self) -> Transport:
        host = self.ours.host
        ring = SocketRing([self.ours.arena.buffer], 16)
        tcp = TcpTransport(ring, self._connect, host, self.copier, STALL_S)
        if self.kind == "tcp":
            return tcp
        self.mooncake = MooncakeTransport(self.reading, host, self.copier, STALL_S)
        if self.kind == "mooncake":
            tcp.close()
            return self.mooncake
        return PreferredTransport(self.mooncake, tcp)

    @property
    def has_movers(self) -> bool:
        """Return whether Mooncake is used."""
        return self.kind != "tcp"

    def _locate(self, block_ids: BlockIds) -> GrantedPlaces | None:
        """Say where the owner's blocks are, as its tier does."""
        return located(self._lender, self.theirs.host, block_ids)

    async def start(self) -> None:
        """Start everything, and sum the owner's blocks: those of leaves are the last ones."""
        await self.supervisor.start()
        self.port.connect(self._ended.set)
        leaves, reads = np.arange(BLOCKS) >= LEAVES, CheckedReads(self.theirs.host, self.copier)
        for group, own in enumerate((~leaves, leaves)):
            await self.copier.checksum(reads._pages[group], np.flatnonzero(own))
        reads.close()
        if self.has_movers:
            async with asyncio.timeout(PATIENCE_S):
                await self._until_engines_run()

    async def close(self) -> None:
        """Close everything; nothing may be left."""
        with suppress(ProcessLookupError):
            self.speak()
        self.port.stop()
        await self.supervisor.stop()
        for mover in (self.lending, self.reading):
            await mover.leave()
        self.port.close()
        self.grants.close()
        self._ring.close()
        for each in self._servers:
            each.close()
        assert not self.failures, self.failures
        assert not self.owner.holds
        assert self.ours.close()
        assert self.theirs.close()

    # -- the owner ------------------------------------------------------------------------------

    async def want(self, holder: int, wish: Wish) -> Allowed:
        """Ask the owner: see `Holders`."""
        assert holder == HOLDER
        if self.is_gone:
            raise PeerError("owner", "asking", "it is gone")
        if self.busy:
            self.busy -= 1
            raise PeerError("owner", "asking", "it is busy", is_busy=True)
        answers: list[Grant | Busy] = []
        keys, first, last, group, with_places = wish
        want = Want(next(self._numbers), keys, first, last, group, 0, with_places)
        self.grants.want(READER, want, answers.append)
        (grant,) = answers
        self.on_grant()
        assert isinstance(grant, Grant)
        return Allowed(grant.number, grant.count, grant.is_cut, places_of(grant, 15.0))

    def release(self, holder: int, number: int) -> None:
        """End a grant."""
        self.grants.release(READER, number)

    def begin(self, holder: int, request: int) -> None:
        """Take note of nothing."""

    def blame(self, holder: int, error: PeerError) -> None:
        """Take note of nothing."""

    def arrived(self, holder: int) -> None:
        """Take note of nothing."""

    async def _connect(self, holder: int) -> tuple[socket.socket, str]:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        self._servers.append(theirs)
        if self.is_cut:
            theirs.shutdown(socket.SHUT_RDWR)
        else:
            self.supervisor.spawn("sender", self._serve(theirs))
        return ours, "owner"

    async def _serve(self, connection: socket.socket) -> None:
        arena = self.theirs.arena

        def lookup(read: Read) -> Granted | Status:
            lent = self.grants.blocks(READER, read.number, read.first, read.blocks)
            if not isinstance(lent, Lent):
                return Status(int(lent))
            addresses = arena.address + lent.block_ids * arena.block_stride_bytes
            return Granted(addresses, self.theirs.host.sums[lent.block_ids], lent.ended)

        index = self._ring.add(connection)
        try:
            with suppress(OSError, EOFError, TimeoutError):
                await Sender(self._ring, PATIENCE_S).serve(index, lookup)
        finally:
            await self._ring.remove(index)

    def hush(self) -> None:
        """Let the owner send nothing any more; it still answers Wants."""
        self._ring.speaks.clear()
        if self.has_movers:
            os.kill(self.lending.life().pid, signal.SIGSTOP)

    def speak(self) -> None:
        """Let the owner send again."""
        self.is_cut = False
        self._ring.speaks.set()
        if self.lending.ready is not None:
            os.kill(self.lending.ready.pid, signal.SIGCONT)

    def cut(self) -> None:
        """End the owner's connections and its engine; new ones are accepted, and end at once."""
        self.is_cut = True
        for each in self._servers:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        if self.has_movers:
            os.kill(self.lending.life().pid, signal.SIGKILL)

    # -- the reader -----------------------------------------------------------------------------

    def transfer(self, keys: bytes, first: int, host_ids: BlockIds, group: int = 0) -> Transfer:
        """Return a transfer of consecutive blocks of a prompt."""
        count_ = len(host_ids)
        places = first + RATIO * np.arange(count_) if group else None
        names = BlockNames(leaf_keys(keys, group), Positions(first, count_, places))
        holders = np.full(count_, HOLDER)
        return Transfer(next(self._ops), 0, ROUTE, holders, host_ids, names=names, group=group)

    def wish(self, keys: bytes, first: int, last: int, with_places: bool) -> Wish:
        """Return a wish for blocks of group 0."""
        return Wish(keys, first, last, 0, with_places)

    async def until_works(self, keys: bytes, host_ids: BlockIds) -> None:
        """Read the first blocks of a prompt until they come: an engine may lose a first read."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                (end,) = await self.run(self.transfer(keys, 0, host_ids))
                if end.error is None:
                    assert self.is_right(np.arange(len(host_ids)), host_ids)
                    return
                assert self.kind == "mooncake", end
                await self._until_engines_run()
                self.mooncake._failing.clear()

    async def _until_engines_run(self) -> None:
        while self.lending.ready is None or self.reading.ready is None:
            for mover in (self.lending, self.reading):
                with suppress(RemoteError):
                    mover.life()
            await asyncio.sleep(0.01)  # the state of other processes

    async def run(self, *transfers: Transfer) -> list[Completion]:
        """Run transfers to their ends."""
        for each in transfers:
            self.port.submit(each)
        return await self.ends(len(transfers))

    async def ends(self, transfers: int) -> list[Completion]:
        """Return the ends of transfers that were submitted."""
        ended: list[Completion] = []
        async with asyncio.timeout(PATIENCE_S):
            while len(ended) < transfers:
                await self._ended.wait()
                self._ended.clear()
                ended += self.port.reap()
        return sorted(ended)

    async def until_reading(self, before: int) -> None:
        """Wait until more reads have begun than before."""
        async with asyncio.timeout(PATIENCE_S):
            while self.reads <= before:  # noqa: ASYNC110 -- what other processes and threads do
                await asyncio.sleep(0.001)

    @property
    def reads(self) -> int:
        """Return how many reads have begun, as the side sees it that knows."""
        return self.mooncake.counts.reads if self.has_movers else self.grants.counts.reads

    async def until_ended(self) -> None:
        """Wait until the port has something to reap."""
        async with asyncio.timeout(PATIENCE_S):
            await self._ended.wait()

    def is_right(self, theirs: BlockIds, ours: BlockIds, size: int = BLOCK_BYTES) -> bool:
        """Return whether blocks are the same at both ends."""
        return np.array_equal(
            self.theirs.arena.array[theirs, :size], self.ours.arena.array[ours, :size]
        )


@asynccontextmanager
async def rig_over(kind: str) -> AsyncIterator[Rig]:
    """Yield a rig over a transport: "tcp", "mooncake" or "preferred"."""
    async with AsyncExitStack() as stack:
        rig = Rig(kind)
        stack.push_async_callback(rig.close)
        await rig.start()
        yield rig
