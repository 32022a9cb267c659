"""Turns a request and what the index says into a plan, and opens the plan's claims.

Nothing is planned that cannot run: what does not fit is left out, so that a request moves the
longest prefix that it can (get, prefetch) or as many leading blocks as there is room for (put).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from flexkv.common.errors import CapacityError
from flexkv.common.request import Operation, Request
from flexkv.common.terms import Route, Tier
from flexkv.graph.compile import compile_shape
from flexkv.graph.ops import CHUNKS_MAX, Leg, Shape
from flexkv.graph.plan import LegFill, Plan, Template, even_bounds
from flexkv.index.claims import Claim, Holding
from flexkv.index.residency import Found, Placement, Residency

LOAD = Route(Tier.HOST, Tier.DEVICE)
STORE = Route(Tier.DEVICE, Tier.HOST)

SINGLE_HOP_CHUNKS = 4
"""How many pipelined chunks make one of a leg that has nothing to overlap."""


class PlanLimits(NamedTuple):
    """What bounds a plan."""

    chunk_blocks: int
    """Blocks of one pipelined chunk, about; a leg has at most CHUNKS_MAX of them."""
    write_behind_blocks_max: int
    """Blocks of one lower tier that may wait to be written; more are not written at all."""


class Planned(NamedTuple):
    """A plan whose claims are open, what was found, and what did not fit."""

    plan: Plan
    found: Found
    shortfall: CapacityError | None


class Draft:
    """Legs and fills under construction."""

    def __init__(self, request: Request, limits: PlanLimits) -> None:
        self._request = request
        self._chunk_blocks = limits.chunk_blocks
        self._legs: list[Leg] = []
        self._fills: list[LegFill] = []

    def add(
        self, hops: tuple[Route, ...], positions: Sequence[int], ids: dict[Tier, list[int]]
    ) -> None:
        """Add a leg over blocks that are there; none when there are no blocks."""
        if positions:
            # One hop overlaps nothing: larger chunks, which only bound how long a cancel takes.
            chunk_blocks = self._chunk_blocks * (1 if len(hops) > 1 else SINGLE_HOP_CHUNKS)
            chunks = chunk_count(len(positions), chunk_blocks)
            bounds = even_bounds(len(positions), chunks)
            self._append(Leg(hops, chunks), positions, ids, bounds, ())

    def add_waiting(
        self, hops: tuple[Route, ...], pending: Placement, fillers: Sequence[int]
    ) -> None:
        """Add a leg over blocks that others are filling: a chunk per op that fills."""
        if pending.positions:
            starts = [i for i, token in enumerate(fillers) if not i or token != fillers[i - 1]]
            self._append(
                Leg(hops, len(starts), waits=True),
                pending.positions,
                {Tier.HOST: pending.block_ids},
                (*starts, len(fillers)),
                tuple(fillers[i] for i in starts),
            )

    def _append(
        self,
        leg: Leg,
        positions: Sequence[int],
        claimed: dict[Tier, list[int]],
        bounds: tuple[int, ...],
        fillers: tuple[int, ...],
    ) -> None:
        self._legs.append(leg)
        self._fills.append(_fill(self._request, positions, claimed, bounds, fillers))

    def plan(self, run_id: int) -> Plan:
        """Give the plan: the shape's template with these fills."""
        shape = Shape(self._request.operation, tuple(self._legs))
        return Plan(compile_shape(shape), run_id, tuple(self._fills))


def _fill(
    request: Request,
    positions: Sequence[int],
    claimed: dict[Tier, list[int]],
    bounds: tuple[int, ...],
    fillers: tuple[int, ...],
) -> LegFill:
    """Give the blocks of a leg as arrays, the device's places among them."""
    ids = {tier: np.array(block_ids, np.int64) for tier, block_ids in claimed.items()}
    device_ids = request.device_ids
    if device_ids is not None:
        first = request.span.first_block
        begin, end = positions[0] - first, positions[-1] - first + 1
        unbroken = end - begin == len(positions)
        ids[Tier.DEVICE] = (
            device_ids[begin:end] if unbroken else device_ids[np.subtract(positions, first)]
        )
    return LegFill(positions, ids, claimed, bounds, fillers)


class Planner:
    """Plans requests over one residency. Synchronous, pure, and the only caller of `reserve`."""

    def __init__(self, residency: Residency, limits: PlanLimits) -> None:
        self._residency = residency
        self._limits = limits
        self._host = residency.tiers[Tier.HOST]
        self._lower = [index for tier, index in residency.tiers.items() if tier is not Tier.HOST]

    def plan(self, request: Request, run_id: int) -> Planned:
        """Plan a request and open its claims: they end by the run's events, and only so."""
        found = self._residency.find(request.keys, request.span.first_block)
        if request.operation is Operation.PUT:
            draft = Draft(request, self._limits)
            shortfall = self._store(request, draft)
            plan = self._claimed(draft.plan(run_id))
        elif found.host_only:
            plan, shortfall = self._claimed(self._from_host(request, found, run_id)), None
        else:
            draft = Draft(request, self._limits)
            with self._residency.holding(found.holdings):
                last, shortfall = self._load(request, found, draft)
                plan = self._claimed(draft.plan(run_id))
            found = found._replace(last=last)
        return Planned(plan, found, shortfall)

    def _from_host(self, request: Request, found: Found, run_id: int) -> Plan:
        """Plan the common case: all is in host memory, nothing to reserve, nobody to wait for."""
        positions, block_ids = found.ready[Tier.HOST]
        if not positions or request.operation is not Operation.GET:
            return Plan(compile_shape(Shape(request.operation, ())), run_id, ())
        chunks = chunk_count(len(positions), self._limits.chunk_blocks * SINGLE_HOP_CHUNKS)
        bounds = even_bounds(len(positions), chunks)
        fill = _fill(request, positions, {Tier.HOST: block_ids}, bounds, ())
        return Plan(_load_template(chunks), run_id, (fill,))

    # -- loads: get and prefetch ----------------------------------------------------------------

    def _load(
        self, request: Request, found: Found, draft: Draft
    ) -> tuple[int, CapacityError | None]:
        """Draft the loads of the resident run, and give where the run ends that can be loaded."""
        onward = (LOAD,) if request.operation is Operation.GET else ()
        fillers, last = self._fillers(found)
        last, shortfall = self._room_for(found, last)
        for tier, placement in found.ready.items():
            count = bisect_left(placement.positions, last)
            positions, ids = placement.positions[:count], placement.block_ids[:count]
            if tier is Tier.HOST:
                if onward:
                    draft.add(onward, positions, {Tier.HOST: ids})
                continue
            host_ids = self._host.reserve([request.keys[position] for position in positions])
            hops = (Route(tier, Tier.HOST), *onward)
            draft.add(hops, positions, {tier: ids, Tier.HOST: host_ids})
        count = bisect_left(found.pending.positions, last)
        pending = Placement(found.pending.positions[:count], found.pending.block_ids[:count])
        draft.add_waiting(onward, pending, fillers[:count])
        return last, shortfall

    def _room_for(self, found: Found, last: int) -> tuple[int, CapacityError | None]:
        """Give where the run ends for which there are host places, at or before `last`."""
        wanted = sorted(
            position
            for tier, placement in found.ready.items()
            if tier is not Tier.HOST
            for position in placement.positions
            if position < last
        )
        room = self._host.room()
        if len(wanted) <= room:
            return last, None
        return wanted[room], self._shortfall(len(wanted))

    def _fillers(self, found: Found) -> tuple[list[int], int]:
        """Give who fills each pending block, and where the run ends that few enough ops fill."""
        claims = self._residency.claims
        fillers = [claims.filler(Tier.HOST, block_id) for block_id in found.pending.block_ids]
        changes = [i for i, token in enumerate(fillers) if not i or token != fillers[i - 1]]
        if len(changes) > CHUNKS_MAX:
            return fillers, found.pending.positions[changes[CHUNKS_MAX]]
        return fillers, found.last

    # -- stores: put ----------------------------------------------------------------------------

    def _store(self, request: Request, draft: Draft) -> CapacityError | None:
        """Draft what no tier has yet: device → host, and host → each tier that lacks it."""
        new, resident = self._missing(request)
        keys, shortfall = request.keys, None
        with self._residency.holding([Holding(Tier.HOST, list(resident.values()))]):
            room = self._host.room()
            if len(new) > room:
                shortfall = self._shortfall(len(new))
                new = new[:room]
            reserved = self._host.reserve([keys[at] for at in new])
        host_ids = dict(zip(new, reserved, strict=True))
        host_ids.update(resident)
        lower_ids = {
            index.tier: self._places_behind(index.tier, request, sorted(host_ids))
            for index in self._lower
        }
        groups: dict[tuple[bool, tuple[Tier, ...]], list[int]] = {}
        for position in sorted(host_ids):
            targets = tuple(tier for tier, places in lower_ids.items() if position in places)
            groups.setdefault((position not in resident, targets), []).append(position)
        for (is_new, targets), positions in groups.items():
            behind = tuple(Route(Tier.HOST, tier) for tier in targets)
            hops = (STORE, *behind) if is_new else behind
            ids = {tier: [lower_ids[tier][at] for at in positions] for tier in targets}
            ids[Tier.HOST] = [host_ids[at] for at in positions]
            if hops:
                draft.add(hops, positions, ids)
        return shortfall

    def _missing(self, request: Request) -> tuple[list[int], dict[int, int]]:
        """Give the positions that the host lacks, and the host ids of those it has ready."""
        new: list[int] = []
        resident: dict[int, int] = {}
        for position in range(request.span.first_block, request.span.last_block):
            block_id = self._host.find(request.keys[position])
            if block_id is None:
                new.append(position)
            elif self._host.is_ready(block_id):
                resident[position] = block_id
        return new, resident

    def _places_behind(
        self, tier: Tier, request: Request, positions: Sequence[int]
    ) -> dict[int, int]:
        """Reserve places in a lower tier for the blocks it lacks, as many as may be written.

        Those that it has are used by this, too.
        """
        index = self._residency.tiers[tier]
        lacking: list[int] = []
        present: list[int] = []
        for at in positions:
            block_id = index.find(request.keys[at])
            if block_id is None:
                lacking.append(at)
            else:
                present.append(block_id)
        index.touch(present)  # else a prompt that grows would lose its oldest blocks first
        allowed = self._limits.write_behind_blocks_max - index.reserved_blocks
        lacking = lacking[: max(0, min(allowed, index.room()))]
        return dict(zip(lacking, index.reserve([request.keys[at] for at in lacking]), strict=True))

    # -- both -----------------------------------------------------------------------------------

    def _shortfall(self, wanted_blocks: int) -> CapacityError:
        host = self._host
        return CapacityError("host", wanted_blocks, host.free_blocks, host.evictable_blocks)

    def _claimed(self, plan: Plan) -> Plan:
        """Open a claim for every op of the plan that moves bytes."""
        claims = self._residency.claims
        for op in plan.template.ops:
            if op.route is None:
                continue
            begin, end = plan.bounds(op)
            claimed = plan.fills[op.leg].claimed
            source, target = op.route
            pinned = Holding(source, claimed[source][begin:end]) if source in claimed else None
            leased = Holding(target, claimed[target][begin:end]) if target in claimed else None
            claims.open(plan.token(op), Claim(plan.run_id, pinned, leased))
        return plan


@cache
def _load_template(chunks: int) -> Template:
    """Give the template of a get whose blocks are all in host memory."""
    return compile_shape(Shape(Operation.GET, (Leg((LOAD,), chunks),)))


def chunk_count(block_count: int, chunk_blocks: int) -> int:
    """Give into how many chunks to split: a power of two, so that few shapes serve all sizes."""
    wanted = min(-(-block_count // chunk_blocks), CHUNKS_MAX)
    chunks = 1 << (wanted - 1).bit_length()
    return chunks if chunks <= block_count else chunks // 2
