"""Whether a fetch of far blocks costs less than the computing that it saves, by measured times."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from random import Random

import pytest

from flexkv.integration.common.costs import FIRST, FORGIVEN, Costs
from tests.unit.test_costs import Clock, clock, compute

__all__ = ["clock"]

TOKENS_PER_S = 10_000
ANSWER_S, BLOCK_S = 0.05, 0.001
"""What the far tier of these tests takes to answer, and for each block."""
Made = Callable[[], Costs]


def fetch(costs: Costs, *blocks: int, ahead: int = 0, slower: float = 1.0) -> None:
    """Report fetches of so many blocks each."""
    for count in blocks:
        costs.fetched({"remote": count}, ahead, slower * (ANSWER_S + (count + ahead) * BLOCK_S))


def check(made: Made, by_tier: dict[str, int], seconds: float, ahead: int = 0) -> None:
    """Check that a fetch is expected to take so long, to one part in a hundred."""
    for factor, is_worth_it in ((1.01, True), (0.99, False)):
        tokens = round(factor * seconds * TOKENS_PER_S)
        assert made().is_worth_fetching(by_tier, ahead, tokens) is is_worth_it, factor


@pytest.fixture
def new(clock: Clock) -> Made:
    """Return a function that makes costs which know the cost of a token."""

    def make() -> Costs:
        costs = Costs()
        compute(costs, clock, TOKENS_PER_S, 1.0)
        return costs

    return make


def after(new: Made, *blocks: int, ahead: int = 0) -> Made:
    """Return a function that makes costs which have also seen fetches of so many blocks."""

    def make() -> Costs:
        costs = new()
        fetch(costs, *blocks, ahead=ahead)
        return costs

    return make


def test_everything_is_fetched_before_both_sides_are_known(new: Made, clock: Clock) -> None:
    """Far blocks are fetched until enough fetches and steps are measured."""
    costs = Costs()
    fetch(costs, *[8] * FIRST)
    assert costs.computing_s(1) is None
    assert costs.is_worth_fetching({"remote": 1000}, 0, 1)
    compute(costs, clock, TOKENS_PER_S, 1.0)
    assert costs.computing_s(TOKENS_PER_S) == pytest.approx(1.0)
    assert not costs.is_worth_fetching({"remote": 1000}, 0, 1)
    costs = new()
    fetch(costs, *[8] * (FIRST - 1))
    assert costs.is_worth_fetching({"remote": 1000}, 0, 1)


def test_the_cost_of_a_fetch_is_told_from_that_of_its_blocks(new: Made) -> None:
    """Fetches of different lengths tell how long the tier takes to answer, and for each block."""
    seen = after(new, 8, 16, 64)
    for blocks in (1, 30, 1000):
        check(seen, {"remote": blocks}, ANSWER_S + blocks * BLOCK_S)
    check(seen, {"remote": 30}, ANSWER_S + 100 * BLOCK_S, ahead=70)
    check(seen, {"remote": 30, "host": 50}, ANSWER_S + 30 * BLOCK_S)


def test_blocks_that_were_under_way_explain_a_longer_fetch(new: Made) -> None:
    """What waited behind other fetches does not make the tier look slower."""
    check(after(new, 8, 16, 64, ahead=40), {"remote": 30}, ANSWER_S + 30 * BLOCK_S)


def test_fetches_of_one_length_say_what_a_block_takes_at_most(new: Made) -> None:
    """As long as all fetches are alike, a shorter one is expected to take its share of the time."""
    check(after(new, 50, 50, 52), {"remote": 25}, (ANSWER_S + 50 * BLOCK_S) / 2)


def test_a_tier_that_was_too_slow_is_tried_again(new: Made) -> None:
    """Each time that fetching does not pay, its expected time is reduced a little."""
    costs = after(new, 8, 16, 64)()
    seconds, declined = (ANSWER_S + 100 * BLOCK_S) / 2, 0
    while not costs.is_worth_fetching({"remote": 100}, 0, round(seconds * TOKENS_PER_S)):
        declined += 1
    assert FORGIVEN**declined < 0.5 <= FORGIVEN ** (declined - 1)


def test_an_outlier_counts_as_twice_the_expected_time(new: Made) -> None:
    """One fetch that took for ever does not end all others; lasting slowness is learnt."""
    seen = after(new, 8, 16, 64)
    costs = seen()
    fetch(costs, 30, slower=1000.0)
    assert costs.is_worth_fetching({"remote": 30}, 0, round(0.08 * 1.5 * TOKENS_PER_S))
    for _ in range(30):
        fetch(costs, 8, 64, slower=10.0)
    check(lambda: costs, {"remote": 30}, 0.8)
    for _ in range(30):
        fetch(costs, 8, 64)
    check(lambda: costs, {"remote": 30}, 0.08)


def test_time_that_a_nearer_tier_usually_takes_is_not_charged_to_a_farther_one(new: Made) -> None:
    """Of a fetch from two tiers, what is not explained by the nearer one is the farther one's."""

    def make() -> Costs:
        costs = new()
        for count in (8, 16, 64):
            costs.fetched({"peer": count}, 0, ANSWER_S + count * BLOCK_S)
        for count in (10, 20, 40):
            costs.fetched({"peer": 50, "remote": count}, 0, 0.1 + 0.2 + count * 0.01)
        return costs

    check(make, {"remote": 30}, 0.2 + 30 * 0.01)
    check(make, {"peer": 50, "remote": 30}, 0.1 + 0.2 + 30 * 0.01)
    costs = make()
    costs.fetched({}, 0, 100.0)
    costs.fetched({"host": 5}, 0, 100.0)
    check(lambda: costs, {"remote": 30}, 0.5)


def test_what_is_expected_is_never_absurd(new: Made) -> None:
    """Whatever was measured, more blocks take no less time, and none a negative one."""
    chance = Random(5)
    for _ in range(300):
        costs = new()
        for _ in range(chance.randint(FIRST, 20)):
            costs.fetched({"remote": chance.randint(1, 100)}, 0, chance.random())
        line = costs._fetch["remote"]
        expected = [line.at(blocks) for blocks in (1, 10, 100, 1000)]
        assert expected[0] >= 0
        assert all(later >= earlier - 1e-9 for earlier, later in pairwise(expected))
