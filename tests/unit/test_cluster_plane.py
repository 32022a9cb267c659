"""A cluster's metadata, law by law, on a virtual clock: two or three nodes and a fake Redis."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest

from flexkv.cluster.follower import SNAPSHOT_RETRY_MAX_S
from flexkv.cluster.generations import RANDOM_BITS, later_than
from flexkv.cluster.membership import Membership
from flexkv.cluster.records import STREAMS, Beat, Entry, NodeRecord, encoded
from flexkv.cluster.redis_store import RedisStore
from flexkv.cluster.store import BEGIN
from flexkv.common.errors import PeerError
from flexkv.index.hints import Hints
from flexkv.testing.cluster_simulation import ClusterSimulation, Scene, SimulatedNode
from flexkv.testing.virtual_time import run_virtual

TTL_S = 30.0
KEY = b"a span's own key"
OTHER = b"another one's 16"


class Cluster:
    """A simulated cluster in which nothing happens by itself.

    Attributes:
        simulation: which it is.
        server: its Redis.
    """

    def __init__(self) -> None:
        self.simulation = ClusterSimulation(Scene(ttl_s=TTL_S, spans_max=1, delay_s=0.0), seed=1)
        self.simulation.is_faulty = False
        self.server = self.simulation.server

    def node(self, number: int, address: str = "") -> SimulatedNode:
        """Start a node."""
        return self.simulation.start(bytes([number]) * 16, True, address)

    async def pair(self) -> tuple[SimulatedNode, SimulatedNode]:
        """Return two nodes that follow each other."""
        one, other = self.node(1), self.node(2)
        await asyncio.sleep(TTL_S)
        assert not one.plane.follower.is_behind(other.record.life)
        return one, other


@asynccontextmanager
async def cluster() -> AsyncIterator[Cluster]:
    """Return a cluster without nodes; those that are started are killed at the end."""
    made = Cluster()
    async with made.simulation.running():
        yield made


def virtual(
    test: Callable[[Cluster], Coroutine[Any, Any, None]],
) -> Callable[[], None]:
    """Return a test that runs on a virtual clock."""

    def run() -> None:
        async def main() -> None:
            async with cluster() as made:
                await test(made)

        run_virtual(main())

    run.__doc__ = test.__doc__
    return run


def knows(node: SimulatedNode, other: SimulatedNode, key: bytes = KEY) -> bool:
    """Return whether a node's hints say that another one has a span."""
    member = node.plane.membership.member_of(other.record.life)
    return member is not None and bool(node.hints.known(member.holder, key)[0])


@virtual
async def test_a_change_is_known_soon(cluster: Cluster) -> None:
    """What a node stores, moves and drops is in another node's hints within a moment."""
    one, other = await cluster.pair()
    one.source.put(KEY, True, False)
    await asyncio.sleep(0.1)
    assert knows(other, one)
    one.source.put(KEY, False, False)
    await asyncio.sleep(0.1)
    assert not knows(other, one)
    assert one.asked == {other.record.life: 1}


@virtual
async def test_what_is_there_at_the_start_is_known(cluster: Cluster) -> None:
    """A node that joins learns what others have had before, and they learn what it has."""
    one = cluster.node(1)
    one.source.put(KEY, True, False)
    one.source.changes()
    await asyncio.sleep(TTL_S)
    other = cluster.node(2)
    other.source.put(OTHER, False, True)
    other.source.changes()
    await asyncio.sleep(1.0)
    assert knows(other, one)
    assert knows(one, other, OTHER)


@virtual
async def test_a_node_that_has_left_is_asked_for_no_snapshot(cluster: Cluster) -> None:
    """Not even if it leaves between the decision to ask and the first step of the task that asks:
    the connection would be tried for ever."""
    one, other = await cluster.pair()
    follower, begun = other.plane.follower, asyncio.Event()
    asked, tasks = dict(other.asked), []

    def spawn(name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        tasks.append(asyncio.get_running_loop().create_task(work, name=name))
        other.plane.membership.farewell(one.record.life)
        begun.set()
        return tasks[-1]

    taking = asyncio.get_running_loop().create_task(follower.take_snapshots(spawn))
    for task in other.tasks:
        task.cancel()
    follower.resync()
    await begun.wait()
    await asyncio.wait(tasks)
    taking.cancel()
    assert other.asked == asked


@virtual
async def test_nobody_is_asked_for_a_snapshot_while_it_would_be_refused(cluster: Cluster) -> None:
    """A node that shares nothing asks for nothing; once it shares again it asks everybody."""
    one, other = await cluster.pair()
    other.plane.follower.may_ask = lambda: False
    asked, newcomer = dict(other.asked), cluster.node(3)
    one.source.has_lost = True
    await asyncio.sleep(TTL_S)
    assert other.asked == asked
    other.plane.follower.may_ask = lambda: True
    other.plane.follower.resync()
    await asyncio.sleep(TTL_S)
    assert set(other.asked) == {one.record.life, newcomer.record.life}
    assert other.asked[one.record.life] == asked[one.record.life] + 1


@virtual
async def test_after_a_reset_nobody_waits_for_what_had_failed_before(cluster: Cluster) -> None:
    """Snapshots that were refused until a reset are asked for soon after it, not after the pauses
    that failures have made long."""
    one, other = await cluster.pair()
    living = cluster.simulation.living
    del living[one.record.life]  # its links fail
    one.source.has_lost = True
    await asyncio.sleep(10 * SNAPSHOT_RETRY_MAX_S)
    assert other.plane.follower.is_behind(one.record.life)
    living[one.record.life] = one
    other.plane.follower.resync()
    await asyncio.sleep(1.0)
    assert not other.plane.follower.is_behind(one.record.life)


@virtual
async def test_a_trimmed_log_is_noticed_without_another_entry(cluster: Cluster) -> None:
    """A reader that has missed a node's last entry learns from its beat that there was one."""
    one, other = await cluster.pair()
    other.redis.is_cut_off = True
    one.source.put(KEY, True, False)
    await asyncio.sleep(5.0)
    cluster.server.trim(0)
    other.redis.is_cut_off = False
    await asyncio.sleep(TTL_S)
    assert knows(other, one)
    assert other.asked[one.record.life] == 2


@virtual
async def test_a_gap_is_noticed_at_the_next_entry(cluster: Cluster) -> None:
    """A reader that has missed an entry does not wait for a beat if there is another entry."""
    one, other = await cluster.pair()
    other.redis.is_cut_off = True
    one.source.put(KEY, True, False)
    await asyncio.sleep(1.0)
    cluster.server.trim(0)
    one.source.put(OTHER, True, False)
    await asyncio.sleep(1.0)
    other.redis.is_cut_off = False
    await asyncio.sleep(6.0)
    assert knows(other, one)
    assert knows(other, one, OTHER)


@virtual
async def test_a_flushed_redis_costs_nothing_but_beats(cluster: Cluster) -> None:
    """After a flush nodes register again; nobody leaves, and nobody asks for a snapshot."""
    one, other = await cluster.pair()
    one.source.put(KEY, True, False)
    await asyncio.sleep(0.1)
    cluster.server.flush()
    await asyncio.sleep(TTL_S)
    one.source.put(OTHER, True, False)
    await asyncio.sleep(0.1)
    assert knows(other, one)
    assert knows(other, one, OTHER)
    assert other.asked == {one.record.life: 1}


@virtual
async def test_a_redis_whose_clock_went_back_is_read(cluster: Cluster) -> None:
    """Entries are read whose ids are smaller than those that were read before."""
    one, other = await cluster.pair()
    one.source.put(OTHER, True, False)
    await asyncio.sleep(0.1)
    cluster.server.flush(is_clock_set_back=True)
    one.source.put(KEY, True, False)
    await asyncio.sleep(TTL_S)
    assert knows(other, one)
    assert other.asked == {one.record.life: 1}


@virtual
async def test_hints_stand_while_redis_is_away(cluster: Cluster) -> None:
    """Nobody leaves while the registry cannot be read, and changes are told once it can be."""
    one, other = await cluster.pair()
    one.source.put(KEY, True, False)
    await asyncio.sleep(0.1)
    cluster.server.is_down = True
    one.source.put(OTHER, True, False)
    await asyncio.sleep(20 * TTL_S)
    assert knows(other, one)
    assert not other.plane.state().is_store_up
    cluster.server.is_down = False
    await asyncio.sleep(6.0)
    assert other.plane.state().is_store_up
    assert knows(other, one, OTHER)
    assert other.asked == {one.record.life: 1}


@virtual
async def test_a_dead_node_is_gone_within_two_ttls(cluster: Cluster) -> None:
    """A node that is killed is retired, with all that it had, between one TTL and two."""
    one, other = await cluster.pair()
    one.source.put(KEY, True, False)
    await asyncio.sleep(0.1)
    cluster.simulation.kill(one)
    await asyncio.sleep(TTL_S)
    assert knows(other, one)
    await asyncio.sleep(1.01 * TTL_S)
    assert not len(other.plane.membership)
    assert not len(other.hints)
    assert len(cluster.server.keys()) <= 1 + 12


@virtual
async def test_a_node_that_leaves_is_gone_at_once(cluster: Cluster) -> None:
    """A farewell ends a node's life in others' hints without waiting for its TTL."""
    one, other = await cluster.pair()
    cluster.simulation.kill(one)
    await one.plane.leave()
    await asyncio.sleep(0.1)
    assert not len(other.plane.membership)


@virtual
async def test_a_restart_at_the_same_address_is_a_new_life(cluster: Cluster) -> None:
    """A node that was killed and started again is followed anew; nothing of before is believed."""
    one, other = await cluster.pair()
    one.source.put(KEY, True, False)
    await asyncio.sleep(0.1)
    cluster.simulation.kill(one)
    again = cluster.node(1, one.record.address)
    await asyncio.sleep(2.0)
    assert [member.node for member in other.plane.membership.members()] == [again.record]
    assert not knows(other, again)
    assert not len(other.hints)


@virtual
async def test_a_running_node_keeps_its_id(cluster: Cluster) -> None:
    """A second node with the same id is refused by the name of the field and of the first."""
    one, other = await cluster.pair()
    twin = cluster.node(1)
    await asyncio.sleep(2 * TTL_S)
    refused = twin.plane.registration.refused
    assert refused is not None
    assert refused.field == "node_id"
    assert one.record.address in str(refused)
    assert one.plane.registration.is_registered
    assert {m.node.life for m in other.plane.membership.members()} == {one.record.life}
    assert not twin.plane.publisher.sent_seq


@virtual
async def test_a_node_that_was_replaced_gives_up_its_id(cluster: Cluster) -> None:
    """A node whose id another one got while it was cut off does not take it back."""
    one, other = await cluster.pair()
    one.redis.is_cut_off = True
    await asyncio.sleep(2 * TTL_S)
    twin = cluster.node(1)
    await asyncio.sleep(1.0)
    one.redis.is_cut_off = False
    await asyncio.sleep(TTL_S)
    assert one.plane.registration.refused is not None
    assert twin.plane.registration.is_registered
    assert {m.node.life for m in other.plane.membership.members()} == {twin.record.life}


@virtual
async def test_a_restart_elsewhere_waits_for_the_old_ttl(cluster: Cluster) -> None:
    """A node that was killed and starts at another address gets its id once the old TTL is over."""
    one, _ = await cluster.pair()
    cluster.simulation.kill(one)
    again = cluster.node(1)
    await asyncio.sleep(TTL_S / 2)
    assert not again.plane.registration.is_registered
    await asyncio.sleep(TTL_S)
    assert again.plane.registration.is_registered


@virtual
async def test_a_new_generation_is_reported_once(cluster: Cluster) -> None:
    """Each follower reports a later generation at once, and a store that forgets it is reminded."""
    one, other = await cluster.pair()
    seen: list[int] = []
    other.plane.follower.generations.on_reset = seen.append
    first = await one.plane.advance()
    await asyncio.sleep(0.1)
    assert seen == [first]
    cluster.server.flush()
    await asyncio.sleep(1.0)
    second = await RedisStore(one.redis, "simulated", TTL_S).advance(0)
    assert second > first, "it was put back at once, and not only with the next beat"
    await asyncio.sleep(0.1)
    assert seen == [first, second]
    third = await one.plane.advance(later_than(second))
    assert third > later_than(second) - (1 << RANDOM_BITS)


@virtual
async def test_a_node_is_told_of_once_it_knows_the_generation(cluster: Cluster) -> None:
    """Others hear of a life when it can answer them, and not before."""
    one = cluster.node(1)
    assert not one.plane.follower.generations.is_known
    assert not one.plane.publisher.may_send()
    await asyncio.sleep(1.0)
    assert one.plane.follower.generations.is_known
    assert one.plane.publisher.may_send()


@virtual
async def test_a_node_that_is_apart_closes_its_generation(cluster: Cluster) -> None:
    """The store says soon that it is closed, and again after it has lost everything."""
    one, other = await cluster.pair()
    one.plane.registration.is_apart = lambda: True
    one.plane.registration.look_soon()
    store = RedisStore(other.redis, "simulated", TTL_S)
    for _ in range(2):
        await asyncio.sleep(1.0)
        heard = (await store.read((BEGIN,) * STREAMS, 0.0)).heard
        assert heard.closed == heard.book == one.plane.follower.generations.name
        cluster.server.flush()
        await asyncio.sleep(TTL_S)


@virtual
async def test_the_rate_of_entries_does_not_depend_on_who_asks(cluster: Cluster) -> None:
    """However many ask, and however often, each gets the average of the last seconds."""
    one, other = await cluster.pair()
    for number in range(200):
        one.source.put(number.to_bytes(16, "little"), True, False)
        other.plane.state()
        await asyncio.sleep(0.25)
    rates = [other.plane.state().entries_per_s for _ in range(2)]
    assert rates == pytest.approx([4.0, 4.0], rel=0.1)
    await asyncio.sleep(100.0)
    assert other.plane.state().entries_per_s < 0.01


@virtual
async def test_a_failing_snapshot_is_asked_for_ever_more_seldom(cluster: Cluster) -> None:
    """One snapshot of a node is asked for at a time, with longer and longer pauses."""
    one, other = await cluster.pair()
    asked: list[float] = []

    async def refuse(node: NodeRecord) -> AsyncIterator[Any]:
        asked.append(asyncio.get_running_loop().time())
        raise PeerError(node.address, "snapshot", "busy", is_busy=True)
        yield

    other.plane.follower._snapshots.parts = refuse
    one.source.has_lost = True
    await asyncio.sleep(300.0)
    pauses = [later - earlier for earlier, later in pairwise(asked)]
    assert 10 <= len(asked) <= 30
    assert pauses[0] < 2.0
    assert min(pauses[6:]) > 10.0


@virtual
async def test_what_comes_during_a_snapshot_follows_it(cluster: Cluster) -> None:
    """Entries that come while a snapshot is under way are applied behind it; one is enough."""
    one, other = await cluster.pair()
    asked: list[NodeRecord] = []

    async def slowly(node: NodeRecord) -> AsyncIterator[Any]:
        asked.append(node)
        for part in one.plane.publisher.snapshot():
            yield part
            await asyncio.sleep(1.0)

    other.plane.follower._snapshots.parts = slowly
    one.source.put(OTHER, True, False)
    one.source.has_lost = True
    await asyncio.sleep(0.5)
    one.source.put(KEY, True, False)
    one.source.put(OTHER, False, False)
    await asyncio.sleep(TTL_S / 3)
    assert knows(other, one)
    assert not knows(other, one, OTHER)
    assert len(asked) == 1


@virtual
async def test_what_cannot_be_decoded_is_counted(cluster: Cluster) -> None:
    """Entries that nobody can read harm nobody."""
    one, other = await cluster.pair()
    for data in (b"\xff", b"{}", encoded(Entry(one.record.life, 5, b"odd"))):
        await cluster.server.run(
            ("XADD", "flexkv:{simulated}:log:0", "MAXLEN", "~", 9, "*", b"e", data)
        )
    one.source.put(KEY, True, False)
    await asyncio.sleep(0.1)
    assert other.plane.state().malformed_entries == 3
    assert knows(other, one)


@virtual
async def test_the_state_says_what_is_known(cluster: Cluster) -> None:
    """The state has each node with its spans and how long ago it was heard of."""
    one, other = await cluster.pair()
    one.source.put(KEY, True, False)
    await asyncio.sleep(0.1)
    cluster.simulation.kill(one)
    await asyncio.sleep(5.0)
    state = other.plane.state()
    (node,) = state.nodes
    assert (node.id, node.address) == (one.record.id.hex(), one.record.address)
    assert (node.spans, node.is_behind) == (1, False)
    assert 4.9 <= node.stale_s <= 5.1
    assert state.is_registered
    assert state.entries > 0
    assert state.log_bytes > 0


@virtual
async def test_too_many_changes_make_a_gap(cluster: Cluster) -> None:
    """A source that has lost changes makes others ask for a snapshot, once."""
    one, other = await cluster.pair()
    one.source.spans[KEY] = True, False
    one.source.has_lost = True
    await asyncio.sleep(1.0)
    assert knows(other, one)
    assert other.asked[one.record.life] == 2
    assert one.plane.publisher.gaps == 1


@virtual
async def test_a_log_is_not_read_before_the_registry(cluster: Cluster) -> None:
    """A newcomer does not read what the log has of the past."""
    store = RedisStore(cluster.node(1).redis, "simulated", TTL_S)
    await asyncio.sleep(0.1)
    for seq in range(50):
        await store.append(0, [encoded(Entry(123, seq))])
    newcomer = cluster.node(2)
    await asyncio.sleep(0.1)
    assert newcomer.plane.follower.entries <= 2
    assert newcomer.plane.follower.positions != (BEGIN,) * STREAMS


def test_many_nodes_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """More nodes than one store carries are warned of, once."""
    beats = [Beat(NodeRecord(n.to_bytes(16, "big"), 1000 + n, f"10.0.0.1:{n}")) for n in range(360)]
    members = Membership(Hints(64, 1), NodeRecord(bytes(16), 7, "10.0.0.1:7"), TTL_S)
    with caplog.at_level(logging.WARNING):
        members.saw(beats[:349], 0.0)
        assert "cluster_too_large" not in caplog.text
        members.saw(beats, 0.0)
    assert caplog.text.count("cluster_too_large") == 1
