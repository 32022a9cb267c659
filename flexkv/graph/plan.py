"""Frozen plans: a template, shared by every request of its shape, and one request's block ids."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from flexkv.common.errors import InvariantError
from flexkv.common.terms import BlockIds, BlockNames, LayerWatch, Tier, Transfer
from flexkv.graph.ops import OpSpec, OpState, Shape

OPS_MAX = 4096
"""Most ops of one run; an op's id is run_id * OPS_MAX + op index."""


class Template(msgspec.Struct, frozen=True):
    """A compiled shape: ops in start order, the ops after and before each, how many block it."""

    shape: Shape
    ops: tuple[OpSpec, ...]
    successors: tuple[tuple[int, ...], ...]
    predecessors: tuple[tuple[int, ...], ...]
    blockers: tuple[int, ...]
    answer_count: int
    start_states: tuple[OpState, ...]

    def __post_init__(self) -> None:
        if len(self.ops) > OPS_MAX:
            raise InvariantError(f"{len(self.ops)} ops; the limit is {OPS_MAX}")


class LegFill(BlockNames, frozen=True):
    """One request's blocks of one leg.

    `ids` are their places in each tier of the leg (int64[n] each); in a far tier, what the
    catalogue calls them. `bounds` has the start of each chunk, and the end of the last. `fillers`
    has, for a leg that waits, the id of the op that is filling each chunk. `owed_to` are the tiers
    that lack the blocks and to which no hop of the leg writes them.
    """

    ids: Mapping[Tier, BlockIds]
    bounds: tuple[int, ...]
    fillers: tuple[int, ...] = ()
    owed_to: tuple[Tier, ...] = ()


class Plan(msgspec.Struct, frozen=True):
    """A template filled for one request."""

    template: Template
    run_id: int
    fills: tuple[LegFill, ...]
    watch: LayerWatch | None = None

    def op_id(self, op: OpSpec) -> int:
        """Return the op's id, unique among all ops of all runs."""
        return self.run_id * OPS_MAX + op.index

    def device_op_ids(self) -> list[int]:
        """Return the ids of the ops that move bytes to or from the device."""
        ops = self.template.ops
        return [self.op_id(op) for op in ops if op.route and op.route.outer is Tier.DEVICE]

    def bounds(self, op: OpSpec) -> tuple[int, int]:
        """Return where the op's blocks begin and end among those of its leg."""
        bounds = self.fills[op.leg].bounds
        return bounds[op.chunk], bounds[op.chunk + 1]

    def transfer(self, op: OpSpec) -> Transfer:
        """Return the op as its actor receives it."""
        fill, route = self.fills[op.leg], op.route
        if route is None:
            raise InvariantError(f"op {op.index} is a barrier: it moves nothing")
        begin, end = fill.bounds[op.chunk], fill.bounds[op.chunk + 1]
        return Transfer(
            self.run_id * OPS_MAX + op.index,
            self.run_id,
            route,
            fill.ids[route.source][begin:end],
            fill.ids[route.target][begin:end],
            self.watch if route.outer is Tier.DEVICE else None,
            None,
            fill,
            begin,
            op.group,
        )


def even_bounds(block_count: int, chunks: int) -> tuple[int, ...]:
    """Return the bounds of `chunks` chunks whose sizes differ by at most one block."""
    if chunks == 1:
        return 0, block_count
    return tuple([block_count * chunk // chunks for chunk in range(chunks + 1)])
