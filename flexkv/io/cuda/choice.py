"""How to copy: by copy engine or by kernel, and with how many thread blocks, as measured.

A port has one layout, so what there is to know is few numbers, and measuring them at start-up takes
a few milliseconds. What is copied for it goes back to where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

ENGINE = 0
"""Stands for the copy engine where others are numbers of thread blocks."""
THREAD_BLOCKS = (2, 4, 8, 16, 32)
AS_GOOD = 0.95
"""A way that costs the device less is taken when it reaches this of the best one's rate."""
TRIALS = 3


class Choice(NamedTuple):
    """How one direction is copied: by the engine, or by a kernel of so many thread blocks."""

    by_engine: bool = True
    thread_blocks: int = 8


def decide(rates: Mapping[int, float]) -> Choice:
    """Give the way that costs the device least among those that are as good as the best.

    Args:
        rates: bytes per second, by number of thread blocks; `ENGINE` for the copy engine.
    """
    best = max(rates.values())
    ways = sorted(way for way, rate in rates.items() if rate >= AS_GOOD * best)
    if ways[0] == ENGINE:
        kernels = {way: rate for way, rate in rates.items() if way != ENGINE}
        return Choice(True, decide(kernels).thread_blocks if kernels else Choice().thread_blocks)
    return Choice(False, ways[0])


def measure(timed: Callable[[Choice], float]) -> Choice:
    """Give the choice for one direction.

    Args:
        timed: copies the same bytes the way it is told, and gives the seconds that it took.
    """
    rates = {}
    for way in (ENGINE, *THREAD_BLOCKS):
        choice = Choice(way == ENGINE, way or Choice().thread_blocks)
        timed(choice)  # warm
        rates[way] = 1 / min(timed(choice) for _ in range(TRIALS))
    return decide(rates)
