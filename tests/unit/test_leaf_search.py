"""Which leaves a store is asked for that cannot be listed."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from numpy.typing import NDArray

from flexkv.common.space import GroupRule, Kind
from flexkv.common.terms import BlockKey
from flexkv.graph.leaf_search import ENDS_MAX, ROUNDS_MAX, SHORTER, LeafSearch
from flexkv.index.catalogue import Sought
from flexkv.index.keys import block_keys, key_list, leaf_keys
from tests.unit.prompts import keys

WINDOW, STATE = 1, 2
ROOM = 1000
LONG = keys(*range(6000))


def state(group: int = STATE, ratio: int = 1) -> GroupRule:
    """Return the rule of a group of states."""
    return GroupRule(group, Kind.STATE, 0, ratio, ratio)


def window(blocks: int) -> GroupRule:
    """Return the rule of a window of so many blocks."""
    return GroupRule(WINDOW, Kind.WINDOW, blocks + 1, 1, 1)


class Asked:
    """A search that was carried out, and what it has asked for.

    Attributes:
        rounds: the keys of each round.
        known: all leaves that are known to be there.
    """

    def __init__(
        self,
        rules: list[GroupRule],
        sought: Sought,
        there: set[BlockKey],
        known: set[BlockKey] = frozenset(),  # type: ignore[assignment]
        room: int = ROOM,
    ) -> None:
        def are_known(leaves: bytes) -> NDArray[np.bool_]:
            return np.array([key in known for key in key_list(leaves)], np.bool_)

        search = LeafSearch(rules, sought, are_known)
        self.rounds: list[list[BlockKey]] = []
        while not search.is_over:
            self.rounds.append(search.wanted(room))
            search.heard(there)
        assert search.wanted(room) == []
        self.all = [key for each in self.rounds for key in each]
        self.known = set(known) | (there & set(self.all))


def leaf(rule: GroupRule, own: int, prompt: bytes = LONG) -> BlockKey:
    """Return the key of one of a group's own blocks."""
    return block_keys(leaf_keys(prompt, rule.group))[(own + 1) * rule.ratio - 1]


def needs(rule: GroupRule, end: int, prompt: bytes = LONG) -> set[BlockKey]:
    """Return the keys of the leaves that a prefix needs."""
    of_group = block_keys(leaf_keys(prompt, rule.group))
    return {of_group[(own + 1) * rule.ratio - 1] for own in range(*rule.needed(0, end))}


def sought(last: int, first: int = 0, prompt: bytes = LONG) -> Sought:
    """Return prefixes whose chain is there."""
    return Sought(prompt, first, last, last)


def longest(rules: list[GroupRule], ends: range, has: set[BlockKey], prompt: bytes) -> int:
    """Return where the longest prefix ends that has all its leaves; 0 if none has."""
    whole = [end for end in ends if all(needs(rule, end, prompt) <= has for rule in rules)]
    return max(whole, default=0)


@pytest.mark.parametrize("seed", range(150))
def test_the_longest_whole_prefix_becomes_known(seed: int) -> None:
    """What is known after a search makes the longest prefix whole that is whole in the store.

    No leaf is asked for in vain: a prefix that may still be whole needs it, and it was not known.
    """
    random = Random(seed)
    rules = []
    for group in range(1, random.randint(2, 4)):
        ratio, kind = random.choice([1, 1, 2, 3]), random.choice(list(Kind))
        size = random.randint(1, 24) if kind in (Kind.WINDOW, Kind.CHUNK) else 0
        rules.append(GroupRule(group, kind, size, ratio, 4 * ratio))
    blocks = random.randint(1, 40)
    prompt, first = keys(*range(blocks)), random.randint(0, blocks // 2)
    every = [leaf(rule, own, prompt) for rule in rules for own in range(blocks // rule.ratio)]
    share = random.choice([0.5, 0.9, 1.0])
    there = {key for key in every if random.random() < share}
    known = {key for key in there if random.random() < random.choice([0.0, 0.7])}
    found = Asked(rules, sought(blocks, first, prompt), there, known, random.choice([20, ROOM]))
    step = int(np.lcm.reduce([rule.ratio for rule in rules]))
    ends = range(first // step * step + step, blocks + 1, step)
    if len(found.rounds) < ROUNDS_MAX:
        assert longest(rules, ends, found.known, prompt) == longest(rules, ends, there, prompt)
    assert len(set(found.all)) == len(found.all)
    needed = [{key for rule in rules for key in needs(rule, end, prompt)} for end in ends]
    missing: set[BlockKey] = set()
    for asked in found.rounds:
        assert asked
        assert set(asked) <= {key for of in needed if not of & missing for key in of} - known
        missing |= set(asked) - there


def test_a_prefix_that_is_whole_takes_one_round() -> None:
    """If the longest prefix is whole, its leaves are asked for, and a few of shorter ones."""
    rules = [window(100), state()]
    there = {leaf(rule, own) for rule in rules for own in range(1000)}
    found = Asked(rules, sought(1000), there)
    (only,) = found.rounds
    needed = needs(rules[0], 1000) | needs(rules[1], 1000)
    assert needed <= set(only)
    assert len(only) == len(needed) + SHORTER


def test_shorter_prefixes_are_known_when_a_leaf_turns_out_to_be_gone() -> None:
    """After the first round, a prefix one block shorter, and some more, are known to be whole."""
    rules = [window(100), state()]
    there = {leaf(rule, own) for rule in rules for own in range(1000)}
    found = Asked(rules, sought(1000), there)
    for end in range(1000 - SHORTER // 2, 1000):
        assert longest(rules, range(end, end + 1), found.known, LONG) == end


def test_nothing_is_asked_for_where_all_is_known() -> None:
    """A prefix whose leaves hints name needs no request, nor does one that no boundary allows."""
    rules = [state()]
    assert Asked(rules, sought(50), set(), {leaf(rules[0], 49)}).rounds == []
    assert Asked([state(ratio=8)], sought(31, 24), set()).rounds == []
    assert Asked(rules, sought(50, 50), set()).rounds == []


@pytest.mark.parametrize("at", [999, 940, 700, 100])
def test_a_state_far_from_the_end_is_found_in_a_few_rounds(at: int) -> None:
    """Each round tries more of the shorter prefixes; the windows that they need come with them."""
    rules = [window(10), state()]
    there = {leaf(rules[0], own) for own in range(1000)} | {leaf(rules[1], at)}
    found = Asked(rules, sought(1000), there)
    assert longest(rules, range(1, 1001), found.known, LONG) == at + 1
    assert len(found.rounds) <= 6


@pytest.mark.parametrize("room", [1, 10, ROOM])
def test_a_search_ends(room: int) -> None:
    """If nothing is there, a limited number of leaves is asked for, each once."""
    rules = [window(3000), state(), GroupRule(3, Kind.FULL, 0, 1, 1)]
    found = Asked(rules, sought(5999), set(), room=room)
    assert len(found.rounds) <= ROUNDS_MAX
    assert max(map(len, found.rounds)) <= room
    assert len(set(found.all)) == len(found.all)


def test_a_long_window_is_asked_for_in_parts() -> None:
    """A window that is larger than a request takes several, until all of it is known."""
    rules = [window(2500)]
    there = {leaf(rules[0], own) for own in range(5000)}
    found = Asked(rules, sought(5000), there)
    assert needs(rules[0], 5000) <= found.known
    assert len(found.rounds) == 3


def test_only_the_longest_prefixes_are_tried() -> None:
    """However long a prompt is, no more than so many leaves are considered."""
    considered = []

    def are_known(leaves: bytes) -> NDArray[np.bool_]:
        considered.append(len(key_list(leaves)))
        return np.zeros(considered[-1], np.bool_)

    LeafSearch([state()], sought(5999), are_known)
    assert considered == [ENDS_MAX]


def test_the_last_leaves_come_first() -> None:
    """A missing state shows at once that a prefix is not whole, however much else it needs."""
    rules = [GroupRule(1, Kind.FULL, 0, 1, 1), state()]
    found = Asked(rules, sought(3000), set())
    assert leaf(rules[1], 2999) in found.rounds[0]


def test_dropped_blocks_of_the_chain_are_behind_the_prefix() -> None:
    """A prefix ends so much before the end of the chain that its dropped blocks are there."""
    rules = [state()]
    there = {leaf(rules[0], own) for own in range(50)}
    found = Asked(rules, Sought(LONG, 0, 40, 60, 3), there)
    assert leaf(rules[0], 36) in found.known
    assert leaf(rules[0], 37) not in found.all
