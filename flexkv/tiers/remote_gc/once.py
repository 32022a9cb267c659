"""One collection of a pool, now and apart from engines: for commands.

The pool is listed once, and the ages of all spans are kept until the victims are known: 24 bytes a
span.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from flexkv.common.errors import RemoteError
from flexkv.io.remote.names import SHARDS, Pool
from flexkv.io.remote.requests import Requests
from flexkv.io.remote.until import Until
from flexkv.process.spawning import Spawn
from flexkv.tiers.remote_gc.lease import Lease
from flexkv.tiers.remote_gc.removal import Removal
from flexkv.tiers.remote_gc.rules import Census, Limits, ShardListing, victims
from flexkv.tiers.remote_gc.turns import Pacer, side_by_side

PAGE_S = 60.0
TRIES = 3
"""How often a shard is listed until a command gives up."""
SIDE_BY_SIDE, SHARDS_PER_S = 8, 1000.0


class Collected(NamedTuple):
    """What one collection has found and done.

    Attributes:
        spans: how many spans there were.
        expired: how many of them are older than the TTL.
        victims: how many are to be deleted, those included.
        deleted: how many were deleted.
        oldest_s: the age of the oldest span that stays; 0 without any.
    """

    spans: int
    expired: int
    victims: int
    deleted: int
    oldest_s: float


class SinglePool:
    """A pool that is in use for as long as a command runs."""

    def __init__(self, pool: Pool) -> None:
        self.current: Pool | None = pool

    async def joined(self) -> Pool:
        """Return the pool."""
        assert self.current is not None
        return self.current


async def shards_of(
    requests: Requests,
    pool: Pool,
    spawn: Spawn,
    seen: Callable[[int], object],
    wanted: Iterable[int] = range(SHARDS),
) -> list[ShardListing]:
    """Return the listings of all shards of a pool.

    Args:
        requests: the store's.
        pool: the pool.
        spawn: starts tasks.
        seen: called with the number of spans of each page.
        wanted: the shards to list; the others' listings are empty.

    Raises:
        RemoteError: the store failed, or did not answer in time.
    """
    listings = [ShardListing() for _ in range(SHARDS)]
    failures: list[RemoteError] = []

    async def list_one(shard: int, _: Until) -> None:
        for number in range(TRIES):
            listings[shard] = ShardListing()
            try:
                async for page in requests.pages(pool.shard(shard), PAGE_S):
                    spans = [(each, key) for each in page if (key := pool.span_key(each.name))]
                    keys = b"".join(key for _, key in spans)
                    listings[shard].add(keys, [each.modified_s for each, _ in spans])
                    seen(len(spans))
            except RemoteError as error:
                if error.is_lasting or number == TRIES - 1:
                    failures.append(error)
                    return
            else:
                return

    await side_by_side(spawn, SIDE_BY_SIDE, deque(wanted), Pacer(SHARDS_PER_S), list_one)
    for listing in listings:
        listing.end()
    if failures:
        raise failures[0]
    return listings


async def collect(
    removal: Removal,
    lease: Lease,
    pool: Pool,
    limits: Limits,
    listings: list[ShardListing],
    is_dry: bool,
) -> Collected:
    """Delete the spans of a pool that are too old or too many, by the listings of its shards.

    Args:
        removal: deletes.
        lease: of the pool, held unless nothing is to be deleted; its clock is known.
        pool: the pool.
        limits: what to keep it within.
        listings: of all shards.
        is_dry: whether only to count.

    Raises:
        RemoteError: the store failed, or did not answer in time.
    """
    census, now_s = Census(), asyncio.get_running_loop().time()
    for shard, listing in enumerate(listings):
        census.listed(shard, listing.modified_s, now_s)
    early_s = lease.clock.early_s()
    expired_before_s = limits.expired_before_s(early_s)
    is_over = limits.spans_max is not None and census.spans > limits.spans_max
    cut = census.cut(limits.spans_max, now_s) if is_over and limits.spans_max else None
    expired = chosen_count = deleted = 0
    kept_s = early_s
    for listing in listings:
        chosen = victims(listing, cut, expired_before_s)
        expired += int((listing.modified_s < expired_before_s).sum())
        chosen_count += int(chosen.sum())
        kept_s = min(kept_s, float(listing.modified_s[~chosen].min(initial=early_s)))
        if not is_dry and chosen.any() and await lease.hold(pool):
            left = await removal.spans(pool, listing, chosen, expired_before_s)
            deleted += int(left.size - left.sum())
    return Collected(census.spans, expired, chosen_count, deleted, early_s - kept_s)
