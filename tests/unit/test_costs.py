"""Whether a load costs less than the computing that it saves, by measured times."""

from __future__ import annotations

import pytest

from flexkv.integration.common import costs as module
from flexkv.integration.common.costs import BLOCKS_MIN, FIRST, TOKENS_MIN, Costs


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        """Return the time."""
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Return a clock that replaces the module's."""
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def compute(costs: Costs, clock: Clock, tokens: int, seconds: float) -> None:
    """Run as many equal steps as it takes to know the cost of a token."""
    for _ in range(FIRST):
        costs.step_begins(tokens)
        clock.now_s += seconds
        costs.step_ends()


def load(costs: Costs, seconds: float, **by_tier: int) -> None:
    """Report as many equal loads as it takes to know the cost of a block."""
    for _ in range(FIRST):
        costs.loaded(by_tier, seconds)


def test_everything_is_worth_it_before_both_sides_are_known(clock: Clock) -> None:
    """Every load is worth it until enough loads and steps are measured.

    One or two loads do not count, as the first ones may wait for memory to be touched.
    """
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
    """A load slower than computing is declined, until refusals have lowered its tier's cost."""
    costs = Costs()
    compute(costs, clock, 1000, 0.1)
    load(costs, 0.002, host=20)
    load(costs, 0.082, host=20, disk=20)
    assert costs.is_worth_it({"host": 100}, 1600)
    assert costs.is_worth_it({"disk": 39}, 1600)  # 39 blocks at 4 ms against 160 ms
    assert not costs.is_worth_it({"disk": 50}, 1600)
    declined = sum(not costs.is_worth_it({"disk": 50}, 1600) for _ in range(100))
    assert 1 <= declined < 5
    assert costs.is_worth_it({"disk": 50}, 1600)
    assert costs.is_worth_it({"host": 100}, 1600)


def test_short_loads_say_nothing(clock: Clock) -> None:
    """Loads of few blocks, or of blocks that others bring, do not change the cost of a block."""
    costs = Costs()
    compute(costs, clock, 1000, 0.1)
    load(costs, 0.01, host=1000)
    for _ in range(100):
        costs.loaded({"host": 2}, 0.01)
        costs.loaded({}, 5.0)
    assert costs.is_worth_it({"host": 1000}, 16_000)


def test_a_step_begins_when_the_one_before_has_ended(clock: Clock) -> None:
    """A step is timed from the end of the one before; steps of few tokens do not count."""
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
    """A step of `TOKENS_MIN` tokens is measured, one of fewer is not."""
    for tokens, known in ((TOKENS_MIN - 1, False), (TOKENS_MIN, True)):
        costs = Costs()
        load(costs, 10.0, disk=20)
        compute(costs, clock, tokens, 0.1)
        assert costs.is_worth_it({"disk": 100}, 10) != known


def test_the_shortest_load_that_tells_something_is_taken(clock: Clock) -> None:
    """A load of `BLOCKS_MIN` blocks is measured, one of fewer is not."""
    for blocks, known in ((BLOCKS_MIN - 1, False), (BLOCKS_MIN, True)):
        costs = Costs()
        compute(costs, clock, 1000, 0.1)
        load(costs, 10.0, disk=blocks)
        assert costs.is_worth_it({"disk": 100}, 10) != known


def test_one_slow_load_is_soon_forgotten(clock: Clock) -> None:
    """One slow load among quick ones does not change the decision."""
    costs = Costs()
    compute(costs, clock, 1000, 0.1)
    for _ in range(20):
        costs.loaded({"disk": 20}, 0.02)
    costs.loaded({"disk": 20}, 10.0)
    assert costs.is_worth_it({"disk": 100}, 1600)
    costs.step_ends()  # the end of a step that was never scheduled
