"""Loads of models with several KV groups that join what other requests are loading or storing."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec import structs

from flexkv.common.errors import CapacityError
from flexkv.common.request import Operation
from flexkv.common.terms import Positions, Tier, positions_of
from flexkv.graph.draft import Avoid, PlanLimits
from flexkv.graph.explain import explain
from flexkv.graph.ops import CHUNKS_MAX
from flexkv.graph.planner import Planned, Planner
from flexkv.index.claims import Claim, Holding
from tests.unit.prompts import LIMITS, request
from tests.unit.test_planner_leaves import (
    CHAIN,
    KEYS,
    LOAD,
    NEEDED,
    NUMBERS,
    PAIR,
    READ,
    RULES,
    STATE,
    WINDOW,
    asked,
    fill,
    index,
    leaf_blocks,
    moved,
    settle,
)

EVERY = {WINDOW: list(NUMBERS), STATE: list(NUMBERS), PAIR: [1, 3, 5, 7]}
"""All leaves of the prompt."""


def waits(planned: Planned) -> dict[int, list[int]]:
    """Return the positions that a plan waits for, by KV group."""
    of: dict[int, list[int]] = {}
    for leg, each in zip(planned.plan.template.shape.legs, planned.plan.fills, strict=True):
        if leg.waits:
            of.setdefault(leg.group, []).extend(each.positions)
    return of


def fillers(planned: Planned) -> set[int]:
    """Return the ids of the ops that a plan waits for."""
    return {op for each in planned.plan.fills for op in each.fillers}


def filling(planned: Planned) -> set[int]:
    """Return the ids of the ops of a plan that fill host memory."""
    ops = planned.plan.template.ops
    return {planned.plan.op_id(op) for op in ops if op.route and op.route.target is Tier.HOST}


@pytest.mark.parametrize("first", [Operation.GET, Operation.PREFETCH])
@pytest.mark.parametrize("second", [Operation.GET, Operation.PREFETCH])
def test_a_load_joins_another_of_the_same_prefix(first: Operation, second: Operation) -> None:
    """It waits for the ops of the first, group by group, and reserves and reads nothing."""
    tiers = index()
    fill(tiers, Tier.DISK, EVERY)
    planner = Planner(tiers, LIMITS, rules=RULES)
    loads = {
        Operation.GET: asked(Operation.GET),
        Operation.PREFETCH: request(Operation.PREFETCH, *NUMBERS),
    }
    leading = planner.plan(loads[first], 1)
    reserved = tiers.counts(Tier.HOST).reserved
    joining = planner.plan(loads[second], 2)
    assert (joining.found.last, joining.is_whole, joining.shortfall) == (8, True, None)
    assert waits(joining) == CHAIN | NEEDED
    assert fillers(joining) == filling(leading)
    assert moved(joining, READ) == {}
    assert moved(joining, LOAD) == (CHAIN | NEEDED if second is Operation.GET else {})
    assert tiers.counts(Tier.HOST).reserved == reserved
    for op in joining.plan.template.ops:
        assert op.route is not None or op.answers == (second is Operation.PREFETCH)
    for leg, each in zip(joining.plan.template.shape.legs, joining.plan.fills, strict=True):
        if leg.group and second is Operation.GET:
            expected = [100 * leg.group + at for at in each.positions]
            assert each.ids[Tier.DEVICE].tolist() == expected
    settle(tiers, leading)
    settle(tiers, joining)
    assert planner.find(KEYS).host_only


def test_a_load_joins_a_part_and_brings_the_rest() -> None:
    """Blocks in host memory, blocks on their way there and blocks on SSD make up one prefix."""
    tiers = index()
    fill(tiers, Tier.DISK, EVERY)
    planner = Planner(tiers, LIMITS, rules=RULES)
    leaves = {WINDOW: [4, 5], STATE: [5], PAIR: [1, 3, 5]}
    span = request(Operation.GET, *NUMBERS[:6]).span
    leading = planner.plan(asked(Operation.GET, leaves, span=span, device_ids=np.arange(6)), 1)
    tiers.commit(Tier.HOST, tiers.reserve(Tier.HOST, KEYS, Positions(6, 1), group=WINDOW))
    joining = planner.plan(asked(Operation.GET), 2)
    assert waits(joining) == {0: [0, 1, 2, 3, 4, 5], PAIR: [1, 3, 5]}
    assert moved(joining, READ) == {0: [6, 7], WINDOW: [7], STATE: [7], PAIR: [7]}
    assert moved(joining, LOAD) == CHAIN | NEEDED
    settle(tiers, leading)
    settle(tiers, joining)


def test_a_load_joins_a_put() -> None:
    """What a put is storing is found, and waited for."""
    tiers = index()
    planner = Planner(tiers, LIMITS, rules=RULES)
    storing = planner.plan(asked(Operation.PUT), 1)
    joining = planner.plan(asked(Operation.GET), 2)
    assert waits(joining) == CHAIN | NEEDED
    assert fillers(joining) == filling(storing)
    assert planner.find(KEYS).last == 8
    settle(tiers, storing)
    settle(tiers, joining)


@pytest.mark.parametrize("group", [0, WINDOW, STATE, PAIR])
def test_what_hangs_is_not_waited_for(group: int) -> None:
    """An op that must not be waited for shortens the prefix, whichever group its block is of.

    Its blocks are not read again, as they have their host places already.
    """
    tiers = index()
    fill(tiers, Tier.DISK, EVERY)
    planner = Planner(tiers, PlanLimits(64, 8), rules=RULES)
    span = request(Operation.GET, *NUMBERS).span._replace(first_block=6, first_token=6)
    leaves = {WINDOW: [6, 7], STATE: [7], PAIR: [7]}
    begun = planner.plan(asked(Operation.GET, leaves, span=span, device_ids=np.arange(2)), 1)
    plan = begun.plan
    stuck = {
        plan.op_id(op)
        for op in plan.template.ops
        if op.route == READ and op.group == group and 7 in plan.transfer(op).positions
    }
    planner.avoid = Avoid(fillers=frozenset(stuck))
    assert planner.find(KEYS).last == 6
    joining = planner.plan(asked(Operation.GET, EVERY), 2)
    assert moved(joining, READ) == {0: [0, 1, 2, 3, 4, 5], WINDOW: [4, 5], STATE: [5],
                                    PAIR: [1, 3, 5]}  # fmt: skip
    assert waits(joining) == {}
    settle(tiers, begun)
    settle(tiers, joining)


def test_a_group_waits_for_no_more_ops_than_a_leg_has_chunks() -> None:
    """If there are more ops to wait for, the longest prefix that waits for few enough is loaded."""
    blocks = 2 * CHUNKS_MAX + 8
    tiers, numbers = index(host=300, disk=1), list(range(blocks))
    made = request(Operation.GET, *numbers)
    tiers.commit(Tier.HOST, tiers.reserve(Tier.HOST, made.keys, Positions(0, blocks)))
    for group in (WINDOW, STATE):
        places = tiers.reserve(Tier.HOST, made.keys, Positions(0, blocks), group=group)
        tiers.commit(Tier.HOST, places)
    for at in range(1, blocks, 2):
        ids = tiers.reserve(Tier.HOST, made.keys, Positions(at, 1), group=PAIR)
        tiers.claims.open(at, Claim(9, None, Holding(Tier.HOST, ids)))
    planner = Planner(tiers, LIMITS, rules=RULES)
    assert planner.find(made.keys).last == blocks
    leaves = {WINDOW: numbers, STATE: numbers, PAIR: list(range(1, blocks, 2))}
    planned = planner.plan(structs.replace(made, leaves=leaf_blocks(leaves)), 1)
    assert (planned.found.last, planned.shortfall) == (2 * CHUNKS_MAX, None)
    assert len(fillers(planned)) == CHUNKS_MAX
    for at in range(1, blocks, 2):
        tiers.claims.settle(at, filled=True)
    settle(tiers, planned)


@pytest.mark.parametrize("ops", [CHUNKS_MAX + 1, 100, 4 * CHUNKS_MAX, 4 * CHUNKS_MAX + 8])
def test_the_chain_waits_for_the_ops_of_several_requests(ops: int) -> None:
    """Its waiting blocks are divided into several legs, each op a chunk of two blocks."""
    blocks = 2 * ops
    tiers, numbers = index(host=1200, disk=1), list(range(blocks))
    made = request(Operation.GET, *numbers)
    for op in range(ops):
        ids = tiers.reserve(Tier.HOST, made.keys, Positions(2 * op, 2))
        tiers.claims.open(op, Claim(9, None, Holding(Tier.HOST, ids)))
    leaves = {WINDOW: numbers, STATE: numbers, PAIR: list(range(1, blocks, 2))}
    for group, at in leaves.items():
        positions = positions_of(np.array(at, np.int64))
        tiers.commit(Tier.HOST, tiers.reserve(Tier.HOST, made.keys, positions, group=group))
    planner = Planner(tiers, LIMITS, rules=RULES)
    planned = planner.plan(structs.replace(made, leaves=leaf_blocks(leaves)), 1)
    expected = min(ops, 4 * CHUNKS_MAX)
    assert (planned.found.last, planned.shortfall) == (2 * expected, None)
    assert waits(planned) == {0: numbers[: 2 * expected]}
    assert fillers(planned) == set(range(expected))
    for op in planned.plan.template.ops:
        if op.route is None:
            begin, end = planned.plan.bounds(op)
            fill = planned.plan.fills[op.leg]
            assert end - begin == 2
            assert list(fill.positions)[begin] == 2 * fill.fillers[op.chunk]
    for op_id in range(ops):
        tiers.claims.settle(op_id, filled=True)
    settle(tiers, planned)


def test_joined_blocks_take_no_room() -> None:
    """A get that joins another fits into a host memory that has no room left."""
    tiers = index(host=15)
    fill(tiers, Tier.DISK, EVERY)
    planner = Planner(tiers, LIMITS, rules=RULES)
    leading = planner.plan(asked(Operation.GET), 1)
    assert tiers.counts(Tier.HOST).free == 0
    assert planner.places_wanted(asked(Operation.GET)) == 0
    joining = planner.plan(asked(Operation.GET), 2)
    assert (joining.found.last, joining.shortfall) == (8, None)
    settle(tiers, leading)
    settle(tiers, joining)


def test_a_load_without_room_for_what_is_not_joined_is_shorter() -> None:
    """What is being filled stays while a shorter prefix is searched for."""
    tiers = index(host=12)
    fill(tiers, Tier.DISK, EVERY)
    planner = Planner(tiers, LIMITS, rules=RULES)
    leaves = {WINDOW: [4, 5], STATE: [5], PAIR: [1, 3, 5]}
    span = request(Operation.GET, *NUMBERS[:6]).span
    leading = planner.plan(asked(Operation.GET, leaves, span=span, device_ids=np.arange(6)), 1)
    joining = planner.plan(asked(Operation.GET, EVERY), 2)
    assert joining.found.last == 6
    assert waits(joining) == {0: [0, 1, 2, 3, 4, 5]} | leaves
    assert isinstance(joining.shortfall, CapacityError)
    settle(tiers, leading)
    settle(tiers, joining)


def test_a_plan_that_joins_can_be_explained() -> None:
    """`explain` only reads the index, and works while blocks are being filled."""
    tiers = index()
    fill(tiers, Tier.DISK, EVERY)
    planner = Planner(tiers, LIMITS, rules=RULES)
    leading = planner.plan(asked(Operation.GET), 1)
    assert "get of 8 whole blocks" in str(explain(asked(Operation.GET), planner))
    settle(tiers, leading)
