"""Shapes of requests, and the ops that their graphs are made of.

A *leg* is a set of blocks that take the same hops, such as DISK→HOST→DEVICE. A request's shape is
its goal and its legs, each with a number of chunks: everything that decides the graph, and nothing
that is particular to one request. So each shape is compiled and checked only once.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import msgspec

from flexkv.common.errors import InvariantError
from flexkv.common.request import Operation
from flexkv.common.terms import Route, Tier

CHUNKS_MAX = 32
"""Most chunks of one leg: this bounds the ops of a run, the templates and the mailboxes."""

LEAF_CHUNKS_MAX = 4
"""Most chunks of one leg of a KV group other than the chain's."""

LEGS_MAX = 8
"""A shape has at most LEGS_MAX legs for each KV group, and CHUNKS_MAX more for the chain."""


class Leg(NamedTuple):
    """Blocks that take the same hops.

    The source of each hop is where the blocks are at first, or the target of an earlier hop. With
    `waits`, another request is filling the blocks, and a barrier per chunk waits for that. All
    blocks are of KV group `group`: see `common/space.py`.
    """

    hops: tuple[Route, ...]
    chunks: int
    waits: bool = False
    group: int = 0

    @property
    def origin(self) -> Tier:
        """Return the tier where the blocks are at first."""
        return self.hops[0].source if self.hops else Tier.HOST


class Shape(NamedTuple):
    """All that decides the graph of a request."""

    goal: Operation
    legs: tuple[Leg, ...]


class OpState(IntEnum):
    """The state of one op of a run."""

    BLOCKED = 0
    READY = 1
    IN_FLIGHT = 2
    DONE = 3
    FAILED = 4
    SKIPPED = 5
    DRAINING = 6
    OVERDUE = 7


class Node(NamedTuple):
    """An op of the graph; before chunking, its chunk is -1, which stands for the whole leg."""

    leg: int
    chunk: int
    hop: int
    """Position among the leg's hops; -1 is the barrier in front of them."""
    route: Route | None


class OpSpec(msgspec.Struct, frozen=True):
    """One op of a template: chunk `chunk` of leg `leg`, on `route`, which is None for a barrier.

    `group` is the KV group of its blocks. `answers` marks the ops that the caller waits for.
    `keeps` marks the ops whose bytes stay valid when the request is cancelled meanwhile: all but
    those that read device memory, which its owner may reuse once the caller is answered.
    """

    index: int
    leg: int
    chunk: int
    route: Route | None
    answers: bool
    keeps: bool
    label: str
    """Short name of the op, for drawings and records."""
    group: int = 0


def answers(goal: Operation, leg: Leg, route: Route | None) -> bool:
    """Return whether the caller of `goal` waits for an op on `route`."""
    if route is None:
        return not leg.hops
    if goal is Operation.GET:
        return route.target is Tier.DEVICE
    if goal is Operation.PUT:
        return route.source is Tier.DEVICE
    return route.target is Tier.HOST


def check_shape(shape: Shape) -> None:
    """Check the limits, and that every hop starts in a tier that has the blocks by then.

    Raises:
        InvariantError: the planner made a shape that cannot run.
    """
    groups = 1 + max((leg.group for leg in shape.legs), default=0)
    if len(shape.legs) > LEGS_MAX * groups + CHUNKS_MAX:
        raise InvariantError(f"{len(shape.legs)} legs of {groups} KV groups are too many")
    for leg in shape.legs:
        if not 0 <= leg.chunks <= CHUNKS_MAX:
            raise InvariantError(f"{leg}: must have from 0 to {CHUNKS_MAX} chunks")
        at = {leg.origin}
        for route in leg.hops:
            if route.source not in at:
                raise InvariantError(
                    f"{leg}: {route} starts in a tier that does not have the blocks"
                )
            if route.target in at:
                raise InvariantError(f"{leg}: {route} fills {route.target.label} a second time")
            at.add(route.target)
