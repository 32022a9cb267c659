"""Which engine collects a pool, and what time it is in the store, on a virtual clock."""

from __future__ import annotations

import asyncio

import pytest

from flexkv.common.errors import RemoteError
from flexkv.testing.simulated_pool import run_skewed, true_time_s
from flexkv.testing.timed_store import TimedStore
from flexkv.testing.virtual_time import run_virtual
from flexkv.tiers.remote_gc.collector import generation_of
from flexkv.tiers.remote_gc.lease import LEASE_S, RENEW_S, Lease, folder_of
from tests.remote_engines import AHEAD_S, POOL, World


def test_one_engine_at_a_time_has_the_lease() -> None:
    """Of engines that ask at once, one gets the lease, and renews it as long as it asks."""

    async def main() -> None:
        world = World()
        leases = [Lease(world.requests()) for _ in range(3)]
        held = [await each.hold(POOL) for each in leases]
        assert sum(held) == 1
        for _ in range(20):
            await asyncio.sleep(RENEW_S)
            assert [await each.hold(POOL) for each in leases] == held
            assert [each.is_held(POOL) for each in leases] == held
            assert len(world.leases()) == 1

    run_virtual(main())


def test_a_race_for_the_lease_has_one_winner() -> None:
    """Engines whose requests overlap never have the lease both."""

    async def main() -> None:
        for seed in range(20):
            world = World(seed)
            leases = [Lease(world.requests()) for _ in range(4)]
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(each.hold(POOL)) for each in leases]
            assert sum(task.result() for task in tasks) == 1

    run_virtual(main())


def test_the_lease_of_an_engine_that_is_gone_ends() -> None:
    """An engine that does not renew its lease loses it, not before its time, and to one other."""

    async def main() -> None:
        world = World()
        gone, first, second = (Lease(world.requests()) for _ in range(3))
        assert await gone.hold(POOL)
        await asyncio.sleep(0.9 * LEASE_S)
        assert not await first.hold(POOL)
        await asyncio.sleep(0.2 * LEASE_S)
        assert not gone.is_held(POOL)
        assert await first.hold(POOL)
        assert not await second.hold(POOL)
        assert not await gone.hold(POOL)

    run_virtual(main())


def test_a_renewal_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine whose renewal fails keeps the lease it has, and renews it the next time."""

    async def refuse(self: TimedStore, name: str, buffers: object) -> bool:
        raise RemoteError("store", "put", "status 500")

    async def main() -> None:
        world = World()
        lease, other = Lease(world.requests()), Lease(world.requests())
        assert await lease.hold(POOL)
        await asyncio.sleep(1.1 * RENEW_S)
        with monkeypatch.context() as patch:
            patch.setattr(TimedStore, "put", refuse)
            with pytest.raises(RemoteError):
                await lease.hold(POOL)
        assert lease.is_held(POOL)
        await asyncio.sleep(1.1 * RENEW_S)
        assert await lease.hold(POOL)
        await asyncio.sleep(0.9 * LEASE_S)
        assert lease.is_held(POOL)
        assert not await other.hold(POOL)

    run_virtual(main())


def test_a_put_whose_answer_is_lost_still_takes_the_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that finds its own name in the lease has it, though the store says it exists."""

    async def twice(self: TimedStore, name: str, buffers: list[bytes]) -> bool:
        assert await put(self, name, buffers)
        return await put(self, name, buffers)

    async def main() -> None:
        lease = Lease(World().requests())
        with monkeypatch.context() as patch:
            patch.setattr(TimedStore, "put", twice)
            assert await lease.hold(POOL)

    put = TimedStore.put
    run_virtual(main())


def test_a_lease_is_its_pools() -> None:
    """The lease of one pool is none of another, and is left when an engine changes its pool."""

    async def main() -> None:
        world, other = World(), generation_of(POOL, 1)
        lease = Lease(world.requests())
        assert await lease.hold(POOL)
        assert not lease.is_held(other)
        assert await lease.hold(other)
        assert not lease.is_held(POOL)

    run_virtual(main())


def test_a_released_lease_is_free() -> None:
    """After a release, another engine gets the lease at once, and nothing is left of it."""

    async def main() -> None:
        world = World()
        first, second = Lease(world.requests()), Lease(world.requests())
        assert await first.hold(POOL)
        await first.release()
        assert world.leases() == []
        assert not first.is_held(POOL)
        assert await second.hold(POOL)

    run_virtual(main())


@pytest.mark.parametrize("skew_s", [-1e6, 0.0, 1e6])
def test_the_stores_time_does_not_depend_on_the_engines(skew_s: float) -> None:
    """Both readings of the store's clock enclose its time, whatever time the engine has."""

    async def main() -> None:
        world = World()
        lease = Lease(world.requests())
        await asyncio.sleep(123.4)
        await lease.read_clock(POOL)
        for _ in range(5):
            late_s, early_s = lease.clock.late_s(), lease.clock.early_s()
            assert early_s <= true_time_s() + AHEAD_S <= late_s
            assert late_s - early_s < 1.5
            await asyncio.sleep(77.7)
        assert world.leases() == []

    run_skewed(main(), skew_s)


def test_leftovers_of_killed_engines_are_tidied_up() -> None:
    """What an engine left that was killed while it read the clock goes, when it is old enough."""

    async def main() -> None:
        world = World()
        world.objects.create(f"{folder_of(POOL)}now-old", age_s=2 * LEASE_S)
        world.objects.create(f"{folder_of(POOL)}now-young", age_s=1)
        lease = Lease(world.requests())
        assert await lease.hold(POOL)
        await lease.tidy()
        assert sorted(world.leases()) == [f"{folder_of(POOL)}{1}", f"{folder_of(POOL)}now-young"]

    run_virtual(main())
