"""Groups runs of bytes into grids: rows of one width, evenly spaced in source and target."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Runs = NDArray[np.uint64]
"""uint64[3, n]: the target address, the source address and the bytes of each run."""

PITCH_MAX = (1 << 31) - 1
"""The driver's limit: CU_DEVICE_ATTRIBUTE_MAX_PITCH on every device so far."""


class Grid(NamedTuple):
    """`height` rows of `width` bytes, with one pitch in the target and one in the source."""

    target: int
    source: int
    width: int
    height: int
    target_pitch: int
    source_pitch: int


def grids(runs: Runs) -> Iterator[Grid]:
    """Yield grids that together cover some runs, in any order."""
    rows = runs[:, np.lexsort((runs[1], runs[2]))].astype(np.int64)
    count = rows.shape[1]
    steps = np.diff(rows, axis=1)
    # Whether a grid may go on from each row to the next: as wide, not overlapping, not too far.
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
