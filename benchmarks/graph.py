"""Graph costs of a request over host and SSD: template look-up and fill, and the run's bookkeeping.

The planner's own code drafts, fills and looks up. What the index gives it (positions and places)
is made beforehand, since the `index` case measures whole planning. A leg has one chunk.

The comparison builds and walks the same graph with networkx for every request, as a planner
without templates would. Floor: in-degree counters over a static template, about 1 µs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import networkx as nx
import numpy as np

from benchmarks.harness import Figures, Options
from flexkv.common.request import Operation, Request, Span
from flexkv.common.terms import Positions, Route, Tier
from flexkv.graph.compile import build, compile_shape
from flexkv.graph.draft import Draft, PlanLimits, template_of
from flexkv.graph.ops import Leg, Shape
from flexkv.graph.plan import Plan
from flexkv.graph.run import IssueOp, LaunchRun, OpDone, Run

LOAD, STORE = Route(Tier.HOST, Tier.DEVICE), Route(Tier.DEVICE, Tier.HOST)
READ, WRITE = Route(Tier.DISK, Tier.HOST), Route(Tier.HOST, Tier.DISK)
LEGS = {
    "get": (Operation.GET, ((LOAD,), (READ, LOAD))),
    "put": (Operation.PUT, ((STORE, WRITE),)),
}
IDS = np.arange(64)
POSITIONS = [Positions(0, 64), Positions(64, 64)]
PLACES = {
    path: {tier: IDS for route in path for tier in route if tier is not Tier.DEVICE}
    for _, paths in LEGS.values()
    for path in paths
}
LIMITS = PlanLimits(chunk_blocks=64, write_behind_blocks_max=64)
REQUESTS = {
    operation: Request(
        operation, 1, 128 * 16, 16, Span(0, 128, 0, 128 * 16), b"", np.arange(128, dtype=np.int64)
    )
    for operation in Operation
}


def measure(options: Options) -> Figures:
    """Return the figures of the case."""
    rounds = 50 if options.quick else 700 * options.repeats
    figures: Figures = {}
    for name, (operation, hops) in LEGS.items():
        fill = partial(_fill, operation, hops)
        graph_us = _median_us(fill, rounds)
        whole_us = _median_us(partial(_fill_and_drive, fill), rounds)
        networkx_us = _median_us(partial(_by_networkx, operation, hops), rounds // 5)
        figures[f"{name}: template look-up and fill, us"] = graph_us
        figures[f"{name}: fill and run, us"] = whole_us
        figures[f"{name}: networkx a request / template"] = networkx_us / graph_us
    figures["new shape, compile and check, us"] = _compile_us(rounds // 25 + 1)
    return figures


def _fill(operation: Operation, paths: tuple[tuple[Route, ...], ...]) -> Plan:
    """Draft and fill a plan as the planner does once it knows the blocks: 64 a leg."""
    draft = Draft(REQUESTS[operation], LIMITS)
    for number, path in enumerate(paths):
        draft.add(path, POSITIONS[number], PLACES[path].copy())
    return draft.plan(1)


def _by_networkx(operation: Operation, paths: tuple[tuple[Route, ...], ...]) -> None:
    """Build and walk the graph as a planner without templates would for each request."""
    graph = build(Shape(operation, tuple(Leg(path, 1) for path in paths)))
    list(nx.topological_generations(graph))


def _fill_and_drive(fill: Callable[[], Plan]) -> None:
    _drive(fill())


def _drive(plan: Plan) -> None:
    """Run a plan whose ops all succeed, and make each op's transfer."""
    run = Run(plan.template)
    commands = run.handle(LaunchRun())
    while commands:
        following = []
        for command in commands:
            if type(command) is IssueOp:
                plan.transfer(plan.template.ops[command.op])
                following += run.handle(OpDone(command.op))
        commands = following


def _compile_us(rounds: int) -> float:
    """Return the median microseconds of a plan whose shape is new."""
    took = []
    for _ in range(rounds):
        compile_shape.cache_clear()
        template_of.cache_clear()
        begin = time.perf_counter()
        _fill(Operation.GET, LEGS["get"][1])
        took.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(took)


def _median_us(work: Callable[[], object], rounds: int) -> float:
    took = []
    for _ in range(rounds):
        begin = time.perf_counter()
        work()
        took.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(took)
