"""What the planner makes of requests of a model with several KV groups."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from flexkv.common.errors import CapacityError
from flexkv.common.request import NO_BLOCK, LeafBlocks, Operation, Request
from flexkv.common.space import GroupRule, Kind
from flexkv.common.terms import Positions, Route, Tier, positions_of
from flexkv.graph.draft import Avoid, PlanLimits
from flexkv.graph.planner import Planned, Planner
from flexkv.index.keys import block_keys, leaf_keys
from flexkv.index.residency import Residency
from flexkv.testing.fake_far import FakeFar
from tests.unit.prompts import LIMITS, keys, request

WINDOW, STATE, PAIR = 1, 2, 3
RULES = (
    GroupRule(WINDOW, Kind.WINDOW, 3, 1, 1),  # the last two blocks
    GroupRule(STATE, Kind.STATE, 0, 1, 1),
    GroupRule(PAIR, Kind.FULL, 0, 2, 2),
)
NUMBERS = tuple(range(8))
KEYS = keys(*NUMBERS)
NEEDED = {WINDOW: [6, 7], STATE: [7], PAIR: [1, 3, 5, 7]}
"""The positions of the leaves that a prefix of eight blocks needs."""


def index(host: int = 64, disk: int = 64) -> Residency:
    """Return the index of empty tiers."""
    return Residency({Tier.HOST: host, Tier.DISK: disk}, rules=RULES)


def leaf_blocks(of: dict[int, list[int]]) -> tuple[LeafBlocks, ...]:
    """Return device blocks 100 * group + position for the leaves at some positions."""
    return tuple(
        LeafBlocks(group, positions_of(np.array(at, np.int64)), np.array(at) + 100 * group)
        for group, at in of.items()
    )


def asked(operation: Operation, leaves: Any = NEEDED, **changes: Any) -> Request:
    """Return a request for the prompt, with device blocks for some leaves."""
    made = request(operation, *NUMBERS)
    return msgspec.structs.replace(made, leaves=leaf_blocks(leaves), **changes)


def fill(tiers: Residency, tier: Tier, leaves: dict[int, list[int]], chain: int = 8) -> None:
    """Make the chain and some leaves READY in a tier."""
    tiers.commit(tier, tiers.reserve(tier, KEYS, Positions(0, chain)))
    for group, at in leaves.items():
        positions = positions_of(np.array(at, np.int64))
        tiers.commit(tier, tiers.reserve(tier, KEYS, positions, group=group))


def settle(tiers: Residency, planned: Planned, filled: bool = True) -> None:
    """Settle every op of a plan."""
    for op in planned.plan.template.ops:
        if op.route is not None:
            tiers.claims.settle(planned.plan.op_id(op), filled)
    tiers.validate()


def moved(planned: Planned, route: Route) -> dict[int, list[int]]:
    """Return the positions that a plan moves on a route, by KV group."""
    of: dict[int, list[int]] = {}
    for leg, each in zip(planned.plan.template.shape.legs, planned.plan.fills, strict=True):
        if route in leg.hops:
            of.setdefault(leg.group, []).extend(each.positions)
    return {group: sorted(at) for group, at in of.items()}


LOAD, READ = Route(Tier.HOST, Tier.DEVICE), Route(Tier.DISK, Tier.HOST)
STORE, WRITE = Route(Tier.DEVICE, Tier.HOST), Route(Tier.HOST, Tier.DISK)
CHAIN = {0: list(NUMBERS)}


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DISK])
def test_a_get_moves_what_each_group_needs(tier: Tier) -> None:
    """A get loads the chain and the needed leaves, under their keys, into their device blocks."""
    tiers = index()
    fill(tiers, tier, {WINDOW: list(NUMBERS), STATE: list(NUMBERS), PAIR: [1, 3, 5, 7]})
    planned = Planner(tiers, LIMITS, rules=RULES).plan(asked(Operation.GET), 1)
    assert moved(planned, LOAD) == CHAIN | NEEDED
    assert moved(planned, READ) == (CHAIN | NEEDED if tier is Tier.DISK else {})
    for leg, each in zip(planned.plan.template.shape.legs, planned.plan.fills, strict=True):
        if leg.group:
            assert each.keys == leaf_keys(KEYS, leg.group)
            expected = [100 * leg.group + at for at in each.positions]
            assert each.ids[Tier.DEVICE].tolist() == expected
    settle(tiers, planned)


def test_a_prefetch_moves_the_leaves_too() -> None:
    """A prefetch brings the chain and the needed leaves to host memory, and needs no device."""
    tiers = index()
    fill(tiers, Tier.DISK, NEEDED)
    prefetch = request(Operation.PREFETCH, *NUMBERS)
    planned = Planner(tiers, LIMITS, rules=RULES).plan(prefetch, 1)
    assert (moved(planned, READ), moved(planned, LOAD)) == (CHAIN | NEEDED, {})
    settle(tiers, planned)


def test_host_places_are_reserved_for_all_or_none() -> None:
    """Where host memory cannot take a whole prefix from SSD, a shorter one is loaded whole."""
    tiers = index(host=10)
    fill(tiers, Tier.DISK, {WINDOW: list(NUMBERS), STATE: list(NUMBERS), PAIR: [1, 3, 5, 7]})
    leaves = {WINDOW: list(NUMBERS), STATE: list(NUMBERS), PAIR: [1, 3, 5, 7]}
    planned = Planner(tiers, LIMITS, rules=RULES).plan(asked(Operation.GET, leaves), 1)
    # Eight blocks need 15 places, six need 12, four need 9.
    assert planned.found.last == 4
    assert moved(planned, READ) == {0: [0, 1, 2, 3], WINDOW: [2, 3], STATE: [3], PAIR: [1, 3]}
    assert isinstance(planned.shortfall, CapacityError)
    assert tiers.counts(Tier.HOST).reserved == 9
    settle(tiers, planned)


def test_a_get_without_room_reserves_nothing() -> None:
    """A get whose shortest prefix finds no room moves nothing, and leaves nothing reserved."""
    tiers = index(host=3)
    fill(tiers, Tier.DISK, {WINDOW: list(NUMBERS), STATE: list(NUMBERS), PAIR: [1, 3, 5, 7]})
    leaves = {WINDOW: list(NUMBERS), STATE: list(NUMBERS), PAIR: [1, 3, 5, 7]}
    planned = Planner(tiers, LIMITS, rules=RULES).plan(asked(Operation.GET, leaves), 1)
    assert (planned.found.last, planned.plan.template.ops) == (0, ())
    assert isinstance(planned.shortfall, CapacityError)
    counts = tiers.counts(Tier.HOST)
    assert (counts.reserved, counts.pinned, counts.free) == (0, 0, 3)
    tiers.validate()


@pytest.mark.parametrize("states", [range(32), [3, 9, 21, 31]])
def test_the_longest_prefix_that_host_memory_has_room_for_is_loaded(states: Any) -> None:
    """Whatever the room, no longer prefix would have fitted, and a shorter one is not settled for.

    A prefix of n blocks needs n places for the chain, half as many for the pairs, two for the
    window and one for the state.
    """
    long = keys(*range(32))
    every = {WINDOW: list(range(32)), STATE: list(states), PAIR: list(range(1, 32, 2))}
    possible = [n for n in range(2, 33, 2) if n - 1 in states]
    for host in range(1, 55):
        tiers = index(host, disk=128)
        tiers.commit(Tier.DISK, tiers.reserve(Tier.DISK, long, Positions(0, 32)))
        for group, at in every.items():
            positions = positions_of(np.array(at, np.int64))
            tiers.commit(Tier.DISK, tiers.reserve(Tier.DISK, long, positions, group=group))
        made = msgspec.structs.replace(
            request(Operation.GET, *range(32)), leaves=leaf_blocks(every)
        )
        planned = Planner(tiers, LIMITS, rules=RULES).plan(made, 1)
        fitting = [n for n in possible if n + n // 2 + 2 + 1 <= host]
        assert planned.found.last == max(fitting, default=0)
        assert (planned.shortfall is None) == (planned.found.last == 32)
        settle(tiers, planned)
        assert tiers.counts(Tier.HOST).reserved == 0


@pytest.mark.parametrize("lacks", [WINDOW, STATE, PAIR])
def test_a_get_needs_a_device_block_for_every_leaf(lacks: int) -> None:
    """Without a device block for one leaf, the prefix is not loaded; -1 stands for none."""
    tiers = index()
    fill(tiers, Tier.HOST, {WINDOW: list(NUMBERS), STATE: list(NUMBERS), PAIR: [1, 3, 5, 7]})
    planner = Planner(tiers, LIMITS, rules=RULES)
    for absent in ("left out", "-1"):
        leaves = []
        for each in leaf_blocks(NEEDED):
            if each.group == lacks:
                ids = each.device_ids.copy()
                ids[-1] = NO_BLOCK
                each = each._replace(device_ids=ids)
            if each.group != lacks or absent == "-1":
                leaves.append(each)
        made = msgspec.structs.replace(asked(Operation.GET), leaves=tuple(leaves))
        planned = planner.plan(made, 1)
        assert planned.found.last == 0, absent
        assert not planned.plan.template.ops


def test_a_get_is_cut_to_a_prefix_with_device_blocks() -> None:
    """The longest prefix counts of which every leaf has a device block, found in few steps."""
    tiers = index()
    fill(tiers, Tier.HOST, {WINDOW: list(NUMBERS), STATE: list(NUMBERS), PAIR: [1, 3, 5, 7]})
    leaves = {WINDOW: [2, 3], STATE: [3], PAIR: [1, 3]}
    planned = Planner(tiers, LIMITS, rules=RULES).plan(asked(Operation.GET, leaves), 1)
    assert planned.found.last == 4
    assert moved(planned, LOAD) == {0: [0, 1, 2, 3]} | leaves
    settle(tiers, planned)


def test_leaves_that_the_device_has_are_not_moved() -> None:
    """A get from a later block on needs only leaves from there on, and the state."""
    tiers = index()
    fill(tiers, Tier.HOST, NEEDED)
    span = request(Operation.GET, *NUMBERS).span._replace(first_block=6, first_token=6)
    leaves = {WINDOW: [6, 7], STATE: [7], PAIR: [7]}
    ids = np.arange(2, dtype=np.int64)
    made = asked(Operation.GET, leaves, span=span, device_ids=ids)
    planned = Planner(tiers, LIMITS, rules=RULES).plan(made, 1)
    assert moved(planned, LOAD) == {0: [6, 7]} | leaves
    settle(tiers, planned)


@pytest.mark.parametrize("group", [0, WINDOW, STATE, PAIR])
def test_a_tier_that_is_down_shortens_what_is_found(group: int) -> None:
    """If a block of any group is only in a tier that is down, a shorter prefix is found."""
    tiers = index()
    whole = {WINDOW: list(NUMBERS), STATE: list(NUMBERS), PAIR: [1, 3, 5, 7]}
    fill(tiers, Tier.DISK, whole)
    fill(tiers, Tier.HOST, whole)
    forgotten = Positions(7, 1) if group else Positions(6, 2)
    (found,) = tiers.survey(KEYS, forgotten.first, 8, False, group)
    ids = found.block_ids[0]
    assert ids is not None
    if group:
        tiers.forget(Tier.HOST, ids)
    else:
        for other in whole:
            for each in tiers.survey(KEYS, 6, 8, False, other):
                assert each.block_ids[0] is not None
                tiers.forget(Tier.HOST, each.block_ids[0])
        tiers.forget(Tier.HOST, ids)
    planner = Planner(tiers, LIMITS, rules=RULES)
    assert planner.find(KEYS).last == 8
    planner.avoid = Avoid(unreadable=frozenset({Tier.DISK}))
    assert planner.find(KEYS).last == 6
    assert planner.peek(asked(Operation.GET)).last == 8


def test_blocks_behind_a_hit_must_be_there_for_a_draft_model() -> None:
    """With `drop`, the chain must go on behind the prefix; the leaves are those of the prefix."""
    tiers = index()
    fill(tiers, Tier.HOST, {WINDOW: list(NUMBERS), STATE: list(NUMBERS), PAIR: [1, 3, 5, 7]})
    planner = Planner(tiers, LIMITS, rules=RULES)
    assert [planner.find(KEYS, 0, drop).last for drop in (0, 1, 2, 3, 8, 9)] == [8, 6, 6, 4, 0, 0]
    leaves = {WINDOW: [4, 5], STATE: [5], PAIR: [1, 3, 5]}
    span = request(Operation.GET, *NUMBERS[:6]).span
    made = asked(Operation.GET, leaves, span=span, drop=1, device_ids=np.arange(6))
    planned = planner.plan(made, 1)
    assert planned.found.last == 6
    settle(tiers, planned)


@pytest.mark.parametrize("operation", [Operation.GET, Operation.PREFETCH])
def test_a_far_chain_without_leaves_is_of_no_use(operation: Operation) -> None:
    """If others hold only blocks of the chain, a prefix is no longer than without them."""
    far = FakeFar()
    far.hold(block_keys(KEYS))
    tiers = index()
    fill(tiers, Tier.HOST, {WINDOW: [2, 3], STATE: [3], PAIR: [1, 3]}, chain=5)
    planner = Planner(tiers, LIMITS, far, RULES)
    made = asked(operation, {WINDOW: list(NUMBERS), STATE: list(NUMBERS), PAIR: [1, 3, 5, 7]})
    planned = planner.plan(made, 1)
    assert (planned.found.last, planned.found.chain, planned.far) == (4, 5, frozenset())
    assert (planner.peek(made).last, planner.find(KEYS).last) == (4, 4)
    assert moved(planned, LOAD).keys() == ({0, 1, 2, 3} if operation is Operation.GET else set())
    settle(tiers, planned)


# -- puts -------------------------------------------------------------------------------------


def test_a_put_stores_leaves_with_the_chain_and_behind_it() -> None:
    """A put copies chain and leaves to host memory, and writes both to the SSD."""
    tiers = index()
    planner = Planner(tiers, LIMITS, rules=RULES)
    planned = planner.plan(asked(Operation.PUT), 1)
    assert moved(planned, STORE) == CHAIN | NEEDED
    settle(tiers, planned)
    assert planner.find(KEYS).last == 8
    assert tiers.group_blocks(Tier.HOST) == [8, 2, 1, 4]
    # The limit of the queue is eight blocks; the rest is owed.
    assert sum(tiers.group_blocks(Tier.DISK)) == 8
    owed = [(f.owed_to, f.positions.block_count) for f in planned.plan.fills if f.owed_to]
    assert sum(count for _, count in owed) == 7


def test_a_put_stores_only_leaves_that_are_missing() -> None:
    """Leaves that host memory has are not copied again, but written to the SSD that lacks them."""
    tiers = index()
    fill(tiers, Tier.HOST, {WINDOW: [6]})
    planned = Planner(tiers, LIMITS, rules=RULES).plan(asked(Operation.PUT, {WINDOW: [6, 7]}), 1)
    assert moved(planned, STORE) == {WINDOW: [7]}
    assert WINDOW in moved(planned, WRITE) or planned.owed
    settle(tiers, planned)
    assert tiers.group_blocks(Tier.HOST) == [8, 2, 0, 0]


def test_leaves_alone_can_be_put() -> None:
    """A put whose span is empty stores leaves of the chain that is there."""
    tiers = index()
    fill(tiers, Tier.HOST, {})
    planner = Planner(tiers, LIMITS, rules=RULES)
    span = request(Operation.PUT, *NUMBERS).span._replace(first_block=8, first_token=8)
    made = asked(Operation.PUT, span=span, device_ids=np.zeros(0, np.int64))
    planned = planner.plan(made, 1)
    assert moved(planned, STORE) == NEEDED
    settle(tiers, planned)
    assert planner.find(KEYS).last == 8


def test_leaves_of_a_chain_that_is_nowhere_are_not_stored() -> None:
    """A leaf without its block of the chain is left out: no prefix could use it."""
    tiers = index(host=6)
    planned = Planner(tiers, LIMITS, rules=RULES).plan(asked(Operation.PUT), 1)
    assert moved(planned, STORE) == {0: [0, 1, 2, 3, 4, 5]}
    assert isinstance(planned.shortfall, CapacityError)
    settle(tiers, planned)


def test_storing_leaves_evicts_no_block_that_they_hang_on() -> None:
    """A full host gives up other prompts' blocks for leaves, and none of their own prefix."""
    tiers = Residency({Tier.HOST: 16}, rules=RULES)
    other = keys(*range(50, 58))
    tiers.commit(Tier.HOST, tiers.reserve(Tier.HOST, KEYS, Positions(0, 8)))
    tiers.commit(Tier.HOST, tiers.reserve(Tier.HOST, other, Positions(0, 8)))
    planner = Planner(tiers, LIMITS, rules=RULES)
    planned = planner.plan(asked(Operation.PUT), 1)
    assert moved(planned, STORE) == NEEDED
    settle(tiers, planned)
    assert planner.find(KEYS).last == 8


def test_device_blocks_of_minus_one_are_not_stored() -> None:
    """A put leaves out leaves for which the caller has no block."""
    tiers = index()
    (leaves,) = leaf_blocks({WINDOW: [4, 5, 6, 7]})
    ids = leaves.device_ids.copy()
    ids[[0, 2]] = NO_BLOCK
    made = msgspec.structs.replace(asked(Operation.PUT), leaves=(leaves._replace(device_ids=ids),))
    planned = Planner(tiers, LIMITS, rules=RULES).plan(made, 1)
    assert moved(planned, STORE) == CHAIN | {WINDOW: [5, 7]}
    for leg, each in zip(planned.plan.template.shape.legs, planned.plan.fills, strict=True):
        if leg.group and STORE in leg.hops:
            assert each.ids[Tier.DEVICE].tolist() == [100 + at for at in each.positions]
    settle(tiers, planned)


def test_a_chain_that_is_not_filled_takes_its_leaves_along() -> None:
    """If the chain of a put does not arrive, its leaves are dropped with it."""
    tiers = index()
    planned = Planner(tiers, LIMITS, rules=RULES).plan(asked(Operation.PUT), 1)
    for op in planned.plan.template.ops:
        tiers.claims.settle(planned.plan.op_id(op), filled=op.group > 0)
    tiers.validate()
    assert tiers.group_blocks(Tier.HOST) == [0, 0, 0, 0]
    assert tiers.counts(Tier.HOST).free == 64


def test_what_a_put_would_have_to_store_begins_with_the_first_missing_block() -> None:
    """The first block that host memory lacks counts, of the chain or of a needed leaf."""
    tiers = index()
    planner = Planner(tiers, LIMITS, rules=RULES)
    assert planner.lacking_from(asked(Operation.PUT)) == 0
    fill(tiers, Tier.HOST, {STATE: [7], PAIR: [1, 3, 7]})
    assert planner.lacking_from(asked(Operation.PUT)) == 4  # the third pair
    tiers.commit(Tier.HOST, tiers.reserve(Tier.HOST, KEYS, Positions(5, 1), group=PAIR))
    assert planner.lacking_from(asked(Operation.PUT)) == 6  # the window
    tiers.commit(Tier.HOST, tiers.reserve(Tier.HOST, KEYS, Positions(6, 2), group=WINDOW))
    assert planner.lacking_from(asked(Operation.PUT)) == 8


def test_a_put_does_not_evict_the_leaf_that_it_writes_behind() -> None:
    """Leaves that are in host memory only keep their places while the put's others find theirs."""
    tiers = index(host=10)
    fill(tiers, Tier.HOST, {STATE: [7]})
    planned = Planner(tiers, PlanLimits(64, 1000), rules=RULES).plan(
        asked(Operation.PUT, {STATE: [3, 4, 5, 6, 7]}), 1
    )
    written = moved(planned, WRITE)[STATE]
    keys_of = leaf_keys(KEYS, STATE)
    for leg, each in zip(planned.plan.template.shape.legs, planned.plan.fills, strict=True):
        if leg.group == STATE and STORE not in leg.hops:
            held = tiers.keys_of(Tier.HOST, each.ids[Tier.HOST])
            assert held == b"".join(keys_of[16 * (at + 1) : 16 * (at + 2)] for at in each.positions)
    assert 7 in written
    assert 7 not in moved(planned, STORE).get(STATE, [])
    settle(tiers, planned)
