"""Which spans of a pool are deleted, and which are touched when they are read. No I/O.

A store says when an object was last written or *touched*, by its own clock, and nothing of reads:

    age    0 ────────── retention / 2 ────────── retention ──▶
           a read does nothing │ a read touches     │ deleted

So a span that was read within half of the retention is younger than the retention, and stays. The
retention is the TTL, or less if the pool has no room for so much: the *horizon* is the age of the
oldest spans that the budget has room for.

Spans are spread over the shards by their keys, which look random. So all shards are alike, and
what a listing of one shard shows is used at once: nothing waits for a whole round.

The age at which spans go follows from the last listings of all shards. If most spans are touched in
less time than a round takes, those listings show them older than they are, and no span of the shard
that was just listed is that old. What a shard should have lost, and has not, is its *arrears*. Once
there are many of them, each shard loses its own oldest spans, however young they are.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flexkv.common.terms import BLOCK_KEY_BYTES, BlockKey
from flexkv.io.remote.names import SHARDS

FULL, LOW = 0.80, 0.95
"""The share of the budget from which on reads touch spans, and that down to which they are deleted.
"""
TTL_SHARE, HORIZON_SHARE = 1 / 2, 1 / 3
"""Spans older than these parts of the TTL or the horizon are touched by a read. The horizon moves.
With a third, a span that was read within half of the new horizon stays even if the horizon has
shrunk by a third since."""
SLACK_S, SLACK_SHARE = 60.0, 0.1
"""How much longer than the TTL spans are kept, while a touch may be under way."""
SAMPLES = 16
"""How many ages are remembered of a shard: 4096 of a pool, which take a quarter of a millisecond to
sort."""
ARREARS = 0.02
"""The share of the budget that arrears may reach: shards differ by chance."""
_GOLDEN = (math.sqrt(5) - 1) / 2
EDGE = 0.05
"""The oldest part of a pool, which does not count for the horizon: a few ages may be wrong."""

_TAG = slice(1, 5)
"""The bytes of a key by which the spans of a shard are told apart."""

Times = NDArray[np.float64]
"""Times by the store's clock, in seconds since the epoch: float64[n]."""


class Limits(NamedTuple):
    """How much a pool may hold, and for how long."""

    spans_max: int | None = None
    ttl_s: float | None = None

    def expired_before_s(self, now_s: float) -> float:
        """Return a time: spans that were last modified before it are too old now."""
        if self.ttl_s is None:
            return -math.inf
        return now_s - self.ttl_s - min(SLACK_S, SLACK_SHARE * self.ttl_s)

    def touch_age_s(self, horizon_s: float) -> float:
        """Return from which age on a span is touched when it is read; infinite if never."""
        ttl_s = math.inf if self.ttl_s is None else self.ttl_s
        return min(TTL_SHARE * ttl_s, HORIZON_SHARE * horizon_s)


class ShardListing:
    """The spans that a listing of one shard has found.

    Attributes:
        keys: uint8[n, 16].
        modified_s: when each was last written or touched.
    """

    def __init__(self) -> None:
        self.keys = np.zeros((0, BLOCK_KEY_BYTES), np.uint8)
        self.modified_s: Times = np.zeros(0)
        self._keys: list[bytes] = []
        self._times: list[Times] = []

    def add(self, keys: bytes, modified_s: list[float]) -> None:
        """Add the spans of a page."""
        self._keys.append(keys)
        self._times.append(np.array(modified_s, np.float64))

    def end(self) -> None:
        """Join the pages."""
        joined = np.frombuffer(b"".join(self._keys), np.uint8)
        self.keys = joined.reshape(-1, BLOCK_KEY_BYTES)
        self.modified_s = np.concatenate([np.zeros(0), *self._times])
        self._keys, self._times = [], []

    def __len__(self) -> int:
        return len(self.modified_s)


class Cut(NamedTuple):
    """The border between spans to delete and spans to keep.

    Attributes:
        before_s: spans that were last modified before this time are deleted.
        share: the part of those modified at this very time that is deleted, too: a store may know
            times by the second only.
    """

    before_s: float
    share: float


def victims(listing: ShardListing, cut: Cut | None, expired_before_s: float) -> NDArray[np.bool_]:
    """Return which spans of a shard are to be deleted."""
    times = listing.modified_s
    chosen = times < expired_before_s
    if cut is not None:
        lots = listing.keys[:, 8:12].copy().view("<u4")[:, 0] / 2**32
        chosen |= (times < cut.before_s) | ((times == cut.before_s) & (lots < cut.share))
    return chosen


def with_oldest(times: Times, chosen: NDArray[np.bool_], more: int) -> NDArray[np.bool_]:
    """Return the chosen spans of a shard, and so many more of it: the oldest that are left."""
    rows = np.flatnonzero(~chosen)
    both = chosen.copy()
    both[rows[np.argsort(times[rows], kind="stable")[: max(0, more)]]] = True
    return both


class Census:
    """How many spans a pool has, and how old they are, by the last listing of each shard.

    It has a sample of each shard's ages instead of all ages: 64 KiB, however large the pool is.
    """

    def __init__(self) -> None:
        self._times = np.zeros((SHARDS, SAMPLES))
        self._weights = np.zeros((SHARDS, SAMPLES))
        """How many spans each time stands for."""
        self._left = np.zeros(SHARDS)
        """How many spans a shard had once it was listed, and victims deleted."""
        self._listed_s = np.full(SHARDS, np.nan)
        self._arrears = 0.0
        """How many spans the shards should have lost, and have not, since the pool was over its
        low mark."""
        self._gained, self._apart_s = np.zeros(SHARDS), np.zeros(SHARDS)
        """By how many spans a shard grew between its last two listings, and in which time."""

    @property
    def is_whole(self) -> bool:
        """Return whether every shard was listed."""
        return not np.isnan(self._listed_s).any()

    @property
    def spans(self) -> int:
        """Return how many spans there were by the last listings."""
        return int(self._left.sum())

    def listed(self, shard: int, modified_s: Times, now_s: float) -> None:
        """Take the spans of a shard that was just listed; `now_s` is by any steady clock."""
        if not math.isnan(self._listed_s[shard]):
            self._gained[shard] = len(modified_s) - self._left[shard]
            self._apart_s[shard] = now_s - self._listed_s[shard]
        self._listed_s[shard] = now_s
        self.left(shard, modified_s)

    def left(self, shard: int, modified_s: Times) -> None:
        """Take the spans of that shard which are left after others were deleted."""
        count = len(modified_s)
        kept = min(count, SAMPLES)
        self._left[shard], self._weights[shard] = count, 0
        if kept:
            phase = shard * _GOLDEN % 1  # so that the shards' samples differ in what they miss
            rows = ((np.arange(kept) + phase) * count / kept).astype(np.int64)
            self._times[shard, :kept] = np.sort(modified_s)[rows]
            self._weights[shard, :kept] = count / kept

    def total(self, now_s: float) -> float:
        """Return about how many spans there are now: shards have grown since they were listed."""
        return float(self._left.sum() + self._gain_per_s * (now_s - self._listed_s).sum())

    @property
    def _gain_per_s(self) -> float:
        """Return by how many spans a shard grows in a second."""
        apart_s = float(self._apart_s.sum())
        return float(self._gained.sum()) / apart_s if apart_s > 0 else 0.0

    def _excess(self, spans_max: int, now_s: float) -> float:
        """Return by how many spans the pool exceeds what shards are left with when they are listed.

        Until it is listed again, a shard grows; the mean of all shards must stay within the budget.
        """
        return self.total(now_s) - self._low_mark(spans_max)

    def _low_mark(self, spans_max: int) -> float:
        """Return how many spans all shards are to have when each was just listed."""
        growth = max(0.0, self._gain_per_s) * float(self._apart_s.mean()) * SHARDS
        room = max((1 - LOW) * spans_max, (1 - LOW) / 2 * spans_max + growth / 2)
        return spans_max - min(room, spans_max / 2)

    def overdue(self, spans_max: int, count: int, chosen: int) -> int:
        """Return how many more spans to delete of the shard that was just listed than the cut does.

        Args:
            spans_max: the budget.
            count: how many spans the shard has.
            chosen: how many of them are to be deleted anyway.
        """
        arrears = self._arrears + count - self._low_mark(spans_max) / SHARDS - chosen
        return min(count - chosen, max(0, int(arrears - _arrears_max(spans_max))))

    def deleted(self, spans_max: int, count: int, deleted: int, now_s: float) -> None:
        """Record how many of the shard's `count` spans were deleted, for the arrears."""
        arrears = self._arrears + count - self._low_mark(spans_max) / SHARDS - deleted
        is_over = self._excess(spans_max, now_s) > 0
        self._arrears = max(-_arrears_max(spans_max), arrears) if is_over else 0.0

    def cut(self, spans_max: int, now_s: float) -> Cut | None:
        """Return what to delete of the shard that was just listed; None if there is room."""
        excess = self._excess(spans_max, now_s)
        return self._cut_at(excess) if excess > 0 and self.is_whole else None

    def horizon_s(self, spans_max: int, now_s: float, store_s: float) -> float:
        """Return the age of the oldest spans that there is room for; infinite while there is much.

        Args:
            spans_max: the budget.
            now_s: the time, by the clock that `listed` is given.
            store_s: the store's time.
        """
        total = self.total(now_s)
        if not self.is_whole or total < FULL * spans_max:
            return math.inf
        oldest = max(self._excess(spans_max, now_s), EDGE * total)
        return max(0.0, store_s - self._cut_at(oldest).before_s)

    def _cut_at(self, rank: float) -> Cut:
        """Return the cut that deletes so many of the oldest spans."""
        there = self._weights > 0
        times, weights = self._times[there], self._weights[there]
        if not len(times):
            return Cut(-math.inf, 0.0)
        order = np.argsort(times, kind="stable")
        times, sums = times[order], np.cumsum(weights[order])
        at = min(int(np.searchsorted(sums, rank)), len(times) - 1)
        before_s = float(times[at])
        first, last = np.searchsorted(times, before_s), np.searchsorted(times, before_s, "right")
        older = float(sums[first - 1]) if first else 0.0
        equal = float(sums[last - 1]) - older
        return Cut(before_s, min(1.0, (rank - older) / equal))


def _arrears_max(spans_max: int) -> float:
    """Return how many arrears there may be by chance."""
    return max(ARREARS * spans_max, math.sqrt(spans_max))


class Ages:
    """When the spans of a pool were last modified, by each shard's last listing: 8 bytes a span.

    Spans are told apart by 32 bits of their keys. If two of a shard agree in them, both have the
    earlier time: asking the store settles that.
    """

    def __init__(self) -> None:
        nothing = np.zeros(0, np.uint32)
        self._shards = [(nothing, nothing)] * SHARDS
        """Of each shard the sorted tags of its spans, and their times."""
        self._listed = bytearray(SHARDS)

    def is_listed(self, key: BlockKey) -> bool:
        """Return whether the shard of a span was ever listed."""
        return bool(self._listed[key[0]])

    def listed(self, shard: int, listing: ShardListing) -> None:
        """Take the times of a shard that was listed."""
        tags = listing.keys[:, _TAG].copy().view("<u4")[:, 0]
        times = np.maximum(listing.modified_s, 0).astype(np.uint32)
        order = np.lexsort((times, tags))
        self._shards[shard], self._listed[shard] = (tags[order], times[order]), True

    def modified_s(self, key: BlockKey) -> float | None:
        """Return when a span was last modified, or up to a second earlier; None if not known."""
        tags, times = self._shards[key[0]]
        tag = np.uint32(int.from_bytes(key[_TAG], "little"))
        at = int(tags.searchsorted(tag))
        return float(times[at]) if at < len(tags) and tags[at] == tag else None
