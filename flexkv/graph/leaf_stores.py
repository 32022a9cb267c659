"""Finds places in host memory for the leaves of puts.

If there is not room for all of them, only leaves that complete a whole prefix are stored, from the
end of the prompt backwards: no get could use the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from flexkv.common.errors import CapacityError
from flexkv.common.request import Request
from flexkv.common.space import GroupRule
from flexkv.common.terms import BlockIds, Positions, Tier
from flexkv.graph.ends import Leaves, WholeEnds, within
from flexkv.index.claims import Holding
from flexkv.index.found import AlikeBlocks
from flexkv.index.residency import ABSENT, READY, Residency


class Store(NamedTuple):
    """Blocks that are in host memory, or new and on their way there.

    `lacking` are the lower tiers that lack them.
    """

    positions: Positions
    host_ids: BlockIds
    is_new: bool
    lacking: tuple[Tier, ...]
    group: int


class LeafStores:
    """Finds the leaves of puts, and places for those that host memory lacks."""

    def __init__(self, residency: Residency, rules: tuple[GroupRule, ...]) -> None:
        self._residency, self._rules = residency, rules
        self._ratio = {rule.group: rule.ratio for rule in rules}

    def brought(self, request: Request, use: bool = True) -> list[Leaves]:
        """Return the leaves that a put brings, by group and by their states in the tiers now.

        Leaves whose parent is in no tier are left out, as no prefix could use them.
        """
        found = []
        for group, positions, device_ids in request.leaves:
            wanted = positions.chosen(device_ids >= 0)
            if not wanted.block_count:
                continue
            last = wanted.at(wanted.block_count - 1) + 1
            surveyed = self._residency.survey(request.keys, wanted.first, last, use, group)
            found += [Leaves(group, within(alike, wanted)) for alike in surveyed]
        return [leaves for leaves in found if leaves.alike.positions.block_count]

    def parents(self, request: Request) -> list[Holding]:
        """Return what to pin of the chain so that all parents of a put's leaves stay in the index.

        Each block is pinned in its farthest tier: its places in nearer ones may go to leaves.
        """
        ranges = [
            (positions.first, positions.at(positions.block_count - 1) + 1)
            for _, positions, _ in request.leaves
            if positions.block_count
        ]
        if not ranges:
            return []
        first, last = min(begin for begin, _ in ranges), max(end for _, end in ranges)
        chain = self._residency.survey(request.keys, first, last, False)
        return [holding for alike in chain for holding in self._farthest(alike)]

    def place(
        self, request: Request, brought: Sequence[Leaves], reserve: Reserve
    ) -> tuple[list[Store], CapacityError | None]:
        """Return the new leaves that got places in host memory, and why not all did.

        Args:
            request: the put.
            brought: the leaves that it brings; their parents must be pinned.
            reserve: reserves places for all of the leaves that it is given, or for none.
        """
        new = [leaves for leaves in brought if leaves.alike.states[0] == ABSENT]
        stores = self._reserved(request, new, reserve)
        if stores is not None:
            return stores, None
        count = sum(alike.positions.block_count for _, alike in new)
        shortfall = self._residency.shortfall(Tier.HOST, count)
        return self._whole(request, new, reserve), shortfall

    def _reserved(
        self, request: Request, new: Sequence[Leaves], reserve: Reserve
    ) -> list[Store] | None:
        """Reserve places for all of these leaves; return None if there is not room for all."""
        stores: list[Store] = []
        residency, count = self._residency, sum([each.positions.block_count for _, each in new])
        # A selective tier may find that some are worth an eviction and others are not.
        if not (residency.selective or residency.make_room(Tier.HOST, request.keys, count)):
            return None
        for leaves in new:
            store = reserve(leaves)
            if store is None:
                self._release(stores)
                return None
            stores.append(store)
        return stores

    def _release(self, stores: Sequence[Store]) -> None:
        for store in stores:
            self._residency.abort(Tier.HOST, store.host_ids)

    def _whole(self, request: Request, new: Sequence[Leaves], reserve: Reserve) -> list[Store]:
        """Reserve places for what the last end that fits needs, and as many ends before it."""
        ends = WholeEnds(self._rules, self._chain(request), self._there(request), new)

        def placed(begin: int, end: int) -> list[Store] | None:
            marks, there = ends.needed(begin, end), self._there(request)
            if not ends.has_all(marks, [*there, *new]):  # an earlier attempt has evicted some
                return None
            needed = [leaves.at(marks, self._ratio[leaves.group]) for leaves in there]
            wanted = [leaves.at(marks, self._ratio[leaves.group]) for leaves in new]
            held = [holding for _, alike in needed for holding in self._farthest(alike)]
            with self._residency.holding(held):
                wanted = [each for each in wanted if each.alike.positions.block_count]
                return self._reserved(request, wanted, reserve)

        def fits(begin: int, end: int) -> bool:
            stores = placed(begin, end)
            self._release(stores or ())
            return stores is not None

        last = _longest(len(ends), lambda count: fits(count - 1, count))
        if not last:
            return []
        before = _longest(last - 1, lambda count: fits(last - 1 - count, last))
        return placed(last - 1 - before, last) or []

    def _there(self, request: Request) -> list[Leaves]:
        """Return all leaves of a prompt that are in some tier, or on their way there."""
        keys, blocks = request.keys, request.block_count
        return [
            Leaves(rule.group, alike)
            for rule in self._rules
            for alike in self._residency.survey(keys, 0, blocks, False, rule.group)
            if any(alike.states)
        ]

    def _chain(self, request: Request) -> int:
        """Return how many blocks of a prompt's chain are in some tier, or on their way there."""
        found = self._residency.survey(request.keys, 0, request.block_count, False)
        return sum([each.positions.block_count for each in found if any(each.states)])

    def _farthest(self, alike: AlikeBlocks) -> Iterator[Holding]:
        """Yield the places of the blocks in the farthest tier where they are ready."""
        tiers = self._residency.tiers
        for tier, state, ids in zip(
            tiers[::-1], alike.states[::-1], alike.block_ids[::-1], strict=True
        ):
            if state == READY and ids is not None:
                yield Holding(tier, ids)
                return


Reserve = Callable[[Leaves], Store | None]


def _longest(most: int, fits: Callable[[int], bool]) -> int:
    """Return a number, at most `most`, that fits while the next larger one does not; 0 for none.

    The search goes down from `most` in steps that double, and up again by bisection.
    """
    low, high, step = 0, most + 1, 1
    while low + 1 < high:
        tried = max(high - step, (low + high) // 2)
        if fits(tried):
            low = tried
        else:
            high = tried
            step *= 2
    return low
