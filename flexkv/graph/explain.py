"""What a request would do: the graph of its plan, as text and as DOT, without planning it.

The index is only read: nothing is reserved or pinned.
"""

from __future__ import annotations

import networkx as nx

from flexkv.common.request import Operation, Request
from flexkv.common.terms import Route, Tier
from flexkv.graph.compile import compile_shape
from flexkv.graph.draft import LOAD, STORE, PlanLimits, chunks_of
from flexkv.graph.ops import Leg, Shape
from flexkv.graph.plan import Template, even_bounds
from flexkv.graph.planner import Planner


class Explanation:
    """A plan's graph, with the number of blocks of each op. `str()` draws it as text."""

    def __init__(self, template: Template, leg_blocks: tuple[int, ...], note: str) -> None:
        self.template = template
        self.leg_blocks = leg_blocks
        self.note = note

    def graph(self) -> nx.DiGraph[str]:
        """Return the ops as a graph of labelled nodes."""
        graph: nx.DiGraph[str] = nx.DiGraph()
        labels = [self._label(index) for index in range(len(self.template.ops))]
        graph.add_nodes_from(labels)
        for index, successors in enumerate(self.template.successors):
            graph.add_edges_from((labels[index], labels[after]) for after in successors)
        return graph

    def dot(self) -> str:
        """Return the graph in Graphviz' DOT language."""
        graph = self.graph()
        lines = ["digraph plan {", "  rankdir=LR;", "  node [shape=box];"]
        lines += [f'  "{node}";' for node in graph]
        lines += [f'  "{before}" -> "{after}";' for before, after in graph.edges]
        return "\n".join([*lines, "}"])

    def __repr__(self) -> str:
        return f"Explanation({self.note}, {len(self.template.ops)} ops)"

    def __str__(self) -> str:
        if not self.template.ops:
            return self.note
        return "\n".join(
            [self.note, *nx.generate_network_text(self.graph(), vertical_chains=False)]
        )

    def _label(self, index: int) -> str:
        op = self.template.ops[index]
        bounds = even_bounds(self.leg_blocks[op.leg], self.template.shape.legs[op.leg].chunks)
        blocks = bounds[op.chunk + 1] - bounds[op.chunk]
        group = f" of group {op.group}" if op.group else ""
        told = " (answers)" if op.answers else ""
        return f"op {op.index}: {op.label} {blocks} blocks{group}{told}"


def explain(request: Request, planner: Planner) -> Explanation:
    """Return what a request would do with the blocks that are resident now, or lie far."""
    own, limits = planner.tiers, planner.limits
    counts = dict.fromkeys(own, 0)
    counts |= {t: place.block_count for t, place in planner.peek(request).ready.items()}
    total = request.span.last_block - request.span.first_block
    hits = ", ".join(f"{n} in {tier.label}" for tier, n in counts.items())
    note = f"{request.operation.label} of {total} whole blocks: {hits}"
    if request.operation is Operation.PUT:
        new = total - counts[Tier.HOST]
        legs = {(STORE, *(Route(Tier.HOST, tier) for tier in own if tier != Tier.HOST)): new}
    else:
        onward = (LOAD,) if request.operation is Operation.GET else ()
        below = [(tier, n) for tier, n in counts.items() if tier != Tier.HOST]
        legs = {(Route(tier, Tier.HOST), *onward): n for tier, n in below}
        if onward:
            legs = {onward: counts[Tier.HOST], **legs}
    return hypothetical(request.operation, legs, limits, note)


def hypothetical(
    operation: Operation, legs: dict[tuple[Route, ...], int], limits: PlanLimits, note: str
) -> Explanation:
    """Return what a request would do if its blocks took these hops: {hops: number of blocks}."""
    present = {hops: blocks for hops, blocks in legs.items() if blocks}
    shape = Shape(
        operation,
        tuple(Leg(hops, chunks_of(hops, n, limits.chunk_blocks)) for hops, n in present.items()),
    )
    return Explanation(compile_shape(shape), tuple(present.values()), note)
