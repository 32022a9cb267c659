"""Slot mappings of models with several KV groups: which device block each leaf is in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flexkv.common.errors import ConfigError
from flexkv.common.request import Span
from flexkv.index.slots import SlotReader

PER_BLOCK = 4
WHOLE = Span(0, 4, 0, 16)
"""Four blocks of the chain."""


def slots_of(*block_ids: int, per_block: int = PER_BLOCK) -> Any:
    """Return the slots of device blocks, -1 throughout for a block that is -1."""
    ids = np.repeat(np.array(block_ids, np.int64), per_block)
    return np.where(ids < 0, -1, ids * per_block + np.arange(len(ids)) % per_block)


def test_a_group_lists_the_blocks_that_the_caller_has() -> None:
    """A block whose tokens all have -1 is left out; the others come with their positions."""
    chain, leaves = SlotReader([4, 4, 4]).read(
        [slots_of(9, 8, 7, 6), slots_of(-1, 5, -1, 3), slots_of(-1, -1, -1, -1)], WHOLE, 10
    )
    assert chain.tolist() == [9, 8, 7, 6]
    (only,) = leaves
    assert (only.group, list(only.positions), only.device_ids.tolist()) == (1, [1, 3], [5, 3])


def test_larger_blocks_hang_on_the_last_block_of_the_chain_that_they_cover() -> None:
    """A group whose blocks have twice the tokens has half as many, at every other position."""
    _, (leaves,) = SlotReader([4, 8]).read(
        [slots_of(0, 1, 2, 3), slots_of(7, 2, per_block=8)], WHOLE, 8
    )
    assert list(leaves.positions) == [1, 3]
    assert leaves.device_ids.tolist() == [7, 2]


def test_blocks_that_a_mask_cuts_are_left_out() -> None:
    """A block of which the mask selects only a part is not moved, whatever its slots."""
    span = Span(2, 4, 5, 17)
    mapping = [slots_of(*range(9))[5:17], slots_of(3, 2, 1, per_block=8)[5:17]]
    chain, (leaves,) = SlotReader([4, 8]).read(mapping, span, 9)
    assert chain.tolist() == [2, 3]
    assert (list(leaves.positions), leaves.device_ids.tolist()) == ([3], [2])
    nothing = np.full(12, -1)
    assert SlotReader([4, 8]).read([mapping[0], nothing], span, 9)[1] == ()


@pytest.mark.parametrize(
    ("second", "why"),
    [
        (slots_of(5, -1, 4), r"slot_mapping\[1\]='12 slots': must have one slot per selected"),
        (np.r_[slots_of(5, -1), -1, 17, 18, 19, slots_of(3)], r"\[1\]\[9\]=17: must be -1 for ev"),
        (np.r_[slots_of(5, 6), 16, -1, 18, 19, slots_of(3)], r"\[1\]\[9\]=-1: must be -1 for ev"),
        (np.r_[slots_of(5, -1, -1), 12, 13, 15, 14], r"slot_mapping\[1\]\[14\]=15: must follow"),
        (np.r_[slots_of(-1, 5, -1), 13, 14, 15, 16], r"slot_mapping\[1\]\[12\]=13: must be the fi"),
        (slots_of(-1, 5, 40, -1), r"slot_mapping\[1\]\[8\]=160: is not a slot of the device"),
        (np.r_[slots_of(-1, 5), -2, -2, -2, -2, slots_of(4)], r"\[1\]\[8\]=-2: is not a slot"),
        (slots_of(5, -1, -1, 5), r"slot_mapping\[1\]\[12\]=20: is in device block 5, which slot_m"),
        (np.zeros((2, 8), np.int64), r"slot_mapping\[1\]='shape \(2, 8\)': must have one dim"),
        (slots_of(1, 2, 3, 4) * 0.5, r"slot_mapping\[1\]='dtype float64': must have an integer"),
        (None, r"slot_mapping\[1\]="),
    ],
)
def test_slots_that_break_a_rule_are_named_with_their_group(second: Any, why: str) -> None:
    """An error names the group, the index, the value and the rule."""
    with pytest.raises(ConfigError, match=why):
        SlotReader([4, 4]).read([slots_of(0, 1, 2, 3), second], WHOLE, 10)


@pytest.mark.parametrize("first", [slots_of(0, -1, 2, 3), slots_of(-1, 1, 2, 3)])
def test_the_chain_has_a_slot_for_every_token(first: Any) -> None:
    """The first group's blocks are what is asked for, so none may be missing."""
    with pytest.raises(ConfigError, match=r"slot_mapping\[0\]\[\d\]=-1: is not a slot"):
        SlotReader([4, 4]).read([first, slots_of(0, 1, 2, 3)], WHOLE, 10)


@pytest.mark.parametrize(
    "edge", [np.r_[-1, 7], np.r_[7, 6]], ids=["none for one token", "any legal slot"]
)
def test_tokens_outside_whole_blocks_may_have_no_slot(edge: Any) -> None:
    """Tokens of a block that is not whole need no slot, but those given must be legal."""
    span = Span(0, 1, 0, 6)
    chain = slots_of(1, 2)[:6]
    _, (leaves,) = SlotReader([4, 4]).read([chain, np.r_[slots_of(3), edge]], span, 8)
    assert leaves.device_ids.tolist() == [3]
    with pytest.raises(ConfigError, match=r"slot_mapping\[1\]\[5\]=99: is not a slot"):
        SlotReader([4, 4]).read([chain, np.r_[slots_of(3), -1, 99]], span, 8)


@pytest.mark.parametrize(
    "mapping",
    [
        slots_of(0, 1, 2, 3),
        slots_of(0, 1, 2, 3).tolist(),
        [slots_of(0, 1, 2, 3)],
        [slots_of(0, 1, 2, 3)] * 3,
        {"full": slots_of(0, 1, 2, 3), "window": slots_of(0, 1, 2, 3)},
        "01",
        [0, 1],
        (),
        None,
        7,
    ],
    ids=str,
)
def test_several_groups_need_one_array_each(mapping: Any) -> None:
    """A mapping that is not a list of as many arrays as groups is refused with their number."""
    with pytest.raises(ConfigError, match=r"slot_mapping=.*must be a list of 2 arrays of slots"):
        SlotReader([4, 4]).read(mapping, WHOLE, 10)


@pytest.mark.parametrize("form", [tuple, list, np.array, iter])
def test_arrays_come_in_any_list(form: Any) -> None:
    """The arrays may be in a list, a tuple, an array of two dimensions, or an iterator."""
    mapping = form([slots_of(0, 1, 2, 3), slots_of(3, 2, 1, 0)])
    chain, (leaves,) = SlotReader([4, 4]).read(mapping, WHOLE, 10)
    assert (chain.tolist(), leaves.device_ids.tolist()) == ([0, 1, 2, 3], [3, 2, 1, 0])


@pytest.mark.parametrize("form", [list, tuple])
def test_one_group_needs_one_array(form: Any) -> None:
    """A list of arrays for a model with one KV group is refused with the reason."""
    with pytest.raises(ConfigError, match="must be one array of slots: the model has one KV group"):
        SlotReader([4]).read(form([slots_of(0, 1, 2, 3)]), WHOLE, 10)
