"""Laws of runs: no id is lost, no separate ids are joined, no run is longer than allowed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv.common.errors import InvariantError
from flexkv.common.extents import check_ids, coalesce
from flexkv.common.terms import Route, Tier, Transfer

# Few distinct ids, so that runs are common.
PAIRS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=40)
RUNS = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(1, 9)), max_size=8)


def ids_of_runs(runs):
    """Return the id arrays of runs (source, target, length)."""
    pairs = [(s + i, t + i) for s, t, count in runs for i in range(count)]
    return ids_of_pairs(pairs)


def ids_of_pairs(pairs):
    """Return the two columns of the pairs as int64 arrays."""
    both = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return both[:, 0].copy(), both[:, 1].copy()


def plain_runs(source, target, blocks_max):
    """Return what `coalesce` should return, computed one id at a time."""
    starts, counts = [], []
    for i, (s, t) in enumerate(zip(source.tolist(), target.tolist(), strict=True)):
        if i and counts[-1] < blocks_max and (s, t) == (source[i - 1] + 1, target[i - 1] + 1):
            counts[-1] += 1
        else:
            starts.append(i)
            counts.append(1)
    return starts, counts


@given(pairs=PAIRS, blocks_max=st.integers(1, 10))
def test_runs_are_those_of_the_plain_loop(pairs, blocks_max):
    """For any ids, the vectorised runs equal those of a loop over single ids."""
    source, target = ids_of_pairs(pairs)
    starts, counts = coalesce(source, target, blocks_max)
    assert (starts.tolist(), counts.tolist()) == plain_runs(source, target, blocks_max)


@given(runs=RUNS, blocks_max=st.integers(1, 10))
def test_long_runs_are_cut(runs, blocks_max):
    """Existing runs are found, cover every id once, and are never longer than allowed."""
    source, target = ids_of_runs(runs)
    starts, counts = coalesce(source, target, blocks_max)
    assert (starts.tolist(), counts.tolist()) == plain_runs(source, target, blocks_max)
    assert counts.sum() == len(source)
    assert (starts.dtype, counts.dtype) == (np.int64, np.int64)


def transfer(source_ids, target_ids):
    """Return a transfer from disk to host."""
    return Transfer(
        op_id=7,
        owner=1,
        route=Route(Tier.DISK, Tier.HOST),
        source_ids=np.array(source_ids, np.int64),
        target_ids=np.array(target_ids, np.int64),
    )


def test_ids_in_range_pass():
    """The first and the last id of both pools are accepted, and so are no ids."""
    check_ids(transfer([0, 9], [4, 0]), 5, 10)
    check_ids(transfer([], []), 5, 10)


@pytest.mark.parametrize(
    ("source_ids", "target_ids", "said"),
    [
        ([10], [0], "disk ids 10..10 are not all in its 10"),
        ([-1, 3], [0, 1], "disk ids -1..3 are not all in its 10"),
        ([0], [5], "host ids 5..5 are not all in its 5"),
        ([0, 1], [0], "2 source ids but 1 target ids"),
    ],
)
def test_ids_out_of_range_are_named(source_ids, target_ids, said):
    """Ids outside a pool, or of unequal count, raise an InvariantError that names them."""
    with pytest.raises(InvariantError, match=said):
        check_ids(transfer(source_ids, target_ids), 5, 10)
