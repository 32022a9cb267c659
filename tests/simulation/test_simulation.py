"""The real engine, scheduler and actors on a virtual clock, with injected faults and cancels."""

from __future__ import annotations

import os

import pytest

from flexkv.testing.simulation import simulate

SEEDS = int(os.environ.get("SIMULATION_SEEDS", "700"))
FIRST = int(os.environ.get("SIMULATION_FIRST", "0"))
BATCH = 100


@pytest.mark.parametrize("first", range(FIRST, FIRST + SEEDS, BATCH))
def test_no_wrong_byte_no_leak_no_hang(first: int) -> None:
    """Every check of the simulation holds for every seed, and gets do bring blocks back."""
    assert sum(simulate(seed) for seed in range(first, first + BATCH)) > 0


def test_a_seed_replays() -> None:
    """Two runs of the same seed are equal."""
    assert [simulate(seed) for seed in (3, 5, 8)] == [simulate(seed) for seed in (3, 5, 8)]
