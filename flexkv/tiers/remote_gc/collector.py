"""Keeps a pool within its budget and its TTL, and removes what nobody uses any more.

    listing ── a shard ──▶ census, ages ──▶ this engine has the lease? ──▶ delete its victims
    every few minutes      look at the lease, renew it; with it: remove older generations, leftovers

Every engine with limits counts, so that any of them can go on collecting. One without limits must
not keep the lease from those: it takes the lease only to remove garbage, and releases it at once.
Nothing is listed for that: the pages
by which hints are kept up to date have the times of the objects. What others delete, or a lifecycle
rule of the bucket, is simply not there any more in the next listing.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import msgspec

from flexkv.common.errors import RemoteError
from flexkv.common.terms import BlockKey
from flexkv.io.remote.names import SHARDS, CurrentPool, Pool
from flexkv.io.remote.requests import Requests
from flexkv.observe.logs import get_logger
from flexkv.process.spawning import Spawn
from flexkv.tiers.remote_gc.lease import RENEW_S, Lease, numbers_in, within
from flexkv.tiers.remote_gc.refusals import Refusals
from flexkv.tiers.remote_gc.removal import Removal, RemovalCounts
from flexkv.tiers.remote_gc.rules import (
    Ages,
    Census,
    Limits,
    ShardListing,
    victims,
    with_oldest,
)

log = get_logger(__name__)

GARBAGE_S = 3600.0
"""How old objects of an older generation are at least when they are removed. An engine that still
uses that generation, because another engine was cleared, loses only copies that are older."""
TIDY_S = 600.0
"""How often garbage is looked for."""
SWEEP_S, LEFTOVER_S = 24 * 3600.0, 3600.0
"""How often a shard is searched for leftovers of puts, and how old those are at least."""
CLOCK_S = 3600.0
"""How often the store's time is read."""
PAGE_S = 30.0


def generation_of(pool: Pool, number: int) -> Pool:
    """Return another generation of a pool; 0 is the one that names the others."""
    return Pool(msgspec.structs.replace(pool.description, generation=number))


class CollectionCounts(msgspec.Struct, frozen=True):
    """The state of the collection.

    Attributes:
        is_collector: whether this engine collects now.
        spans: how many spans the last listings have found, less those deleted.
        horizon_s: the age of the oldest spans that the budget has room for; None while there is
            room for more.
        removed: what this engine has removed.
    """

    is_collector: bool
    spans: int
    horizon_s: float | None
    removed: RemovalCounts


class Collector:
    """Knows the ages of a pool's spans, and deletes old ones while this engine has the lease.

    Attributes:
        ages: when spans were last modified.
        touch_age_s: from which age on a read should touch a span.
        lease: the right to collect the pool, with the store's clock.
        removal: deletes spans and garbage, and counts that.
        refusals: of the requests by which an engine collects.
    """

    def __init__(
        self,
        requests: Requests,
        pool: CurrentPool,
        limits: Limits,
        delete_per_s: float | None,
        forget: Callable[[BlockKey], object],
    ) -> None:
        """Take what to collect; nothing is sent.

        Args:
            requests: the store's.
            pool: the pool in use.
            limits: what to keep it within.
            delete_per_s: the most objects to delete in a second; None for an engine that never
                collects, because it does not list the pool again and again.
            forget: called with the key of each span that is found to be gone.
        """
        self.lease = Lease(requests)
        self.removal = Removal(requests, delete_per_s or 1.0, forget)
        self.refusals = Refusals()
        self._may_collect = delete_per_s is not None
        self._requests, self._pool, self._limits = requests, pool, limits
        self._has_limits = limits != Limits()
        self._horizon_s = math.inf
        self._tidied_s = self._clock_s = -math.inf
        self._is_collector = False
        """As of the last look at the lease."""
        self._forget_pool(None)

    def _forget_pool(self, pool: Pool | None) -> None:
        self._of: Pool | None = pool
        self.ages, self._census = Ages(), Census()
        self.touch_age_s = self._limits.touch_age_s(math.inf)
        self._horizon_s = math.inf
        self._swept_s = [-math.inf] * SHARDS

    def counts(self) -> CollectionCounts:
        """Return the state of the collection."""
        return CollectionCounts(
            self._is_collector,
            self._census.spans,
            self._horizon_s if math.isfinite(self._horizon_s) else None,
            self.removal.counts(),
        )

    # -- with each shard that was listed ----------------------------------------------------------

    async def listed(self, pool: Pool, shard: int, listing: ShardListing, is_first: bool) -> None:
        """Take what is in a shard, and delete what is too old if it is this engine's turn.

        Args:
            pool: the pool.
            shard: its number.
            listing: what was found; it has ended.
            is_first: whether the engine lists the pool for the first time: it only counts then.

        Cancellation: deletions that were begun end at once.
        """
        if pool is not self._of:
            self._forget_pool(pool)
        now_s = asyncio.get_running_loop().time()
        limits, census = self._limits, self._census
        if limits.spans_max is not None:
            census.listed(shard, listing.modified_s, now_s)
        if self._has_limits:
            self.ages.listed(shard, listing)
        if not self.lease.clock.is_known:
            return
        early_s = self.lease.clock.early_s()
        cut = None
        if limits.spans_max is not None and census.is_whole:
            self._horizon_s = census.horizon_s(limits.spans_max, now_s, early_s)
            self.touch_age_s = limits.touch_age_s(self._horizon_s)
            cut = census.cut(limits.spans_max, now_s)
        if is_first or not self.lease.is_held(pool):
            return
        expired_before_s = limits.expired_before_s(early_s)
        chosen = victims(listing, cut, expired_before_s)
        if limits.spans_max is not None and cut is not None:
            more = census.overdue(limits.spans_max, len(listing), int(chosen.sum()))
            chosen = with_oldest(listing.modified_s, chosen, more)
        deleted = 0
        if chosen.any():
            left = await self.removal.spans(pool, listing, chosen, expired_before_s)
            census.left(shard, listing.modified_s[left])
            deleted = len(listing) - int(left.sum())
        if limits.spans_max is not None:
            census.deleted(limits.spans_max, len(listing), deleted, now_s)
        await self._sweep(pool, shard, now_s)

    async def _sweep_all(self, pool: Pool, now_s: float) -> None:
        """Sweep all shards, as long as the lease can be kept."""
        for shard in range(SHARDS):
            if not await self.lease.hold(pool):
                return
            await self._sweep(pool, shard, now_s)

    async def _sweep(self, pool: Pool, shard: int, now_s: float) -> None:
        """Remove what killed puts have left in a shard, once a day."""
        if now_s - self._swept_s[shard] < SWEEP_S:
            return
        self._swept_s[shard] = now_s
        with suppress(RemoteError, TimeoutError):
            sweep = self._requests.store.sweep(pool.shard(shard), LEFTOVER_S)
            self.removal.counting["leftovers"] += await within(PAGE_S).wait(sweep)

    # -- now and then -----------------------------------------------------------------------------

    async def run(self, spawn: Spawn) -> None:
        """Keep the lease if it can be had, and remove garbage, until cancelled.

        Cancellation: the lease is released, for which the store has a second.
        """
        self.removal.spawn = spawn
        try:
            while True:
                pool = await self._pool.joined()
                await asyncio.sleep(await self._turn(pool))
        finally:
            self._is_collector = False
            with suppress(RemoteError):
                await self.lease.release()

    async def _turn(self, pool: Pool) -> float:
        """Do what is due, and return the pause until the next turn."""
        try:
            await self._do_what_is_due(pool)
        except RemoteError as error:
            pause_s = self.refusals.refused(error) if error.is_lasting else RENEW_S
            log.warning("remote_collection_failed", error=str(error), pause_s=round(pause_s))
            return pause_s
        self.refusals.granted()
        return RENEW_S

    async def _do_what_is_due(self, pool: Pool) -> None:
        now_s = asyncio.get_running_loop().time()
        if not self._has_limits:
            await self._tidy_in_passing(pool, now_s)
            return
        is_held = self._may_collect and await self.lease.hold(pool)
        if is_held != self._is_collector:
            log.info("remote_collection", is_collector=is_held, pool=pool.name)
        self._is_collector = is_held
        if is_held and now_s - self._tidied_s > TIDY_S:
            self._tidied_s = now_s
            await self.tidy(pool)
        elif not is_held and now_s - self._clock_s > CLOCK_S:
            await self.lease.read_clock(pool)
            self._clock_s = now_s

    async def _tidy_in_passing(self, pool: Pool, now_s: float) -> None:
        """Remove garbage if that is due and no engine collects the pool, and release the lease.

        Raises:
            RemoteError: the store failed, or did not answer in time.
        """
        if not self._may_collect or now_s - self._tidied_s <= TIDY_S:
            return
        if not await self.lease.hold(pool):
            return
        self._tidied_s = now_s
        try:
            await self.tidy(pool)
            await self._sweep_all(pool, now_s)
        finally:
            await self.lease.release()

    async def tidy(self, pool: Pool) -> None:
        """Remove what is left of generations before the latest, and of leases.

        Raises:
            RemoteError: the store failed, or did not answer in time.
        """
        await self.lease.tidy()
        numbers = await numbers_in(self._requests, generation_of(pool, 0).generations)
        own = pool.description.generation
        if own < max(numbers, default=0):
            return  # engines of the latest one do it
        for number in sorted({0, *numbers}):  # the reset of a cluster skips many numbers
            if number < own:
                await self.remove_generation(pool, generation_of(pool, number))

    async def remove_generation(self, pool: Pool, older: Pool, age_s: float = GARBAGE_S) -> None:
        """Remove the old objects of an older generation, and its description after the last.

        Args:
            pool: the pool in use, whose lease is kept meanwhile.
            older: that of the older generation.
            age_s: how old the objects are at least.

        Raises:
            RemoteError: the store failed, or did not answer in time.
        """
        before_s, left = self.lease.clock.early_s() - age_s, 0
        async for page in self._requests.pages(f"{older.name}/", PAGE_S):
            times = {
                each.name: each.modified_s
                for each in page
                if not each.name.startswith((older.generations, older.description_name))
            }
            old = deque(name for name, modified_s in times.items() if modified_s < before_s)
            left += len(times) - len(old)
            await self.removal.garbage(old)
            if not await self.lease.hold(pool):
                return
        if not left:
            await self._requests.delete(older.description_name, within(PAGE_S))
