"""Touches spans that are read and old, so that they are not deleted: see `rules`.

    read or stored ──▶ young by the listing, or looked at lately? nothing
                     ▶ old ──▶ head: young? another engine has touched it
                                    ▶ old ──▶ touch

So an engine asks at most once for a span in each half of the retention, and touches it only if no
other engine has. Touching is worth a request, not a wait: when too many spans are to be touched,
some are left to the next read.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque

import msgspec

from flexkv.actors.supervisor import Bell
from flexkv.common.errors import RemoteError
from flexkv.common.terms import BlockKey
from flexkv.io.remote.names import CurrentPool
from flexkv.io.remote.requests import Requests
from flexkv.io.remote.until import Until
from flexkv.observe.logs import get_logger
from flexkv.process.spawning import Spawn
from flexkv.tiers.remote_gc.collector import Collector
from flexkv.tiers.remote_gc.refusals import Refusals
from flexkv.tiers.remote_gc.turns import Pacer, side_by_side

log = get_logger(__name__)

AT_ONCE, PER_S = 4, 50.0
"""How many spans are looked at and touched side by side, and in a second."""
WAITING_MAX = 4096
REMEMBERED_MAX = 1 << 16
"""How many of the spans that were looked at are remembered, and of those not listed yet."""


class TouchCounts(msgspec.Struct, frozen=True):
    """What was done for spans that were read and old, since the engine started.

    Attributes:
        touched: spans that were touched.
        young: spans that another engine had touched.
        skipped: spans that were not looked at, because too many were waiting, or the store has
            refused a touch.
        failed: spans that could not be touched, or were gone.
    """

    touched: int
    young: int
    skipped: int
    failed: int


class Touches:
    """Touches what an engine reads.

    Attributes:
        requests: the store's.
        refusals: of touches.
    """

    def __init__(self, requests: Requests, pool: CurrentPool, collector: Collector) -> None:
        """Take the store's requests, the pool in use, and who knows the ages of its spans."""
        self.requests, self._pool, self._collector = requests, pool, collector
        self._waiting: deque[BlockKey] = deque()
        self._queued: set[BlockKey] = set()
        self._looked_at: OrderedDict[BlockKey, float] = OrderedDict()
        """When the spans that were looked at were last modified, or earlier."""
        self._unlisted: OrderedDict[BlockKey, float] = OrderedDict()
        """When the spans that no listing has shown were first used."""
        self.refusals = Refusals()
        self._bell = Bell()
        self._touched = self._young = self._skipped = self._failed = 0

    def counts(self) -> TouchCounts:
        """Return the counts as they are now."""
        return TouchCounts(self._touched, self._young, self._skipped, self._failed)

    def used(self, key: BlockKey) -> None:
        """Record that a span was read, stored or found in the store; touch it soon if it is old."""
        collector, clock = self._collector, self._collector.lease.clock
        if math.isinf(collector.touch_age_s) or key in self._queued:
            return
        if clock.is_known and collector.ages.is_listed(key):
            late_s = clock.late_s()
            if late_s - self._modified_s(key, late_s) < collector.touch_age_s:
                return
        elif key in self._looked_at:
            return
        if self.refusals.is_pause or len(self._waiting) >= WAITING_MAX:
            self._skipped += 1
            return
        self._queued.add(key)
        self._waiting.append(key)
        self._bell.ring()

    def _modified_s(self, key: BlockKey, late_s: float) -> float:
        """Return when a span was last modified, as far as that is known."""
        listed_s, looked_at_s = self._collector.ages.modified_s(key), self._looked_at.get(key)
        if listed_s is None and looked_at_s is None:
            # It was stored since the last listing, or is just now.
            return _remembered(self._unlisted, key, self._unlisted.get(key, late_s))
        return max(listed_s or 0.0, looked_at_s or 0.0)

    async def run(self, spawn: Spawn) -> None:
        """Touch spans until cancelled."""
        pacer = Pacer(PER_S)
        while True:
            await self._bell.wait()
            await side_by_side(spawn, AT_ONCE, self._waiting, pacer, self._touch)

    async def _touch(self, key: BlockKey, until: Until) -> None:
        """Touch a span, unless it is young or the engine has no pool now."""
        try:
            if self._pool.current is None:
                return
            modified_s = await self._look(self._pool.current.object_name(key), until)
        except (RemoteError, FileNotFoundError) as error:
            self._failed += 1
            if isinstance(error, RemoteError) and error.is_lasting:
                pause_s = self.refusals.refused(error)
                log.warning("remote_span_not_touched", error=str(error), pause_s=round(pause_s))
            return
        finally:
            self._queued.discard(key)
        _remembered(self._looked_at, key, modified_s)

    async def _look(self, name: str, until: Until) -> float:
        """Touch an object unless it is young; return when it was last modified, or earlier.

        Raises:
            FileNotFoundError: it is gone.
            RemoteError: the store failed, or did not answer in time.
        """
        clock, pool = self._collector.lease.clock, self._pool.current
        if not clock.is_known and pool is not None:
            await self._collector.lease.read_clock(pool)
        modified_s = (await self.requests.head(name, until)).modified_s
        if clock.late_s() - modified_s < self._collector.touch_age_s:
            self._young += 1
            return modified_s
        early_s = clock.early_s()
        await self.requests.touch(name, until)
        self.refusals.granted()
        self._touched += 1
        return early_s


def _remembered(times: OrderedDict[BlockKey, float], key: BlockKey, time_s: float) -> float:
    """Remember a time as the latest, forget the oldest if there are too many, and return it."""
    times[key] = time_s
    times.move_to_end(key)
    if len(times) > REMEMBERED_MAX:
        times.popitem(last=False)
    return time_s
