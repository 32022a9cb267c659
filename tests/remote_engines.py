"""What an engine knows and does of a pool, over a store with a clock, for tests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random
from typing import cast

from flexkv.actors.supervisor import Supervisor
from flexkv.io.remote.landing import OpenStore
from flexkv.io.remote.names import Pool
from flexkv.io.remote.options import RemoteOptions
from flexkv.io.remote.requests import Requests
from flexkv.testing.simulated_pool import DESCRIPTION, true_time_s
from flexkv.testing.timed_store import TimedObjects, TimedStore
from flexkv.testing.virtual_time import run_virtual
from flexkv.tiers.remote_gc.collector import Collector
from flexkv.tiers.remote_gc.lease import folder_of
from flexkv.tiers.remote_gc.once import SinglePool
from flexkv.tiers.remote_gc.rules import Limits, ShardListing
from flexkv.tiers.remote_gc.touches import Touches

POOL = Pool(DESCRIPTION)
AHEAD_S = 1e9


class World:
    """A store with a clock, and what engines have of it.

    Attributes:
        objects: what the store holds.
    """

    def __init__(self, seed: int = 3, ahead_s: float = AHEAD_S) -> None:
        self.objects = TimedObjects(Random(seed), ahead_s, true_time_s)
        self._random = Random(seed)

    def requests(self) -> Requests:
        """Return one engine's requests."""
        store = cast("OpenStore", TimedStore(self.objects))
        return Requests(store, RemoteOptions(retries=0), self._random)

    def leases(self) -> list[str]:
        """Return the names of all leases."""
        return list(self.objects.folders.get(folder_of(POOL), {}))


def failed(error: BaseException) -> None:
    """Fail a test whose engine has failed."""
    raise AssertionError from error


class Rig:
    """One engine's collector and touches over a store with a clock."""

    def __init__(
        self, limits: Limits, delete_per_s: float = 1e6, world: World | None = None
    ) -> None:
        self.world = world or World()
        self.pool = SinglePool(POOL)
        self.requests = self.world.requests()
        self.forgotten: list[bytes] = []
        self.collector = Collector(
            self.requests, self.pool, limits, delete_per_s, self.forgotten.append
        )
        self.touches = Touches(self.requests, self.pool, self.collector)
        self.tasks = Supervisor(failed)

    async def start(self) -> None:
        """Start the tasks, and let the engine get the lease."""
        await self.tasks.start()
        self.tasks.keep("collection", self.collector.run(self.tasks.spawn))
        self.tasks.keep("touches", self.touches.run(self.tasks.spawn))
        await asyncio.sleep(5)

    def create(self, shard: int, ages_s: list[float]) -> list[bytes]:
        """Create spans, and return their keys."""
        random = Random(shard)
        keys = [bytes([shard]) + random.randbytes(15) for _ in ages_s]
        for key, age_s in zip(keys, ages_s, strict=True):
            assert self.world.objects.create(POOL.object_name(key), age_s=age_s)
        return keys

    async def show(self, *shards: int, is_first: bool = False) -> None:
        """Do what the listing does with shards."""
        for shard in shards:
            await self.collector.listed(POOL, shard, self.look(shard), is_first)

    def look(self, shard: int) -> ShardListing:
        """Return a listing of a shard."""
        folder, listing = self.world.objects.folders.get(POOL.shard(shard), {}), ShardListing()
        keys = b"".join(POOL.span_key(name) or b"" for name in folder)
        listing.add(keys, list(folder.values()))
        listing.end()
        return listing

    def there(self, keys: list[bytes]) -> list[bool]:
        """Return which spans are there."""
        folder = self.world.objects.folders
        return [POOL.object_name(key) in folder[POOL.shard(key[0])] for key in keys]


def with_rig(limits: Limits, work: Callable[[Rig], Awaitable[None]], per_s: float = 1e6) -> None:
    """Do the work of a test with an engine that has the lease."""

    async def main() -> None:
        rig = Rig(limits, per_s)
        await rig.start()
        await work(rig)
        await rig.tasks.stop()

    run_virtual(main())
