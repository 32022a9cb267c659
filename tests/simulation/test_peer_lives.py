"""Nodes that share on a virtual clock: whatever breaks, requests end in time and nothing is left.

A seed replays: `SIMULATION_FIRST=17 PEER_SEEDS=1` runs seed 17 alone.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from random import Random

import pytest

from flexkv.cluster.grants import GrantLimits, Lent
from flexkv.cluster.peer import PeerTimes
from flexkv.common.errors import ClosedError, PeerError
from flexkv.testing.virtual_time import run_virtual
from tests.cluster_rigs import ClusterNode, Network, keys_of, open_descriptors, pair, turns

SEEDS = int(os.environ.get("PEER_SEEDS", "4"))
FIRST = int(os.environ.get("SIMULATION_FIRST", "0"))
NODES = 4
SECONDS = 120.0
PROMPTS = [keys_of(prompt, 24) for prompt in range(6)]
TIMES = PeerTimes(idle_s=15.0)
LATE_S = 0.5
"""How much later than its deadline a request may end, because of what it does before."""


class Wire(Network):
    """A network that delays what is sent, and loses connections and nodes as it is told.

    Attributes:
        stalled: addresses whose connections carry nothing, though nobody is told.
    """

    def __init__(self, random: Random) -> None:
        super().__init__()
        self.stalled: set[str] = set()
        self._random = random
        self._relays: set[asyncio.Task[None]] = set()
        self._middles: list[socket.socket] = []
        self._moved = asyncio.Condition()

    async def dial(self, address: str) -> socket.socket:
        """Connect to an address, by way of two relays."""
        await asyncio.sleep(self._random.random() / 100)
        if address in self.cut or address not in self.listeners:
            raise ConnectionRefusedError(111, "refused")
        (ours, near), (far, theirs) = pair(), pair()
        self._middles += [near, far]
        self.listeners[address].arrived(theirs, "wire")
        for source, target in ((near, far), (far, near)):
            task = asyncio.ensure_future(self._relay(address, source, target))
            self._relays.add(task)
            task.add_done_callback(self._relays.discard)
        return ours

    async def _relay(self, address: str, source: socket.socket, target: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with suppress(OSError):
            while more := await loop.sock_recv(source, 1 << 16):
                await asyncio.sleep(self._random.random() / 100)
                async with self._moved:
                    await self._moved.wait_for(lambda: address not in self.stalled)
                await loop.sock_sendall(target, more)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    async def stall(self, address: str, is_stalled: bool) -> None:
        """Let connections to an address carry nothing, or let them go on."""
        async with self._moved:
            if is_stalled:
                self.stalled.add(address)
            else:
                self.stalled.discard(address)
            self._moved.notify_all()

    def break_some(self) -> None:
        """Break some connections."""
        for each in self._middles:
            if self._random.random() < 0.3:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    async def close(self) -> None:
        """End all relays."""
        for each in self._relays:
            each.cancel()
        if self._relays:
            await asyncio.wait(self._relays)
        for middle in self._middles:
            middle.close()


class Simulation:
    """Nodes that ask each other at random, while others stall, restart and lose connections."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.wire = Wire(Random(seed + 1))
        self.nodes = [self._node(number, 1) for number in range(NODES)]
        self.wants = self.granted = self.failed = 0
        self._reads: dict[Callable[[], None], ClusterNode] = {}

    def _node(self, number: int, life: int) -> ClusterNode:
        limits = GrantLimits(30, 40, 10)
        node = ClusterNode(self.wire, number, life, limits=limits, times=TIMES)
        for keys in PROMPTS:
            put = node.owner.put_on_disk if self.random.random() < 0.3 else node.owner.put
            put(keys, 0, self.random.randrange(25))
        return node

    async def run(self) -> None:
        """Run the nodes, the faults, and then a quiet time, after which everything works."""
        for node in self.nodes:
            await node.start()
        self._meet()
        async with asyncio.timeout(3 * SECONDS), asyncio.TaskGroup() as group:
            group.create_task(self._faults())
            for number in range(NODES):
                for _ in range(3):
                    group.create_task(self._reader(number))
        await asyncio.sleep(40)
        assert [node.grants.counts.grants for node in self.nodes] == [0] * NODES
        for node in self.nodes:
            for holder in node.nodes:
                assert node.peers.is_up(holder)
                await node.peers.want(holder, PROMPTS[0], 0, 4)
        for node in self.nodes:
            await node.stop()
        await self.wire.close()
        await turns()

    def _meet(self) -> None:
        for node in self.nodes:
            others = [other for other in self.nodes if other is not node]
            node.meet(*others)

    async def _faults(self) -> None:
        """Break things, one after the other, and mend them."""
        loop = asyncio.get_running_loop()
        while loop.time() < SECONDS:
            await asyncio.sleep(self.random.expovariate(0.3))
            victim = self.random.randrange(NODES)
            address = self.nodes[victim].listener.address
            match self.random.randrange(4):
                case 0:
                    self.wire.break_some()
                case 1:
                    self.wire.cut.add(address)
                    await asyncio.sleep(self.random.random() * 5)
                    self.wire.cut.discard(address)
                case 2:
                    await self.wire.stall(address, True)
                    await asyncio.sleep(self.random.random() * 12)
                    await self.wire.stall(address, False)
                case 3:
                    await self._restart(victim)

    async def _restart(self, number: int) -> None:
        """Let a node end and begin another life; the others learn that late."""
        old = self.nodes[number]
        for ended in [ended for ended, owner in self._reads.items() if owner is old]:
            self._end_read(ended)
        await old.stop()
        node = self.nodes[number] = self._node(number, old.id.life + 1)
        node.meet(*[other for other in self.nodes if other is not node])
        await node.start()
        await asyncio.sleep(self.random.random() * 3)
        self._meet()
        for other in self.nodes:
            other.peers.left(old.node)

    def _end_read(self, ended: Callable[[], None]) -> None:
        if self._reads.pop(ended, None) is not None:
            ended()

    async def _reader(self, number: int) -> None:
        """Ask others for blocks, and read what is granted."""
        loop = asyncio.get_running_loop()
        while loop.time() < SECONDS:
            await asyncio.sleep(self.random.expovariate(2.0))
            node = self.nodes[number]
            holder = self.random.randrange(1, NODES)
            begin_s, limit_s = loop.time(), TIMES.answer_s
            try:
                if self.random.random() < 0.1:
                    limit_s = TIMES.connect_s
                    (await node.peers.data_socket(holder)).close()
                elif self.random.random() < 0.1:
                    limit_s *= 2
                    [part async for part in node.peers.parts(node.nodes[holder])]
                else:
                    await self._want(node, holder)
            except (PeerError, ClosedError):
                self.failed += 1
            assert loop.time() - begin_s <= limit_s + LATE_S
            for each in self.nodes:
                assert each.grants.counts.pinned_blocks <= each.limits.pinned_blocks

    async def _want(self, node: ClusterNode, holder: int) -> None:
        """Ask for blocks; perhaps give up, perhaps read, perhaps release."""
        self.wants += 1
        asked = node.nodes[holder]
        first = self.random.randrange(20)
        asking = node.peers.want(holder, self.random.choice(PROMPTS), first, first + 4)
        try:
            async with asyncio.timeout(0.02 if self.random.random() < 0.2 else None):
                grant = await asking
        except TimeoutError:
            return
        owner = next((each for each in self.nodes if each.node == asked), None)
        if not grant.count or owner is None:
            return
        self.granted += 1
        lent = owner.grants.blocks(node.id, grant.number, first, grant.count)
        if isinstance(lent, Lent):
            assert len(lent.block_ids) == grant.count
            self._reads[lent.ended] = owner
            asyncio.get_running_loop().call_later(self.random.random(), self._end_read, lent.ended)
        if self.random.random() < 0.8:
            node.peers.release(holder, grant.number)


@pytest.mark.parametrize("seed", range(FIRST, FIRST + SEEDS))
def test_whatever_breaks_requests_end_and_nothing_is_left(seed: int) -> None:
    """Every request ends in time; when all is mended, peers are up, and no grant is left."""
    before = open_descriptors()
    simulation = Simulation(seed)
    run_virtual(simulation.run())
    assert open_descriptors() == before
    assert simulation.granted > simulation.wants / 20
    assert simulation.failed
