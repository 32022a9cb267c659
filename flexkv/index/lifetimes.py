"""How long a block is worth its place: worked out from when blocks of its class are asked for.

The table counts, for each class of blocks and bin of ages, how many were asked for again (hits),
and how long blocks were watched at that age (exposure), resident or not. Their quotient is the
hazard: the chance per second of being asked for. With it, keeping a block of a class for a lifetime
T gives 1 - S(T) hits and occupies its place for the integral of S, where S is what survives. The
lifetimes are chosen together: each class's T maximises hits - price * occupancy, and the price is
the one at which all classes together occupy the tier. A class that is not worth it gets 0.

Nothing is a parameter of a workload: what is fixed is the classes, the bins, and how many
observations a class needs before its own hazard outweighs that of all classes together.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

CLASSES, AGE_BINS = 29, 26
"""As in `ext/index_core.h`."""

PRIOR_BLOCKS = 30.0
"""Observations of a class that weigh as much as what is known of all classes."""

SHARED_CLASS = CLASSES - 1
"""Blocks that many prompts share: too unlike the others to be a prior for them."""

Floats = NDArray[np.float64]

EDGES_S: Floats = np.concatenate([[0.0], 2.0 ** (np.arange(AGE_BINS) / 2)])
"""float64[bins + 1]: where each bin of ages begins, and the end of the last, in seconds."""

_WIDTHS_S = np.diff(EDGES_S)


class Observed(NamedTuple):
    """What the table has counted, by class, and by class and age."""

    uses: Floats
    """float64[classes]: times a block was asked for or stored."""
    hits: Floats
    """float64[classes, bins]: memories that ended because the block was asked for again."""
    ended: Floats
    """float64[classes, 2, bins]: memories that ended, and their ages in seconds, added up."""
    living: Floats
    """The same, of memories that have not ended."""


def observed(counts: tuple[bytes, bytes, bytes, bytes]) -> Observed:
    """Give the table's counts as arrays."""
    uses, hits, ended, living = (np.frombuffer(c, np.uint64).astype(np.float64) for c in counts)
    return Observed(
        uses,
        hits.reshape(CLASSES, AGE_BINS),
        ended.reshape(CLASSES, 2, AGE_BINS),
        living.reshape(CLASSES, 2, AGE_BINS),
    )


def lifetimes(seen: Observed, capacity_blocks: int, span_s: float) -> list[float]:
    """Give each class's lifetime in seconds, for a tier of so many blocks.

    Args:
        seen: since the start.
        capacity_blocks: of the tier.
        span_s: seconds since the start.
    """
    survival, occupancy = _curves(seen)
    rate = seen.uses / max(span_s, 1.0)

    def chosen(price: float) -> tuple[NDArray[np.intp], float]:
        best = np.argmax((1 - survival) - price * occupancy, axis=1)
        return best, float(rate @ occupancy[np.arange(CLASSES), best])

    low, high = 1e-8, 10.0
    for _ in range(32):
        price = (low * high) ** 0.5
        if chosen(price)[1] > capacity_blocks:
            low = price
        else:
            high = price
    (longer, too_much), (shorter, enough) = chosen(low), chosen(high)
    # Between two prices some classes jump: go as far as there is room for.
    part = 1.0 if too_much <= enough else (capacity_blocks - enough) / (too_much - enough)
    part = min(1.0, max(0.0, part))
    ages = EDGES_S[shorter] + (EDGES_S[longer] - EDGES_S[shorter]) * part
    return [float(age) for age in ages]


def _curves(seen: Observed) -> tuple[Floats, Floats]:
    """Give what survives to each edge, and the seconds lived until it: [classes, bins + 1]."""
    exposure_s = _exposure_s(seen.ended + seen.living)
    own = slice(0, SHARED_CLASS)
    all_hits, all_exposure_s = seen.hits[own].sum(axis=0), exposure_s[own].sum(axis=0)
    prior = np.divide(all_hits, all_exposure_s, out=np.zeros(AGE_BINS), where=all_exposure_s > 0)
    prior_s = PRIOR_BLOCKS * _WIDTHS_S
    hazard = (seen.hits + prior * prior_s) / (exposure_s + prior_s)
    survives = np.exp(-hazard * _WIDTHS_S)
    survival = np.cumprod(np.hstack([np.ones((CLASSES, 1)), survives]), axis=1)
    lived_s = np.where(hazard > 1e-9, (1 - survives) / np.maximum(hazard, 1e-9), _WIDTHS_S)
    occupancy = np.cumsum(survival[:, :-1] * lived_s, axis=1)
    return survival, np.hstack([np.zeros((CLASSES, 1)), occupancy])


def _exposure_s(ages: Floats) -> Floats:
    """Give the seconds that memories were watched in each bin: float64[classes, bins].

    Those that went beyond a bin were in it for its whole width, those that stopped in it for what
    their age exceeds its beginning.
    """
    count, sum_s = ages[:, 0], ages[:, 1]
    beyond = count[:, ::-1].cumsum(axis=1)[:, ::-1] - count
    within_s = np.clip(sum_s - count * EDGES_S[:-1], 0.0, count * _WIDTHS_S)
    return np.asarray(beyond * _WIDTHS_S + within_s)
