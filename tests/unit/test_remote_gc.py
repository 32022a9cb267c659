"""What engines delete from a pool and touch, and what that costs, on a virtual clock."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator
from random import Random
from typing import cast

import pytest

from flexkv.actors.supervisor import Supervisor
from flexkv.common.errors import RemoteError
from flexkv.io.remote.names import SHARDS
from flexkv.io.remote.store import Listed
from flexkv.testing.timed_store import TimedStore
from flexkv.testing.virtual_time import run_virtual
from flexkv.tiers.remote_gc.collector import (
    GARBAGE_S,
    SWEEP_S,
    Collector,
    generation_of,
)
from flexkv.tiers.remote_gc.lease import LEASE_S, RENEW_S, Lease
from flexkv.tiers.remote_gc.once import SinglePool, shards_of
from flexkv.tiers.remote_gc.refusals import PAUSE_MAX_S, PAUSE_S
from flexkv.tiers.remote_gc.rules import Limits
from flexkv.tiers.remote_pool import CLEARS_MAX
from tests.remote_engines import POOL, Rig, World, failed, with_rig

TTL_S = 10_000.0


def test_old_spans_are_deleted_as_their_shard_is_listed() -> None:
    """Expired spans of a listed shard are gone, are forgotten by the hints, and are counted."""

    async def work(rig: Rig) -> None:
        keys = rig.create(3, [0.0, TTL_S / 2, 2 * TTL_S, 3 * TTL_S])
        await rig.show(3)
        assert rig.there(keys) == [True, True, False, False]
        assert sorted(rig.forgotten) == sorted(keys[2:])
        assert rig.collector.counts().removed.expired == 2
        assert rig.collector.counts().is_collector

    with_rig(Limits(ttl_s=TTL_S), work)


def test_the_first_listing_only_counts() -> None:
    """Nothing is deleted in the first listing of a pool."""

    async def work(rig: Rig) -> None:
        keys = rig.create(3, [2 * TTL_S])
        await rig.show(3, is_first=True)
        assert rig.there(keys) == [True]

    with_rig(Limits(ttl_s=TTL_S), work)


def test_an_engine_without_the_lease_deletes_nothing() -> None:
    """While another engine collects, this one only counts; it goes on when that one is gone."""

    async def main() -> None:
        world = World()
        assert await Lease(world.requests()).hold(POOL)
        rig = Rig(Limits(ttl_s=TTL_S), world=world)
        await rig.start()
        keys = rig.create(3, [2 * TTL_S])
        await rig.show(3)
        assert rig.there(keys) == [True]
        assert not rig.collector.counts().is_collector
        await asyncio.sleep(LEASE_S + RENEW_S)
        await rig.show(3)
        assert rig.there(keys) == [False]
        await rig.tasks.stop()

    run_virtual(main())


def test_a_span_that_was_touched_since_it_was_listed_is_spared() -> None:
    """An old span is looked at right before it is deleted, and stays if it is young by then."""

    async def work(rig: Rig) -> None:
        keys = rig.create(3, [2 * TTL_S, 2 * TTL_S, 2 * TTL_S])
        listing = rig.look(3)
        rig.world.objects.touch(POOL.object_name(keys[0]))
        rig.world.objects.delete(POOL.object_name(keys[1]))
        await rig.collector.listed(POOL, 3, listing, is_first=False)
        assert rig.there(keys) == [True, False, False]
        removed = rig.collector.counts().removed
        assert (removed.spared, removed.gone, removed.expired) == (1, 1, 1)

    with_rig(Limits(ttl_s=TTL_S), work)


def test_the_pool_is_kept_within_its_budget() -> None:
    """A pool that is over its budget has 95 % of it once every shard was listed twice."""

    async def work(rig: Rig) -> None:
        random, keys = Random(1), list[bytes]()
        for shard in range(SHARDS):
            keys += rig.create(shard, [random.uniform(0, 9000) for _ in range(6)])
        await rig.show(*range(SHARDS), is_first=True)
        assert all(rig.there(keys))
        await rig.show(*range(SHARDS))
        assert sum(rig.there(keys)) == pytest.approx(0.95 * 1000, rel=0.05)
        counts = rig.collector.counts()
        assert counts.spans == sum(rig.there(keys))
        assert counts.removed.evicted == len(keys) - counts.spans
        assert counts.horizon_s is not None
        assert counts.horizon_s == pytest.approx(9000 * 950 / len(keys), rel=0.1)
        folders = rig.world.objects.folders
        kept = [s for key in keys if (s := folders[POOL.shard(key[0])].get(POOL.object_name(key)))]
        assert min(kept) > max(kept) - 1.1 * counts.horizon_s

    with_rig(Limits(1000), work)


def test_deletions_are_paced() -> None:
    """No more spans are looked at and deleted in a second than the configuration allows."""

    async def work(rig: Rig) -> None:
        rig.create(3, [2 * TTL_S] * 100)
        begin_s = asyncio.get_running_loop().time()
        await rig.show(3)
        assert asyncio.get_running_loop().time() - begin_s >= 99 / 20
        assert rig.requests.counting.requests["delete"] >= 100

    with_rig(Limits(ttl_s=TTL_S), work, per_s=20.0)


def test_an_engine_that_is_closed_releases_the_lease() -> None:
    """After an orderly end nothing is left of the lease, so that another engine need not wait."""

    async def main() -> Collector:
        world = World()
        rig = Rig(Limits(ttl_s=TTL_S), world=world)
        await rig.start()
        assert len(world.leases()) == 1
        assert rig.collector.counts().is_collector
        await rig.tasks.stop()
        assert world.leases() == []
        return rig.collector

    assert not run_virtual(main()).counts().is_collector  # without a loop, too


def test_an_engine_without_limits_keeps_the_lease_from_nobody() -> None:
    """Of two engines, the one with limits collects, however long the other one has been there."""

    async def main() -> None:
        world = World()
        other = Rig(Limits(), world=world)
        await other.start()
        assert world.leases() == []
        assert not other.collector.counts().is_collector
        await asyncio.sleep(LEASE_S)
        rig = Rig(Limits(ttl_s=TTL_S), world=world)
        await rig.start()
        assert rig.collector.counts().is_collector
        keys = rig.create(3, [2 * TTL_S])
        await asyncio.sleep(10 * LEASE_S)
        await rig.show(3)
        assert rig.there(keys) == [False]
        assert rig.collector.counts().is_collector
        await other.tasks.stop()
        await rig.tasks.stop()

    run_virtual(main())


def test_an_engine_without_limits_removes_leftovers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no engine has limits, what killed puts left behind still goes, once a day."""
    swept: list[str] = []

    async def sweep(self: TimedStore, prefix: str, age_s: float) -> int:
        swept.append(prefix)
        return 1

    async def work(rig: Rig) -> None:
        shards = [POOL.shard(shard) for shard in range(SHARDS)]
        assert swept == shards
        await asyncio.sleep(0.9 * SWEEP_S)
        assert swept == shards
        await asyncio.sleep(0.2 * SWEEP_S)
        assert swept == shards * 2
        assert rig.collector.counts().removed.leftovers == 2 * SHARDS

    monkeypatch.setattr(TimedStore, "sweep", sweep)
    with_rig(Limits(), work)


@pytest.mark.parametrize("limits", [Limits(), Limits(ttl_s=9 * GARBAGE_S)])
def test_garbage_of_older_generations_is_removed(limits: Limits) -> None:
    """Engines of the latest generation delete what is old in earlier ones, and only there."""

    async def main() -> None:
        world = World()
        rig = Rig(limits, world=world)
        base, older, latest = POOL, generation_of(POOL, 1), generation_of(POOL, 2)
        rig.pool.current = latest
        world.objects.create(f"{base.generations}1")
        world.objects.create(f"{base.generations}2", age_s=9 * GARBAGE_S)
        names = {
            pool.object_name(bytes([shard] * 16)): (pool, age_s)
            for pool in (base, older, latest)
            for shard, age_s in ((1, 2 * GARBAGE_S), (2, GARBAGE_S / 2))
        }
        for name, (_, age_s) in names.items():
            world.objects.create(name, age_s=age_s)
        for pool in (base, older, latest):
            world.objects.create(pool.description_name, age_s=9 * GARBAGE_S)
        await rig.start()
        await asyncio.sleep(60)
        there = {name for folder in world.objects.folders.values() for name in folder}
        gone = {n for n, (pool, age_s) in names.items() if pool is not latest and age_s > GARBAGE_S}
        assert gone
        assert names.keys() - there == gone
        assert base.description_name in there
        assert f"{base.generations}2" in there
        await asyncio.sleep(GARBAGE_S)
        there = {name for folder in world.objects.folders.values() for name in folder}
        assert names.keys() & there == {n for n, (pool, _) in names.items() if pool is latest}
        assert older.description_name not in there
        assert latest.description_name in there
        await rig.tasks.stop()

    run_virtual(main())


def test_generations_that_never_were_cost_nothing() -> None:
    """The reset of a cluster skips a million numbers; only those that were used are looked at."""

    async def main() -> None:
        rig = Rig(Limits(ttl_s=9 * GARBAGE_S))
        objects, latest = rig.world.objects, generation_of(POOL, CLEARS_MAX)
        rig.pool.current = latest
        for number in (7, CLEARS_MAX):
            objects.create(f"{POOL.generations}{number}")
        names = [generation_of(POOL, number).object_name(bytes(16)) for number in (0, 7)]
        for name in names:
            objects.create(name, age_s=2 * GARBAGE_S)
        await rig.start()
        await asyncio.sleep(600)
        there = {name for folder in objects.folders.values() for name in folder}
        assert not there & set(names)
        assert cast("TimedStore", rig.requests.store).sent < 50
        await rig.tasks.stop()

    run_virtual(main())


def test_an_engine_of_an_older_generation_leaves_the_others_alone() -> None:
    """Only the collector of the latest generation removes earlier ones."""

    async def main() -> None:
        world = World()
        rig = Rig(Limits(), world=world)
        rig.pool.current = generation_of(POOL, 1)
        world.objects.create(f"{POOL.generations}2")
        name = POOL.object_name(bytes(16))
        world.objects.create(name, age_s=9 * GARBAGE_S)
        await rig.start()
        await asyncio.sleep(60)
        assert world.objects.modified_s(name)
        await rig.tasks.stop()

    run_virtual(main())


def test_a_read_touches_an_old_span_once() -> None:
    """However often an old span is read, it is looked at and touched once in half of the TTL."""

    async def work(rig: Rig) -> None:
        old, young = rig.create(3, [0.6 * TTL_S, 0.1 * TTL_S])
        await rig.show(3)
        before = rig.requests.counting.requests.copy()
        for _ in range(5):
            rig.touches.used(old)
            rig.touches.used(young)
            await asyncio.sleep(10)
        sent = rig.requests.counting.requests - before
        assert (sent["touch"], sent["head"]) == (1, 1)
        assert rig.touches.counts().touched == 1
        await asyncio.sleep(0.6 * TTL_S)
        await rig.show(3)
        rig.touches.used(old)
        await asyncio.sleep(10)
        assert rig.touches.counts().touched == 2

    with_rig(Limits(ttl_s=TTL_S), work)


def test_a_span_that_is_not_listed_yet_ages_from_its_first_use() -> None:
    """A span that was stored since the listing is young, and touched once it has become old."""

    async def work(rig: Rig) -> None:
        await rig.show(3)
        (key,) = rig.create(3, [0.0])
        for waited_s in (0.0, 0.4 * TTL_S, 0.2 * TTL_S):
            assert rig.touches.counts().touched == 0
            await asyncio.sleep(waited_s)
            rig.touches.used(key)
            await asyncio.sleep(10)
        assert rig.touches.counts().touched == 1

    with_rig(Limits(ttl_s=TTL_S), work)


def test_an_old_span_is_touched_before_its_shard_is_listed() -> None:
    """An engine that has just started looks at what it reads, once, since it knows no ages yet."""

    async def work(rig: Rig) -> None:
        old, young = rig.create(3, [0.6 * TTL_S, 0.1 * TTL_S])
        for _ in range(3):
            rig.touches.used(old)
            rig.touches.used(young)
            await asyncio.sleep(10)
        counts = rig.touches.counts()
        assert (counts.touched, counts.young) == (1, 1)

    with_rig(Limits(ttl_s=TTL_S), work)


def test_a_listing_knows_better_than_the_first_use() -> None:
    """A span that another engine stored long before it was first used here has its real age."""

    async def work(rig: Rig) -> None:
        await rig.show(3)
        (key,) = rig.create(3, [0.45 * TTL_S])
        rig.touches.used(key)
        await rig.show(3)
        await asyncio.sleep(0.1 * TTL_S)
        rig.touches.used(key)
        await asyncio.sleep(10)
        assert rig.touches.counts().touched == 1

    with_rig(Limits(ttl_s=TTL_S), work)


def test_an_engine_that_does_not_list_takes_no_lease() -> None:
    """An engine that lists the pool only once leaves the lease to others, and knows the time."""

    async def main() -> None:
        world = World()
        collector = Collector(
            world.requests(), SinglePool(POOL), Limits(100), None, lambda key: None
        )
        tasks = Supervisor(failed)
        await tasks.start()
        tasks.keep("collection", collector.run(tasks.spawn))
        await asyncio.sleep(10)
        assert not collector.counts().is_collector
        assert collector.lease.clock.is_known
        assert world.leases() == []
        await tasks.stop()

    run_virtual(main())


def test_what_another_engine_has_touched_is_not_touched_again() -> None:
    """A span that was old by the listing and is young in the store costs one head."""

    async def work(rig: Rig) -> None:
        (key,) = rig.create(3, [0.6 * TTL_S])
        await rig.show(3)
        rig.world.objects.touch(POOL.object_name(key))
        for _ in range(3):
            rig.touches.used(key)
            await asyncio.sleep(10)
        counts = rig.touches.counts()
        assert (counts.touched, counts.young) == (0, 1)

    with_rig(Limits(ttl_s=TTL_S), work)


def test_a_span_that_is_gone_is_not_touched() -> None:
    """A touch of a span that was deleted meanwhile does nothing but count."""

    async def work(rig: Rig) -> None:
        (key,) = rig.create(3, [0.6 * TTL_S])
        await rig.show(3)
        rig.world.objects.delete(POOL.object_name(key))
        rig.touches.used(key)
        await asyncio.sleep(10)
        assert rig.touches.counts().failed == 1

    with_rig(Limits(ttl_s=TTL_S), work)


def test_a_store_that_refuses_touches_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a refusal nothing is touched for a while, and again afterwards."""

    async def refuse(self: TimedStore, name: str) -> None:
        raise RemoteError("store", "touch", "status 403", is_lasting=True)

    async def work(rig: Rig) -> None:
        keys = rig.create(3, [0.6 * TTL_S] * 2)
        await rig.show(3)
        with monkeypatch.context() as patch:
            patch.setattr(TimedStore, "touch", refuse)
            rig.touches.used(keys[0])
            await asyncio.sleep(10)
        rig.touches.used(keys[1])
        await asyncio.sleep(10)
        assert rig.touches.counts().skipped == 1
        assert rig.touches.counts().touched == 0
        assert "status 403" in rig.touches.refusals.why
        await asyncio.sleep(PAUSE_S)
        rig.touches.used(keys[1])
        await asyncio.sleep(10)
        assert rig.touches.counts().touched == 1
        assert not rig.touches.refusals.why

    with_rig(Limits(ttl_s=TTL_S), work)


def test_a_store_that_refuses_to_be_collected_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After one refusal the engine collects again within a minute; pauses of many are bounded."""
    asked_s: list[float] = []

    async def refuse(self: TimedStore, name: str, buffers: object) -> bool:
        asked_s.append(asyncio.get_running_loop().time())
        raise RemoteError("store", "put", "status 403", is_lasting=True)

    async def main() -> None:
        rig = Rig(Limits(ttl_s=TTL_S))
        with monkeypatch.context() as patch:
            patch.setattr(TimedStore, "put", refuse)
            await rig.start()
            assert "status 403" in rig.collector.refusals.why
            await asyncio.sleep(PAUSE_S / 2)
        await asyncio.sleep(PAUSE_S)
        assert rig.collector.counts().is_collector
        assert not rig.collector.refusals.why
        asked_s.clear()
        with monkeypatch.context() as patch:
            patch.setattr(TimedStore, "put", refuse)
            await asyncio.sleep(10 * PAUSE_MAX_S)
        pauses = [later - earlier for earlier, later in itertools.pairwise(asked_s)]
        assert [round(pause_s / PAUSE_S) for pause_s in pauses[:5]] == [1, 2, 4, 8, 10]
        assert max(pauses) < PAUSE_MAX_S + 10
        await rig.tasks.stop()

    with caplog.at_level(logging.WARNING):
        run_virtual(main())
    assert f"pause_s={PAUSE_S:.0f}" in caplog.text


def test_a_budget_alone_touches_once_the_pool_is_nearly_full() -> None:
    """Without a TTL, old spans that are read are touched only when deletion is near."""

    async def work(rig: Rig) -> None:
        keys = rig.create(0, [9000.0])
        for shard in range(1, SHARDS):
            rig.create(shard, [float(shard)] * 4)
        await rig.show(*range(SHARDS), is_first=True)
        rig.touches.used(keys[0])
        await asyncio.sleep(10)
        assert rig.touches.counts().touched == 1

    with_rig(Limits(1100), work)
    with pytest.raises(AssertionError):
        with_rig(Limits(2000), work)


def test_a_command_lists_a_shard_again_if_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing that fails once is repeated, and has each span once; a refusal ends the command."""
    failing = {"left": 1, "lasting": False}

    async def pages(self: TimedStore, prefix: str) -> AsyncIterator[list[Listed]]:
        async for page in real(self, prefix):
            yield page
        if failing["left"]:
            failing["left"] -= 1
            raise RemoteError("store", "list", "status 500", is_lasting=failing["lasting"])

    async def work(rig: Rig) -> None:
        keys = rig.create(3, [1.0, 2.0])
        monkeypatch.setattr(TimedStore, "pages", pages)
        spawn = rig.tasks.spawn
        listings = await shards_of(rig.requests, POOL, spawn, lambda _: None, [3])
        assert [key.tobytes() for key in listings[3].keys] == keys
        failing.update(left=1, lasting=True)
        with pytest.raises(RemoteError):
            await shards_of(rig.requests, POOL, spawn, lambda _: None, [3])
        failing.update(left=99, lasting=False)
        with pytest.raises(RemoteError):
            await shards_of(rig.requests, POOL, spawn, lambda _: None, [3])
        failing["left"] = 0

    real = TimedStore.pages
    with_rig(Limits(), work)
