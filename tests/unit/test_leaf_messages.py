"""Leaves in messages: what is sent comes back, and what breaks a rule is refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv.common.errors import ConfigError
from flexkv.common.request import NO_BLOCK, LeafBlocks
from flexkv.common.terms import positions_of
from flexkv.server.leaves import GAP, leaf_blocks, leaf_ids
from flexkv.server.wire import LEAVES_MAX, LeafIds, Start, framed
from tests.unit.group_spaces import FULL, STATE, WINDOW, spaces_of

SPACES = spaces_of((WINDOW, 8), (STATE, 0, 8), (FULL, 0))


def leaves_of(group: int, blocks: dict[int, int]) -> LeafBlocks:
    """Return leaves by position and device block."""
    places = np.array(sorted(blocks), np.int64)
    return LeafBlocks(group, positions_of(places), np.array([blocks[at] for at in sorted(blocks)]))


def told(leaves: tuple[LeafBlocks, ...]) -> dict[int, dict[int, int]]:
    """Return the device blocks by group and position."""
    return {
        group: dict(zip(positions, ids.tolist(), strict=True)) for group, positions, ids in leaves
    }


def run(group: int, first: int, step: int, *ids: int) -> LeafIds:
    """Return a run of a message."""
    return LeafIds(group, first, step, np.array(ids, np.int64).tobytes())


@given(
    st.dictionaries(
        st.integers(1, 3),
        st.sets(st.integers(0, 999) | st.integers(0, 9), max_size=40),
        max_size=3,
    )
)
def test_leaves_come_back_from_a_message(places: dict[int, set[int]]) -> None:
    """Whatever positions they have, the other end reads the same leaves."""
    ratio = {1: 1, 2: 2, 3: 1}
    blocks = {
        group: {(at + 1) * ratio[group] - 1: 7 * at for at in chosen}
        for group, chosen in sorted(places.items())
        if chosen
    }
    runs = leaf_ids([leaves_of(group, each) for group, each in blocks.items()])
    assert told(leaf_blocks(runs, 2000, SPACES)) == blocks


def test_runs_end_at_wide_gaps_unless_they_were_too_many() -> None:
    """A message has few ids that stand for no block, and never more runs than it may."""
    near, far = {0: 1, 2: 2, GAP: 3}, {0: 1, 2: 2, 2 * GAP + 4: 3}
    assert [len(each.ids) // 8 for each in leaf_ids([leaves_of(1, near)])] == [GAP // 2 + 1]
    assert [(each.first, len(each.ids)) for each in leaf_ids([leaves_of(1, far)])] == [
        (0, 16),
        (2 * GAP + 4, 8),
    ]
    odd = {at * (GAP + 2) + at % 2: at for at in range(LEAVES_MAX + 1)}
    (whole,) = leaf_ids([leaves_of(1, odd)])
    assert told(leaf_blocks([whole], 10**6, SPACES)) == {1: odd}
    assert framed(Start(1, "put", b"", 0, b"", 0, leaves=(whole,)))


def test_positions_without_a_block_are_left_out() -> None:
    """Ids of -1 stand for no block."""
    assert told(leaf_blocks([run(1, 4, 1, -1, 5, -1)], 9, SPACES)) == {1: {5: 5}}
    (none,) = leaf_blocks([run(1, 4, 1, -1)], 9, SPACES)
    assert (none.positions.block_count, NO_BLOCK) == (0, -1)
    assert leaf_blocks([], 0, SPACES) == ()


@pytest.mark.parametrize(
    ("runs", "field", "why"),
    [
        ([run(4, 0, 1, 5)], r"leaves\[0\].group=4", "less than the number of KV groups, 4"),
        ([run(1, 0, 1)], r"leaves\[0\].ids='0 bytes", "at least one"),
        ([LeafIds(1, 0, 1, b"1234567")], r"leaves\[0\].ids='7 bytes", "8 bytes for each"),
        ([run(1, 9, 1, 5)], r"leaves\[0\]='positions 9 to 9", "must be from 0 to 8"),
        ([run(1, 8, 1, 5, 6)], r"leaves\[0\]='positions 8 to 9", "must be from 0 to 8"),
        ([run(1, 2**62, 2**30, 5, 6)], r"leaves\[0\]", "must be from 0 to 8"),
        ([run(1, 3, 1, 5), run(1, 3, 1, 6)], r"leaves\[1\]='positions 3 to 3", "from 4 to 8"),
        ([run(1, 3, 2, 5, 7), run(1, 4, 1, 6)], r"leaves\[1\]", "must be from 6 to 8"),
        ([run(3, 0, 1, 5), run(1, 0, 1, 6)], r"leaves\[1\].group=1", "less than the one before"),
        ([run(1, 0, 1, 5), run(3, 0, 1, 5), run(1, 1, 1, 6)], r"leaves\[2\].group=1", "less"),
        ([run(2, 0, 1, 5)], r"leaves\[0\]='positions 0", "every 2 blocks of the chain"),
        ([run(2, 1, 1, 5, 6)], r"leaves\[0\]='positions 1", "every 2 blocks of the chain"),
        ([run(1, 0, 1, -2)], "leaves=-2", "must not be negative"),
        ([run(1, 0, 1, 5, 5)], "leaves='2 ids", "device block of KV group 1 twice"),
        ([run(1, 0, 1, 5), run(1, 3, 1, 5)], "leaves='2 ids", "twice"),
    ],
)
def test_leaves_that_break_a_rule_are_refused(runs: list[LeafIds], field: str, why: str) -> None:
    """The error names the run, the value and the rule."""
    with pytest.raises(ConfigError, match=f"{field}.*{why}"):
        leaf_blocks(runs, 9, SPACES)


def test_a_plain_model_has_no_leaves() -> None:
    """Any leaf of a model with one KV group is refused."""
    with pytest.raises(ConfigError, match="less than the number of KV groups, 1"):
        leaf_blocks([run(1, 0, 1, 5)], 9, spaces_of())


def test_a_device_block_may_be_in_two_groups() -> None:
    """Each group numbers its own blocks, so the same id may stand for two blocks."""
    leaves: Any = leaf_blocks([run(1, 0, 1, 5), run(3, 0, 1, 5)], 9, SPACES)
    assert told(leaves) == {1: {0: 5}, 3: {0: 5}}
