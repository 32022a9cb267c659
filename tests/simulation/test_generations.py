"""Engines that are cleared share a generation if it was offered, and never one with older KV.

Each engine has an *era*: what its blocks are computed with. A clear of an engine begins another
era there. A pool that an engine reads must have blocks of its own era only. A failure names its
seed: `GENERATIONS_FIRST=seed GENERATIONS_SEEDS=1 pytest …` replays it.
"""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from random import Random
from typing import cast

import pytest

from flexkv.common.errors import RemoteError
from flexkv.io.remote.names import Pool
from flexkv.io.remote.store import Store
from flexkv.testing.simulated_pool import DESCRIPTION
from flexkv.testing.timed_store import TimedObjects, TimedStore
from flexkv.testing.virtual_time import run_virtual
from flexkv.tiers.remote_pool import OFFER, OFFER_S, SharedPool

SEEDS = int(os.environ.get("GENERATIONS_SEEDS", "30"))
FIRST = int(os.environ.get("GENERATIONS_FIRST", "0"))
BASE = Pool(DESCRIPTION)


class AwayStore(TimedStore):
    """A store that is away at times, and whose answers may be long on their way.

    Attributes:
        is_away: whether requests fail.
        delay_s: the longest that a request and its answer take more than usual.
    """

    is_away, delay_s = False, 0.0

    async def _travel(self) -> None:
        await super()._travel()
        if self.delay_s:
            await asyncio.sleep(self._objects.random.uniform(0, self.delay_s))
        if self.is_away:
            raise RemoteError(self.where, "request", "it is away")


class Engine:
    """What matters of an engine: its pool, its era, and what it stores and reads."""

    def __init__(self, world: World, era: str) -> None:
        self.era, self.clears_here = era, 0
        self._world = world
        self.store = AwayStore(world.objects)
        self.pool = SharedPool(cast("Store", self.store), DESCRIPTION)
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self.pool.run()), loop.create_task(self._live())]

    async def _live(self) -> None:
        """Store and read all the time, as a port does: only in the pool of the last clear."""
        world = self._world
        while True:
            await asyncio.sleep(world.random.choice([0.0, 0.2, 5.0, 40.0]))
            era, clears = self.era, self.pool.clears
            pool = await self.pool.joined()
            if clears != self.pool.clears:
                continue
            await asyncio.sleep(world.random.uniform(0, 0.5))
            world.stored[pool.name].add(era)  # though a clear may have come meanwhile
            if self.pool.current is pool:
                world.read(self, pool)

    def clear(self, era: str) -> None:
        """Begin another era, as after an update of the weights."""
        self.era = era
        self.pool.clear(None)

    async def stop(self) -> None:
        """Kill it; what it has sent may still arrive."""
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)


class World:
    """Some engines over one store.

    Attributes:
        stored: the eras of the blocks in each pool.
        reads: how often an engine has read.
    """

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        ahead_s = self.random.choice([-1e6, 0.0, 1e9])
        self.objects = TimedObjects(Random(seed + 1), ahead_s)
        self.stored: defaultdict[str, set[str]] = defaultdict(set)
        self.reads = 0
        self.offered, self.offered_s = 0, -OFFER_S
        self.engines = [Engine(self, "0") for _ in range(self.random.choice([2, 3]))]

    def read(self, engine: Engine, pool: Pool) -> None:
        """Check that all blocks in a pool are of an engine's era."""
        self.reads += 1
        assert self.stored[pool.name] <= {engine.era}, (engine.era, self.stored[pool.name])

    def offer(self) -> int:
        """Offer a generation, and return its number."""
        number = 1
        while not self.objects.create(f"{BASE.generations}{number}", OFFER):
            number += 1
        self.offered, self.offered_s = number, asyncio.get_running_loop().time()
        return number

    async def all_joined(self) -> None:
        """Wait until all engines use a pool."""
        for engine in self.engines:
            engine.store.is_away, engine.store.delay_s = False, 0.0
            await engine.pool.joined()

    async def disturb(self) -> None:
        """Let some engines have a store that is slow or away, and let some time pass."""
        for engine in self.engines:
            engine.store.is_away = self.random.random() < 0.2
            engine.store.delay_s = self.random.choice([0.0, 0.0, 0.5, 3.0])
        await asyncio.sleep(self.random.choice([0.0, 0.01, 0.3, 5.0, 60.0]))

    async def restart(self, engine: Engine) -> Engine:
        """Kill an engine, start another one of its era in its place, and return that."""
        await engine.stop()
        later = Engine(self, engine.era)
        self.engines[self.engines.index(engine)] = later
        return later

    async def update(self, era: str, engines: list[Engine]) -> None:
        """Offer a generation, clear some engines in any order, and check that they share it."""
        number = self.offer()
        await asyncio.sleep(self.random.uniform(0, 30))
        self.random.shuffle(engines)
        for engine in engines:
            await self.disturb()
            engine.clear(era)
        begin_s = asyncio.get_running_loop().time()
        await self.all_joined()
        assert asyncio.get_running_loop().time() - begin_s < OFFER_S / 4
        generations = {await generation(engine) for engine in engines}
        assert generations == {number}, "they share what was offered"

    async def part(self, era: str) -> None:
        """Clear one engine alone: it must share with nobody.

        An engine that has not taken the last offer is not cleared before that has ended.
        """
        engine = self.random.choice(self.engines)
        if await generation(engine) < self.offered:
            left_s = self.offered_s + OFFER_S + 60 - asyncio.get_running_loop().time()
            await asyncio.sleep(max(0.0, left_s))
        if self.random.random() < 0.3 and len({each.era for each in self.engines}) == 1:
            engine = await self.restart(engine)
            if self.random.random() < 0.5 and self.offered_s + OFFER_S < _now_s():
                await asyncio.sleep(self.random.uniform(0, 0.2))  # it may be joining a pool now
            else:
                await engine.pool.joined()
        engine.clear(era)
        await self.disturb()
        await self.all_joined()
        others = {await generation(each) for each in self.engines if each is not engine}
        assert await generation(engine) not in others


def _now_s() -> float:
    return asyncio.get_running_loop().time()


async def generation(engine: Engine) -> int:
    """Return the number of the generation that an engine uses."""
    return (await engine.pool.joined()).description.generation


@pytest.mark.parametrize("seed", range(FIRST, FIRST + SEEDS))
def test_cleared_engines_share_what_was_offered_and_nothing_older(seed: int) -> None:
    """Through offers, clears, restarts and delays no engine reads what its clear has ended."""

    async def main() -> World:
        world = World(seed)
        await world.all_joined()
        for step in range(1, 8):
            kind = world.random.choice(["update", "some", "part", "part", "restart"])
            if kind == "restart" and len({each.era for each in world.engines}) == 1:
                await world.restart(world.random.choice(world.engines))
                await world.all_joined()
            elif kind == "part":
                await world.part(f"{step} alone")
            else:
                await asyncio.sleep(world.random.choice([0.0, 5.0, 2000.0]))
                engines = list(world.engines)
                if kind == "some":  # the others are forgotten, and go on as they are
                    engines = world.random.sample(engines, len(engines) - 1)
                await world.update(str(step), engines)
            await asyncio.sleep(world.random.uniform(0, 50))
        for engine in world.engines:
            await engine.stop()
        return world

    assert run_virtual(main()).reads


def test_an_offer_is_taken_once_and_not_for_ever() -> None:
    """A second clear, one after the offer has ended, and one without an offer begin a new one."""

    async def main() -> list[int]:
        world = World(1)
        first, second = world.engines[:2]
        await world.all_joined()
        found, offered = [], world.offer()
        first.clear("1")
        found.append(await generation(first) - offered)
        first.clear("1 again")
        found.append(await generation(first) - offered)
        offered = world.offer()
        await asyncio.sleep(OFFER_S + 10)
        second.clear("2")
        found.append(await generation(second) - offered)
        first.clear("3")
        found.append(await generation(first) - offered)
        for engine in world.engines:
            await engine.stop()
        return found

    assert run_virtual(main()) == [0, 1, 1, 2]
