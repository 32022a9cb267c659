"""Two nodes on a real Redis server that is killed, stopped and flushed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest

from flexkv.cluster.membership import Membership
from flexkv.cluster.plane import MetadataPlane
from flexkv.cluster.records import NodeRecord, SpanTags
from flexkv.cluster.redis_commands import RedisCommands
from flexkv.cluster.redis_store import RedisStore
from flexkv.common.errors import PeerError
from flexkv.index.hints import Hints
from flexkv.testing.cluster_simulation import SimulatedSpans
from flexkv.testing.redis_server import RedisServer

TTL_S, ANSWER_S = 3.0, 0.3
PATIENCE_S = 60.0


async def until(is_so: Callable[[], bool]) -> None:
    """Return once something is so."""
    async with asyncio.timeout(PATIENCE_S):
        while not is_so():  # noqa: ASYNC110 -- nobody tells
            await asyncio.sleep(0.005)


class Node:
    """A node of a cluster, with its tasks."""

    def __init__(self, server: RedisServer, others: dict[int, Node]) -> None:
        self.record = NodeRecord(os.urandom(16), Random().getrandbits(64), f"10.0.0.1:{id(self)}")
        self.spans, self.hints = SimulatedSpans(Random(0), 1), Hints(1 << 12, 1)
        self.redis = RedisCommands("127.0.0.1", server.port, server.password, ANSWER_S)
        store = RedisStore(self.redis, "tests", TTL_S)
        membership = Membership(self.hints, self.record, TTL_S)
        self.plane = MetadataPlane(store, membership, self.hints, self.spans, self, 100)
        self.asked = 0
        self._others = others

    async def parts(self, node: NodeRecord) -> AsyncGenerator[SpanTags, None]:
        """Yield another node's snapshot."""
        self.asked += 1
        if node.life not in self._others:
            raise PeerError(node.address, "snapshot", "gone")
        for part in self._others[node.life].plane.publisher.snapshot():
            yield part

    def store(self) -> bytes:
        """Store a new span and return its key."""
        key = os.urandom(16)
        self.spans.put(key, True, False)
        return key

    def knows(self, other: Node, key: bytes) -> bool:
        """Return whether the hints say that another node has a span."""
        member = self.plane.membership.member_of(other.record.life)
        return member is not None and bool(self.hints.known(member.holder, key)[0])


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """Return a server that runs."""
    server = RedisServer("open sesame")
    server.start()
    yield server
    server.close()


@asynccontextmanager
async def two_nodes(server: RedisServer) -> AsyncIterator[tuple[Node, Node]]:
    """Return two nodes that know each other."""
    others: dict[int, Node] = {}
    nodes = Node(server, others), Node(server, others)
    others |= {node.record.life: node for node in nodes}
    async with asyncio.TaskGroup() as tasks:

        def spawn(name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
            return tasks.create_task(work, name=name)

        running = [spawn(*each) for node in nodes for each in node.plane.work(spawn).items()]
        try:
            one, other = nodes
            for reader, writer in ((one, other), (other, one)):
                key = writer.store()
                await until(lambda r=reader, w=writer, k=key: r.knows(w, k))  # type: ignore[misc]
            yield nodes
        finally:
            for task in running:
                task.cancel()
    for node in nodes:
        await node.redis.close()


async def test_a_redis_that_was_killed_is_filled_again(server: RedisServer) -> None:
    """Hints stand while it is away; started again, empty, it gets beats and what changed since."""
    async with two_nodes(server) as (one, other):
        before = one.store()
        await until(lambda: other.knows(one, before))
        server.kill()
        during = one.store()
        await until(lambda: not other.plane.state().is_store_up)
        assert other.knows(one, before)
        server.start()
        await until(lambda: other.knows(one, during))
        assert other.knows(one, before)
        assert "open sesame" not in other.plane.state().store_error
        after = other.store()
        await until(lambda: one.knows(other, after))
        (count,) = await one.redis.run([("DBSIZE",)])
        assert count <= 2 + 12


async def test_a_redis_that_hangs_is_left_alone(server: RedisServer) -> None:
    """A server that stops answering costs a bounded wait, and what changed is told afterwards."""
    async with two_nodes(server) as (one, other):
        os.kill(server.pid, signal.SIGSTOP)
        key = one.store()
        try:
            await until(lambda: "no answer in time" in one.plane.state().store_error)
            assert len(other.plane.membership) == 1
        finally:
            os.kill(server.pid, signal.SIGCONT)
        await until(lambda: other.knows(one, key))


async def test_a_flush_needs_no_snapshot(server: RedisServer) -> None:
    """After FLUSHALL the nodes register again, and read on in a log that begins anew."""
    async with two_nodes(server) as (one, other):
        asked = other.asked
        await one.redis.run([("FLUSHALL",)])
        key = one.store()
        await until(lambda: other.knows(one, key))
        assert other.asked == asked
        assert len(other.plane.membership) == 1
