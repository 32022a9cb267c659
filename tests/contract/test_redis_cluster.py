"""The cluster's store on a Redis Cluster: one slot has all keys of a pool, wherever that is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, closing

import pytest

from flexkv.cluster.records import STREAMS, Beat, NodeRecord
from flexkv.cluster.redis_commands import RedisCommands
from flexkv.cluster.redis_store import RedisStore
from flexkv.cluster.store import BEGIN, ClusterStoreError
from flexkv.testing.redis_server import RedisServer

SLOTS, BUS_PORT, PORT_MAX = 16384, 10_000, 65_535
PASSWORD = "open sesame"
ALL = (BEGIN,) * STREAMS
NODE = NodeRecord(bytes(16), 1, "10.0.0.1:1")
PATIENCE_S = 60.0


@pytest.fixture(scope="module", params=[1, 2])
def servers(request: pytest.FixtureRequest) -> Iterator[list[RedisServer]]:
    """Return the nodes of a Redis Cluster."""
    with ExitStack() as undo:
        made = []
        for _ in range(request.param):
            made.append(undo.enter_context(closing(of_cluster())))
            made[-1].start()
        asyncio.run(join(made))
        yield made


def of_cluster() -> RedisServer:
    """Return a node whose second port, for the others of the cluster, is a port."""
    while True:
        server = RedisServer(PASSWORD, more=["--cluster-enabled", "yes"])
        if server.port + BUS_PORT <= PORT_MAX:
            return server
        server.close()


async def is_ready(client: RedisCommands) -> bool:
    """Return whether a node knows who has which slot."""
    (told,) = await client.run([("CLUSTER", "INFO")])
    return b"cluster_state:ok" in told


async def join(servers: list[RedisServer]) -> None:
    """Divide the slots among nodes, and return once all know it."""
    share = SLOTS // len(servers)
    clients = [RedisCommands("127.0.0.1", server.port, PASSWORD) for server in servers]
    for number, client in enumerate(clients):
        slots = number * share, (number + 1) * share - 1
        await client.run([("CLUSTER", "ADDSLOTSRANGE", *slots)])
        await client.run([("CLUSTER", "MEET", "127.0.0.1", servers[0].port)])
    async with asyncio.timeout(PATIENCE_S):
        for client in clients:
            while not await is_ready(client):  # noqa: ASYNC110 -- the state of a server
                await asyncio.sleep(0.05)
    for client in clients:
        await client.close()


@pytest.fixture
async def redis(servers: list[RedisServer]) -> AsyncIterator[RedisCommands]:
    """Return a client to which the first node is given."""
    client = RedisCommands("127.0.0.1", servers[0].port, PASSWORD)
    yield client
    await client.close()


@pytest.mark.parametrize("pool", [f"pool {number}" for number in range(6)])
async def test_any_node_may_be_given(redis: RedisCommands, pool: str) -> None:
    """Whichever node has the slot of a pool, the registry, the log and the generation work."""
    store = RedisStore(redis, pool, 60.0)
    assert await store.register(Beat(NODE), None) is None
    await store.append(3, [b"an entry"])
    generation = await store.advance(0)
    page = await store.read(ALL, 0.0)
    assert (page.entries[3], page.heard.now) == ([b"an entry"], generation)
    registry = await store.registry()
    assert registry.beats == [Beat(NODE)]
    assert registry.ends[3] == page.positions[3]
    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(store.read(page.positions, 100.0))
        await asyncio.sleep(0)
        await store.append(5, [b"new"])
    assert waiting.result().entries[5] == [b"new"]
    await store.leave(NODE)


async def test_keys_of_two_pools_in_one_call_are_an_error(
    redis: RedisCommands, servers: list[RedisServer]
) -> None:
    """What cannot be carried out is an error that names the server; the next call works."""
    commands = [("GET", f"{{pool {number}}}") for number in range(6)]
    if len(servers) == 1:
        assert await redis.run(commands) == [None] * 6
        return
    with pytest.raises(ClusterStoreError, match=f"{servers[0].port}.*MOVED|MovedError"):
        await redis.run(commands)
    for command in commands:
        assert await redis.run([command]) == [None]


async def test_a_node_that_has_ended_is_given_up(servers: list[RedisServer]) -> None:
    """After a failure the node that was given is asked again, which knows where the slot is now."""
    redis = RedisCommands("127.0.0.1", servers[0].port, PASSWORD)
    redis._follow("127.0.0.1", 1)
    with pytest.raises(ClusterStoreError):
        await redis.run([("GET", "{pool 1}")])
    assert await redis.run([("GET", "{pool 1}")]) == [None]
    await redis.close()
