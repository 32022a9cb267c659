"""Tests which prefixes of a model with several KV groups a load brings, if some blocks are far.

The right answer is found by trying every prefix, block by block.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from random import Random

import numpy as np
import pytest
from msgspec import structs

from flexkv.common.request import LeafBlocks, Operation
from flexkv.common.space import GroupRule, Kind
from flexkv.common.terms import Positions, Route, Tier, positions_of
from flexkv.graph.draft import Avoid
from flexkv.graph.leaves import LeafFinder, Prefix
from flexkv.graph.planner import Planned, Planner
from flexkv.index.catalogue import NOTHING_IS_FAR, Sought
from flexkv.index.claims import Claim, Holding
from flexkv.index.found import Found, Placement
from flexkv.index.keys import block_keys, leaf_keys
from flexkv.index.residency import Residency
from flexkv.testing.fake_far import FakeFar
from tests.unit.prompts import LIMITS, keys, request
from tests.unit.test_planner_leaves import LOAD, leaf_blocks, moved, settle

WINDOW, STATE = 1, 2
RULES = (
    GroupRule(WINDOW, Kind.WINDOW, 3, 1, 1),  # the last two blocks
    GroupRule(STATE, Kind.STATE, 0, 1, 1),
)
BLOCKS = 8
KEYS = keys(*range(BLOCKS))
FETCH = Route(Tier.REMOTE, Tier.HOST)
Of = dict[int, list[int]]
"""The positions, in the chain, of some blocks of each group."""


def held(of: Of, prompt: bytes = KEYS) -> list[bytes]:
    """Return the keys of some blocks of a prompt."""
    return [block_keys(leaf_keys(prompt, group))[at] for group, some in of.items() for at in some]


def index(here: Of, tier: Tier = Tier.HOST, host: int = 64) -> Residency:
    """Return an index with some blocks of the prompt READY in a tier."""
    tiers = Residency({Tier.HOST: host, Tier.DISK: 64}, rules=RULES)
    fill(tiers, tier, here)
    return tiers


def fill(tiers: Residency, tier: Tier, here: Of, prompt: bytes = KEYS) -> None:
    """Make some blocks READY in a tier; the chain comes first."""
    for group, at in sorted(here.items()):
        positions = positions_of(np.array(at, np.int64))
        ids = tiers.reserve(tier, prompt, positions, group=group)
        assert len(ids) == len(at)
        tiers.commit(tier, ids)


def far_with(of: Of, span_blocks: int = 1) -> FakeFar:
    """Return a far tier that has some blocks."""
    far = FakeFar(span_blocks=span_blocks)
    far.hold(held(of))
    return far


def positions_in(placed: dict[Tier, Placement]) -> dict[Tier, list[int]]:
    """Return positions by tier."""
    return {tier: list(placement.positions) for tier, placement in placed.items()}


@dataclass
class Case:
    """What a random prompt's prefixes need, and where its blocks are.

    Attributes:
        usable: for each block of the chain (0) or leaf that can be loaded from here: where it is.
        far: blocks that are said to be far, by group.
        device: leaves for which the request has a device block; None for a prefetch.
        down: tiers that cannot be read.
    """

    rules: tuple[GroupRule, ...]
    prompt: bytes
    first: int
    drop: int
    span_blocks: int
    usable: dict[tuple[int, int], Tier]
    far: set[tuple[int, int]]
    device: set[tuple[int, int]] | None
    down: frozenset[Tier]

    @property
    def blocks(self) -> int:
        """Return the length of the prompt."""
        return len(self.prompt) // 16 - 1

    def chain_is_there(self, end: int) -> bool:
        """Return whether the chain that a prefix needs can be loaded, or lies far behind that.

        Blocks that are dropped behind it must be here for a load to a device.
        """
        local, last = self.first, end + self.drop
        while (0, local) in self.usable:
            local += 1
        if self.drop and self.device is not None and last > local:
            return False
        size = self.span_blocks
        ends = [(at // size + 1) * size - 1 for at in range(local, last)]
        return all((0, end) in self.far and end < self.blocks for end in ends)

    def leaves(self, rule: GroupRule, end: int) -> list[int]:
        """Return the positions of the leaves of a group that a prefix needs."""
        return [(own + 1) * rule.ratio - 1 for own in range(*rule.needed(self.first, end))]

    def is_whole(self, end: int) -> bool:
        """Return whether a load can bring the prefix."""
        if not self.chain_is_there(end):
            return False
        needed = [(rule.group, at) for rule in self.rules for at in self.leaves(rule, end)]
        return all(
            (each in self.usable or each in self.far)
            and (self.device is None or each in self.device)
            for each in needed
        )

    def longest(self) -> int:
        """Return where the longest prefix ends."""
        step = lcm(*(rule.ratio for rule in self.rules))
        ends = range(step, self.blocks - self.drop + 1, step)
        return max([end for end in ends if end > self.first and self.is_whole(end)], default=0)


def random_case(
    random: Random, span_blocks: tuple[int, ...] = (1, 2, 4)
) -> tuple[Case, Residency, FakeFar]:
    """Return a random case, the index of what is here, and the far tier."""
    rules = []
    for group in range(1, random.randint(2, 4)):
        ratio, kind = random.choice([1, 1, 2, 3]), random.choice(list(Kind))
        window = random.randint(1, 24) if kind in (Kind.WINDOW, Kind.CHUNK) else 0
        rules.append(GroupRule(group, kind, window, ratio, 4 * ratio))
    blocks, size = random.randint(1, 24), random.choice(span_blocks)
    prompt = keys(*range(blocks))
    tiers, far = Residency({Tier.HOST: 200, Tier.DISK: 200}, rules=rules), FakeFar(span_blocks=size)
    local = random.randint(0, blocks)
    split = random.randint(0, local)
    usable = {(0, at): Tier.HOST if at < split else Tier.DISK for at in range(local)}
    share = random.choice([0.1, 0.5, 0.9])
    for rule in rules:
        for at in range(rule.ratio - 1, local, rule.ratio):
            if random.random() < share:
                usable[rule.group, at] = random.choice([Tier.HOST, Tier.DISK])
    for group in range(len(rules) + 1):
        for tier in (Tier.HOST, Tier.DISK):
            at = [at for (of, at), where in usable.items() if (of, where) == (group, tier)]
            if at:
                fill(tiers, tier, {group: sorted(at)}, prompt)
    reach = random.randint(0, blocks)
    is_far = {(0, at) for at in range(reach)}
    is_far |= {
        (rule.group, at)
        for rule in rules
        for at in range(rule.ratio - 1, reach, rule.ratio)
        if random.random() < random.choice([0.8, 1.0])
    }
    far.hold([block_keys(leaf_keys(prompt, group))[at] for group, at in is_far])
    device = None
    if random.random() < 0.5:
        device = {
            (rule.group, at)
            for rule in rules
            for at in range(rule.ratio - 1, blocks, rule.ratio)
            if random.random() < 0.9
        }
    first = random.choice([0, random.randint(0, local)])
    first -= first % lcm(*(rule.ratio for rule in rules))
    drop = min(random.choice([0, 0, 1, 2]), blocks - first)
    down = frozenset(random.choice([[], [], [Tier.DISK]]))
    usable = {each: tier for each, tier in usable.items() if tier not in down}
    case = Case(tuple(rules), prompt, first, drop, size, usable, is_far, device, down)
    return case, tiers, far


def prefix_of(case: Case) -> Prefix:
    """Return what a request of a case asks for."""
    leaves = None
    if case.device is not None:
        leaves = tuple(
            LeafBlocks(rule.group, positions_of(np.array(at, np.int64)), np.array(at, np.int64))
            for rule in case.rules
            if (at := sorted(at for group, at in case.device if group == rule.group))
        )
    return Prefix(case.prompt, case.first, case.blocks - case.drop, case.drop, leaves)


@pytest.mark.parametrize("seed", range(400))
def test_the_longest_whole_prefix_is_found(seed: int) -> None:
    """What is found is the longest whole prefix, and names each of its blocks once, where it is."""
    case, tiers, far = random_case(Random(seed))
    finder, avoid = LeafFinder(tiers, case.rules, far), Avoid(unreadable=case.down)
    near = LeafFinder(tiers, case.rules, NOTHING_IS_FAR).find(prefix_of(case), avoid)
    found = finder.find_with_far(prefix_of(case), avoid).found
    assert found.last == max(case.longest(), case.first)
    assert found.last >= near.last == finder.find(prefix_of(case), avoid).last
    check_places(case, found)
    dropped = [at for placed in found.dropped.values() for at in placed.positions]
    here = [at for at in range(case.blocks) if (0, at) in case.usable]
    if found.last > near.last:
        assert dropped == [at for at in range(found.last, found.last + case.drop) if at not in here]


def check_places(case: Case, found: Found) -> None:
    """Check that what was found is all that the prefix needs, each block where it is."""
    groups = {0: (found.ready, list(range(case.first, found.last)))}
    for rule in case.rules:
        groups[rule.group] = ({}, case.leaves(rule, found.last))
    for leaves in found.leaves:
        groups[leaves.group] = (leaves.ready, groups[leaves.group][1])
    for group, (ready, needed) in groups.items():
        placed = positions_in(ready)
        assert sorted(at for some in placed.values() for at in some) == needed, group
        for tier, some in placed.items():
            for at in some:
                assert case.usable.get((group, at), Tier.REMOTE) == tier
                assert tier is not Tier.REMOTE or group == 0 or (group, at) in case.far


def test_a_catalogue_is_asked_about_prefixes_that_are_not_found() -> None:
    """A search tells what it has found, where the chain ends that is here, and what it wants."""
    tiers = index({0: [0, 1, 2], WINDOW: [0, 1], STATE: [1]})
    far = far_with({0: list(range(6))})
    prefix = Prefix(KEYS, 0, BLOCKS - 1, 1)
    finder = LeafFinder(tiers, RULES, far)
    assert finder.find_with_far(prefix).found.last == 2
    assert far.sought == Sought(KEYS, 2, 3, BLOCKS - 1, 1)
    far.sought = None
    finder.find_with_far(prefix, before=5)  # a shorter one, for which there might be room
    assert far.sought is None


def test_a_catalogue_is_not_asked_for_more_than_is_wanted() -> None:
    """A search that finds the longest prefix has nothing to ask."""
    far = far_with({0: list(range(8)), WINDOW: [6, 7], STATE: [7]})
    found = LeafFinder(index({0: [0]}), RULES, far).find_with_far(Prefix(KEYS, 0, BLOCKS)).found
    assert found.last == BLOCKS
    assert far.sought is None


# -- plans ------------------------------------------------------------------------------------

EVERY: Of = {0: list(range(8)), WINDOW: list(range(8)), STATE: list(range(8))}
NEEDED: Of = {0: list(range(8)), WINDOW: [6, 7], STATE: [7]}


def plan(tiers: Residency, far: FakeFar, operation: Operation, near: bool = False) -> Planned:
    """Plan a load of the prompt."""
    made = request(operation, *range(BLOCKS))
    if operation is Operation.GET:
        leaves = leaf_blocks({group: at for group, at in EVERY.items() if group})
        made = structs.replace(made, leaves=leaves)
    return Planner(tiers, LIMITS, far, RULES).plan(made, 1, near)


@pytest.mark.parametrize("operation", [Operation.GET, Operation.PREFETCH])
def test_a_load_fetches_far_leaves_beside_the_far_chain(operation: Operation) -> None:
    """Blocks of any group that are not here come from far, others from where they are."""
    tiers, far = index({0: [0, 1, 2], WINDOW: [2], STATE: [2]}), far_with(EVERY)
    planned = plan(tiers, far, operation)
    assert moved(planned, FETCH) == {0: [3, 4, 5, 6, 7], WINDOW: [6, 7], STATE: [7]}
    assert planned.far == {Tier.REMOTE}
    onward = NEEDED if operation is Operation.GET else {}
    assert moved(planned, LOAD) == onward
    for leg, fill_ in zip(planned.plan.template.shape.legs, planned.plan.fills, strict=True):
        if leg.group:
            assert fill_.keys == leaf_keys(KEYS, leg.group)
    settle(tiers, planned)
    assert Planner(tiers, LIMITS, rules=RULES).find(KEYS).last == 8


def test_a_load_that_must_be_near_fetches_nothing() -> None:
    """A plan with `near` is that of an engine without a far tier."""
    tiers, far = index({0: [0, 1, 2], WINDOW: [1, 2], STATE: [2]}), far_with(EVERY)
    planned = plan(tiers, far, Operation.GET, near=True)
    assert (planned.found.last, planned.far, moved(planned, FETCH)) == (3, frozenset(), {})
    settle(tiers, planned)


def test_without_room_for_a_far_prefix_a_shorter_one_is_loaded() -> None:
    """A prefix of n blocks needs n + 3 places; the longest for which there is room is fetched."""
    for host in range(12):
        tiers, far = index({}, host=host), far_with(EVERY)
        planned = plan(tiers, far, Operation.GET)
        expected = max([n for n in range(1, 9) if n + min(n, 2) + 1 <= host], default=0)
        assert planned.found.last == expected
        settle(tiers, planned)
        assert tiers.counts(Tier.HOST).reserved == 0


def test_the_block_before_what_is_fetched_keeps_its_place() -> None:
    """A load of far blocks from a later block on evicts none that they continue."""
    tiers, far = index({0: [0, 1]}, host=8), far_with(EVERY)
    made = request(Operation.PREFETCH, *range(BLOCKS))
    made = structs.replace(made, span=made.span._replace(first_block=2, first_token=2))
    planned = Planner(tiers, LIMITS, far, RULES).plan(made, 1)
    # There are six places left: for three blocks, two of the window, and a state.
    assert planned.found.last == 5
    settle(tiers, planned)
    assert tiers.group_blocks(Tier.HOST) == [5, 2, 1]


@pytest.mark.parametrize("host", range(8, 16))
def test_what_is_here_before_dropped_blocks_that_are_far_keeps_its_place(host: int) -> None:
    """The blocks to be dropped are partly here: none of these is evicted for the others."""
    tiers = index({0: list(range(6))}, host=host)
    far = far_with({0: list(range(8)), WINDOW: [2, 3], STATE: [3]})
    made = structs.replace(request(Operation.PREFETCH, *range(8)), drop=4)
    planned = Planner(tiers, LIMITS, far, RULES).plan(made, 1)
    assert planned.found.last in (0, 4)
    settle(tiers, planned)
    assert tiers.group_blocks(Tier.HOST)[0] >= 6
    assert tiers.counts(Tier.HOST).reserved == 0


def test_a_prefetch_brings_the_blocks_that_a_draft_model_drops() -> None:
    """The chain is brought as far behind the prefix as a match asks for."""
    tiers, far = index({}), far_with(EVERY | {STATE: [5]})
    made = request(Operation.PREFETCH, *range(BLOCKS))
    span = made.span._replace(last_block=6, last_token=6)
    planner = Planner(tiers, LIMITS, far, RULES)
    planned = planner.plan(structs.replace(made, span=span, drop=2), 1)
    assert planned.found.last == 6
    assert moved(planned, FETCH) == {0: list(range(8)), WINDOW: [4, 5], STATE: [5]}
    settle(tiers, planned)
    assert planner.find(KEYS, 0, 2).last == 6


def test_no_chunk_of_the_far_chain_divides_a_span() -> None:
    """The chain of a model with leaves is fetched by spans, as any other."""
    tiers, far = index({0: [0]}), far_with(EVERY, span_blocks=4)
    planned = plan(tiers, far, Operation.GET)
    (fetched,) = (
        fill_
        for leg, fill_ in zip(planned.plan.template.shape.legs, planned.plan.fills, strict=True)
        if leg.group == 0 and FETCH in leg.hops
    )
    assert all((fetched.positions.first + at) % 4 == 0 for at in fetched.bounds[1:])
    settle(tiers, planned)


@pytest.mark.parametrize("group", [0, WINDOW, STATE])
def test_what_hangs_on_its_way_is_not_waited_for(group: int) -> None:
    """A prefix ends before a block that a hung op is filling; no other op fetches the block."""
    here = {of: [at for at in some if at < 4] for of, some in EVERY.items()}
    tiers, far = index(here | {0: list(range(4 if group == 0 else 6))}), far_with(EVERY)
    ids = tiers.reserve(Tier.HOST, KEYS, Positions(4 if group == 0 else 5, 1), group=group)
    tiers.claims.open(77, Claim(5, None, Holding(Tier.HOST, ids)))
    finder, prefix = LeafFinder(tiers, RULES, far), Prefix(KEYS, 0, 6)
    assert finder.find_with_far(prefix).found.last == 6
    hangs = Avoid(fillers=frozenset({77}))
    assert finder.find_with_far(prefix, hangs).found.last == (5 if group else 4)
    tiers.claims.settle(77, filled=False)
    assert finder.find_with_far(prefix, hangs).found.last == 6
