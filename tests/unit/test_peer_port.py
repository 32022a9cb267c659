"""The port to other nodes over real sockets, with nodes that grant what a test tells them to."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
import pytest

from flexkv.actors.supervisor import Supervisor
from flexkv.common.errors import PeerError
from flexkv.common.terms import BlockNames, Positions, Route, Tier, Transfer
from flexkv.io.peer.lanes import Lanes
from flexkv.io.peer.port import Allowed, PeerPort, Wish
from flexkv.io.peer.sender import Sender
from flexkv.io.ports import Completion
from tests.cluster_rigs import keys_of, open_descriptors, turns
from tests.peer_rig import BLOCKS, NUMBER, Node, connected, nodes

HOLDER = 5
BLOCKS_READ = 6
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

    def blame(self, holder: int, error: PeerError) -> None:
        """Do nothing."""

    async def connect(self, holder: int) -> tuple[socket.socket, str]:
        """Return a data connection, at whose other end blocks are sent."""
        self.connecting.set()
        await self.may_connect.wait()
        ours, theirs = connected()
        index = self.owner.ring.add(theirs)
        theirs.close()
        self.supervisor.spawn("sender", self._send(index))
        return ours, "holder"

    async def _send(self, index: int) -> None:
        with suppress(OSError, EOFError):
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
        """Start to read blocks of a prompt into the host blocks behind them."""
        self._op_id += 1
        names = BlockNames(keys_of(1, BLOCKS), Positions(first, blocks))
        route, ids = Route(Tier.PEER, Tier.HOST), np.full(blocks, HOLDER)
        targets = (np.arange(first, first + blocks) + 50) % BLOCKS
        self.port.submit(Transfer(self._op_id, 1, route, ids, targets, names=names))

    async def completion(self) -> Completion:
        """Return the next end of a transfer."""
        async with asyncio.timeout(30):
            while not self.ended:
                await self._woken.wait()
                self._woken.clear()
                self.ended += self.port.reap()
        return self.ended.pop(0)


@asynccontextmanager
async def reading() -> AsyncIterator[Reader]:
    """Yield a port; afterwards nothing may be granted, pinned or in flight."""
    async with nodes() as (owner, node):
        failures: list[BaseException] = []
        supervisor = Supervisor(failures.append)
        await supervisor.start()
        holders = Holders(owner, supervisor)
        lanes = Lanes(node.ring, holders.connect, 60.0)
        port = PeerPort(node.ring, lanes, holders, node.host, [1], 0.1)
        port.spawn = supervisor.spawn
        try:
            yield Reader(port, holders, node)
        finally:
            port.stop()
            await supervisor.stop()
            port.close()
        assert (holders.granted, owner.pins, failures) == (0, 0, [])


async def test_a_transfer_brings_what_is_granted() -> None:
    """The blocks come with their bytes, over all lanes, and the grant ends."""
    async with reading() as own:
        own.submit()
        assert await own.completion() == Completion(1, None, BLOCKS_READ)
        ids = np.arange(BLOCKS_READ)
        assert own.node.blocks(ids + 50) == own.holders.owner.blocks(ids)


@pytest.mark.parametrize("is_cleared", [True, False])
async def test_a_transfer_of_before_a_clear_reads_nothing_that_is_granted_after_it(
    is_cleared: bool,
) -> None:
    """The node may be in the next generation by then, and be granted blocks of that."""
    async with reading() as own:
        own.holders.may_answer.clear()
        before = own.node.arena.array.copy()
        own.submit()
        await own.holders.asked.wait()
        if is_cleared:
            own.port.cleared()
        own.holders.may_answer.set()
        ended = await own.completion()
        if not is_cleared:
            assert ended == Completion(1, None, BLOCKS_READ)
            return
        assert (type(ended.error), ended.filled) == (PeerError, 0)
        assert np.array_equal(own.node.arena.array, before)
        own.submit()
        assert await own.completion() == Completion(2, None, BLOCKS_READ)


async def test_a_transfer_of_before_a_clear_asks_for_nothing_more() -> None:
    """What a limit has cut off is not asked for in the next generation."""
    async with reading() as own:

        def half(wish: Wish) -> Allowed:
            own.port.cleared()
            return Allowed(NUMBER, (wish.last - wish.first) // 2, True)

        own.submit()
        own.holders.answer = half
        ended = await own.completion()
        assert (type(ended.error), len(own.holders.wishes)) == (PeerError, 1)


async def test_a_port_that_is_stopped_reads_nothing_over_a_new_connection() -> None:
    """A connection that was being made when the engine was closed is not used."""
    async with reading() as own:
        own.holders.may_connect.clear()
        before = own.node.arena.array.copy()
        own.submit()
        await own.holders.connecting.wait()
        own.port.stop()
        own.holders.may_connect.set()
        ended = await own.completion()
        assert (type(ended.error), ended.filled) == (PeerError, 0)
        assert np.array_equal(own.node.arena.array, before)


async def test_a_connection_to_a_holder_takes_one_descriptor() -> None:
    """With hundreds of nodes they are scarce; a connection that is forgotten keeps none."""
    async with reading() as own:
        before = open_descriptors()
        own.submit()
        await own.completion()
        assert open_descriptors() == before + 2, "one at each end, as the part has one lane"
        await own.port._lanes.forget(HOLDER)
        await turns()
        assert await until(lambda: open_descriptors() == before)


async def until(condition: Callable[[], bool]) -> bool:
    """Wait until a condition holds."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 -- the other end notices it by and by
            await asyncio.sleep(0.001)
    return True
