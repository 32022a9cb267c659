"""Engines that share a pool of a store, on a virtual clock: who deletes what, and is it right?

The listing, the lease, the collection, the touches and the hints are the real ones. The store is a
fake with a clock of its own, each engine has another time, and engines that collect are killed.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass, field
from random import Random
from typing import Any, TypeVar, TypeVarTuple, cast

from flexkv.actors.supervisor import Supervisor
from flexkv.common.terms import BlockKey
from flexkv.index.hints import STORE, Hints
from flexkv.io.remote.landing import OpenStore
from flexkv.io.remote.names import Pool, PoolDescription
from flexkv.io.remote.options import RemoteOptions
from flexkv.io.remote.requests import Requests
from flexkv.testing.timed_store import TimedObjects, TimedStore
from flexkv.testing.virtual_time import VirtualTimeLoop
from flexkv.tiers.remote_gc.collector import Collector
from flexkv.tiers.remote_gc.rules import Limits
from flexkv.tiers.remote_gc.touches import Touches
from flexkv.tiers.remote_listing import Listing
from flexkv.tiers.remote_pool import SharedPool

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")

DESCRIPTION = PoolDescription({"model_id": "simulated"}, (1,), 1)
AHEAD_S = 1.7e9
"""By how much the store's clock is ahead of the loop's."""
TICK_S = 5.0
RACE_S = 5.0
"""A read this short before the deletion of its span came too late to save it."""

_skew_s: ContextVar[float] = ContextVar("skew_s", default=0.0)


class SkewedTimeLoop(VirtualTimeLoop):
    """A virtual-time loop on which tasks may have different times."""

    def time(self) -> float:
        """Return the time as the running task has it."""
        return super().time() + _skew_s.get()

    def call_at(
        self,
        when: float,
        callback: Callable[[*Arguments], object],
        *args: *Arguments,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """Call something at a time of the running task."""
        return super().call_at(when - _skew_s.get(), callback, *args, context=context)


def true_time_s() -> float:
    """Return the time of a task without skew."""
    return asyncio.get_running_loop().time() - _skew_s.get()


def run_skewed(main: Coroutine[Any, Any, T], skew_s: float = 0.0) -> T:
    """Run a coroutine to its end on a fresh loop; its time is ahead by some seconds."""
    context = copy_context()
    context.run(_skew_s.set, skew_s)
    with asyncio.Runner(loop_factory=SkewedTimeLoop) as runner:
        return runner.run(main, context=context)


@dataclass(frozen=True)
class Scene:
    """What happens in a simulation.

    Attributes:
        limits: of the pool.
        writes_per_s: spans that all engines store in a second.
        seconds: how long it takes.
        list_per_s: requests by which an engine lists.
        engines: how many there are.
        kill_every_s: how often the engine that collects is killed; it is back a minute later.
        hot_share: the part of the spans that is read again and again.
        stays_hot: the part of the hot spans that is still hot after a read.
        returning_share: the part that is read once more, after any time.
        read_within_s: hot spans are read at least so often.
        pace: how fast the store's clock runs.
        delete_per_s: most spans that the collector deletes in a second.
    """

    limits: Limits
    writes_per_s: float
    seconds: float
    list_per_s: float = 1.0
    engines: int = 3
    kill_every_s: float = math.inf
    hot_share: float = 0.1
    stays_hot: float = 0.95
    returning_share: float = 0.05
    read_within_s: float = 1000.0
    pace: float = 1.0
    delete_per_s: float = 200.0


@dataclass
class Outcome:
    """What came of it.

    Attributes:
        written, read, deleted: spans.
        missed: reads of spans that were not there any more.
        too_soon: of each span that was deleted although it was read lately, how long before.
        raced: spans that were read in the moment in which they were deleted.
        orphaned: deleted spans whose reader was killed before it could touch them.
        again: touches of a span that was touched within half of the touch age before.
        fill: the number of spans, as a part of the budget, now and then.
        collectors: how many engines had the lease at once, at most.
        touched, kills, requests: counts.
    """

    written: int = 0
    read: int = 0
    deleted: int = 0
    missed: int = 0
    too_soon: list[float] = field(default_factory=list)
    raced: int = 0
    orphaned: int = 0
    again: int = 0
    fill: list[float] = field(default_factory=list)
    collectors: int = 0
    touched: int = 0
    kills: int = 0
    requests: int = 0


class SimulatedEngine:
    """One engine's part in a pool, until it is killed."""

    def __init__(self, objects: TimedObjects, scene: Scene, skew_s: float, seed: int) -> None:
        self._context: Context = copy_context()
        self._context.run(_skew_s.set, skew_s)
        self.store = TimedStore(objects)
        requests = Requests(cast("OpenStore", self.store), RemoteOptions(), Random(seed))
        self.pool = SharedPool(self.store, DESCRIPTION)
        self.hints = Hints(2 * (scene.limits.spans_max or 1 << 16), 1)
        self.collector = Collector(
            requests, self.pool, scene.limits, scene.delete_per_s, self._forget
        )
        self.touches = Touches(requests, self.pool, self.collector)
        self._listing = Listing(requests, self.pool, self.hints, scene.list_per_s, self.collector)
        self._tasks = Supervisor(self._failed)
        self.failure: BaseException | None = None

    def _forget(self, key: BlockKey) -> None:
        self.hints.drop(STORE, key)

    def _failed(self, error: BaseException) -> None:
        self.failure = error

    async def start(self) -> None:
        """Start the tasks of the tier."""
        await asyncio.get_running_loop().create_task(self._start(), context=self._context)

    async def _start(self) -> None:
        await self._tasks.start()
        spawn = self._tasks.spawn
        self._tasks.keep("pool", self.pool.run())
        self._tasks.keep("listing", self._listing.run(spawn))
        self._tasks.keep("touches", self.touches.run(spawn))
        self._tasks.keep("collection", self.collector.run(spawn))

    def use(self, key: BlockKey) -> None:
        """Do what the port does when a span was stored or read."""
        self.hints.note(STORE, key)
        self._context.run(self.touches.used, key)

    @property
    def collects(self) -> bool:
        """Return whether the engine has the lease."""
        current = self.pool.current
        return current is not None and self._context.run(self.collector.lease.is_held, current)

    def kill(self) -> None:
        """End the engine without a last word."""
        self.store.is_dead = True
        self._tasks.abandon()

    async def stop(self) -> None:
        """End the engine in order."""
        await self._tasks.stop()


class PoolSimulation:
    """A run of some engines over one pool."""

    def __init__(self, scene: Scene, seed: int) -> None:
        self.scene, self.outcome = scene, Outcome()
        self.random = Random(seed)
        self._objects = TimedObjects(Random(seed + 1), AHEAD_S, true_time_s, scene.pace)
        self._objects.deleted, self._objects.touched = self._was_deleted, self._was_touched
        self._pool = Pool(DESCRIPTION)
        self._used_s: dict[BlockKey, float] = {}
        self._touched_s: dict[BlockKey, float] = {}
        self._orphans: set[BlockKey] = set()
        """Spans that the last use would have touched, had its engine not been killed."""
        self._reads: list[tuple[float, BlockKey, bool]] = []
        self._engines: list[SimulatedEngine | None] = []
        self._due = 0.0

    @property
    def spans(self) -> int:
        """Return how many spans the store has."""
        return sum(
            len(folder)
            for at, folder in self._objects.folders.items()
            if at.count("/") == 2 and at[-3:-1] != "gc" and not at.endswith("generations/")
        )

    @property
    def list_requests(self) -> int:
        """Return how many requests of engines that are alive have listed something."""
        there = [engine for engine in self._engines if engine is not None]
        return sum(each.touches.requests.counting.requests["list"] for each in there)

    async def run(self, spans: int, aged_s: float) -> Outcome:
        """Run the scene, in a pool that has some spans already.

        Args:
            spans: how many.
            aged_s: the oldest is so old.
        """
        scene, now = self.scene, asyncio.get_running_loop().time
        for number in range(spans):
            self._write(aged_s * (1 - number / spans))
        self.outcome.written = 0
        self._engines = [await self._started() for _ in range(scene.engines)]
        kill_s, back_s = now() + scene.kill_every_s * self.random.uniform(0.5, 1.5), math.inf
        end_s, tick = now() + scene.seconds, 0
        while now() < end_s:
            await asyncio.sleep(TICK_S)
            self._use(now())
            if now() >= back_s:
                self._engines[self._engines.index(None)] = await self._started()
                back_s = math.inf
            if now() >= kill_s and (holder := self._holder()) is not None:
                self._kill(holder)
                kill_s = now() + scene.kill_every_s * self.random.uniform(0.5, 1.5)
                back_s = min(back_s, now() + 60.0)
            if (tick := tick + 1) % 4 == 0:
                self._look()
        for engine in self._engines:
            if engine is not None:
                self._count(engine)
                await engine.stop()
        return self.outcome

    async def _started(self) -> SimulatedEngine:
        skew_s, seed = self.random.uniform(-1e5, 1e5), self.random.getrandbits(32)
        engine = SimulatedEngine(self._objects, self.scene, skew_s, seed)
        await engine.start()
        return engine

    def _holder(self) -> int | None:
        holders = [n for n, each in enumerate(self._engines) if each is not None and each.collects]
        self.outcome.collectors = max(self.outcome.collectors, len(holders))
        return holders[0] if holders and None not in self._engines else None

    def _kill(self, number: int) -> None:
        engine = self._engines[number]
        assert engine is not None
        self._count(engine)
        self._orphans |= engine.touches._queued
        engine.kill()
        self._engines[number] = None
        self.outcome.kills += 1

    def _count(self, engine: SimulatedEngine) -> None:
        if engine.failure is not None:
            raise engine.failure
        self.outcome.touched += engine.touches.counts().touched
        self.outcome.requests += engine.store.sent

    def _look(self) -> None:
        self._holder()
        if self.scene.limits.spans_max is not None:
            self.outcome.fill.append(self.spans / self.scene.limits.spans_max)

    # -- what the engines' prompts do -------------------------------------------------------

    def _use(self, now_s: float) -> None:
        """Store and read what is due."""
        self._due += self.scene.writes_per_s * TICK_S
        for _ in range(int(self._due)):
            self._write()
        self._due -= int(self._due)
        while self._reads and self._reads[0][0] <= now_s:
            _, key, is_hot = heapq.heappop(self._reads)
            self._read(key, is_hot, now_s)

    def _write(self, age_s: float = 0.0) -> None:
        key, scene = self.random.randbytes(16), self.scene
        now_s = true_time_s()
        self._objects.create(self._pool.object_name(key), age_s=age_s)
        self._used_s[key] = now_s - age_s
        self.outcome.written += 1
        lot = self.random.random()
        if lot < scene.hot_share:
            gap_s = self.random.uniform(0, scene.read_within_s)
            heapq.heappush(self._reads, (now_s + gap_s, key, True))
        elif lot < scene.hot_share + scene.returning_share:
            gap_s = self.random.uniform(0, 6 * scene.read_within_s)
            heapq.heappush(self._reads, (now_s + gap_s, key, False))
        self._engine_uses(key)

    def _engine_uses(self, key: BlockKey) -> None:
        there = [engine for engine in self._engines if engine is not None]
        if there:
            self.random.choice(there).use(key)

    def _read(self, key: BlockKey, is_hot: bool, now_s: float) -> None:
        try:
            self._objects.modified_s(self._pool.object_name(key))
        except FileNotFoundError:
            self.outcome.missed += 1
            return
        self._used_s[key] = now_s
        self._orphans.discard(key)
        self.outcome.read += 1
        self._engine_uses(key)
        if is_hot and self.random.random() < self.scene.stays_hot:
            gap_s = self.random.uniform(0, self.scene.read_within_s)
            heapq.heappush(self._reads, (now_s + gap_s, key, True))

    # -- what happens in the store ----------------------------------------------------------

    def _was_deleted(self, name: str) -> None:
        key = self._pool.span_key(name)
        if key is None:
            return
        self.outcome.deleted += 1
        self._touched_s.pop(key, None)
        unused_s = true_time_s() - self._used_s.pop(key)
        if key in self._orphans and unused_s < self._kept_s():
            self.outcome.orphaned += 1
        elif unused_s < RACE_S:
            self.outcome.raced += 1
        elif unused_s < self._kept_s():
            self.outcome.too_soon.append(unused_s)

    def _kept_s(self) -> float:
        """Return how long a span must at least be kept once it was read."""
        if self.scene.limits.ttl_s is not None:
            return self.scene.limits.ttl_s / 2
        there = [engine for engine in self._engines if engine is not None]
        horizons = [engine.collector.counts().horizon_s or 0.0 for engine in there]
        return max(horizons, default=0.0) / 2

    def _was_touched(self, name: str) -> None:
        key = self._pool.span_key(name)
        assert key is not None, name
        before_s = self._touched_s.get(key, -math.inf)
        self._touched_s[key] = true_time_s()
        ages = [e.collector.touch_age_s for e in self._engines if e is not None]
        if self._touched_s[key] - before_s < min(ages) / 2:
            self.outcome.again += 1
