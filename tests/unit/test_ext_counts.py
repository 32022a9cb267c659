"""The extension's counts by id, compared with numpy, and the arguments that it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv._ext import any_counted, change_counts

SIZE = 12
ids_of = st.lists(st.integers(0, SIZE - 1), max_size=20)


@given(st.lists(st.tuples(ids_of, st.sampled_from([-1, 0, 1])), max_size=20))
def test_counts_are_what_numpy_makes_of_them(changes: list[tuple[list[int], int]]) -> None:
    """An id changes as often as it occurs; the result is how often counts left or reached 0."""
    counts, expected = np.zeros(SIZE, np.uint32), np.zeros(SIZE, np.uint32)
    for numbers, by in changes:
        ids = np.array(numbers, np.int64)
        crossed = 0
        for number in numbers:
            before = expected[number]
            expected[number : number + 1] += np.array(by).astype(np.uint32)
            crossed += (before == 0) != (expected[number] == 0)
        assert change_counts(counts, ids, by) == crossed
        np.testing.assert_array_equal(counts, expected)
        assert any_counted(counts, ids) == bool(expected[numbers].any() if numbers else False)


@pytest.mark.parametrize(
    ("counts", "ids", "by", "error"),
    [
        (np.zeros(4, np.uint32), [1, 4], 1, ValueError),
        (np.zeros(4, np.uint32), [-1], 1, ValueError),
        (np.zeros(4, np.uint32), [0], 2, ValueError),
        (np.zeros(4, np.uint16), [0], 1, TypeError),
        (np.zeros(8, np.uint32)[::2], [0], 1, (BufferError, ValueError)),
        (bytes(16), [0], 1, BufferError),
        (None, [0], 1, TypeError),
    ],
)
def test_what_is_refused_changes_nothing(counts: Any, ids: Any, by: int, error: Any) -> None:
    """Ids out of range, wrong types and read-only memory are refused, and no count changes."""
    with pytest.raises(error):
        change_counts(counts, np.array(ids, np.int64), by)
    if isinstance(counts, np.ndarray):
        assert not counts.any()


def test_ids_are_64_bits() -> None:
    """Both functions refuse ids that are not of 64 bits."""
    for call in (lambda ids: change_counts(np.zeros(4, np.uint32), ids, 1),
                 lambda ids: any_counted(np.zeros(4, np.uint32), ids)):  # fmt: skip
        with pytest.raises(TypeError):
            call(np.zeros(2, np.int32))
