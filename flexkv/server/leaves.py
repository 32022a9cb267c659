"""The device blocks of leaves, between requests and messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from flexkv.common.request import NO_BLOCK, LeafBlocks
from flexkv.server.wire import LEAVES_MAX, LeafIds

GAP = 64
"""A run goes on over up to this many positions that have no block, rather than end there."""


def leaf_ids(leaves: Sequence[LeafBlocks]) -> tuple[LeafIds, ...]:
    """Return leaves as a message has them: in runs of positions at equal distances."""
    runs = tuple(run for each in leaves for run in _runs_of(each, GAP))
    if len(runs) > LEAVES_MAX:
        runs = tuple(run for each in leaves for run in _runs_of(each, None))
    return runs


def _runs_of(leaves: LeafBlocks, gap: int | None) -> Iterator[LeafIds]:
    """Return the runs of one group, which end at gaps of more than `gap` positions, if given."""
    group, positions, ids = leaves
    count, places = positions.block_count, positions.places
    if places is None or count < 2:
        if count:
            yield LeafIds(group, positions.at(0), 1, ids.tobytes())
        return
    distances = np.diff(places)
    step = int(np.gcd.reduce(distances))
    ends = [] if gap is None else (np.flatnonzero(distances > gap * step) + 1).tolist()
    for begin, end in zip([0, *ends], [*ends, count], strict=True):
        at = (places[begin:end] - places[begin]) // step
        run = np.full(int(at[-1]) + 1, NO_BLOCK, np.int64)
        run[at] = ids[begin:end]
        yield LeafIds(group, int(places[begin]), step, run.tobytes())
