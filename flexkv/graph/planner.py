"""Turns a request into a plan by what the index knows, and opens the plan's claims.

Only what can run is planned. What does not fit is left out, so that a request moves the longest
prefix that it can (get, prefetch) or as many leading blocks as there is room for (put).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple

from msgspec import structs

from flexkv.common.errors import CapacityError, ClearedError
from flexkv.common.request import Operation, Request
from flexkv.common.space import GroupRule
from flexkv.common.terms import BLOCK_KEY_BYTES, BlockIds, Positions, Route, Tier
from flexkv.graph.draft import (
    NOTHING_AVOIDED,
    ONWARD,
    STORE,
    Avoid,
    Chunks,
    Draft,
    Owed,
    PlanLimits,
    chunked,
    chunks_filled,
    fill_of,
    template_of,
)
from flexkv.graph.ends import Leaves
from flexkv.graph.far import Extended, SetApart, set_apart, with_far
from flexkv.graph.leaf_stores import LeafStores, Store
from flexkv.graph.leaves import TOO_MANY, LeafFinder, Prefix, prefix_of
from flexkv.graph.ops import CHUNKS_MAX
from flexkv.graph.plan import OPS_MAX, LegFill, Plan
from flexkv.index.catalogue import NOTHING_IS_FAR, Catalogue
from flexkv.index.claims import Claim, Holding
from flexkv.index.found import AlikeBlocks, Found
from flexkv.index.owed import Taken
from flexkv.index.residency import ABSENT, ALL, PREFIX, READY, WORTHY, Residency


class Planned(NamedTuple):
    """A plan whose claims are open, what was found, and the error that cut it short, if any."""

    plan: Plan
    found: Found
    shortfall: CapacityError | ClearedError | None
    owed: tuple[Owed, ...] = ()
    """Owed blocks that are in host memory already; see `LegFill.owed_to` for the others."""
    declined: tuple[tuple[Tier, int], ...] = ()
    """How many blocks each lower tier refuses as worth less than what it has."""
    is_whole: bool = False
    """Whether a load moves everything found or nothing, since the model has several KV groups."""
    far: frozenset[Tier] = frozenset()
    """The far tiers from which such a load fetches blocks."""


class Planner:
    """Plans requests over one residency. Synchronous, pure, and the only caller of `reserve`."""

    def __init__(
        self,
        residency: Residency,
        limits: PlanLimits,
        catalogue: Catalogue = NOTHING_IS_FAR,
        rules: tuple[GroupRule, ...] = (),
    ) -> None:
        self._residency, self.tiers = residency, residency.tiers
        self._far = frozenset(Tier) - {Tier.DEVICE, *self.tiers}
        self.limits = limits
        self.catalogue = catalogue
        self.avoid = NOTHING_AVOIDED
        self.tiers_owed: frozenset[Tier] = frozenset()
        """Lower tiers that are owed blocks: blocks of new puts are owed, too, and come last."""
        self._lower = [(n, tier) for n, tier in enumerate(residency.tiers) if tier != Tier.HOST]
        self.groups = 1 + len(rules)
        """The number of KV groups of the model."""
        self._leaves = LeafFinder(residency, rules, catalogue) if rules else None
        self._leaf_stores = LeafStores(residency, rules)

    def plan(self, request: Request, run_id: int, near: bool = False) -> Planned:
        """Plan a request and open its claims, which only the run's events end.

        With `near`, no load fetches far blocks, or waits for those that others fetch.
        """
        if request.operation is Operation.PUT:
            draft = Draft(request, self.limits)
            shortfall = self._store(request, draft)
            first = request.span.first_block
            plan, found = self._claimed(draft.plan(run_id)), Found(first, first, {})
            return Planned(plan, found, shortfall, tuple(draft.owed), tuple(draft.declined))
        avoid = self.avoid.and_far(self._residency) if near else self.avoid
        if self._leaves is not None:
            return self._plan_whole(self._leaves, request, run_id, avoid)
        first, drop = request.span.first_block, request.drop
        found = self._residency.find(request.keys, first, True, drop)
        found = avoid.visible(found, self._residency.claims)
        above: Sequence[Holding] = ()
        if not self.catalogue.is_empty:
            end = request.span.last_block
            found, above = self._with_far(request.keys, end, found, avoid.unreadable)
        if found.host_only:
            return Planned(self._claimed(self._from_host(request, found, run_id)), found, None)
        last, told = found.last, None
        while True:
            draft, wanted = Draft(request, self.limits), found.before(last)
            with self._residency.holding([*above, *wanted.holdings]):
                last, shortfall = self._load(request, wanted, draft)
                told = told or shortfall
                if shortfall is None or wanted is not found:
                    plan = self._claimed(draft.plan(run_id))
                    return Planned(plan, structs.replace(wanted, last=last), told)
                self._drop(draft)
            # Host blocks later in the run are pinned, and so hold places that blocks before them
            # lack: give up as many of them as extends the run furthest.
            last = min(found.furthest(last), found.last - 1)

    def _plan_whole(
        self, leaves: LeafFinder, request: Request, run_id: int, avoid: Avoid
    ) -> Planned:
        """Plan a load that brings what it finds of every KV group, or nothing."""
        found, above = leaves.find_with_far(prefix_of(request), avoid, use=True)
        with self._residency.holding(above):
            return self._plan_found(leaves, request, run_id, avoid, found)

    def _plan_found(
        self, leaves: LeafFinder, request: Request, run_id: int, avoid: Avoid, found: Found
    ) -> Planned:
        """Plan a load that brings all of what was found, or of the longest prefix that fits."""
        told = None
        while True:
            draft = Draft(request, self.limits)
            with self._residency.holding(found.holdings):
                lacks = leaves.load(request, found, draft)
                if not lacks:
                    plan = self._claimed(draft.plan(run_id))
                    far = self._far.intersection(leg.origin for leg in plan.template.shape.legs)
                    return Planned(plan, found, told, is_whole=True, far=far)
                self._drop(draft)
            if lacks != TOO_MANY:
                told = told or self._residency.shortfall(Tier.HOST, lacks)
            found = self._shorter(leaves, request, found, avoid)

    def _shorter(self, leaves: LeafFinder, request: Request, found: Found, avoid: Avoid) -> Found:
        """Return the longest prefix that host memory has room for, where it has none for `found`.

        The search goes down in steps that double, and from the first prefix that fits up again by
        bisection. So it takes few steps, whether little room is lacking or much.
        """
        prefix, best, step = prefix_of(request), found.before(found.first), 1
        fits, fails = found.first + 1, found.last
        while fits < fails:  # `best` is the longest that ends before `fits`
            before = max(fails - step + 1, (fits + fails + 1) // 2)
            shorter = leaves.find_with_far(prefix, avoid, before).found
            if shorter.last > best.last and not self._has_room(leaves, request, shorter, best):
                fails = shorter.last
            else:
                best, fits = max(best, shorter, key=_last), before
            step *= 2
        return best

    def _has_room(self, leaves: LeafFinder, request: Request, found: Found, kept: Found) -> bool:
        """Return whether host memory has room to load a prefix, without losing what was `kept`."""
        draft = Draft(request, self.limits)
        with self._residency.holding([*kept.holdings, *found.holdings]):
            lacks = leaves.load(request, found, draft)
            self._drop(draft)
        return not lacks

    def find(self, keys: bytes, first: int = 0, drop: int = 0) -> Found:
        """Return where a prompt's blocks from `first` on are, and count a use of them.

        `drop` more blocks of the chain are resident behind what is found. With several KV groups,
        that is the longest prefix for which every group has what it needs.
        """
        if self._leaves is None:
            found = self._residency.find(keys, first, True, drop)
            return self.avoid.visible(found, self._residency.claims)
        last = len(keys) // BLOCK_KEY_BYTES - 1 - drop
        return self._leaves.find(Prefix(keys, first, last, drop), self.avoid, use=True)

    def find_apart(self, keys: bytes, first: int, drop: int, with_coming: bool) -> SetApart:
        """Return what `find` does, and what a load could bring behind it.

        What is coming from far tiers is found only `with_coming`.
        """
        avoid, end = self.avoid, len(keys) // BLOCK_KEY_BYTES - 1
        if self._leaves is not None:
            prefix = Prefix(keys, first, end - drop, drop)
            return self._leaves.find_apart(prefix, avoid, with_coming)
        here = found = self.find(keys, first)
        if found.pending is not None and not with_coming:
            here = avoid.and_far(self._residency).visible(found, self._residency.claims)
        whole = self._with_far(keys, end, found, avoid.unreadable).found
        return set_apart(here, whole, drop, self._residency)

    def most_places(self, request: Request) -> int:
        """Return an upper bound, cheap to compute, of the host places that a request needs."""
        span, leaves = request.span, sum([len(each.device_ids) for each in request.leaves])
        return (span.last_block - span.first_block) * self.groups + request.drop + leaves

    def places_wanted(self, request: Request) -> int:
        """Return how many host places a request would need if it were planned now."""
        if request.operation is not Operation.PUT:
            found = self.peek(request)
            ready = [found.ready, found.dropped, *[leaves.ready for leaves in found.leaves]]
            lacking = [
                placed.block_count
                for each in ready
                for tier, placed in each.items()
                if tier is not Tier.HOST
            ]
            return sum(lacking)
        first, last = request.span.first_block, request.span.last_block
        surveyed = self._residency.survey(request.keys, first, last, use=False)
        surveyed += [alike for _, alike in self._leaf_stores.brought(request, use=False)]
        return sum(alike.positions.block_count for alike in surveyed if alike.states[0] == ABSENT)

    def lacking_from(self, request: Request) -> int:
        """Return the position of the first block that a put would have to store."""
        if self._leaves is not None:
            return self._leaves.lacking_from(request)
        found = self._residency.find(request.keys, request.span.first_block)
        host = found.ready.get(Tier.HOST)
        return found.first + (0 if host is None else host.positions.leading(found.first))

    def peek(self, request: Request) -> Found:
        """Return what a load would find if all tiers were up, without planning it."""
        if self._leaves is not None:
            return self._leaves.find_with_far(prefix_of(request)).found
        first, drop = request.span.first_block, request.drop
        found = self._residency.find(request.keys, first, drop=drop)
        return self._with_far(request.keys, request.span.last_block, found, frozenset()).found

    def _with_far(self, keys: bytes, end: int, found: Found, avoid: frozenset[Tier]) -> Extended:
        return with_far(keys, end, found, self._residency, self.catalogue, avoid)

    def _drop(self, draft: Draft) -> None:
        """Release the host places that a draft has reserved."""
        for ids in reversed(draft.reserved):
            self._residency.abort(Tier.HOST, ids)

    def _from_host(self, request: Request, found: Found, run_id: int) -> Plan:
        """Plan the common case: all blocks are in host memory, with nothing to reserve or await."""
        if found.last == found.first or request.operation is not Operation.GET:
            return Plan(template_of(request.operation, ()), run_id, ())
        placement = found.ready[Tier.HOST]
        positions, block_ids = placement.positions, placement.block_ids
        leg, bounds = chunked(ONWARD, positions.block_count, self.limits.chunk_blocks)
        fill = fill_of(request, positions, {Tier.HOST: block_ids}, bounds)
        return Plan(template_of(Operation.GET, (leg,)), run_id, (fill,), request.watch)

    # -- loads: get and prefetch ----------------------------------------------------------------

    def _load(
        self, request: Request, found: Found, draft: Draft
    ) -> tuple[int, CapacityError | None]:
        """Draft the loads of the resident run; return where what can be loaded ends, and why."""
        onward = ONWARD if request.operation is Operation.GET else ()
        pending, last = found.pending, found.last
        waits = Chunks([], [])
        if pending is not None:
            waits = chunks_filled(self._residency.claims, pending)
            if len(waits.starts) > CHUNKS_MAX:
                last = pending.positions.at(waits.starts[CHUNKS_MAX])
        host_ids, last, shortfall = self._host_places(request, found, last)
        draft.reserved.extend(host_ids.values())
        for tier, placement in found.ready.items():
            placed = placement.before(last)
            if not placed.block_count:
                continue
            if tier is not Tier.HOST:
                ids = {tier: placed.block_ids, Tier.HOST: host_ids[tier]}
                hops = (Route(tier, Tier.HOST), *onward)
                if tier in self.tiers:
                    draft.add(hops, placed.positions, ids)
                else:
                    draft.add_far(hops, placed.positions, ids, self.catalogue.span_blocks)
            elif onward:
                draft.add(onward, placed.positions, {Tier.HOST: placed.block_ids})
        if pending is not None and (placed := pending.before(last)).block_count:
            count = sum(start < placed.block_count for start in waits.starts)
            chunks = Chunks(waits.starts[:count], waits.fillers[:count])
            draft.add_waiting(onward, placed, chunks)
        return last, shortfall

    def _host_places(
        self, request: Request, found: Found, last: int
    ) -> tuple[dict[Tier, BlockIds], int, CapacityError | None]:
        """Reserve host places for blocks in lower tiers.

        Return the places by tier, the end of the run that has all its places, and why not later.
        """
        residency, shortfall = self._residency, None
        host_ids: dict[Tier, BlockIds] = {}
        for tier, placement in found.ready.items():
            if tier is Tier.HOST:
                continue
            below = placement.before(last)
            how = self.limits.peers_how if tier is Tier.PEER else PREFIX
            ids = host_ids[tier] = residency.reserve(Tier.HOST, request.keys, below.positions, how)
            if len(ids) < below.block_count:
                last = below.positions.at(len(ids))
                if how == PREFIX or not residency.selective:  # else they may not be worth it
                    shortfall = residency.shortfall(Tier.HOST, below.block_count)
        for tier, ids in host_ids.items():
            kept = found.ready[tier].before(last).block_count
            if kept < len(ids):  # places for another tier's blocks ran out earlier in the run
                residency.abort(Tier.HOST, ids[kept:])
                host_ids[tier] = ids[:kept]
        return host_ids, last, shortfall

    # -- stores: put ----------------------------------------------------------------------------

    def _store(self, request: Request, draft: Draft) -> CapacityError | ClearedError | None:
        """Draft device → host for what host memory lacks, and host → each tier that lacks it."""
        span, residency = request.span, self._residency
        if span.last_block == span.first_block and not request.leaves:
            return None
        clears = residency.clears
        if request.generation < clears.generation and clears.is_stale(
            request.generation, request.keys[:BLOCK_KEY_BYTES]
        ):
            return ClearedError()
        parent = residency.parent(request.keys, span.first_block)
        if parent is None:
            return None
        found = residency.survey(request.keys, span.first_block, span.last_block)
        if len(found) > 1:
            found.sort(key=_first_position)
        held = [
            Holding(Tier.HOST, alike.block_ids[0])
            for alike in found
            if alike.states[0] == READY
            # Otherwise a lower tier has the block and none lacks it: its host place is not read.
            and (READY not in alike.states[1:] or ABSENT in alike.states[1:])
            and alike.block_ids[0] is not None
        ]
        with residency.holding([*parent, *held]):
            stores, shortfall = self._in_host(request, found)
            for store in stores:
                self._behind(request, draft, store)
            if request.leaves and shortfall is None:
                shortfall = self._store_leaves(request, draft)
        return shortfall

    def _store_leaves(self, request: Request, draft: Draft) -> CapacityError | None:
        """Draft the stores of leaves whose parents are resident, or are being stored."""
        residency, finder = self._residency, self._leaf_stores
        with residency.holding(finder.parents(request)):
            brought = finder.brought(request)
            there = [
                Store(positions, ids[0], False, self._lacking(states), group)
                for group, (states, positions, ids) in brought
                if states[0] == READY and ids[0] is not None
            ]
            with residency.holding([Holding(Tier.HOST, store.host_ids) for store in there]):
                new, shortfall = finder.place(
                    request, brought, lambda leaves: self._all_in_host(request, leaves)
                )
                for store in [*there, *new]:
                    if store.is_new or store.lacking:
                        self._behind(request, draft, store)
        return shortfall

    def _all_in_host(self, request: Request, leaves: Leaves) -> Store | None:
        """Reserve host places for all of these leaves; return None if there is not room for all."""
        group, (states, positions, _) = leaves
        lacking = self._lacking(states)
        how = self._how(lacking) if self._residency.selective else ALL
        how = ALL if how == PREFIX else how
        host_ids = self._residency.reserve(Tier.HOST, request.keys, positions, how, group)
        if len(host_ids) < positions.block_count:
            self._residency.abort(Tier.HOST, host_ids)
            return None
        return Store(positions, host_ids, True, lacking, group)

    def _lacking(self, states: tuple[int, ...]) -> tuple[Tier, ...]:
        """Return the lower tiers that lack blocks with these states."""
        return tuple([tier for number, tier in self._lower if states[number] == ABSENT])

    def _how(self, lacking: tuple[Tier, ...]) -> int:
        """Return how to reserve host places for new blocks that these lower tiers lack, too.

        Blocks that are not worth keeping in host memory pass through it if a lower tier may keep
        them.
        """
        return PREFIX if set(lacking) - self.avoid.unwritable else WORTHY

    def _in_host(
        self, request: Request, found: list[AlikeBlocks]
    ) -> tuple[list[Store], CapacityError | None]:
        """Return new blocks, with host places reserved, and host blocks that lower tiers lack."""
        stores: list[Store] = []
        shortfall = None
        for states, positions, block_ids in found:
            lacking, host_ids = self._lacking(states), block_ids[0]
            if states[0] == READY and host_ids is not None and lacking:
                stores.append(Store(positions, host_ids, False, lacking, 0))
            elif states[0] == ABSENT and shortfall is None:
                how = self._how(lacking)
                host_ids = self._residency.reserve(Tier.HOST, request.keys, positions, how)
                if len(host_ids) < positions.block_count:
                    shortfall = self._residency.shortfall(Tier.HOST, positions.block_count)
                    positions = positions.part(0, len(host_ids))
                if len(host_ids):
                    stores.append(Store(positions, host_ids, True, lacking, 0))
        return stores, shortfall

    def _behind(self, request: Request, draft: Draft, store: Store) -> None:
        """Draft one store, and as many writes behind it as the limit and the tiers' room allow."""
        positions, host_ids, is_new, lacking, group = store
        if not lacking:
            draft.add(_hops(is_new, ()), positions, {Tier.HOST: host_ids}, (), group)
            return
        taken: dict[Tier, BlockIds] = {}
        owed_from: dict[Tier, int] = {}
        for tier in lacking:
            room = self._room_behind(tier, positions.block_count)
            front = positions.part(0, room)
            ids = self._residency.reserve(tier, request.keys, front, WORTHY, group)
            if len(ids):
                taken[tier] = ids
            owed_from[tier] = len(ids)
            if len(ids) < room and self._residency.selective:
                draft.declined.append((tier, room - len(ids)))
                owed_from[tier] = room
        # Each tier took a prefix and is owed the rest: blocks between two ends have the same hops.
        count = positions.block_count
        ends = sorted({count, *map(len, taken.values()), *owed_from.values()} - {0})
        for begin, end in pairwise((0, *ends)):
            targets = tuple([tier for tier, ids in taken.items() if len(ids) > begin])
            owed_to = tuple([tier for tier, first in owed_from.items() if first <= begin])
            hops = _hops(is_new, targets)
            if not is_new:
                draft.owed += [Owed(tier, host_ids[begin:end]) for tier in owed_to]
            if hops:
                ids_by_tier = {tier: taken[tier][begin:end] for tier in targets}
                ids_by_tier[Tier.HOST] = host_ids[begin:end]
                owed_to = owed_to if is_new else ()
                draft.add(hops, positions.part(begin, end), ids_by_tier, owed_to, group)

    def _room_behind(self, tier: Tier, wanted_blocks: int) -> int:
        """Return how many blocks of a put may be queued for a tier at once."""
        if tier in self.tiers_owed or tier in self.avoid.unwritable:
            return 0
        waiting = self._residency.counts(tier).reserved
        return min(wanted_blocks, max(0, self.limits.write_behind_blocks_max - waiting))

    def plan_behind(self, taken: Taken, run_id: int) -> Plan:
        """Plan to write blocks of host memory to a lower tier: to their reserved places, or a span.

        A span of a far tier is written by one op.
        """
        tier, count = taken.tier, len(taken.host_ids)
        chunk_blocks = self.limits.chunk_blocks if tier in self.tiers else count
        leg, bounds = chunked((Route(Tier.HOST, tier),), count, chunk_blocks, taken.group)
        ids = {Tier.HOST: taken.host_ids, tier: taken.target_ids}
        fill = LegFill(taken.keys, Positions(0, count), ids, bounds)
        return self._claimed(Plan(template_of(Operation.PREFETCH, (leg,)), run_id, (fill,)))

    # -- both -----------------------------------------------------------------------------------

    def _claimed(self, plan: Plan) -> Plan:
        """Open the claim of every op that moves bytes, and return the plan."""
        claims, own, run_id = self._residency.claims, self.tiers, plan.run_id
        for op in plan.template.ops:
            if op.route is None:
                continue
            fill = plan.fills[op.leg]
            ids, begin, end = fill.ids, fill.bounds[op.chunk], fill.bounds[op.chunk + 1]
            source, target = op.route
            pinned = Holding(source, ids[source][begin:end]) if source in own else None
            leased = Holding(target, ids[target][begin:end]) if target in own else None
            claims.open(run_id * OPS_MAX + op.index, Claim(run_id, pinned, leased, source))
        return plan


def _last(found: Found) -> int:
    return found.last


def _first_position(alike: AlikeBlocks) -> int:
    return alike.positions.first


@cache
def _hops(is_new: bool, targets: tuple[Tier, ...]) -> tuple[Route, ...]:
    """Return the hops of a store: to the host if the blocks are new, then to these tiers."""
    behind = tuple(Route(Tier.HOST, tier) for tier in targets)
    return (STORE, *behind) if is_new else behind
