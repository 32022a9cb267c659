"""Two nodes ask each other for blocks, over loopback TCP and over socket pairs alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import NamedTuple

import pytest

from flexkv.cluster.grants import Lent
from flexkv.common.errors import PeerError
from tests.cluster_rigs import ClusterNode, Network, keys_of, open_descriptors, parts, turns


class Two(NamedTuple):
    """A reader and an owner, which is number 1 for it."""

    reader: ClusterNode
    owner: ClusterNode


@pytest.fixture(params=["tcp", "pair"])
async def two(request: pytest.FixtureRequest) -> AsyncIterator[Two]:
    """Yield two nodes; afterwards, nothing of them may be left."""
    before = open_descriptors()
    network = Network(is_tcp=request.param == "tcp")
    reader, owner = ClusterNode(network, 1), ClusterNode(network, 2)
    for each in (reader, owner):
        await each.start()
    reader.meet(owner)
    owner.meet(reader)
    yield Two(reader, owner)
    for each in (reader, owner):
        await each.stop()
    await turns()
    assert open_descriptors() == before


async def until(condition: Callable[[], object]) -> None:
    """Return once a condition holds; the loop turns meanwhile."""
    async with asyncio.timeout(10):
        while not condition():
            await turns(1)


async def test_what_the_owner_has_is_granted_and_held_until_the_release(two: Two) -> None:
    """A Want is granted for the leading blocks in host memory, which stay until the Release."""
    keys = keys_of(1, 20)
    two.owner.owner.put(keys, 0, 12)
    grant = await two.reader.peers.want(1, keys, 4, 20)
    assert (grant.first, grant.count, grant.is_cut) == (4, 8, False)
    assert len(two.owner.owner.holds) == 8
    two.reader.peers.release(1, grant.number)
    await until(lambda: not two.owner.owner.holds)


async def test_what_the_owner_does_not_have_is_said_to_be_gone(two: Two) -> None:
    """A Want for blocks that are not there is answered with a count of 0."""
    grant = await two.reader.peers.want(1, keys_of(1, 4), 0, 4)
    assert grant.count == 0
    assert two.owner.grants.counts.missed == 1


async def test_several_wants_are_under_way_at_once(two: Two) -> None:
    """Wants over one link are answered independently, under numbers of their own."""
    slow, fast = keys_of(1, 4), keys_of(2, 4)
    two.owner.owner.put_on_disk(slow)
    two.owner.owner.put(fast)
    two.owner.owner.prefetch_s = 0.05
    order = []
    async with asyncio.TaskGroup() as group:
        for name, keys in (("slow", slow), ("fast", fast)):
            task = group.create_task(two.reader.peers.want(1, keys, 0, 4))
            task.add_done_callback(lambda _, name=name: order.append(name))
    assert order == ["fast", "slow"]
    assert len(two.owner.sessions) == 1
    assert two.owner.grants.counts.grants == 2


async def test_a_cancelled_want_is_released(two: Two) -> None:
    """A Want whose caller gives up leaves nothing held, whether or not it was granted already."""
    keys = keys_of(1, 4)
    two.owner.owner.put_on_disk(keys)
    task = asyncio.ensure_future(two.reader.peers.want(1, keys, 0, 4))
    await until(lambda: two.owner.owner.prefetching)
    task.cancel()
    await until(lambda: not two.owner.owner.prefetching)
    assert two.owner.grants.counts.grants == 0


async def test_the_end_of_a_link_is_the_end_of_its_grants(two: Two) -> None:
    """When the reader is gone, the owner holds nothing for it."""
    keys = keys_of(1, 4)
    two.owner.owner.put(keys)
    await two.reader.peers.want(1, keys, 0, 4)
    assert len(two.owner.owner.holds) == 4
    await two.reader.peers.close()
    await until(lambda: not two.owner.owner.holds)
    assert len(two.owner.sessions) == 0


async def test_the_end_of_an_owner_fails_its_wants_at_once(two: Two) -> None:
    """When the owner is gone, what waits for it fails, and so does what is asked next."""
    keys = keys_of(1, 4)
    two.owner.owner.put_on_disk(keys)
    two.owner.owner.prefetch_s = 60.0
    task = asyncio.ensure_future(two.reader.peers.want(1, keys, 0, 4))
    await until(lambda: two.owner.owner.prefetching)
    two.owner.listener.close()
    two.owner.sessions.close()
    with pytest.raises(PeerError):
        await task
    assert not two.reader.peers.is_up(1)
    with pytest.raises(PeerError, match="closed the connection"):
        await two.reader.peers.want(1, keys, 0, 4)
    assert two.reader.changes == [(two.owner.id.node_id, False)]


async def test_data_connections_are_bare_sockets_with_nothing_lost(two: Two) -> None:
    """What the reader sends right behind its introduction is there for the owner to read."""
    keys = keys_of(1, 8)
    two.owner.owner.put(keys)
    grant = await two.reader.peers.want(1, keys, 0, 8)
    mine = await two.reader.peers.data_socket(1)
    with mine:
        assert mine.getblocking() is False
        await until(lambda: two.owner.data)
        received: list[bytes] = []

        async def serve(connected: object, introduction: object) -> None:
            loop = asyncio.get_running_loop()
            while more := await loop.sock_recv(connected, 3):  # type: ignore[arg-type]
                received.append(more)

        two.owner.listener._hooks = two.owner.listener._hooks._replace(data=serve)
        second = await two.reader.peers.data_socket(1)
        with second:
            await asyncio.get_running_loop().sock_sendall(second, b"READ " * 100)
            second.shutdown(1)
            await until(lambda: len(b"".join(received)) == 500)
        lent = two.owner.grants.blocks(two.reader.id, grant.number, 2, 3)
        assert isinstance(lent, Lent)
        assert lent.block_ids.tolist() == [2, 3, 4]
        lent.ended()
    assert b"".join(received) == b"READ " * 100


async def test_a_snapshot_comes_in_parts_that_are_asked_for(two: Two) -> None:
    """A snapshot is yielded part by part; one that is given up is forgotten by the owner."""
    two.owner.parts = parts(5)
    told = [part async for part in two.reader.peers.parts(two.owner.node)]
    assert told == parts(5)
    async with aclosing(two.reader.peers.parts(two.owner.node)) as again:
        async for part in again:
            assert part.on_host == bytes(8)
            assert two.owner.open_snapshots == 1
            break
    await until(lambda: not two.owner.open_snapshots)


async def test_another_generation_is_refused_by_name(two: Two) -> None:
    """A node that was cleared meanwhile refuses, whether the link was there before or not."""
    keys = keys_of(1, 4)
    two.owner.owner.put(keys)
    await two.reader.peers.want(1, keys, 0, 2)
    two.owner.generation = 3
    with pytest.raises(PeerError, match="generation=0: is 3 on this node"):
        await two.reader.peers.want(1, keys, 0, 4)
    with pytest.raises(PeerError, match="generation=0"):
        async for _ in two.reader.peers.parts(two.owner.node):
            pass
    with pytest.raises(PeerError, match="generation=3: is 0 on this node"):
        await two.reader.peers.data_socket(1)
    with pytest.raises(PeerError, match="generation=0: is 3 on this node"):
        await two.owner.peers.want(1, keys, 0, 4)


async def test_another_life_of_a_node_is_not_believed(two: Two) -> None:
    """A reader that expects an earlier life of a node asks it for nothing."""
    two.reader.nodes[1] = two.owner.node._replace(life=99)
    with pytest.raises(PeerError, match="another life of it has its address now"):
        await two.reader.peers.want(1, keys_of(1, 4), 0, 4)
    assert two.owner.grants.counts.missed == 0


async def test_both_nodes_may_read_from_each_other(two: Two) -> None:
    """Two nodes have a link each way."""
    keys = keys_of(1, 4)
    for node, other in ((two.reader, two.owner), (two.owner, two.reader)):
        other.owner.put(keys)
        assert (await node.peers.want(1, keys, 0, 4)).count == 4
    assert len(two.reader.sessions) == len(two.owner.sessions) == 1
