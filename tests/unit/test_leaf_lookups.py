"""Lookups of leaves in a store that cannot be listed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from flexkv.common.errors import MissingBlockError, RemoteError
from flexkv.common.space import GroupRule, Kind
from flexkv.common.terms import BlockNames, Positions, Route, Tier, Transfer
from flexkv.index.catalogue import Sought
from flexkv.index.hints import STORE
from flexkv.index.keys import block_keys, leaf_keys
from flexkv.tiers.remote_lookups import COUNTS_S, WAIT_S
from tests.remote_rigs import POOL, PROMPT, span_key
from tests.unit.lookups_rig import BLOCKS, NOWHERE, G, Rig, sought, with_rig

WINDOW, STATE = 1, 2
RULES = (
    GroupRule(WINDOW, Kind.WINDOW, 4, 1, 1),  # the last three blocks
    GroupRule(STATE, Kind.STATE, 0, G, G),
)
LEAVES = {group: block_keys(leaf_keys(PROMPT, group)) for group in (WINDOW, STATE)}


def names(*spans: int, windows: Sequence[int] = (), states: Sequence[int] = ()) -> set[str]:
    """Return the names of spans of the chain, and of leaves by their positions."""
    keys = [span_key(span) for span in spans]
    keys += [LEAVES[WINDOW][at] for at in windows] + [LEAVES[STATE][at] for at in states]
    return {POOL.object_name(key) for key in keys}


def known_leaves(rig: Rig, group: int) -> list[int]:
    """Return the positions of the leaves of a group that hints name."""
    return [at for at, key in enumerate(LEAVES[group]) if rig.hints.known(STORE, key)[0]]


def match(rig: Rig, first: int = 0, last: int = BLOCKS) -> None:
    """Seek longer prefixes, as a match does that has found `first` blocks."""
    rig.far(first, last)
    rig.catalogue.ask(Sought(PROMPT, first, first, last), NOWHERE)


def test_leaves_are_asked_for_once_the_chain_is_known() -> None:
    """One match is enough: the leaves that the longest prefix of the chain needs come with it."""

    async def work(rig: Rig) -> None:
        at = 3 * G
        rig.store.there = names(0, 1, 2, windows=range(at), states=[at - 1])
        match(rig)
        await asyncio.sleep(0.01)
        assert rig.known() == [0, 1, 2]
        assert set(range(at - 3, at)) <= set(known_leaves(rig, WINDOW))
        assert known_leaves(rig, STATE) == [at - 1]
        assert len(rig.store.asked) == 2
        assert rig.store.asked[0] == 5

    with_rig(work, RULES)


def test_without_a_chain_no_leaf_is_asked_for() -> None:
    """Leaves whose chain nobody has are of no use."""

    async def work(rig: Rig) -> None:
        rig.store.there = names(windows=range(BLOCKS), states=range(BLOCKS))
        match(rig)
        await asyncio.sleep(0.01)
        assert rig.store.asked == [5]

    with_rig(work, RULES)


def test_a_chain_that_is_here_is_not_asked_for() -> None:
    """Where the chain is here or known, only leaves are asked for."""

    async def work(rig: Rig) -> None:
        rig.store.there = names(windows=range(BLOCKS), states=[BLOCKS - 1])
        rig.hints.note(STORE, b"".join(map(span_key, range(2, 5))))
        rig.catalogue.ask(Sought(PROMPT, 0, 2 * G, BLOCKS), NOWHERE)
        await asyncio.sleep(0.01)
        assert known_leaves(rig, STATE) == [BLOCKS - 1]
        assert len(rig.store.asked) == 1

    with_rig(work, RULES)


def test_matches_of_one_prompt_ask_for_its_leaves_once() -> None:
    """An answer counts for some seconds, whatever was missing; then what others stored is found."""

    async def work(rig: Rig) -> None:
        rig.store.there = names(0, 1, 2)
        for _ in range(20):
            match(rig)
            await asyncio.sleep(0.1)
        asked = list(rig.store.asked)
        assert asked[0] == 5
        assert sum(asked[1:]) <= 3 * G + 3  # each leaf once
        rig.store.there |= names(windows=range(3 * G), states=[2 * G - 1])
        await asyncio.sleep(COUNTS_S)
        match(rig)
        await asyncio.sleep(0.1)
        assert known_leaves(rig, STATE) == [2 * G - 1]

    with_rig(work, RULES)


def test_a_load_waits_for_the_leaves_too() -> None:
    """What a load may wait for ends when the last leaf is known, not with the chain's answer."""

    async def work(rig: Rig) -> None:
        rig.store.there = names(*range(5), windows=range(BLOCKS), states=[BLOCKS - 1])
        rig.store.takes_s = WAIT_S / 4
        answered = rig.lookups.look_up(sought())
        assert answered is not None
        await answered
        assert known_leaves(rig, STATE) == [BLOCKS - 1]
        assert rig.lookups.look_up(sought()) is None

    with_rig(work, RULES)


def test_who_asks_for_leaves_that_are_being_asked_for_joins_in() -> None:
    """Matches and loads of one prompt share one lookup of its leaves."""

    async def work(rig: Rig) -> None:
        rig.store.there = names(*range(5), windows=range(BLOCKS), states=[BLOCKS - 1])
        rig.store.takes_s = 0.02
        match(rig)
        await asyncio.sleep(0.03)  # the chain is known, and its leaves are being asked for
        assert rig.known() == list(range(5))
        answered = rig.lookups.look_up(sought())
        assert answered is not None
        await answered
        assert known_leaves(rig, STATE) == [BLOCKS - 1]
        assert len(rig.store.asked) == 2

    with_rig(work, RULES)


def test_a_missing_leaf_makes_the_others_doubtful() -> None:
    """After a miss the rest of the leaves are asked for at once, and nothing else."""

    async def work(rig: Rig) -> None:
        rig.hints.note(STORE, b"".join(LEAVES[WINDOW][4:9]))
        rig.store.there = names(windows=[4, 7])
        places = np.array([5, 6, 7, 8])
        names_ = BlockNames(leaf_keys(PROMPT, WINDOW), Positions(5, 4))
        route = Route(Tier.REMOTE, Tier.HOST)
        lost = Transfer(1, 0, route, places * 0, places, names=names_, group=WINDOW)
        rig.catalogue.doubt(lost, MissingBlockError(1, str(route), 1, "gone"))
        assert known_leaves(rig, WINDOW) == [4, 6, 7, 8]
        await asyncio.sleep(0.01)
        assert known_leaves(rig, WINDOW) == [4, 7]
        assert rig.store.asked == [4]

    with_rig(work, RULES)


def test_a_missing_span_makes_the_leaves_of_its_blocks_doubtful() -> None:
    """Without their chain, leaves are of no use; those that hints name are asked for with it."""

    async def work(rig: Rig) -> None:
        rig.hints.note(STORE, b"".join(map(span_key, range(5))))
        rig.hints.note(STORE, b"".join(LEAVES[WINDOW][G - 1 : G + 3]))
        rig.store.there = names(0)
        places = np.arange(BLOCKS - G)
        names_ = BlockNames(PROMPT, Positions(G, BLOCKS - G))
        route = Route(Tier.REMOTE, Tier.HOST)
        lost = Transfer(1, 0, route, places * 0, places, names=names_)
        rig.catalogue.doubt(lost, MissingBlockError(1, str(route), 1, "gone"))
        await asyncio.sleep(0.01)
        assert rig.known() == [0]
        assert known_leaves(rig, WINDOW) == [G - 1]
        assert rig.store.asked == [4 + 3]

    with_rig(work, RULES)


def test_leaves_of_a_store_that_fails_are_asked_for_again_later() -> None:
    """An error ends a lookup of leaves; nobody waits for it, and later the answer comes."""

    async def work(rig: Rig) -> None:
        rig.hints.note(STORE, b"".join(map(span_key, range(5))))
        rig.store.error = RemoteError("a store", "exist", "broken")
        answered = rig.lookups.ask(sought())
        assert answered is not None
        await answered
        assert rig.lookups.ask(sought()) is None
        rig.store.error = None
        rig.store.there = names(states=[BLOCKS - 1])
        await asyncio.sleep(COUNTS_S)
        rig.lookups.ask(sought())
        await asyncio.sleep(0.01)
        assert known_leaves(rig, STATE) == [BLOCKS - 1]

    with_rig(work, RULES)


def test_leaves_that_nodes_have_are_not_asked_for() -> None:
    """What another node is said to have comes from there."""

    async def work(rig: Rig) -> None:
        rig.hints.note(STORE, b"".join(map(span_key, range(5))))
        rig.hints.note(1, b"".join([*LEAVES[WINDOW][-3:], LEAVES[STATE][BLOCKS - 1]]))
        assert rig.lookups.ask(sought()) is None
        assert rig.store.asked == []

    with_rig(work, RULES)


def test_a_tier_that_is_down_is_not_asked_for_leaves() -> None:
    """A match that must avoid the tier asks nothing."""

    async def work(rig: Rig) -> None:
        rig.hints.note(STORE, b"".join(map(span_key, range(5))))
        rig.catalogue.ask(sought(), {Tier.REMOTE})
        await asyncio.sleep(0.01)
        assert rig.store.asked == []

    with_rig(work, RULES)
