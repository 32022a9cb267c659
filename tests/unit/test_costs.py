"""What a load costs against what it saves, by what was measured."""

from __future__ import annotations

import pytest

from flexkv.integration.common import costs as module
from flexkv.integration.common.costs import BLOCKS_MIN, FIRST, TOKENS_MIN, Costs


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        """Give the time."""
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Give the clock of the module."""
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def compute(costs: Costs, clock: Clock, tokens: int, seconds: float) -> None:
    """Let as many steps go by as tell something."""
    for _ in range(FIRST):
        costs.step_begins(tokens)
        clock.now_s += seconds
        costs.step_ends()


def load(costs: Costs, seconds: float, **by_tier: int) -> None:
    """Let as many loads go by as tell something."""
    for _ in range(FIRST):
        costs.loaded(by_tier, seconds)


def test_everything_is_worth_it_before_both_sides_are_known(clock: Clock) -> None:
    """A load or two say nothing: the first ones may wait for memory that is touched first."""
    costs = Costs()
    load(costs, 10.0, disk=20)
    assert costs.is_worth_it({"disk": 100}, 10)
    compute(costs, clock, 1000, 0.1)
    assert not costs.is_worth_it({"disk": 100}, 10)
    costs = Costs()
    compute(costs, clock, 1000, 0.1)
    costs.loaded({"disk": 20}, 10.0)
    costs.loaded({"disk": 20}, 10.0)
    assert costs.is_worth_it({"disk": 100}, 10)
    costs.loaded({"disk": 20}, 0.002)
    assert costs.is_worth_it({"disk": 100}, 1000)


def test_a_load_slower_than_computing_is_declined_until_it_is_forgiven(clock: Clock) -> None:
    """A tier's cost sinks by and by, and what it takes then counts anew."""
    costs = Costs()
    compute(costs, clock, 1000, 0.1)
    load(costs, 0.002, host=20)
    load(costs, 0.082, host=20, disk=20)
    assert costs.is_worth_it({"host": 100}, 1600)
    assert costs.is_worth_it({"disk": 39}, 1600)  # 4 ms a block against 160 ms
    assert not costs.is_worth_it({"disk": 50}, 1600)
    declined = sum(not costs.is_worth_it({"disk": 50}, 1600) for _ in range(100))
    assert 1 <= declined < 5
    assert costs.is_worth_it({"disk": 50}, 1600)
    assert costs.is_worth_it({"host": 100}, 1600)


def test_short_loads_say_nothing(clock: Clock) -> None:
    """What they take is mostly not for their blocks; nor do loads of what others bring."""
    costs = Costs()
    compute(costs, clock, 1000, 0.1)
    load(costs, 0.01, host=1000)
    for _ in range(100):
        costs.loaded({"host": 2}, 0.01)
        costs.loaded({}, 5.0)
    assert costs.is_worth_it({"host": 1000}, 16_000)


def test_a_step_begins_when_the_one_before_has_ended(clock: Clock) -> None:
    """Two may be under way at once; those of few tokens say nothing of a prefill."""
    costs = Costs()
    load(costs, 0.2, host=20)
    compute(costs, clock, 4, 5.0)
    assert costs.is_worth_it({"host": 100}, 1)
    costs.step_begins(1000)
    for _ in range(FIRST):
        costs.step_begins(1000)
        clock.now_s += 0.1
        costs.step_ends()
    assert not costs.is_worth_it({"host": 11}, 1000)
    assert costs.is_worth_it({"host": 10}, 1000)


def test_the_shortest_prefill_that_tells_something_is_taken(clock: Clock) -> None:
    """A step of `TOKENS_MIN` tokens says what a token costs, one of fewer does not."""
    for tokens, known in ((TOKENS_MIN - 1, False), (TOKENS_MIN, True)):
        costs = Costs()
        load(costs, 10.0, disk=20)
        compute(costs, clock, tokens, 0.1)
        assert costs.is_worth_it({"disk": 100}, 10) != known


def test_the_shortest_load_that_tells_something_is_taken(clock: Clock) -> None:
    """A load of `BLOCKS_MIN` blocks says what a block costs, one of fewer does not."""
    for blocks, known in ((BLOCKS_MIN - 1, False), (BLOCKS_MIN, True)):
        costs = Costs()
        compute(costs, clock, 1000, 0.1)
        load(costs, 10.0, disk=blocks)
        assert costs.is_worth_it({"disk": 100}, 10) != known


def test_one_slow_load_is_soon_forgotten(clock: Clock) -> None:
    """A hiccup is no habit."""
    costs = Costs()
    compute(costs, clock, 1000, 0.1)
    for _ in range(20):
        costs.loaded({"disk": 20}, 0.02)
    costs.loaded({"disk": 20}, 10.0)
    assert costs.is_worth_it({"disk": 100}, 1600)
    costs.step_ends()  # of a step that was never scheduled
