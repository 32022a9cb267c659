"""Finds the longest prefix of a model with several KV groups, some of whose blocks lie far.

    the chain         here, or coming ─────────┤├ far ──────────┤
    a group's leaves  · · ■ ■ · · · · ■ ■ □ □ · · · □ □ · · · □     ■ here  □ far  · nowhere
    whole prefixes          ▲           ▲ ▲ ▲         ▲             if each needs two leaves

A load brings the longest prefix for which all that each group needs is here or far.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm
from typing import NamedTuple

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from flexkv.common.space import GroupRule
from flexkv.common.terms import BlockIds, Tier, positions_of
from flexkv.graph.ends import Needed, needed_by
from flexkv.graph.far import Extended, with_far
from flexkv.index.catalogue import NOT_FAR, Catalogue
from flexkv.index.found import AlikeBlocks, Found, LeafFound, Limits, Placement
from flexkv.index.keys import leaf_keys_at
from flexkv.index.residency import ABSENT, READY, Residency

_COMING, _NOWHERE, _UNUSABLE = -1, -2, -3
"""Where a leaf is if no tier has it for this load: on its way to host memory; in no tier here, so
that it may be far; or where this load cannot use it."""


class Bounds(NamedTuple):
    """How long a prefix may be.

    Attributes:
        keys: the root and keys of the prompt's blocks.
        last: the furthest position at which the prefix may end.
        drop: how many more blocks of the chain are wanted behind it.
        drops_far: whether these may be far.
    """

    keys: bytes
    last: int
    drop: int
    drops_far: bool


class _Leaves(NamedTuple):
    """Where the leaves of one group are.

    Attributes:
        rule: the group's.
        begin: the number of the first one among the group's own blocks.
        tiers: int64[n], the nearest usable tier of each, or one of the numbers above.
        block_ids: int64[n], their places, or what the catalogue calls them.
    """

    rule: GroupRule
    begin: int
    tiers: NDArray[np.int64]
    block_ids: BlockIds

    @property
    def can_be_loaded(self) -> NDArray[np.bool_]:
        """Return which of them a load can bring: bool[n]."""
        return self.tiers >= _COMING

    def found(self, first: int, last: int) -> LeafFound:
        """Return those from the `first` to the `last` (exclusive) of the group's own blocks."""
        part, ratio = slice(first - self.begin, last - self.begin), self.rule.ratio
        tiers, ids = self.tiers[part], self.block_ids[part]
        positions = np.arange(first + 1, last + 1) * ratio - 1
        placed = {
            number: Placement(positions_of(positions[tiers == number]), ids[tiers == number])
            for number in np.unique(tiers).tolist()
        }
        pending = placed.pop(_COMING, None)
        ready = {Tier(number): placement for number, placement in placed.items()}
        return LeafFound(self.rule.group, ready, pending)


class FarPrefixes:
    """Finds prefixes that far blocks make longer."""

    def __init__(
        self, residency: Residency, rules: tuple[GroupRule, ...], catalogue: Catalogue
    ) -> None:
        """Take what is here, what the groups need, and what is far."""
        self._residency, self._rules, self._catalogue = residency, rules, catalogue
        self._alignment = lcm(*(rule.ratio for rule in rules))

    def longest(self, bounds: Bounds, found: Found, chain: Found, limits: Limits) -> Extended:
        """Return the longest prefix with far blocks, or what was found if it is not longer.

        Args:
            bounds: how long it may be.
            found: the longest prefix without far blocks.
            chain: the chain's run without far blocks, whatever leaves there are.
            limits: what must not be used.
        """
        keys, last, drop, drops_far = bounds
        residency, tiers = self._residency, limits.tiers
        run, above = with_far(keys, last + drop, chain, residency, self._catalogue, tiers)
        reached = run.last if drops_far or not drop else chain.last
        step = self._alignment
        begin = found.last // step * step + step
        ends = np.arange(begin, min(last, reached - drop) + 1, step)
        leaves = []
        for rule in self._rules:
            if not len(ends):
                return Extended(found)
            needed = needed_by(rule, ends, found.first)
            of_group = self._leaves(keys, rule, needed, limits)
            ends = ends[needed.are_in(of_group.can_be_loaded, of_group.begin)]
            leaves.append(of_group)
        if not len(ends):
            return Extended(found)
        longest = self._found(run, leaves, int(ends[-1]), found, drop)
        # What is here of the blocks to be dropped comes before those that are far: it must stay.
        return Extended(longest, [*above, *run.before(longest.last + drop).holdings])

    def _found(
        self, run: Found, leaves: Sequence[_Leaves], end: int, found: Found, drop: int
    ) -> Found:
        """Return the prefix that ends at `end`: the part of the chain's run, and its leaves."""
        of_groups, last = [], np.array([end])
        for of_group in leaves:
            needed = needed_by(of_group.rule, last, found.first)
            of_groups.append(of_group.found(int(needed.first[0]), int(needed.last[0])))
        return structs.replace(
            run.before(end),
            leaves=tuple([each for each in of_groups if each.block_count]),
            chain=found.chain,
            dropped={
                tier: placed.behind(end)
                for tier, placed in run.before(end + drop).ready.items()
                if tier not in self._residency.tiers and placed.behind(end).block_count
            },
        )

    def _leaves(self, keys: bytes, rule: GroupRule, needed: Needed, limits: Limits) -> _Leaves:
        """Return where the leaves are that some prefixes need."""
        group, ratio = rule.group, rule.ratio
        begin, end = int(needed.first.min()), int(needed.last.max())
        positions = np.arange(begin + 1, end + 1) * ratio - 1
        tiers, ids = np.full(end - begin, _NOWHERE), np.zeros(end - begin, np.int64)
        for alike in self._residency.survey(keys, begin * ratio, end * ratio, False, group):
            own = (alike.positions.array + 1) // ratio - 1 - begin
            tiers[own], ids[own] = self._usable(alike, limits)
        if (device := limits.device) is not None:
            tiers[~device[group - 1, positions]] = _UNUSABLE
        if len(absent := np.flatnonzero(tiers == _NOWHERE)):
            some = leaf_keys_at(keys, group, positions[absent])
            for tier, far_ids in self._catalogue.leaves(some, limits.tiers):
                new = (tiers[absent] == _NOWHERE) & (far_ids != NOT_FAR)
                tiers[absent[new]], ids[absent[new]] = tier, far_ids[new]
        return _Leaves(rule, begin, tiers, ids)

    def _usable(self, alike: AlikeBlocks, limits: Limits) -> tuple[NDArray[np.int64], BlockIds]:
        """Return the tiers from which leaves that are alike can be loaded, and their places there.

        As in `Residency.reach`, a leaf with a place in host memory comes from no other tier.
        """
        states, positions, block_ids = alike
        tiers = np.full(positions.block_count, _NOWHERE)
        if states[0] != ABSENT:
            assert block_ids[0] is not None
            return self._usable_in_host(tiers, states[0], block_ids[0], limits), block_ids[0]
        for tier, state, ids in zip(self._residency.tiers, states, block_ids, strict=True):
            if state == READY and tier not in limits.tiers:
                assert ids is not None
                tiers[:] = tier
                return tiers, ids
        return tiers, np.zeros(len(tiers), np.int64)

    def _usable_in_host(
        self, tiers: NDArray[np.int64], state: int, host_ids: BlockIds, limits: Limits
    ) -> NDArray[np.int64]:
        """Return `tiers`, filled for leaves that have places in host memory."""
        tiers[:] = _UNUSABLE
        if Tier.HOST in limits.tiers:
            return tiers
        if state == READY:
            tiers[:] = Tier.HOST
        elif limits.fillers is not None:
            fillers = self._residency.claims.fillers(Tier.HOST, host_ids)
            tiers[~np.isin(fillers, list(limits.fillers))] = _COMING
        return tiers
