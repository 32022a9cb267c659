"""Puts of models with several KV groups when host memory has too little room for their leaves."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from flexkv.common.errors import CapacityError
from flexkv.common.request import Operation
from flexkv.common.space import GroupRule, Kind
from flexkv.common.terms import Positions, Tier, positions_of
from flexkv.graph.draft import PlanLimits
from flexkv.graph.ends import Leaves, WholeEnds
from flexkv.graph.planner import Planned, Planner
from flexkv.index.eviction import Eviction
from flexkv.index.found import AlikeBlocks
from flexkv.index.residency import ABSENT, READY, Residency
from tests.unit.prompts import keys, request
from tests.unit.test_planner_leaves import STORE, leaf_blocks, moved, settle

WINDOW, STATE = 1, 2
RULES = (
    GroupRule(WINDOW, Kind.WINDOW, 3, 1, 1),  # the last two blocks
    GroupRule(STATE, Kind.STATE, 0, 1, 1),
)
BLOCKS = range(8)
KEYS = keys(*BLOCKS)
EVERY = {WINDOW: list(BLOCKS), STATE: list(BLOCKS)}
LIMITS = PlanLimits(64, 100)


def tiers_of(room: int, disk: int = 0, policy: str = "lru") -> Residency:
    """Return an index whose host memory has the chain, and room for some leaves."""
    sizes = {Tier.HOST: 8 + room} | ({Tier.DISK: disk} if disk else {})
    tiers = Residency(sizes, Eviction(policy), rules=RULES)
    fill(tiers, 0, list(BLOCKS))
    return tiers


def fill(tiers: Residency, group: int, at: list[int], tier: Tier = Tier.HOST) -> None:
    """Make blocks of a group READY."""
    ids = tiers.reserve(tier, KEYS, positions_of(np.array(at, np.int64)), group=group)
    assert len(ids) == len(at)
    tiers.commit(tier, ids)


def put(tiers: Residency, leaves: dict[int, list[int]]) -> Planned:
    """Plan and perform a put of leaves alone; check that no reservation or pin is left over."""
    span = request(Operation.PUT, *BLOCKS).span._replace(first_block=8, first_token=8)
    made = structs.replace(
        request(Operation.PUT, *BLOCKS), span=span, device_ids=np.zeros(0, np.int64),
        leaves=leaf_blocks(leaves),
    )  # fmt: skip
    planned = Planner(tiers, LIMITS, rules=RULES).plan(made, 1)
    settle(tiers, planned)
    counts = tiers.counts(Tier.HOST)
    assert (counts.reserved, counts.pinned) == (0, 0)
    return planned


@pytest.mark.parametrize(
    ("room", "stored", "found"),
    [
        (0, {}, []),
        (1, {}, []),
        (2, {WINDOW: [0], STATE: [0]}, [1]),  # the only end that needs so little
        (3, {WINDOW: [6, 7], STATE: [7]}, [8]),
        (4, {WINDOW: [6, 7], STATE: [7]}, [8]),
        (5, {WINDOW: [5, 6, 7], STATE: [6, 7]}, [7, 8]),
        (7, {WINDOW: [4, 5, 6, 7], STATE: [5, 6, 7]}, [6, 7, 8]),
        (15, {WINDOW: [*range(8)], STATE: [*range(1, 8)]}, [2, 3, 4, 5, 6, 7, 8]),
        (16, EVERY, [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_whole_ends_are_stored_from_the_last_one_backwards(
    room: int, stored: dict[int, list[int]], found: list[int]
) -> None:
    """If there is no room for all leaves, only those of the last whole prefixes are stored."""
    tiers = tiers_of(room)
    planned = put(tiers, EVERY)
    assert moved(planned, STORE) == stored
    assert isinstance(planned.shortfall, CapacityError) == (room < 16)
    ends = [n for n in range(1, 9) if tiers.find(KEYS[: 16 * (n + 1)]).last == n]
    assert ends == found


def test_leaves_of_an_end_may_be_there_already() -> None:
    """An end whose other leaves are resident needs only the rest, and evicts none of them."""
    tiers = tiers_of(3)
    fill(tiers, WINDOW, [6])
    planned = put(tiers, {WINDOW: [2, 3, 7], STATE: [3, 7]})
    assert moved(planned, STORE) == {WINDOW: [7], STATE: [7]}
    assert tiers.find(KEYS).last == 8


def test_leaves_on_ssd_count_as_there() -> None:
    """A window block that only the SSD has makes an end whole, and stays there."""
    tiers = tiers_of(2, disk=40)
    fill(tiers, 0, list(BLOCKS), Tier.DISK)
    fill(tiers, WINDOW, [6], Tier.DISK)
    planned = put(tiers, {WINDOW: [7], STATE: [0, 1, 2, 3, 4, 5, 7]})
    assert moved(planned, STORE) == {WINDOW: [7], STATE: [0, 1, 2, 3, 4, 5, 7]}
    assert tiers.find(KEYS).last == 8


def test_leaves_of_no_whole_end_are_stored_where_there_is_room() -> None:
    """A later put may bring what is missing; without room for all, they are left out."""
    assert moved(put(tiers_of(3), {WINDOW: [3, 5, 7]}), STORE) == {WINDOW: [3, 5, 7]}
    assert moved(put(tiers_of(2), {WINDOW: [3, 5, 7]}), STORE) == {}


@pytest.mark.parametrize("disk", [8, 30])
def test_leaves_take_the_host_places_of_a_chain_that_is_on_ssd(disk: int) -> None:
    """While leaves are stored, their parents stay in the index, but not in host memory."""
    tiers = tiers_of(0, disk)
    fill(tiers, 0, list(BLOCKS), Tier.DISK)
    planned = put(tiers, {WINDOW: [6, 7], STATE: [7]})
    assert (moved(planned, STORE), planned.shortfall) == ({WINDOW: [6, 7], STATE: [7]}, None)
    assert tiers.group_blocks(Tier.HOST) == [5, 2, 1]
    assert tiers.group_blocks(Tier.DISK) == ([5, 2, 1] if disk == 8 else [8, 2, 1])
    assert tiers.find(KEYS).last == 8


def test_a_chain_that_only_host_memory_has_keeps_its_places() -> None:
    """Leaves never evict their parents from the index."""
    tiers = tiers_of(0, disk=30)
    assert moved(put(tiers, {WINDOW: [6, 7], STATE: [7]}), STORE) == {}
    assert tiers.group_blocks(Tier.HOST) == [8, 0, 0]


@pytest.mark.parametrize("policy", ["lru", "lfu", "slru", "lhd"])
def test_what_is_stored_is_whole_under_every_policy(policy: str) -> None:
    """Whatever is resident before, a put without room leaves whole ends, or nothing new."""
    random = Random(policy)
    for _ in range(60):
        tiers = tiers_of(random.randint(0, 12), random.choice([0, 0, 12, 40]), policy)
        for group in (WINDOW, STATE):
            some = [at for at in BLOCKS if random.random() < 0.2]
            fitting = some[: tiers.counts(Tier.HOST).free]
            if fitting:
                fill(tiers, group, fitting)
        leaves = {group: [at for at in BLOCKS if random.random() < 0.8] for group in (1, 2)}
        there = {group: set(ready(tiers, group)) for group in leaves}
        lacking = {group: set(at) - there[group] for group, at in leaves.items()}
        planned = put(tiers, leaves)
        stored = {group: set(at) for group, at in moved(planned, STORE).items()}
        tiers.validate()
        if planned.shortfall is None:
            assert stored == {group: at for group, at in lacking.items() if at}
            continue
        has = {group: set(ready(tiers, group)) for group in leaves}
        whole = [end for end in range(1, 9) if needs(end, WINDOW) <= has[WINDOW]
                 and needs(end, STATE) <= has[STATE]]  # fmt: skip
        useful = {group: set().union(*(needs(end, group) for end in whole)) for group in leaves}
        for group, at in stored.items():
            assert at <= useful[group]


def needs(end: int, group: int) -> set[int]:
    """Return the leaves that a prefix needs."""
    return set(range(*RULES[group - 1].needed(0, end)))


def ready(tiers: Residency, group: int) -> list[int]:
    """Return the leaves that are READY in some tier."""
    surveyed = tiers.survey(KEYS, 0, 8, False, group)
    return [at for each in surveyed if READY in each.states for at in each.positions]


def test_ends_of_groups_with_larger_blocks() -> None:
    """Ends are multiples of all blocks, and a leaf is known by its last position in the chain."""
    rules = (GroupRule(1, Kind.WINDOW, 3, 2, 2), GroupRule(2, Kind.FULL, 0, 3, 3))

    def leaves(group: int, at: Any) -> Leaves:
        places = np.array([*at], np.int64)
        positions = Positions(int(places[0]), len(places), places)
        return Leaves(group, AlikeBlocks((ABSENT,), positions, (None,)))

    pairs, triples = range(1, 20, 2), range(2, 20, 3)
    ends = WholeEnds(rules, 20, [leaves(2, triples)], [leaves(1, pairs)])
    assert len(ends) == 3  # 6, 12 and 18
    marks = ends.needed(1, 2)
    assert np.flatnonzero(marks[1]).tolist() == [5]
    assert np.flatnonzero(marks[2]).tolist() == [0, 1, 2, 3]
    assert np.flatnonzero(ends.needed(0, 3)[1]).tolist() == [2, 5, 8]
    assert list(leaves(1, pairs).at(ends.needed(0, 3), 2).alike.positions) == [5, 11, 17]
    assert ends.has_all(marks, [leaves(2, triples), leaves(1, [11])])
    assert not ends.has_all(marks, [leaves(2, triples), leaves(1, [9])])
    assert len(WholeEnds(rules, 20, [leaves(1, pairs), leaves(2, triples)], [])) == 0
    assert len(WholeEnds(rules, 5, [leaves(2, triples)], [leaves(1, pairs)])) == 0
    assert len(WholeEnds(rules, 20, [leaves(2, [2, 5, 11])], [leaves(1, pairs)])) == 1
