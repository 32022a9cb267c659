"""Which spans are deleted, which are touched, and what is remembered of a pool for that."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest

from flexkv.io.remote.names import SHARDS
from flexkv.tiers.remote_gc.rules import (
    ARREARS,
    EDGE,
    FULL,
    SLACK_S,
    Ages,
    Census,
    Cut,
    Limits,
    ShardListing,
    victims,
    with_oldest,
)

TTL_S = 10_000.0


def listing_of(ages_s: list[float], now_s: float, shard: int = 0) -> ShardListing:
    """Return the listing of a shard whose spans have these ages."""
    listing, random = ShardListing(), Random(shard)
    keys = [bytes([shard]) + random.randbytes(15) for _ in ages_s]
    listing.add(b"".join(keys), [now_s - age_s for age_s in ages_s])
    listing.end()
    return listing


def census_of(per_shard: int, now_s: float = 0.0, seed: int = 1) -> tuple[Census, list[float]]:
    """Return the census of a pool with spans of random ages up to 1000 s, and those ages."""
    census, random, all_ages = Census(), Random(seed), list[float]()
    for shard in range(SHARDS):
        ages = [random.uniform(0, 1000) for _ in range(per_shard)]
        census.listed(shard, listing_of(ages, 0.0, shard).modified_s, now_s)
        all_ages += ages
    return census, sorted(all_ages)


def test_what_is_older_than_the_ttl_is_deleted_a_little_later() -> None:
    """A span is deleted once it is older than the TTL and the slack, not before."""
    limits, now_s = Limits(ttl_s=TTL_S), 1e6
    listing = listing_of([0, TTL_S, TTL_S + SLACK_S - 1, TTL_S + SLACK_S + 1, 1e5], now_s)
    chosen = victims(listing, None, limits.expired_before_s(now_s))
    assert chosen.tolist() == [False, False, False, True, True]


def test_without_limits_nothing_is_deleted_or_touched() -> None:
    """Without a TTL and a budget no span is too old, and no read touches one."""
    assert Limits().expired_before_s(1e9) == -math.inf
    assert Limits().touch_age_s(math.inf) == math.inf


def test_reads_touch_at_half_of_the_ttl_and_a_third_of_the_horizon() -> None:
    """The age from which a read touches a span is the smaller of both."""
    assert Limits(ttl_s=900).touch_age_s(math.inf) == 450
    assert Limits(ttl_s=900).touch_age_s(900) == 300
    assert Limits(100).touch_age_s(600) == 200


@pytest.mark.parametrize("per_shard", [1, 3, 64, 200])
def test_the_budget_deletes_the_oldest_down_to_its_low_mark(per_shard: int) -> None:
    """Of a pool that is over its budget, the oldest spans go, so many that 95 % are left."""
    census, ages = census_of(per_shard)
    budget = int(0.9 * len(ages))
    cut = census.cut(budget, 0.0)
    assert cut is not None
    left = sum(-age_s >= cut.before_s for age_s in ages)
    assert left == pytest.approx(0.95 * budget, rel=0.02)


def test_there_is_no_cut_while_there_is_room_or_shards_are_unknown() -> None:
    """Nothing is deleted below the low mark, or before all shards were listed once."""
    census, ages = census_of(4)
    assert census.cut(2 * len(ages), 0.0) is None
    partial = Census()
    partial.listed(0, np.zeros(10_000), 0.0)
    assert not partial.is_whole
    assert partial.cut(100, 0.0) is None
    assert partial.horizon_s(100, 0.0, 0.0) == math.inf


def test_spans_of_the_same_second_are_divided_by_lot() -> None:
    """If all spans have one time, the cut takes the wanted share of them, the same each time."""
    census, listings = Census(), [listing_of([5.0] * 40, 0.0, shard) for shard in range(SHARDS)]
    for shard, listing in enumerate(listings):
        census.listed(shard, listing.modified_s, 0.0)
    budget = 40 * SHARDS // 2
    cut = census.cut(budget, 0.0)
    assert cut is not None
    chosen = [victims(listing, cut, -math.inf) for listing in listings]
    left = 40 * SHARDS - sum(int(each.sum()) for each in chosen)
    assert left == pytest.approx(0.95 * budget, rel=0.05)
    again = [victims(listing, cut, -math.inf) for listing in listings]
    assert all(np.array_equal(*pair) for pair in zip(chosen, again, strict=True))


def test_a_cut_spares_what_is_younger() -> None:
    """Spans modified after the cut's time stay, whatever its share of those at that time."""
    listing = listing_of([3, 2, 1], 0.0)
    assert victims(listing, Cut(-2.0, 0.0), -math.inf).tolist() == [True, False, False]
    assert victims(listing, Cut(-2.0, 1.0), -math.inf).tolist() == [True, True, False]


def test_shards_grow_between_their_listings() -> None:
    """The total counts what was stored since each shard was listed, by how fast shards grow."""
    census, _ = census_of(100, now_s=0.0)
    for shard in range(SHARDS):
        census.listed(shard, np.zeros(150), 100.0 + shard)
    assert census.spans == 150 * SHARDS
    rate = 50 * SHARDS / sum(100 + shard for shard in range(SHARDS))
    expected = 150 * SHARDS + rate * sum(400 - shard for shard in range(SHARDS))
    assert census.total(500.0) == pytest.approx(expected)


def test_a_growing_pool_is_cut_deeper() -> None:
    """If shards grow by much from listing to listing, they are left with less, for the mean."""
    census, _ = census_of(100, now_s=0.0)
    times = -np.linspace(0, 1, 150)
    for shard in range(SHARDS):
        census.listed(shard, times, 100.0)
    budget = 150 * SHARDS
    cut = census.cut(budget, 100.0)
    assert cut is not None
    left = int((times >= cut.before_s).sum())
    assert left == pytest.approx(150 * 0.975 - 50 / 2, abs=1.5)


def test_samples_of_shards_that_are_all_alike_still_find_the_oldest() -> None:
    """With the same times in every shard, a cut is as exact as with other times in each."""
    census, times = Census(), -np.linspace(0, 1, 4000)
    for shard in range(SHARDS):
        census.listed(shard, times, 0.0)
    for budget in (3990, 3900, 3000, 1000):
        cut = census.cut(budget * SHARDS, 0.0)
        assert cut is not None
        assert int((times >= cut.before_s).sum()) == pytest.approx(0.95 * budget, abs=20)


def test_deleted_spans_do_not_count_any_more() -> None:
    """After a deletion the census knows what is left, and how fast the shard grows from there."""
    census, _ = census_of(100, now_s=0.0)
    for shard in range(SHARDS):
        census.left(shard, np.zeros(40))
    assert census.spans == 40 * SHARDS
    census.listed(0, np.zeros(50), 10.0)
    assert census.total(10.0) == pytest.approx(40 * SHARDS + 10 + 255 * 10, rel=0.01)


def test_a_shard_that_loses_nothing_is_in_arrears() -> None:
    """What shards keep beyond their part of the low mark adds up, and then their oldest must go."""
    census, ages = census_of(100)
    budget = int(0.9 * len(ages))
    low = 0.95 * budget / SHARDS
    due, shards = 0, 0
    while not due:
        shards += 1
        due = census.overdue(budget, 100, 0)
        census.deleted(budget, 100, due, 0.0)
    assert shards == math.ceil(ARREARS * budget / (100 - low))
    for _ in range(SHARDS - shards):
        due = census.overdue(budget, 100, 4)
        assert due == pytest.approx(100 - low - 4, abs=2)  # the others go by the cut
        census.deleted(budget, 100, 4 + due, 0.0)
    assert census.overdue(budget, 3, 2) <= 1


def test_arrears_end_once_there_is_room() -> None:
    """A pool that has come below its low mark owes nothing from before."""
    census, ages = census_of(100)
    tight, wide = len(ages) // 2, 2 * len(ages)
    for _ in range(50):
        census.deleted(tight, 100, 0, 0.0)
    assert census.overdue(tight, 100, 0) == 100
    census.deleted(wide, 100, 0, 0.0)
    assert census.overdue(tight, 100, 50) == 0


def test_shards_that_differ_by_chance_are_not_in_arrears() -> None:
    """Where each shard loses what exceeds its part on average, nothing more is deleted."""
    random, per_shard = Random(5), 25
    census, ages = census_of(per_shard)
    budget = int(0.99 * len(ages))
    counts = [sum(random.random() < 0.5 for _ in range(2 * per_shard)) for _ in range(SHARDS)]
    for _ in range(10):
        for count in counts:
            gone = sum(random.random() < 1 - 0.95 * 0.99 for _ in range(count))
            assert census.overdue(budget, count, gone) == 0
            census.deleted(budget, count, gone, 0.0)


def test_the_oldest_of_a_shard_are_added_to_what_goes() -> None:
    """So many more spans are chosen, the oldest of those that were not, and never more than all."""
    times = np.array([5.0, 1.0, 3.0, 2.0, 4.0])
    chosen = np.array([True, False, False, False, False])
    assert with_oldest(times, chosen, 2).tolist() == [True, True, False, True, False]
    assert with_oldest(times, chosen, 0).tolist() == chosen.tolist()
    assert with_oldest(times, chosen, 9).all()
    assert chosen.sum() == 1


def test_the_horizon_is_the_age_of_the_oldest_that_have_room() -> None:
    """A full pool's horizon is about its oldest age; while there is much room, there is none."""
    census, ages = census_of(100)
    count = len(ages)
    assert census.horizon_s(int(1.01 * count / FULL) + 1, 0.0, 0.0) == math.inf
    full = census.horizon_s(int(0.99 * count / FULL), 0.0, 0.0)
    assert full == pytest.approx(ages[int((1 - EDGE) * count)], rel=0.03)
    half = census.horizon_s(count // 2, 0.0, 0.0)
    assert half == pytest.approx(ages[int(0.95 * count / 2)], rel=0.03)


def test_ages_are_those_of_the_listing() -> None:
    """A listed span has the time of its last listing, in whole seconds; others are not known."""
    now_s, random, ages = 1e9, Random(5), Ages()
    listing = listing_of([random.uniform(0, 10_000) for _ in range(2000)], now_s, shard=7)
    assert ages.modified_s(listing.keys[0].tobytes()) is None
    ages.listed(7, listing)
    found = [ages.modified_s(key.tobytes()) for key in listing.keys]
    assert found == np.floor(listing.modified_s).tolist()
    assert ages.modified_s(bytes([7]) + random.randbytes(15)) is None
    assert ages.modified_s(bytes([8]) + listing.keys[0].tobytes()[1:]) is None
    ages.listed(7, listing_of([1.0], now_s, shard=7))
    assert ages.modified_s(listing.keys[1].tobytes()) is None


def test_spans_that_look_alike_have_the_earlier_time() -> None:
    """Of two spans with the same first bytes, neither counts as younger than the older one."""
    listing, ages = ShardListing(), Ages()
    keys = [bytes([7, 1, 2, 3, 4]) + bytes([number] * 11) for number in range(3)]
    listing.add(b"".join(keys), [500.0, 300.0, 400.0])
    listing.end()
    ages.listed(7, listing)
    assert [ages.modified_s(key) for key in keys] == [300.0] * 3
