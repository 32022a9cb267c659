"""Which prefixes are whole with the leaves that there are, and which leaves prefixes need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import lcm
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flexkv.common.space import GroupRule
from flexkv.common.terms import BlockIds, Positions
from flexkv.index.found import AlikeBlocks

Marks = Mapping[int, NDArray[np.bool_]]
"""A set of leaves: for each group bool[n], whether it has the leaf of each of its own blocks."""


class Needed(NamedTuple):
    """Which of a KV group's own blocks each of some prefixes needs: from `first` up to `last`.

    Both are int64[prefixes]; `last` is exclusive.
    """

    first: NDArray[np.int64]
    last: NDArray[np.int64]

    def are_in(self, has: NDArray[np.bool_], begin: int = 0) -> NDArray[np.bool_]:
        """Return which prefixes have all blocks that they need.

        Args:
            has: which of the group's own blocks are there, from `begin` on.
            begin: the first block that any prefix needs, or one before it.
        """
        count = self.last - self.first
        are_in: NDArray[np.bool_] = _number(has, self.first - begin, self.last - begin) == count
        return are_in


def needed_by(rule: GroupRule, ends: NDArray[np.int64], before: int = 0) -> Needed:
    """Return which of a group's own blocks prefixes need.

    Args:
        rule: the group's.
        ends: where the prefixes end, in blocks of the chain: int64[prefixes].
        before: blocks before this one of the chain are on the device.
    """
    last = ends // rule.ratio
    most = int(last.max(initial=0))
    first = _first_needed(rule, 1 << most.bit_length())[last]
    return Needed(np.minimum(np.maximum(first, before // rule.ratio), last), last)


@lru_cache(maxsize=256)
def _first_needed(rule: GroupRule, count: int) -> NDArray[np.int64]:
    """Return the first of its own blocks that a group needs of each prefix of 0 to `count`."""
    return np.array([rule.needed(0, own * rule.ratio)[0] for own in range(count + 1)], np.int64)


class Leaves(NamedTuple):
    """Leaves of one KV group that have the same state in each tier."""

    group: int
    alike: AlikeBlocks

    def at(self, marks: Marks, ratio: int) -> Leaves:
        """Return the marked ones of these leaves; `ratio` is the group's."""
        return Leaves(self.group, chosen(self.alike, marks[self.group][self.own(ratio)]))

    def own(self, ratio: int) -> NDArray[np.int64]:
        """Return int64[n], the numbers of these leaves among the blocks of their own group."""
        return (self.alike.positions.array + 1) // ratio - 1


class WholeEnds:
    """The ends of prefixes that would be whole if a put could store all its leaves.

    Each leaf of such a prefix is there, or the put brings it. Ends for which it brings nothing are
    left out. The others are counted from 0, in the order of their positions.
    """

    def __init__(
        self,
        rules: Sequence[GroupRule],
        blocks: int,
        there: Sequence[Leaves],
        new: Sequence[Leaves],
    ) -> None:
        """Find the ends.

        Args:
            rules: the rule of each group of leaves.
            blocks: the length of the chain.
            there: leaves that some tier has, or is being filled with.
            new: leaves that the put brings and host memory lacks.
        """
        self._rules = rules
        step = lcm(*(rule.ratio for rule in rules))
        ends = np.arange(step, blocks + 1, step)
        is_whole, is_lacking = np.ones(len(ends), np.bool_), np.zeros(len(ends), np.bool_)
        spans = {}
        for rule in rules:
            needed, count = needed_by(rule, ends), blocks // rule.ratio
            lacks = _marked(rule, count, new)
            is_whole &= needed.are_in(lacks | _marked(rule, count, there))
            is_lacking |= _number(lacks, *needed) > 0
            spans[rule.group] = *needed, count
        which = is_whole & is_lacking
        self._spans = {
            group: (first[which], last[which], count)
            for group, (first, last, count) in spans.items()
        }
        self._count = int(np.count_nonzero(which))

    def __len__(self) -> int:
        return self._count

    def needed(self, begin: int, end: int) -> Marks:
        """Return the leaves that the ends with numbers from `begin` to `end` (exclusive) need."""
        marks = {}
        for group, (first, last, count) in self._spans.items():
            steps = np.zeros(count + 1, np.int64)
            np.add.at(steps, first[begin:end], 1)
            np.add.at(steps, last[begin:end], -1)
            marks[group] = np.cumsum(steps[:-1]) > 0
        return marks

    def has_all(self, marks: Marks, leaves: Sequence[Leaves]) -> bool:
        """Return whether all marked leaves are among these."""
        return not any(
            (marks[rule.group] & ~_marked(rule, len(marks[rule.group]), leaves)).any()
            for rule in self._rules
        )


def chosen(alike: AlikeBlocks, which: NDArray[np.bool_]) -> AlikeBlocks:
    """Return the blocks for which `which`, bool[n], is True."""
    if which.all():
        return alike
    states, positions, block_ids = alike
    ids: tuple[BlockIds | None, ...] = tuple(
        [None if each is None else each[which] for each in block_ids]
    )
    return AlikeBlocks(states, positions.chosen(which), ids)


def within(alike: AlikeBlocks, wanted: Positions) -> AlikeBlocks:
    """Return the blocks that are at wanted positions."""
    if wanted.places is None:  # no gaps, and only that range was surveyed
        return alike
    return chosen(alike, np.isin(alike.positions.array, wanted.array, assume_unique=True))


def _marked(rule: GroupRule, count: int, leaves: Sequence[Leaves]) -> NDArray[np.bool_]:
    marks = np.zeros(count, np.bool_)
    for each in leaves:
        if each.group == rule.group:
            own = each.own(rule.ratio)
            marks[own[own < count]] = True
    return marks


def _number(
    marks: NDArray[np.bool_], first: NDArray[np.int64], last: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return how many marks there are in each range."""
    before = np.concatenate(([0], np.cumsum(marks)))
    return before[last] - before[first]
