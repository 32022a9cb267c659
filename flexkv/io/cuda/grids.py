"""Runs of bytes as grids: rows of one width, equally far apart at both ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Runs = NDArray[np.uint64]
"""uint64[3, n]: addresses of targets and sources, and bytes of each."""

PITCH_MAX = (1 << 31) - 1
"""The driver's limit, as CU_DEVICE_ATTRIBUTE_MAX_PITCH has it on every device so far."""


class Grid(NamedTuple):
    """So many rows of `width` bytes, with a pitch of their own at each end."""

    target: int
    source: int
    width: int
    height: int
    target_pitch: int
    source_pitch: int


def grids(runs: Runs) -> Iterator[Grid]:
    """Give the grids that together are some runs, in any order."""
    rows = runs[:, np.lexsort((runs[1], runs[2]))].astype(np.int64)
    count = rows.shape[1]
    steps = np.diff(rows, axis=1)
    # Where the step to the next row is the step before it, a grid goes on.
    goes_on = (
        (steps[2] == 0)
        & (steps[:2] >= rows[2, :-1]).all(axis=0)
        & (steps[:2] <= PITCH_MAX).all(axis=0)
    ).tolist()
    steps_by_row = steps.T.tolist()
    at = 0
    columns = rows.T.tolist()
    while at < count:
        end = at + 1
        if end < count and goes_on[at]:
            while end < count and goes_on[end - 1] and steps_by_row[end - 1] == steps_by_row[at]:
                end += 1
        target, source, width = columns[at]
        to, of = steps_by_row[at][:2] if end - at > 1 else (width, width)
        yield Grid(target, source, width, end - at, to, of)
        at = end
