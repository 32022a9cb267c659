"""A port to other nodes over real sockets, and a holder that grants what a test tells it to."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import numpy as np

from flexkv.actors.supervisor import Supervisor
from flexkv.common.errors import MalformedError, PeerError
from flexkv.common.terms import BlockNames, Positions, Route, Tier, Transfer
from flexkv.io.memory.copier import Copier
from flexkv.io.peer.port import Allowed, PeerPort, Wish
from flexkv.io.peer.sender import Sender
from flexkv.io.peer.tcp_transport import TcpTransport
from flexkv.io.ports import Completion
from tests.cluster_rigs import keys_of
from tests.peer_rig import BLOCKS, NUMBER, Node, connected, nodes

HOLDER, OWNER = 5, 3
BLOCKS_READ = 6
BEHIND = 50
Answer = Callable[[Wish], Allowed]


def all_of(wish: Wish) -> Allowed:
    """Grant all that is wanted."""
    return Allowed(NUMBER, wish.last - wish.first, False)


@dataclass
class Holders:
    """One holder, and what was asked of it.

    Attributes:
        answer: what it grants; may raise.
        granted: how many grants are not released.
        asked: set when something is asked.
        may_answer: the answer waits for it.
        may_connect: a data connection waits for it.
        connecting: set when one is wanted.
        on_connect: called before one is made; may raise.
        on_begin: called when a request begins to read; may raise.
        requests: who began to read.
        told: what was said of the holder.
        sockets: the numbers of the connections' other ends.
    """

    owner: Node
    supervisor: Supervisor
    answer: Answer = all_of
    granted: int = 0
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    may_answer: asyncio.Event = field(default_factory=asyncio.Event)
    may_connect: asyncio.Event = field(default_factory=asyncio.Event)
    connecting: asyncio.Event = field(default_factory=asyncio.Event)
    wishes: list[Wish] = field(default_factory=list)
    sockets: list[int] = field(default_factory=list)
    on_connect: Callable[[], None] = lambda: None
    on_begin: Callable[[], None] = lambda: None
    requests: list[int] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.may_answer.set()
        self.may_connect.set()

    async def want(self, holder: int, wish: Wish) -> Allowed:
        """Answer a wish."""
        assert holder == HOLDER
        self.wishes.append(wish)
        self.asked.set()
        await self.may_answer.wait()
        allowed = self.answer(wish)
        self.granted += 1
        return allowed

    def release(self, holder: int, number: int) -> None:
        """End a grant."""
        assert (holder, number) == (HOLDER, NUMBER)
        self.granted -= 1

    def begin(self, holder: int, request: int) -> None:
        """Take note of the request; fail if the test says so."""
        self.requests.append(request)
        self.on_begin()

    def blame(self, holder: int, error: PeerError) -> None:
        """Take note of it."""
        self.told.append(error.why)

    def arrived(self, holder: int) -> None:
        """Take note of it."""
        self.told.append("arrived")

    async def connect(self, holder: int) -> tuple[socket.socket, str]:
        """Return a data connection, at whose other end blocks are sent."""
        self.connecting.set()
        await self.may_connect.wait()
        self.on_connect()
        ours, theirs = connected()
        index = self.owner.ring.add(theirs)
        self.sockets.append(index)
        theirs.close()
        self.supervisor.spawn("sender", self._send(index))
        return ours, "holder"

    async def _send(self, index: int) -> None:
        with suppress(OSError, EOFError, MalformedError):
            await Sender(self.owner.ring, 60.0).serve(index, self.owner.lookup)
        await self.owner.ring.remove(index)


class Reader:
    """A port, and the node that has it."""

    def __init__(self, port: PeerPort, holders: Holders, reader: Node) -> None:
        self.port, self.holders, self.node = port, holders, reader
        self.ended: list[Completion] = []
        self._woken = asyncio.Event()
        self._op_id = 0
        port.connect(self._woken.set)

    def submit(self, first: int = 0, blocks: int = BLOCKS_READ) -> None:
        """Start to read blocks of a prompt: each into the host block that is `BEHIND` it."""
        self._op_id += 1
        names = BlockNames(keys_of(1, BLOCKS), Positions(first, blocks))
        route, ids = Route(Tier.PEER, Tier.HOST), np.full(blocks, HOLDER)
        targets = (np.arange(first, first + blocks) + BEHIND) % BLOCKS
        self.port.submit(Transfer(self._op_id, OWNER, route, ids, targets, names=names))

    async def completion(self) -> Completion:
        """Return the next end of a transfer."""
        async with asyncio.timeout(30):
            while not self.ended:
                await self._woken.wait()
                self._woken.clear()
                self.ended += self.port.reap()
        return self.ended.pop(0)


@asynccontextmanager
async def reading(patience_s: float = 60.0) -> AsyncIterator[Reader]:
    """Yield a port; afterwards nothing may be granted, pinned or in flight."""
    async with nodes() as (owner, node):
        failures: list[BaseException] = []
        supervisor = Supervisor(failures.append)
        await supervisor.start()
        holders = Holders(owner, supervisor)
        copier = Copier(2)
        transport = TcpTransport(node.ring, holders.connect, node.host, copier, 60.0)
        port = PeerPort(transport, copier, holders, node.host, [1], patience_s)
        port.spawn = supervisor.spawn
        try:
            yield Reader(port, holders, node)
        finally:
            port.stop()
            await supervisor.stop()
            port.close()
        assert (holders.granted, owner.pins, failures) == (0, 0, [])
