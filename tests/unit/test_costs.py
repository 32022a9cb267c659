"""What a load costs against what it saves, by what was measured."""

from __future__ import annotations

import pytest

from flexkv.integration.vllm import costs as module
from flexkv.integration.vllm.costs import Costs


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


def computed(costs: Costs, clock: Clock, tokens: int, seconds: float) -> None:
    """Let a step go by."""
    costs.step_begins(tokens)
    clock.now_s += seconds
    costs.step_ends()


def test_everything_is_worth_it_before_anything_is_known(clock: Clock) -> None:
    """Of either side alone nothing follows."""
    costs = Costs()
    assert costs.is_worth_it({"disk": 100}, 10)
    costs.loaded({"disk": 1}, 10.0)
    assert costs.is_worth_it({"disk": 100}, 10)


def test_a_load_slower_than_computing_is_declined_until_it_is_forgiven(clock: Clock) -> None:
    """A tier's cost sinks by and by, and what it takes then counts anew."""
    costs = Costs()
    computed(costs, clock, 1000, 0.1)
    costs.loaded({"host": 10}, 0.001)
    costs.loaded({"host": 10, "disk": 10}, 0.041)
    assert costs.is_worth_it({"host": 100}, 1600)
    assert costs.is_worth_it({"disk": 40}, 1600)  # 4 ms a block against 160 ms
    assert not costs.is_worth_it({"disk": 50}, 1600)
    declined = sum(not costs.is_worth_it({"disk": 50}, 1600) for _ in range(100))
    assert 1 < declined < 5
    assert costs.is_worth_it({"disk": 50}, 1600)
    assert costs.is_worth_it({"host": 100}, 1600)


def test_steps_of_few_tokens_say_nothing_of_a_prefill(clock: Clock) -> None:
    """Decoding takes long for each token; two steps may be under way at once."""
    costs = Costs()
    costs.loaded({"host": 1}, 0.01)
    computed(costs, clock, 4, 0.1)
    assert costs.is_worth_it({"host": 100}, 1)
    costs.step_begins(1000)
    costs.step_begins(4)
    clock.now_s += 0.1
    costs.step_ends()
    clock.now_s += 5.0
    costs.step_ends()
    assert not costs.is_worth_it({"host": 100}, 1000)
    assert costs.is_worth_it({"host": 9}, 1000)


def test_one_slow_load_is_soon_forgotten(clock: Clock) -> None:
    """A hiccup is no habit."""
    costs = Costs()
    computed(costs, clock, 1000, 0.1)
    for _ in range(20):
        costs.loaded({"disk": 10}, 0.01)
    costs.loaded({"disk": 10}, 10.0)
    assert costs.is_worth_it({"disk": 100}, 1600)


def test_a_load_of_what_others_bring_says_nothing(clock: Clock) -> None:
    """Nor does a step that was never scheduled."""
    costs = Costs()
    costs.loaded({}, 5.0)
    costs.step_ends()
    computed(costs, clock, 1000, 0.001)
    assert costs.is_worth_it({}, 1000)
