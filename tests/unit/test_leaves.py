"""Leaves of KV groups: what a search finds of them, and the laws that bind them to their chain."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flexkv.common.errors import InvariantError
from flexkv.common.space import GroupRule
from flexkv.common.terms import Tier
from flexkv.index.change_hub import ChangeHub
from flexkv.index.forest import forest
from flexkv.index.recorder import Change
from flexkv.index.residency import ABSENT, PENDING, READY, Residency
from tests.unit.leaves import (
    CHUNK,
    FULL,
    KEYS,
    STATE,
    WINDOW,
    key,
    leaves,
    prompt,
    put,
    reserved,
    rule,
    salted,
    table,
)

# -- what each kind needs ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "stored", "last", "needed"),
    [
        (rule(1, FULL), range(12), 12, range(12)),
        (rule(1, FULL), [*range(7), *range(8, 12)], 7, range(7)),
        (rule(1, FULL), range(1, 12), 0, []),
        (rule(1, WINDOW, 9), range(10, 12), 12, range(10, 12)),
        (rule(1, WINDOW, 10), range(10, 12), 0, []),
        (rule(1, WINDOW, 10), range(9, 12), 12, range(9, 12)),
        (rule(1, WINDOW, 10), [*range(3, 6), 10, 11], 6, range(3, 6)),
        (rule(1, WINDOW, 100), range(12), 12, range(12)),
        (rule(1, WINDOW, 1), [], 12, []),  # a token attends to itself only
        (rule(1, CHUNK, 20), [10, 11], 12, [10, 11]),
        (rule(1, CHUNK, 20), [11], 10, []),  # a chunk begins at block 10
        (rule(1, CHUNK, 24), [], 12, []),
        (rule(1, CHUNK, 28), range(7, 12), 12, range(7, 12)),
        (rule(1, CHUNK, 30), range(7, 12), 12, range(7, 12)),  # it begins inside block 7
        (rule(1, STATE), [11], 12, [11]),
        (rule(1, STATE), [4, 8], 9, [8]),
        (rule(1, STATE), [], 0, []),
        (rule(1, STATE, 0, 2), [5], 6, [5]),
        (rule(1, STATE, 0, 3), [2, 8], 9, [8]),
        (rule(1, FULL, 0, 2), [1, 3, 5, 9, 11], 6, [1, 3, 5]),
        (rule(1, FULL, 0, 3), [2, 5, 8], 9, [2, 5, 8]),
        (rule(1, WINDOW, 10, 2), [9, 11], 12, [9, 11]),
        (rule(1, WINDOW, 14, 3), [8, 11], 12, [8, 11]),
        (rule(1, WINDOW, 13, 3), [8, 11], 12, [11]),
        (rule(1, CHUNK, 40, 2), [11], 12, [11]),
        (rule(1, CHUNK, 36, 3), [11], 12, [11]),
    ],
)
def test_a_prefix_ends_where_the_group_has_what_it_needs(
    rule: GroupRule, stored: Any, last: int, needed: Any
) -> None:
    """Each kind, and blocks of one, two and three blocks of the chain."""
    index = table(rule)
    put(index, stored, 1)
    found = index.find(KEYS)
    assert (found.last, found.chain) == (last, 12)
    assert leaves(index) == ({1: list(needed)} if list(needed) else {})
    index.validate()


def test_several_groups_agree_on_one_prefix() -> None:
    """The prefix is the longest that suits all groups, on a multiple of all their blocks."""
    index = table(rule(1, STATE), rule(2, WINDOW, 9), rule(3, FULL, 0, 2), rule(4, STATE, 0, 3))
    put(index, [2, 5, 8, 11], 1)
    put(index, [*range(4, 9), 11], 2)
    put(index, range(1, 12, 2), 3)
    put(index, [2, 5, 8, 11], 4)
    found = index.find(KEYS)
    assert found.last == 6  # not 12: group 2 lacks 10; not 9: no end of a block of group 3
    assert leaves(index) == {1: [5], 2: [4, 5], 3: [1, 3, 5], 4: [5]}
    assert len(found.holdings) == 5


@pytest.mark.parametrize(
    ("drop", "last"), [(0, 12), (1, 8), (4, 8), (5, 4), (8, 4), (9, 0), (99, 0)]
)
def test_a_prefix_leaves_as_many_ready_blocks_of_the_chain_behind_it(drop: int, last: int) -> None:
    """`drop` blocks behind the prefix must be ready; the groups have nothing to say there."""
    index = table(rule(1, STATE, 0, 4))
    put(index, [3, 7, 11], 1)
    found = index.find(KEYS, drop=drop)
    assert (found.last, found.chain) == (last, 12)


def test_drop_cuts_the_run_of_a_plain_model() -> None:
    """Without leaves, `drop` leaves out the last blocks, ready or pending."""
    index = table(chain=5)
    reserved(index, [5, 6])
    assert [index.find(KEYS, drop=n).last for n in (0, 1, 2, 3, 99)] == [7, 6, 5, 4, 0]
    assert index.find(KEYS, 3, drop=99).last == 3
    assert index.find(KEYS).chain == 5


@pytest.mark.parametrize(
    ("first", "needed"),
    [(0, {1: [7], 2: [4, 5, 6, 7]}), (5, {1: [7], 2: [5, 6, 7]}), (7, {1: [7], 2: [7]}), (8, {})],
)
def test_leaves_before_the_first_position_are_not_needed(
    first: int, needed: dict[int, list[int]]
) -> None:
    """What the device has of a window is not asked for; the state at the end always is."""
    index = table(rule(1, STATE), rule(2, WINDOW, 17), chain=8)
    put(index, [7], 1)
    put(index, range(8), 2)
    assert index.find(KEYS, first).last == 8
    assert leaves(index, first) == needed


def test_a_leaf_of_several_blocks_is_needed_while_its_last_block_is() -> None:
    """A leaf that begins before the first position and ends behind it must be loaded."""
    index = table(rule(1, FULL, 0, 3))
    put(index, [5, 8], 1)
    assert index.find(KEYS, 3).last == 9
    assert leaves(index, 4) == {1: [5, 8]}
    assert leaves(index, 6) == {1: [8]}
    assert index.find(KEYS, 10).last == 10  # the next end would be 12


def test_a_hole_before_the_first_position_does_not_matter() -> None:
    """The device has the leaves before `first`, whether the cache has them or not."""
    index = table(rule(1, FULL))
    put(index, range(4, 12), 1)
    assert index.find(KEYS).last == 0
    assert index.find(KEYS, 4).last == 12


def test_what_is_being_filled_counts() -> None:
    """Pending leaves and blocks of the chain belong to the prefix, and are reported as pending."""
    index = table(rule(1, STATE), chain=8)
    put(index, [3, 5], 1)
    ids = reserved(index, [7], 1)
    found = index.find(KEYS)
    assert (found.last, found.chain, found.pending) == (8, 8, None)
    (of,) = found.leaves
    assert (of.ready, of.block_count) == ({}, 1)
    assert of.pending is not None
    assert of.pending.block_ids.tolist() == ids.tolist()
    assert not found.host_only
    assert len(found.holdings) == 1  # what is being filled needs no pin
    tail = reserved(index, [8])
    assert (index.find(KEYS).last, index.find(KEYS).chain) == (8, 8)
    index.abort(Tier.HOST, ids)
    assert index.find(KEYS).last == 6
    index.commit(Tier.HOST, tail)
    assert index.find(KEYS).chain == 9


def test_leaves_are_found_in_lower_tiers() -> None:
    """Leaves and blocks are reported in their nearest tier, unless host memory is being filled."""
    index = table(rule(1, WINDOW, 13), chain=2)
    put(index, range(4), 0, Tier.DISK)
    at_disk = put(index, range(4), 1, Tier.DISK)
    at_host = put(index, [3], 1)
    found = index.find(KEYS)
    assert found.last == 4
    assert {tier: list(p.positions) for tier, p in found.ready.items()} == {
        Tier.HOST: [0, 1], Tier.DISK: [2, 3],
    }  # fmt: skip
    (of,) = found.leaves
    assert of.ready[Tier.HOST].block_ids.tolist() == at_host.tolist()
    assert of.ready[Tier.DISK].block_ids.tolist() == at_disk[1:3].tolist()
    assert of.block_count == 3
    assert not found.host_only
    assert found.before(0).leaves == ()
    with pytest.raises(AssertionError):
        found.before(2)
    reserved(index, [2], 1)  # on its way from disk to host memory
    (of,) = index.find(KEYS).leaves
    assert of.pending is not None
    assert list(of.pending.positions) == [2]
    assert of.ready.keys() == {Tier.HOST, Tier.DISK}
    assert not index.find(KEYS).host_only


def test_a_survey_reports_the_leaves_of_one_group() -> None:
    """Positions where the group can have no leaf, or the chain no block, are left out."""
    index = table(rule(1, FULL, 0, 2), rule(2, STATE), chain=9)
    put(index, [1, 3], 1)
    reserved(index, [7], 1)
    groups = index.survey(KEYS, 0, 12, group=1)
    told = {group.states: list(group.positions) for group in groups}
    assert told == {(READY, ABSENT): [1, 3], (ABSENT, ABSENT): [5], (PENDING, ABSENT): [7]}
    assert [list(group.positions) for group in index.survey(KEYS, 2, 4, group=1)] == [[3]]
    assert index.survey(KEYS, 4, 5, group=1) == []
    assert index.survey(KEYS, 9, 12, group=1) == []
    assert [list(group.positions) for group in index.survey(KEYS, 1, 4, group=2)] == [[1, 2, 3]]


# -- leaves and their chain ----------------------------------------------------------------------


def test_a_leaf_needs_its_block() -> None:
    """A leaf is reserved where its group may have one and the chain has a block, once."""
    index = table(rule(1, STATE, 0, 2), chain=4)
    with pytest.raises(InvariantError, match="whose block is not in the index"):
        reserved(index, [5], 1)
    with pytest.raises(InvariantError, match="a leaf where none can end"):
        reserved(index, [2], 1)
    put(index, [3], 1)
    with pytest.raises(InvariantError, match="has a place already"):
        reserved(index, [3], 1)
    with pytest.raises(ValueError, match=r"group=2 is outside 0\.\.1"):
        reserved(index, [3], 2)
    index.validate()


def test_a_block_goes_after_its_leaves() -> None:
    """Forgetting a last copy of a block drops its leaves; an eviction takes the leaves first."""
    index = table(rule(1, FULL), chain=3)
    ids = put(index, [0, 1, 2], 1)
    index.find(KEYS[: 16 * 4], use=True)
    assert index.evict(Tier.HOST, 2) == 2
    assert index.find(KEYS).last == 2
    assert index.group_blocks(Tier.HOST) == [2, 2]
    (chain,) = (found.block_ids for found in index.find(KEYS).ready.values())
    index.forget(Tier.HOST, chain[:1])
    assert index.group_blocks(Tier.HOST) == [0, 0]
    assert len(ids) == 3
    index.validate()


def test_a_pinned_leaf_keeps_its_block() -> None:
    """A chain stays as far as its deepest pinned leaf."""
    index = table(rule(1, STATE), chain=6)
    put(index, [2, 5], 1)
    found = index.find(KEYS[: 16 * 4])
    assert found.last == 3
    with index.holding(found.holdings):
        assert index.evict(Tier.HOST, 64) == 4
    assert index.find(KEYS).last == 3
    assert index.evict(Tier.HOST, 64) == 4
    index.validate()


def test_changes_name_the_group() -> None:
    """A leaf's changes carry its own key and its group."""
    index = table(rule(1, STATE), rule(2, STATE), chain=1)
    reader = ChangeHub(index).reader(10)
    ids = put(index, [0], 2)
    index.forget(Tier.HOST, ids)
    own = salted(key(1), 2)
    assert reader.take() == [
        Change(own, Tier.HOST, True, 2, 1, {Tier.HOST}),
        Change(own, Tier.HOST, False, 2, 1, frozenset()),
    ]


# -- keys that another process made up -----------------------------------------------------------


def test_a_leaf_is_never_taken_for_a_block() -> None:
    """A chain may offer the key of a leaf as that of a block; the two stay apart."""
    index = table(rule(1, STATE), chain=1)
    put(index, [0], 1)
    hostile = prompt(0, 1) + salted(key(1), 1) + key(99)
    assert index.agreeing(hostile) == 3
    assert index.find(hostile).chain == 1
    put(index, [1, 2], 0, Tier.HOST, hostile)
    assert index.find(hostile).chain == 3
    assert index.find(hostile).last == 1
    index.validate()
    put(index, [1], 1, Tier.HOST, hostile)  # its key is that of the block above
    assert index.find(hostile).last == 2
    assert index.group_blocks(Tier.HOST) == [3, 2]
    index.validate()
    as_root = salted(key(1), 1) + key(7)
    assert index.find(as_root).last == 0
    assert index.namespace_blocks(as_root[:16]) == {Tier.HOST: 0, Tier.DISK: 0}
    assert index.agreeing(as_root) == 1


# -- a later run ---------------------------------------------------------------------------------


def restarted(index: Residency, *rules: GroupRule, records: Any = None) -> Residency:
    """Return a new index with what the lower tier of this one holds."""
    ids = np.arange(64)
    records = index.export(Tier.DISK, ids) if records is None else records
    again = Residency({Tier.HOST: 64, Tier.DISK: 64}, rules=rules)
    reached = forest(records, again.groups)
    again.restore(Tier.DISK, records[reached.order], reached.parents, ids[reached.order])
    again.validate()
    return again


def test_leaves_are_restored_with_their_chain() -> None:
    """A later run has the leaves whose chain it has, and no others."""
    rules = rule(1, STATE), rule(2, WINDOW, 9)
    index = table(*rules)
    put(index, range(6), 0, Tier.DISK)
    put(index, [3, 5, 9], 1, Tier.DISK)
    put(index, [4, 5], 2, Tier.DISK)
    again = restarted(index, *rules)
    assert again.group_blocks(Tier.DISK) == [6, 2, 2]
    found = again.find(KEYS)
    assert found.last == 6
    assert {of.group: list(of.ready[Tier.DISK].positions) for of in found.leaves} == {
        1: [5], 2: [4, 5],
    }  # fmt: skip


def test_records_that_contradict_are_left_out() -> None:
    """Leaves of unknown groups, under other blocks or with the keys of blocks do no harm."""
    rules = rule(1, STATE), rule(2, STATE)
    index = table(*rules, chain=0)
    hostile = prompt(0, 1) + salted(key(1), 1) + key(99)
    put(index, range(3), 0, Tier.DISK, hostile)
    put(index, range(2), 1, Tier.DISK, hostile)
    put(index, range(2), 2, Tier.DISK, hostile)
    assert restarted(index, *rules).group_blocks(Tier.DISK) == [3, 2, 2]
    assert restarted(index, rules[0]).group_blocks(Tier.DISK) == [3, 2]
    assert restarted(index).group_blocks(Tier.DISK) == [3]
    records = index.export(Tier.DISK, np.arange(64)).copy()
    of_group_2 = np.flatnonzero(records[:, 33] == 2)
    records[of_group_2[0], 0] ^= 1
    assert restarted(index, *rules, records=records).group_blocks(Tier.DISK) == [3, 2, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("group", "unknown KV group"),
        ("key", "under another block"),
        ("parent", "under a leaf"),
        ("first", "without its parent"),
    ],
)
def test_a_restore_of_impossible_leaves_is_refused(change: str, message: str) -> None:
    """Records that break a law are refused before anything is restored."""
    index = table(rule(1, STATE), chain=0)
    put(index, range(2), 0, Tier.DISK)
    put(index, [0, 1], 1, Tier.DISK)
    records = index.export(Tier.DISK, np.array([0, 1, 2, 3])).copy()
    parents = np.array([-1, 0, 0, 1])
    if change == "group":
        records[2, 33] = 2
    elif change == "key":
        records[2, 0] ^= 1
    elif change == "parent":
        parents[3] = 2
    else:
        parents[2] = -1
    again = Residency({Tier.DISK: 64}, rules=[rule(1, STATE)])
    with pytest.raises(InvariantError, match=message):
        again.restore(Tier.DISK, records, parents, np.arange(4))
    assert again.counts(Tier.DISK).free == 64


# -- rules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([rule(2, STATE)], r"rules\[0\]\.group=2 is outside 1\.\.1"),
        ([rule(1, STATE), rule(1, STATE)], r"rules\[1\]\.group=1 is outside 2\.\.2"),
        ([rule(1, 4)], r"rules\[0\]\.kind=4 is outside 0\.\.3"),
        ([rule(1, WINDOW)], r"rules\[0\]\.window=0 must be at least 1 for kind=1"),
        ([rule(1, STATE, 8)], r"rules\[0\]\.window=8 must be 0 for kind=3"),
        ([GroupRule(1, STATE, 0, 0, 4)], r"rules\[0\]\.ratio=0 is outside 1"),
        ([GroupRule(1, STATE, 0, 2, 5)], r"rules\[0\]\.block_tokens=5 must be ratio=2 times"),
        ([rule(1, STATE), GroupRule(2, FULL, 0, 2, 16)], r"rules\[1\]\.block_tokens=16 must be"),
        ([rule(n, STATE) for n in range(1, 33)], "32 rules given"),
        (
            [rule(n, STATE, 0, r) for n, r in enumerate((8191, 8179, 8171), 1)],
            r"rules\[1\]\.ratio=8179: no prefix could end",
        ),
    ],
)
def test_a_rule_that_cannot_be_is_named(rules: list[GroupRule], message: str) -> None:
    """An error names the rule, its field and its value."""
    with pytest.raises(ValueError, match=message):
        Residency({Tier.HOST: 4}, rules=rules)


def test_as_many_groups_as_there_may_be() -> None:
    """A chain can have leaves of thirty-one groups."""
    index = Residency({Tier.HOST: 400}, rules=[rule(n, STATE) for n in range(1, 32)])
    put(index, range(12))
    for group in range(1, 32):
        put(index, range(12), group)
    index.validate()
    found = index.find(KEYS, use=True)
    assert (found.last, len(found.leaves)) == (12, 31)
    assert index.evict(Tier.HOST, 400) == 384
    index.validate()
