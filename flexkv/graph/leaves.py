"""Finds and loads prefixes of models with several KV groups, and finds the leaves of a put.

Such a prefix is loaded whole or not at all: every group must have all blocks that the prefix needs,
and the request a device block for each. See `common/space.py` for which blocks these are.
"""

from __future__ import annotations

from math import lcm
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flexkv.common.request import LeafBlocks, Operation, Request
from flexkv.common.space import GroupRule
from flexkv.common.terms import BLOCK_KEY_BYTES, Route, Tier
from flexkv.graph.draft import NOTHING_AVOIDED, ONWARD, Avoid, Chunks, Draft, chunks_filled
from flexkv.graph.far import Extended, SetApart, set_apart
from flexkv.graph.far_prefixes import Bounds, FarPrefixes
from flexkv.graph.ops import CHUNKS_MAX
from flexkv.index.catalogue import NOTHING_IS_FAR, Catalogue, Sought
from flexkv.index.found import Found, LeafFound, Limits, Placement
from flexkv.index.residency import ALL, READY, Residency

TOO_MANY = -1
"""What `LeafFinder.load` returns if there are too many ops to wait for."""

WAITING_LEGS_MAX = 4
"""How many legs of the chain may wait for other requests; a group of leaves has one at most."""


class Prefix(NamedTuple):
    """The prefix of a prompt that a load asks for.

    Attributes:
        keys: root and block keys, up to `drop` blocks behind the prefix.
        first: the first block that the device lacks.
        last: the furthest position at which the prefix may end.
        drop: how many blocks of the chain behind the prefix must be resident as well.
        leaves: the device blocks of the other groups; None if nothing is moved to a device.
    """

    keys: bytes
    first: int
    last: int
    drop: int = 0
    leaves: tuple[LeafBlocks, ...] | None = None


def prefix_of(request: Request) -> Prefix:
    """Return the prefix that a get or prefetch asks for; a prefetch needs no device blocks."""
    leaves = None if request.device_ids is None else request.leaves
    last = min(request.span.last_block, request.block_count - request.drop)
    return Prefix(request.keys, request.span.first_block, last, request.drop, leaves)


class LeafFinder:
    """Finds the blocks that prefixes need of each KV group of a model."""

    def __init__(
        self,
        residency: Residency,
        rules: tuple[GroupRule, ...],
        catalogue: Catalogue = NOTHING_IS_FAR,
    ) -> None:
        self._residency, self._rules, self._catalogue = residency, rules, catalogue
        self._alignment = lcm(*(rule.ratio for rule in self._rules))
        self._far = FarPrefixes(residency, rules, catalogue)

    def find(
        self,
        prefix: Prefix,
        avoid: Avoid = NOTHING_AVOIDED,
        before: int | None = None,
        use: bool = False,
    ) -> Found:
        """Return the longest prefix that is there whole, or will be once ops under way have ended.

        Args:
            prefix: what is asked for.
            avoid: tiers that must not be read, and ops whose blocks must not be waited for.
            before: the prefix must end before this position.
            use: count a use of the blocks that are found.
        """
        keys, first, last, drop, _ = prefix
        last = last if before is None else min(last, before - 1)
        keys = keys[: (max(0, last + drop) + 1) * BLOCK_KEY_BYTES]
        limits = self._limits(prefix, avoid, last)
        return self._residency.reach(keys, first, use, drop, limits)

    def find_with_far(
        self,
        prefix: Prefix,
        avoid: Avoid = NOTHING_AVOIDED,
        before: int | None = None,
        use: bool = False,
    ) -> Extended:
        """Return the longest prefix that a load can bring, with blocks that are said to lie far.

        Arguments are those of `find`; a use of far blocks is not counted.
        """
        return self._with_far(prefix, self.find(prefix, avoid, before, use), avoid, before)

    def _with_far(
        self, prefix: Prefix, found: Found, avoid: Avoid, before: int | None = None
    ) -> Extended:
        """Return what was found, or a longer prefix with blocks that are said to lie far.

        If an even longer one was asked for, the catalogue is asked to find out about it.
        """
        keys, first, last, drop, leaves = prefix
        last = last if before is None else min(last, before - 1)
        if self._catalogue.is_empty or last <= found.last:
            return Extended(found)
        chain = self._residency.run(keys, first, last + drop)
        chain = avoid.visible(chain, self._residency.claims)
        limits, bounds = self._limits(prefix, avoid, last), Bounds(keys, last, drop, leaves is None)
        extended = self._far.longest(bounds, found, chain, limits)
        end = extended.found.last
        if before is None and end < last // self._alignment * self._alignment:
            sought = Sought(keys, end, max(end, chain.last), last, drop)
            self._catalogue.ask(sought, avoid.unreadable)
        return extended

    def _limits(self, prefix: Prefix, avoid: Avoid, last: int) -> Limits:
        """Return what a search up to `last` must not use."""
        leaves = prefix.leaves
        device = None if leaves is None else self._device_blocks(leaves, max(0, last))
        return Limits(avoid.unreadable, avoid.fillers, device)

    def find_apart(self, prefix: Prefix, avoid: Avoid, with_coming: bool) -> SetApart:
        """Return the longest prefix that is here, and what a load could bring behind it.

        Count a use of the blocks that are here or coming. What is coming from far tiers counts as
        here only `with_coming`.
        """
        here = found = self.find(prefix, avoid, use=True)
        pending = (found.pending, *[of.pending for of in found.leaves])
        if not with_coming and (prefix.drop or any(pending)):
            here = self.find(prefix, avoid.and_far(self._residency))
        whole, dropped = self._with_far(prefix, found, avoid).found, None
        if prefix.drop and whole.last > here.last:
            last = whole.last + prefix.drop
            chain = self._residency.run(prefix.keys, prefix.first, last)
            dropped = chain.pending and chain.pending.behind(whole.last)
        return set_apart(here, whole, 0, self._residency, dropped)

    def _device_blocks(self, leaves: tuple[LeafBlocks, ...], last: int) -> NDArray[np.bool_]:
        """Return whether there is a device block for the leaf of each group at each position.

        The positions end before `last`.
        """
        device = np.zeros((len(self._rules), last), np.bool_)
        for group, positions, device_ids in leaves:
            first, count = positions.first, positions.number_before(last)
            places = positions.places
            where = slice(first, first + count) if places is None else places[:count]
            device[group - 1, where] = device_ids[:count] >= 0
        return device

    def load(self, request: Request, found: Found, draft: Draft) -> int:
        """Draft the loads of everything that was found.

        Returns:
            0; or how many blocks did not get a host place; or TOO_MANY, if there are too many ops
            to wait for.
        """
        below = [
            placed.block_count
            for ready in (found.ready, found.dropped, *[of.ready for of in found.leaves])
            for tier, placed in ready.items()
            if tier is not Tier.HOST
        ]
        if below and not self._residency.make_room(Tier.HOST, request.keys, sum(below)):
            return sum(below)
        missing = self._load(request, LeafFound(0, found.ready, found.pending), draft)
        for leaves in (*found.leaves, LeafFound(0, found.dropped)):
            missing = missing or self._load(request, leaves, draft)
        return missing

    def _load(self, request: Request, found: LeafFound, draft: Draft) -> int:
        """Draft the loads of one group, perhaps the chain's."""
        onward = ONWARD if request.operation is Operation.GET else ()
        group = found.group
        for tier, placement in found.ready.items():
            positions, block_ids = placement.positions, placement.block_ids
            if tier is Tier.HOST:
                if onward:
                    draft.add(onward, positions, {tier: block_ids}, group=group)
                continue
            host_ids = self._residency.reserve(Tier.HOST, request.keys, positions, ALL, group)
            if len(host_ids) < positions.block_count:
                return positions.block_count
            draft.reserved.append(host_ids)
            ids, hops = {tier: block_ids, Tier.HOST: host_ids}, (Route(tier, Tier.HOST), *onward)
            if group or tier in self._residency.tiers:
                draft.add(hops, positions, ids, group=group)
            else:
                draft.add_far(hops, positions, ids, self._catalogue.span_blocks)
        return 0 if found.pending is None else self._wait(found.pending, onward, draft, group)

    def _wait(self, pending: Placement, onward: tuple[Route, ...], draft: Draft, group: int) -> int:
        """Draft the legs that wait for other requests to fill blocks; return 0 or TOO_MANY."""
        starts, fillers = chunks_filled(self._residency.claims, pending)
        if len(starts) > CHUNKS_MAX * (1 if group else WAITING_LEGS_MAX):
            return TOO_MANY
        ends = [*starts, pending.block_count]
        for begin in range(0, len(starts), CHUNKS_MAX):
            of_leg = slice(begin, begin + CHUNKS_MAX)
            first, last = starts[begin], ends[min(begin + CHUNKS_MAX, len(starts))]
            part = Placement(pending.positions.part(first, last), pending.block_ids[first:last])
            chunks = Chunks([start - first for start in starts[of_leg]], fillers[of_leg])
            draft.add_waiting(onward, part, chunks, group)
        return 0

    def lacking_from(self, request: Request) -> int:
        """Return the position of the first block that host memory lacks of a put's longest prefix.

        What it lacks there may be the block of the chain, or a leaf that the prefix needs.
        """
        first, last = request.span.first_block, request.span.last_block
        if first == last:  # perhaps behind the prompt's last whole block
            return last
        lacking = [(each, 1) for each in self._residency.survey(request.keys, first, last, False)]
        for rule in self._rules:
            begin, end = rule.needed(first, last // self._alignment * self._alignment)
            found = self._residency.survey(
                request.keys, begin * rule.ratio, end * rule.ratio, False, rule.group
            )
            lacking += [(each, rule.ratio) for each in found]
        starts = [
            max(first, alike.positions.first - ratio + 1)
            for alike, ratio in lacking
            if alike.states[0] != READY
        ]
        if not starts:
            return last
        # The leaf that spans the first block is not looked up if its block of the chain is nowhere.
        return max(first, min(starts) // self._alignment * self._alignment)
