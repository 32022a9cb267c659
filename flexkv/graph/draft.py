"""A plan under construction: legs with their fills, cut into chunks."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from msgspec import structs

from flexkv.common.request import Operation, Request
from flexkv.common.terms import BlockIds, Positions, Route, Tier
from flexkv.graph.compile import TEMPLATES_MAX, compile_shape
from flexkv.graph.ops import CHUNKS_MAX, LEAF_CHUNKS_MAX, Leg, Shape
from flexkv.graph.plan import LegFill, Plan, Template, even_bounds
from flexkv.index.claims import Claims
from flexkv.index.found import Found, Placement
from flexkv.index.keys import leaf_keys
from flexkv.index.residency import PREFIX, Residency

LOAD = Route(Tier.HOST, Tier.DEVICE)
STORE = Route(Tier.DEVICE, Tier.HOST)
ONWARD = (LOAD,)

SINGLE_HOP_CHUNKS = 4
"""How many times larger chunks are in a leg of one hop, which has nothing to overlap."""


class PlanLimits(NamedTuple):
    """Limits of a plan."""

    chunk_blocks: int
    """Blocks of one pipelined chunk, approximately; a leg has at most CHUNKS_MAX chunks."""
    write_behind_blocks_max: int
    """How many blocks puts may queue for one lower tier; further ones are owed to it."""
    peers_how: int = PREFIX
    """How to reserve host places for what other nodes have: PREFIX, or as the policy would."""


class Avoid(NamedTuple):
    """What a plan must not use for now."""

    unreadable: frozenset[Tier] = frozenset()
    unwritable: frozenset[Tier] = frozenset()
    fillers: frozenset[int] = frozenset()
    """Ops that are filling host blocks and must not be waited for."""

    def and_far(self, residency: Residency) -> Avoid:
        """Return what to avoid so that nothing is fetched from far tiers, or waited for."""
        far = frozenset(Tier) - {Tier.DEVICE, *residency.tiers}
        fillers = self.fillers | residency.claims.filling_from_others()
        return self._replace(unreadable=self.unreadable | far, fillers=fillers)

    def visible(self, found: Found, claims: Claims) -> Found:
        """Return the part of a run of the chain that needs nothing that is to be avoided."""
        if self is NOTHING_AVOIDED:
            return found
        for tier in self.unreadable & found.ready.keys():
            found = found.before(found.ready[tier].positions.first)
        if self.fillers and found.pending is not None:
            fillers = claims.fillers(Tier.HOST, found.pending.block_ids)
            stuck = np.flatnonzero(np.isin(fillers, list(self.fillers)))
            if len(stuck):
                found = found.before(found.pending.positions.at(int(stuck[0])))
        return found


NOTHING_AVOIDED = Avoid()


class Owed(NamedTuple):
    """Blocks in host memory that a lower tier lacks and the plan does not write to that tier."""

    tier: Tier
    host_ids: BlockIds


class Draft:
    """The legs and fills of a plan under construction."""

    __slots__ = (
        "_chunk_blocks", "_fills", "_leaf_keys", "_legs", "_request", "declined", "owed",
        "reserved",
    )  # fmt: skip

    def __init__(self, request: Request, limits: PlanLimits) -> None:
        self._request = request
        self._chunk_blocks = limits.chunk_blocks
        self._legs: list[Leg] = []
        self._fills: list[LegFill] = []
        self._leaf_keys: dict[int, bytes] = {}
        self.reserved: list[BlockIds] = []
        """Host places that are reserved for this plan."""
        self.owed: list[Owed] = []
        self.declined: list[tuple[Tier, int]] = []

    def add(
        self,
        hops: tuple[Route, ...],
        positions: Positions,
        ids: dict[Tier, BlockIds],
        owed_to: tuple[Tier, ...] = (),
        group: int = 0,
    ) -> None:
        """Add a leg that waits for no other request; the draft takes over `ids`."""
        leg, bounds = chunked(hops, positions.block_count, self._chunk_blocks, group)
        self._legs.append(leg)
        fill = self._fill(leg, positions, ids, bounds)
        self._fills.append(structs.replace(fill, owed_to=owed_to) if owed_to else fill)

    def add_far(
        self,
        hops: tuple[Route, ...],
        positions: Positions,
        ids: dict[Tier, BlockIds],
        span_blocks: int,
    ) -> None:
        """Add a leg of consecutive blocks of a far tier, whose chunks divide no span."""
        leg, bounds = chunked_by_span(hops, positions, self._chunk_blocks, span_blocks)
        self._legs.append(leg)
        self._fills.append(self._fill(leg, positions, ids, bounds))

    def add_waiting(
        self, hops: tuple[Route, ...], pending: Placement, chunks: Chunks, group: int = 0
    ) -> None:
        """Add a leg over blocks that other requests are filling, one chunk for each filling op."""
        starts, fillers = chunks
        leg = Leg(hops, len(starts), True, group)
        self._legs.append(leg)
        ids, bounds = {Tier.HOST: pending.block_ids}, (*starts, pending.block_count)
        fill = self._fill(leg, pending.positions, ids, bounds)
        self._fills.append(structs.replace(fill, fillers=tuple(fillers)))

    def _fill(
        self, leg: Leg, positions: Positions, ids: dict[Tier, BlockIds], bounds: tuple[int, ...]
    ) -> LegFill:
        """Return the fill of a leg, after adding the device's places to `ids`."""
        group = leg.group
        if not group:
            return fill_of(self._request, positions, ids, bounds)
        if leg.hops and (leg.hops[0] == STORE or leg.hops[-1] == LOAD):
            leaves = next(each for each in self._request.leaves if each.group == group)
            ids[Tier.DEVICE] = leaves.ids_at(positions)
        if group not in self._leaf_keys:
            self._leaf_keys[group] = leaf_keys(self._request.keys, group)
        return LegFill(self._leaf_keys[group], positions, ids, bounds)

    def plan(self, run_id: int) -> Plan:
        """Return the plan: the shape's template with these fills."""
        template = template_of(self._request.operation, tuple(self._legs))
        return Plan(template, run_id, tuple(self._fills), self._request.watch)


def fill_of(
    request: Request,
    positions: Positions,
    ids: dict[Tier, BlockIds],
    bounds: tuple[int, ...],
) -> LegFill:
    """Return the fill of a leg of the chain, after adding the device's places to `ids`."""
    if request.device_ids is not None:
        ids[Tier.DEVICE] = positions.within(request.device_ids, request.span.first_block)
    return LegFill(request.keys, positions, ids, bounds)


class Chunks(NamedTuple):
    """Blocks that other requests are filling, in chunks; one op fills each chunk.

    Attributes:
        starts: the index of the first block of each chunk.
        fillers: the id of the op that fills each chunk.
    """

    starts: list[int]
    fillers: list[int]


def chunks_filled(claims: Claims, pending: Placement) -> Chunks:
    """Return the chunks in which blocks of host memory are being filled."""
    fillers = claims.fillers(Tier.HOST, pending.block_ids)
    starts = [0, *(np.flatnonzero(np.diff(fillers)) + 1).tolist()]
    return Chunks(starts, fillers[starts].tolist())


@lru_cache(maxsize=4096)
def chunked(
    hops: tuple[Route, ...], block_count: int, chunk_blocks: int, group: int = 0
) -> tuple[Leg, tuple[int, ...]]:
    """Return the leg of this many blocks of a KV group, and the bounds of its chunks."""
    chunks = chunks_of(hops, block_count, chunk_blocks)
    if group:
        chunks = min(chunks, LEAF_CHUNKS_MAX)
    return Leg(hops, chunks, False, group), even_bounds(block_count, chunks)


def chunked_by_span(
    hops: tuple[Route, ...], positions: Positions, chunk_blocks: int, span_blocks: int
) -> tuple[Leg, tuple[int, ...]]:
    """Return the leg of consecutive blocks, and bounds of its chunks at which spans begin."""
    first, count = positions.first, positions.block_count
    spans = range(first // span_blocks, -(-(first + count) // span_blocks))
    chunks = chunks_of(hops, len(spans), max(1, chunk_blocks // span_blocks))
    begins = [spans[bound] * span_blocks - first for bound in even_bounds(len(spans), chunks)[:-1]]
    return Leg(hops, chunks), (0, *begins[1:], count)


@lru_cache(maxsize=TEMPLATES_MAX)
def template_of(operation: Operation, legs: tuple[Leg, ...]) -> Template:
    """Return the template of a request with these legs."""
    return compile_shape(Shape(operation, legs))


def chunks_of(hops: tuple[Route, ...], block_count: int, chunk_blocks: int) -> int:
    """Return the number of chunks of a leg.

    A leg that only goes to the device is one chunk: no other request waits for it, and its actor
    moves it in pieces, so a cancel is not slower. Another single hop overlaps with nothing, so its
    chunks are larger.
    """
    if hops == ONWARD:
        return min(1, block_count)
    return chunk_count(block_count, chunk_blocks * (1 if len(hops) > 1 else SINGLE_HOP_CHUNKS))


def chunk_count(block_count: int, chunk_blocks: int) -> int:
    """Return the number of chunks: a power of two, so that few shapes serve all sizes."""
    wanted = min(-(-block_count // chunk_blocks), CHUNKS_MAX)
    chunks = 1 << (wanted - 1).bit_length()
    return chunks if chunks <= block_count else chunks // 2
