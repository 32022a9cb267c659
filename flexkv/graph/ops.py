"""Shapes of requests, and the ops that their graphs are made of.

A *leg* is a set of blocks that take the same hops, such as DISK→HOST→DEVICE. A request's shape is
its goal and its legs, each with a number of chunks: everything that decides the graph, nothing
that is particular to one request. So a shape is compiled and checked once.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import msgspec

from flexkv.common.errors import InvariantError
from flexkv.common.request import Operation
from flexkv.common.terms import Route, Tier

CHUNKS_MAX = 32
"""Chunks of one leg at most: bounds the ops of a run, the templates and the mailboxes."""

LEGS_MAX = 8
"""Legs of one shape at most."""


class Leg(NamedTuple):
    """Blocks that take the same hops.

    The source of each hop is where the blocks are at first, or the target of an earlier hop. With
    `waits`, somebody else is filling the blocks, and a barrier per chunk waits for that.
    """

    hops: tuple[Route, ...]
    chunks: int
    waits: bool = False

    @property
    def origin(self) -> Tier:
        """Give the tier where the blocks are at first."""
        return self.hops[0].source if self.hops else Tier.HOST


class Shape(NamedTuple):
    """All that decides the graph of a request."""

    goal: Operation
    legs: tuple[Leg, ...]


class OpState(IntEnum):
    """Where one op of a run stands."""

    BLOCKED = 0
    READY = 1
    IN_FLIGHT = 2
    DONE = 3
    FAILED = 4
    SKIPPED = 5
    DRAINING = 6
    OVERDUE = 7


class Node(NamedTuple):
    """An op of the graph, by what it is: chunk -1 stands for the whole leg, before chunking."""

    leg: int
    chunk: int
    hop: int
    """Position among the leg's hops; -1 is the barrier in front of them."""
    route: Route | None


class OpSpec(msgspec.Struct, frozen=True):
    """One op of a template: chunk `chunk` of leg `leg`, on `route`; a barrier has none.

    `answers` marks the ops that the caller waits for. `keeps` marks those whose bytes stay good
    when the request is cancelled under way: all that do not read device memory, which its owner
    may reuse once the caller is told.
    """

    index: int
    leg: int
    chunk: int
    route: Route | None
    answers: bool
    keeps: bool
    label: str
    """Names the op in one word, for pictures and records."""


def answers(goal: Operation, leg: Leg, route: Route | None) -> bool:
    """Tell whether the caller of `goal` waits for an op on `route`."""
    if route is None:
        return not leg.hops
    if goal is Operation.GET:
        return route.target is Tier.DEVICE
    if goal is Operation.PUT:
        return route.source is Tier.DEVICE
    return route.target is Tier.HOST


def check_shape(shape: Shape) -> None:
    """Check the limits, and that every hop starts where the blocks are by then.

    Raises:
        InvariantError: the planner made a shape that cannot run.
    """
    if len(shape.legs) > LEGS_MAX + CHUNKS_MAX:
        raise InvariantError(f"{len(shape.legs)} legs, at most {LEGS_MAX + CHUNKS_MAX}")
    for leg in shape.legs:
        if not 0 <= leg.chunks <= CHUNKS_MAX:
            raise InvariantError(f"{leg}: at most {CHUNKS_MAX} chunks")
        at = {leg.origin}
        for route in leg.hops:
            if route.source not in at:
                raise InvariantError(f"{leg}: {route} starts where the blocks are not")
            if route.target in at:
                raise InvariantError(f"{leg}: {route} fills {route.target.label} a second time")
            at.add(route.target)
