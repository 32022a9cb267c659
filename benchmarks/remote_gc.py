"""Whether engines that share a pool of a million spans keep it within its budget and its TTL.

A simulation on a virtual clock, with three engines that write and read, a store with a clock of its
own, and engines that are killed while they collect. The figures are no speeds, except the last.
"""

from __future__ import annotations

import statistics
import time

from benchmarks.harness import Figures, Options
from flexkv.testing.simulated_pool import Outcome, PoolSimulation, Scene, run_skewed
from flexkv.tiers.remote_gc.rules import Limits

SPANS, QUICK_SPANS = 1_000_000, 2000
TURNOVER_S = 10_000.0
"""In how many seconds as many spans are written as there is room for."""
TTL_S = 9000.0


def measure(options: Options) -> Figures:
    """Return the figures of the case."""
    spans, seconds = (QUICK_SPANS, 500.0) if options.quick else (SPANS, 0.3 * TURNOVER_S)
    scene = Scene(
        Limits(spans, TTL_S),
        writes_per_s=spans / TURNOVER_S,
        seconds=seconds,
        list_per_s=max(0.5, spans / 5e5),
        kill_every_s=seconds / 3,
        read_within_s=0.95 * TTL_S / 2,
        pace=1.0005,
        delete_per_s=5 * spans / TURNOVER_S + 10,
    )
    begin_s = time.perf_counter()
    simulation = PoolSimulation(scene, seed=1)
    outcome = run_skewed(simulation.run(int(0.96 * spans), TTL_S))
    return _figures(scene, outcome) | {"seconds": time.perf_counter() - begin_s}


def _figures(scene: Scene, outcome: Outcome) -> Figures:
    return {
        "budget, spans": float(scene.limits.spans_max or 0),
        "spans written meanwhile": float(outcome.written),
        "reads": float(outcome.read),
        "spans deleted": float(outcome.deleted),
        "part of the budget in use: most": max(outcome.fill),
        "part of the budget in use: mean": statistics.mean(outcome.fill),
        "part of the budget in use: least": min(outcome.fill),
        "deleted within half of the TTL of a read": float(len(outcome.too_soon)),
        "deleted in the moment of a read": float(outcome.raced),
        "deleted because their reader was killed": float(outcome.orphaned),
        "touches": float(outcome.touched),
        "touches that were not needed": float(outcome.again),
        "collectors killed": float(outcome.kills),
        "collectors at once, at most": float(outcome.collectors),
        "requests of the three engines, per written span": outcome.requests / outcome.written,
    }
