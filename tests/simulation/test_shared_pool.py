"""Engines that share a pool on a virtual clock: the budget and the TTL hold, whatever is killed."""

from __future__ import annotations

import os

import pytest

from flexkv.io.remote.names import SHARDS
from flexkv.testing.simulated_pool import Outcome, PoolSimulation, Scene, run_skewed
from flexkv.tiers.remote_gc.rules import Limits

SPANS = int(os.environ.get("POOL_SPANS", "6000"))
SEEDS = int(os.environ.get("POOL_SEEDS", "1"))
FIRST = int(os.environ.get("SIMULATION_FIRST", "0"))
TURNOVER_S = 10_000.0
TTL_S = 9000.0


def simulated(limits: Limits, seed: int, filled: float = 0.96) -> Outcome:
    """Return the outcome of a simulation in which as many spans are written as there is room."""
    ttl_s = limits.ttl_s or TTL_S
    scene = Scene(
        limits,
        writes_per_s=SPANS / TURNOVER_S,
        seconds=0.6 * TURNOVER_S,
        list_per_s=max(0.5, SPANS / 1e6),
        kill_every_s=TURNOVER_S / 5,
        read_within_s=0.95 * ttl_s / 2,
        pace=1 + (seed % 3 - 1) / 2000,
        delete_per_s=5 * SPANS / TURNOVER_S + 10,
    )
    outcome = run_skewed(PoolSimulation(scene, seed).run(int(filled * SPANS), ttl_s))
    assert outcome.kills > 1
    assert outcome.collectors == 1
    assert outcome.deleted > SPANS / 4
    assert outcome.touched > SPANS / 100
    assert outcome.again <= outcome.touched / 100
    assert outcome.too_soon == []
    assert outcome.raced <= outcome.deleted / 1000
    return outcome


@pytest.mark.parametrize("seed", range(FIRST, FIRST + SEEDS))
def test_the_budget_and_the_ttl_hold(seed: int) -> None:
    """The pool stays within 5 % of its budget, and no span goes that was read within TTL/2."""
    outcome = simulated(Limits(SPANS, TTL_S), seed)
    assert max(outcome.fill) <= 1.05
    assert min(outcome.fill) >= 0.90


@pytest.mark.parametrize("seed", range(FIRST, FIRST + SEEDS))
def test_a_budget_alone_keeps_what_is_read(seed: int) -> None:
    """Without a TTL, no span goes that was read within half of the age at which spans go."""
    outcome = simulated(Limits(SPANS), seed)
    assert max(outcome.fill) <= 1.05
    assert min(outcome.fill) >= 0.90


@pytest.mark.parametrize("seed", range(FIRST, FIRST + SEEDS))
def test_the_budget_holds_if_every_span_is_read_within_a_round(seed: int) -> None:
    """A pool whose spans are all touched faster than they are listed loses its oldest all the same.

    Nothing is older than the last listings of other shards show their spans to be.
    """
    spans, round_s = 800, 2 * SHARDS
    scene = Scene(
        Limits(spans), writes_per_s=spans / 20 / round_s, seconds=6 * round_s,
        list_per_s=SHARDS / round_s, hot_share=1.0, stays_hot=1.0, returning_share=0.0,
        read_within_s=round_s / 8,
    )  # fmt: skip
    outcome = run_skewed(PoolSimulation(scene, seed).run(int(0.96 * spans), round_s))
    assert max(outcome.fill) <= 1.05
    assert min(outcome.fill) >= 0.90


def test_an_empty_pool_is_listed_at_the_wanted_rate() -> None:
    """An engine lists shards that are empty no faster than it may send requests."""
    scene = Scene(Limits(), writes_per_s=0, seconds=100, list_per_s=2, engines=1)
    simulation = PoolSimulation(scene, seed=1)
    run_skewed(simulation.run(0, 1.0))
    lists = simulation.list_requests
    assert SHARDS + 150 <= lists <= SHARDS + 2 * 100 + 10
