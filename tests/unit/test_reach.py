"""How far a prefix reaches where tiers or leaves must not be used."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

import numpy as np
import pytest

from flexkv.common.request import NO_BLOCK, LeafBlocks
from flexkv.common.space import GroupRule
from flexkv.common.terms import Positions, Tier, positions_of
from flexkv.graph.draft import NOTHING_AVOIDED, Avoid
from flexkv.graph.leaves import LeafFinder, Prefix
from flexkv.index.claims import Claim, Holding
from flexkv.index.found import READY_ONLY, Found, Limits
from flexkv.index.residency import Residency
from tests.unit.leaves import CHUNK, FULL, KEYS, STATE, WINDOW, prompt, put, reserved, rule, table

BLOCKS = 60
LONG = prompt(*range(BLOCKS + 1))
DOWN = Avoid(frozenset({Tier.DISK}))
GROUPS = [
    (rule(1, STATE),),
    (rule(1, WINDOW, 40),),
    (rule(1, CHUNK, 28),),
    (rule(1, FULL),),
    (rule(1, STATE, 0, 2), rule(2, WINDOW, 30), rule(3, CHUNK, 36, 3)),
    (rule(1, FULL, 0, 2), rule(2, STATE), rule(3, STATE, 0, 4)),
]


def ends(of: GroupRule, blocks: int = BLOCKS) -> list[int]:
    """Return the positions of all leaves that a group may have."""
    return list(range(of.ratio - 1, blocks, of.ratio))


def tiers_of(*rules: GroupRule, host: Any = range(BLOCKS)) -> Residency:
    """Return an index of two tiers with a chain in host memory, or only a part of it there."""
    index = Residency({Tier.HOST: 400, Tier.DISK: 400}, rules=rules)
    put(index, host, keys=LONG)
    return index


def leaf_blocks(rules: tuple[GroupRule, ...], has: dict[int, list[int]]) -> tuple[LeafBlocks, ...]:
    """Return device blocks for some leaves: half of the groups name the absent ones as -1."""
    told = []
    for of in rules:
        at = np.array(has[of.group], np.int64)
        if of.group % 2:
            every = np.array(ends(of), np.int64)
            ids = np.where(np.isin(every, at), every, NO_BLOCK)
            told.append(LeafBlocks(of.group, positions_of(every), ids))
        elif len(at):
            told.append(LeafBlocks(of.group, positions_of(at), at))
    return tuple(told)


def needs(found: Found) -> dict[int, list[int]]:
    """Return the positions of the leaves that were found, by group."""
    return {
        of.group: sorted(n for placed in of.ready.values() for n in placed.positions)
        for of in found.leaves
    }


# -- tiers that cannot be read -------------------------------------------------------------------


@pytest.mark.parametrize("rules", GROUPS, ids=str)
def test_what_only_an_unreadable_tier_has_counts_as_absent(rules: tuple[GroupRule, ...]) -> None:
    """However many ends of prefixes need such a block, the longest prefix without one is found."""
    for behind in (1, 15, 16, 17, 30, 59):
        index, without = tiers_of(*rules), tiers_of(*rules)
        for of in rules:
            at_host = [n for n in ends(of) if n < BLOCKS - behind]
            put(index, at_host, of.group, keys=LONG)
            put(index, ends(of), of.group, Tier.DISK, keys=LONG)
            put(without, at_host, of.group, keys=LONG)
        finder = LeafFinder(index, rules)
        found = finder.find(Prefix(LONG, 0, BLOCKS), DOWN)
        expected = without.find(LONG)
        assert (found.last, found.chain) == (expected.last, BLOCKS)
        assert needs(found) == needs(expected)
        assert finder.find(Prefix(LONG, 0, BLOCKS)).last == BLOCKS


def test_the_chain_ends_before_a_block_that_only_an_unreadable_tier_has() -> None:
    """So does what is told of the chain alone."""
    index = tiers_of(rule(1, STATE), host=range(20))
    put(index, range(20, 40), 0, Tier.DISK, keys=LONG)
    put(index, ends(rule(1, STATE), 40), 1, keys=LONG)
    down = Limits(DOWN.unreadable)
    found = index.reach(LONG, limits=down)
    assert (found.last, found.chain, found.ready.keys()) == (20, 20, {Tier.HOST})
    assert index.reach(LONG, 20, limits=down) == Found(20, 20, {}, chain=20)
    assert index.reach(LONG).last == 40


def test_a_block_is_loaded_from_the_next_tier_that_can_be_read() -> None:
    """A tier that cannot be read does not hide a further one that has the block."""
    index = Residency({Tier.HOST: 9, Tier.DISK: 9, Tier.REMOTE: 9}, rules=[rule(1, STATE)])
    for tier in (Tier.DISK, Tier.REMOTE):
        put(index, range(2), 0, tier)
        put(index, range(2), 1, tier)
    for unreadable, tiers in (
        (frozenset[Tier](), {Tier.DISK}),
        (DOWN.unreadable, {Tier.REMOTE}),
        (frozenset({Tier.REMOTE}), {Tier.DISK}),
        (frozenset({Tier.DISK, Tier.REMOTE}), set()),
        (frozenset({Tier.PEER}), {Tier.DISK}),
    ):
        found = index.reach(KEYS, limits=Limits(unreadable))
        assert found.ready.keys() == tiers
        assert [of.ready.keys() for of in found.leaves] == ([tiers] if tiers else [])


def test_a_block_in_host_memory_is_loaded_from_there_or_not_at_all() -> None:
    """It has its host place already, so nothing can be read into a second one."""
    index, without_host = table(rule(1, STATE), chain=2), Limits(frozenset({Tier.HOST}))
    put(index, range(4), 0, Tier.DISK)
    put(index, [1, 3], 1, Tier.DISK)
    assert index.reach(KEYS, limits=without_host).last == 0
    assert index.reach(KEYS, 2, limits=without_host).last == 4
    ids = put(index, [3], 1)
    assert index.reach(KEYS, 2).last == 4
    assert index.reach(KEYS, 2, limits=without_host).last == 2
    index.forget(Tier.HOST, ids)
    reserved(index, [3], 1)
    assert index.reach(KEYS, 2).last == 4
    assert index.reach(KEYS, 2, limits=without_host).last == 2
    assert index.reach(KEYS, 2, limits=READY_ONLY).last == 2


# -- what is being filled ------------------------------------------------------------------------


def filling(index: Residency, op_id: int, positions: Any, group: int = 0) -> None:
    """Reserve host places for blocks, and let an op fill them."""
    ids = reserved(index, positions, group, Tier.HOST, LONG)
    index.claims.open(op_id, Claim(1, None, Holding(Tier.HOST, ids)))


def test_what_an_op_fills_counts_unless_it_must_not_be_waited_for() -> None:
    """Blocks of the chain and leaves that are on their way to host memory are reported so."""
    rules = rule(1, STATE), rule(2, WINDOW, 9)
    index = tiers_of(*rules, host=range(10))
    put(index, [9], 1, keys=LONG)
    put(index, [8, 9], 2, Tier.DISK, keys=LONG)
    filling(index, 5, range(10, 14))
    filling(index, 6, range(14, 20))
    filling(index, 7, [17, 19], 1)
    filling(index, 8, [18, 19], 2)

    def found(*shunned: int) -> Found:
        return index.reach(LONG, limits=Limits(fillers=frozenset(shunned)))

    whole = found()
    assert (whole.last, whole.chain, list(whole.ready[Tier.HOST].positions)) == (
        20, 10, [*range(10)],
    )  # fmt: skip
    assert whole.pending is not None
    assert list(whole.pending.positions) == [*range(10, 20)]
    assert [(of.group, of.ready, list(of.pending.positions)) for of in whole.leaves if of.pending] \
        == [(1, {}, [19]), (2, {}, [18, 19])]  # fmt: skip
    assert (whole.host_only, len(whole.leaves), whole.leaves[1].block_count) == (False, 2, 2)
    assert found(4, 9).last == index.find(LONG).last == 20
    for shunned in ((5,), (6,), (7,), (8,), (5, 6, 7, 8)):
        assert (found(*shunned).last, found(*shunned).chain) == (10, 10), shunned
        assert found(*shunned).pending is None
    assert index.reach(LONG, limits=READY_ONLY).last == 10
    assert index.reach(LONG, 18).last == 20
    assert index.reach(LONG, 18, limits=READY_ONLY) == Found(18, 18, {}, chain=18)
    index.claims.settle(7, filled=True)
    index.claims.settle(8, filled=False)
    assert found().last == 10
    index.claims.settle(5, filled=False)
    assert found().chain == 10
    index.claims.settle(6, filled=True)
    index.validate()


def test_a_block_that_is_filled_counts_only_where_its_tier_may_be_used() -> None:
    """Neither a pending place of a lower tier nor an unusable first tier can be waited for."""
    index = tiers_of(rule(1, STATE), host=range(4))
    reserved(index, [3], 1, Tier.DISK, LONG)
    assert index.find(LONG).last == 0
    filling(index, 3, [3], 1)
    assert index.find(LONG).last == 4
    assert index.reach(LONG, limits=Limits(frozenset({Tier.HOST}))).last == 0
    no_block = np.zeros((1, 4), np.bool_)
    assert index.reach(LONG, limits=Limits(device=no_block)).last == 0


# -- leaves without a device block ---------------------------------------------------------------


@pytest.mark.parametrize("rules", GROUPS, ids=str)
@pytest.mark.parametrize("first", [0, 13])
def test_a_leaf_without_a_device_block_counts_as_absent(
    rules: tuple[GroupRule, ...], first: int
) -> None:
    """What is found is the same as if the index had only the leaves with a device block."""
    index = tiers_of(*rules)
    for of in rules:
        put(index, ends(of), of.group, keys=LONG)
    finder, random = LeafFinder(index, rules), Random(1)
    for share in (0.0, 0.1, 0.5, 0.9, 0.97, 1.0):
        has = {of.group: [n for n in ends(of) if random.random() < share] for of in rules}
        only = tiers_of(*rules)
        for group, at in has.items():
            put(only, at, group, keys=LONG)
        for before in (None, 48, 31, first + 1, 0):
            last = BLOCKS if before is None else max(0, before - 1)
            prefix = Prefix(LONG, first, BLOCKS, 0, leaf_blocks(rules, has))
            found = finder.find(prefix, before=before)
            expected = only.find(LONG[: 16 * (last + 1)], first)
            assert (found.last, needs(found)) == (expected.last, needs(expected))


def calls_of(work: Callable[[], object]) -> int:
    """Return how many calls of functions, in Python and in C, some work makes."""
    events = []
    before = sys.getprofile()
    sys.setprofile(lambda _frame, event, _argument: events.append(event))
    try:
        work()
    finally:
        sys.setprofile(before)
    return sum(event in ("call", "c_call") for event in events)


def test_a_search_takes_as_many_calls_for_a_long_prompt_as_for_a_short_one() -> None:
    """Whatever stands in the way of the longer prefixes, they are not tried one by one."""
    rules = (rule(1, WINDOW, 40), rule(2, STATE), rule(3, FULL))
    index = tiers_of(*rules)
    put(index, range(10), 1, keys=LONG)
    for group in (1, 2, 3):
        put(index, range(BLOCKS), group, Tier.DISK if group == 1 else Tier.HOST, keys=LONG)
    finder = LeafFinder(index, rules)
    whole = [LeafBlocks(group, Positions(0, BLOCKS), np.arange(BLOCKS)) for group in (1, 2, 3)]
    few = LeafBlocks(2, Positions(0, 4), np.arange(4))
    for unreadable, leaves, last in (
        (NOTHING_AVOIDED, (whole[0], few, whole[2]), 4),
        (NOTHING_AVOIDED, (whole[0], whole[2]), 0),
        (NOTHING_AVOIDED, (), 0),
        (DOWN, tuple(whole), 10),
        (DOWN, (whole[0], few, whole[2]), 4),
        (DOWN, None, 10),
    ):
        long, short = (Prefix(LONG, 0, blocks, 0, leaves) for blocks in (BLOCKS, 12))
        assert finder.find(long, unreadable).last == last
        calls = [calls_of(partial(finder.find, each, unreadable)) for each in (long, short)]
        assert calls[0] == calls[1]


def test_what_a_search_must_not_use_is_not_counted_as_used() -> None:
    """Only leaves of the prefix that was found count as used."""
    index = table(rule(1, STATE), chain=4)
    put(index, [1, 3], 1)
    has = np.array([[True, True, True]])  # none at position 3
    for _ in range(3):
        assert index.reach(KEYS, 0, True, 0, Limits(device=has)).last == 2
    assert index.evict(Tier.HOST, 1) == 1
    assert index.reach(KEYS).last == 2


def test_an_impossible_limit_is_refused() -> None:
    """A tier that there is not, and rows that are not those of all groups, raise a ValueError."""
    index = table(rule(1, STATE), rule(2, STATE))
    with pytest.raises(ValueError, match=r"unusable=4 is outside 0\.\.3"):
        index._table.reach(KEYS, 0, 12, 0, False, 4)
    with pytest.raises(ValueError, match="device has 3 bytes, must be as many for each of 2 gr"):
        index._table.reach(KEYS, 0, 12, 0, False, 0, bytes(3))
    with pytest.raises(ValueError, match="device has 1 bytes, must be as many for each of 0 gr"):
        Residency({Tier.HOST: 4})._table.reach(KEYS, 0, 12, 0, False, 0, bytes(1))
    with pytest.raises(TypeError):
        index._table.reach(KEYS, 0, 12, 0, False, 0, None, 7)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="shunned"):
        index._table.reach(KEYS, 0, 12, 0, False, 0, None, b"12")
    with pytest.raises(TypeError):
        index._table.reach(KEYS, 0, 12, 0, False, 0, 7)  # type: ignore[arg-type]
    for nothing in (bytes(0), np.zeros((2, 0), np.bool_)):
        assert index.reach(KEYS, limits=Limits(device=nothing)).last == 0  # type: ignore[arg-type]
    assert index.find(KEYS).last == 0
