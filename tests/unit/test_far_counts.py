"""What a match says that a fetch of far blocks would bring, and how many blocks it would move."""

from __future__ import annotations

from random import Random

import pytest
from msgspec import structs

from flexkv.common.request import Operation, Request, Span
from flexkv.common.terms import Route, Tier
from flexkv.graph.draft import Avoid
from flexkv.graph.far import SetApart
from flexkv.graph.planner import Planned, Planner
from flexkv.index.residency import Residency
from flexkv.testing.fake_far import FakeFar
from tests.unit.prompts import LIMITS, keys, request
from tests.unit.test_far_prefixes import (
    EVERY,
    KEYS,
    RULES,
    STATE,
    WINDOW,
    Of,
    far_with,
    fill,
    held,
    index,
    random_case,
)
from tests.unit.test_planner_leaves import moved, settle


def prefetch(apart: SetApart, drop: int, whole: bool) -> Request:
    """Return what an engine would prefetch behind a match: a prefix of several groups `whole`."""
    first, end = apart.found.last, apart.found.last + sum(apart.far.values())
    made = request(Operation.PREFETCH, *range(end + drop))
    last = end if whole else end + drop
    span = Span(first, last, first, last)
    return structs.replace(made, span=span, drop=drop if whole else 0)


def sent(planned: Planned) -> dict[Tier, int]:
    """Return how many blocks each tier sends to host memory."""
    of = {tier: moved(planned, Route(tier, Tier.HOST)) for tier in (Tier.DISK, Tier.REMOTE)}
    return {tier: count for tier, some in of.items() if (count := sum(map(len, some.values())))}


@pytest.mark.parametrize("seed", range(300))
def test_a_match_says_what_a_fetch_of_several_groups_moves(seed: int) -> None:
    """All that the fetch moves is counted, of any group; then the prefix is as long as was said."""
    case, tiers, far = random_case(Random(seed), (1,))
    planner = Planner(tiers, LIMITS, far, case.rules)
    planner.avoid = Avoid(unreadable=case.down)
    apart = planner.find_apart(case.prompt, case.first, case.drop, with_coming=False)
    if not apart.far:
        assert (apart.fetched, apart.coming) == ({}, 0)
        return
    made = prefetch(apart, case.drop, whole=True)
    places = sum(apart.fetched.values())
    assert planner.most_places(made) >= places
    assert case.down or planner.places_wanted(made) == places
    planned = planner.plan(made, 1)
    assert sent(planned) == apart.fetched
    coming = planner.find_apart(case.prompt, case.first, case.drop, with_coming=False)
    assert coming.coming == apart.fetched[Tier.REMOTE]
    settle(tiers, planned)
    end = planner.find(case.prompt, case.first, case.drop).last
    assert end == apart.found.last + sum(apart.far.values())


@pytest.mark.parametrize("seed", range(200))
def test_a_match_says_what_a_fetch_of_one_group_moves(seed: int) -> None:
    """Blocks to be dropped must be there, too: the hit grows by fewer blocks than are fetched."""
    chance = Random(seed)
    blocks, drop = chance.randint(1, 12), chance.choice([0, 1, 2])
    prompt, local = keys(*range(blocks)), chance.randint(0, blocks)
    tiers, far = Residency({Tier.HOST: 64, Tier.DISK: 64}), FakeFar()
    split = chance.randint(0, local)
    for tier, at in ((Tier.HOST, range(split)), (Tier.DISK, range(split, local))):
        if at:
            fill(tiers, tier, {0: list(at)}, prompt)
    reach = chance.randint(0, blocks)
    far.hold(held({0: list(range(reach))}, prompt))
    planner = Planner(tiers, LIMITS, far)
    apart = planner.find_apart(prompt, 0, drop, with_coming=False)
    assert apart.found.last == max(0, local - drop)
    assert sum(apart.far.values()) == max(0, max(reach, local) - drop) - apart.found.last
    if not apart.far:
        assert (apart.fetched, apart.coming) == ({}, 0)
        return
    assert apart.fetched == {Tier.REMOTE: reach - local}
    planned = planner.plan(prefetch(apart, drop, whole=False), 1)
    assert moved(planned, Route(Tier.REMOTE, Tier.HOST)) == {0: list(range(local, reach))}
    coming = planner.find_apart(prompt, 0, drop, with_coming=False)
    assert (coming.far, coming.fetched) == (apart.far, apart.fetched)
    assert coming.coming == reach - local
    settle(tiers, planned)
    end = apart.found.last + sum(apart.far.values())
    assert planner.find(prompt, 0, drop).last == end


def apart(tiers: Residency, far: FakeFar, drop: int = 0) -> SetApart:
    """Return what a match of the prompt tells apart."""
    return Planner(tiers, LIMITS, far, RULES).find_apart(KEYS, 0, drop, with_coming=False)


def test_a_match_tells_far_blocks_apart() -> None:
    """An engine is offered what is here, and told how much of the chain a prefetch would add."""
    tiers = index({0: [0, 1, 2, 3], WINDOW: [0, 1], STATE: [1]})
    of: Of = {0: [4, 5], WINDOW: [2, 3, 4, 5], STATE: [3, 5]}
    for some, drop, gain, fetched in (
        ({}, 0, {}, {}),
        (of | {STATE: []}, 0, {}, {}),
        (of, 0, {Tier.HOST: 2, Tier.REMOTE: 2}, {Tier.REMOTE: 5}),
        (of, 1, {Tier.HOST: 2}, {Tier.REMOTE: 4}),
    ):
        found, behind, moves, coming = apart(tiers, far_with(some), drop)
        assert (found.last, behind, moves, coming) == (2, gain, fetched, 0)
    pending = Planner(tiers, LIMITS, far_with(of), RULES).find_apart(KEYS, 0, 0, with_coming=True)
    assert (pending.found.last, pending.far) == (2, {Tier.HOST: 2, Tier.REMOTE: 2})


@pytest.mark.parametrize("group", [0, WINDOW, STATE])
def test_what_is_coming_from_far_is_not_offered(group: int) -> None:
    """While a block of any group is being fetched, the prefix that needs it counts as far."""
    here = {of: [at for at in some if of != group or at < 6] for of, some in EVERY.items()}
    if group == 0:
        here |= {of: [at for at in some if at < 6] for of, some in EVERY.items()}
    tiers, far = index(here), far_with(EVERY)
    planner = Planner(tiers, LIMITS, far, RULES)
    planned = planner.plan(request(Operation.PREFETCH, *range(8)), 1)
    fetched = {0: 2 + 2 + 1, WINDOW: 2, STATE: 1}[group]
    assert sent(planned) == {Tier.REMOTE: fetched}
    tier = Tier.HOST if group else Tier.REMOTE
    found, behind, moves, coming = apart(tiers, far)
    assert (found.last, behind, moves, coming) == (6, {tier: 2}, {Tier.REMOTE: fetched}, fetched)
    assert planner.find_apart(KEYS, 0, 0, with_coming=True).found.last == 8
    settle(tiers, planned)
    assert apart(tiers, far)[1:] == ({}, {}, 0)


def test_a_tier_that_is_down_promises_nothing() -> None:
    """Far leaves are not counted on while their tier is down."""
    tiers, far = index({0: list(range(8))}), far_with(EVERY)
    planner = Planner(tiers, LIMITS, far, RULES)
    told = planner.find_apart(KEYS, 0, 0, with_coming=False)
    assert (told.far, told.fetched) == ({Tier.HOST: 8}, {Tier.REMOTE: 3})
    planner.avoid = Avoid(unreadable=frozenset({Tier.REMOTE}))
    assert planner.find_apart(KEYS, 0, 0, with_coming=False).far == {}
