"""What a request would do: the graph of its plan, as text and as DOT, without planning it.

The index is only read: nothing is reserved or pinned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import networkx as nx

from flexkv.common.request import Operation, Request
from flexkv.common.terms import Route, Tier
from flexkv.graph.compile import compile_shape
from flexkv.graph.draft import LOAD, STORE, PlanLimits, chunked
from flexkv.graph.ops import Shape
from flexkv.graph.plan import Template, even_bounds
from flexkv.graph.planner import Planner
from flexkv.index.found import Placement


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
    own, limits, found = planner.tiers, planner.limits, planner.peek(request)
    total = request.span.last_block - request.span.first_block
    note = f"{request.operation.label} of {total} whole blocks: {_hits(own, _counts(found.ready))}"
    if request.operation is Operation.PUT:
        new = total - _counts(found.ready).get(Tier.HOST, 0)
        if planner.groups > 1:  # what was found ends where some leaf is missing
            new = request.span.last_block - planner.lacking_from(request)
        hops = (STORE, *(Route(Tier.HOST, tier) for tier in own if tier != Tier.HOST))
        return _explained(request.operation, [(hops, 0, new)], limits, note)
    by_group = {0: _counts(found.ready)}
    for leaves in found.leaves:
        by_group[leaves.group] = counts = _counts(leaves.ready)
        note += f"; {_hits(counts, counts)} of group {leaves.group}"
    onward = (LOAD,) if request.operation is Operation.GET else ()
    legs = []
    for group, counts in by_group.items():
        legs += [(onward, group, counts.get(Tier.HOST, 0))] if onward else []
        below = [(tier, n) for tier, n in counts.items() if tier != Tier.HOST]
        legs += [((Route(tier, Tier.HOST), *onward), group, n) for tier, n in below]
    return _explained(request.operation, legs, limits, note)


def _counts(ready: Mapping[Tier, Placement]) -> dict[Tier, int]:
    return {tier: placement.block_count for tier, placement in ready.items()}


def _hits(tiers: Iterable[Tier], counts: Mapping[Tier, int]) -> str:
    return ", ".join(f"{counts.get(t, 0)} in {t.label}" for t in dict.fromkeys([*tiers, *counts]))


def hypothetical(
    operation: Operation, legs: dict[tuple[Route, ...], int], limits: PlanLimits, note: str
) -> Explanation:
    """Return what a request would do if its blocks took these hops: {hops: number of blocks}."""
    return _explained(operation, [(hops, 0, n) for hops, n in legs.items()], limits, note)


def _explained(
    operation: Operation,
    legs: Sequence[tuple[tuple[Route, ...], int, int]],
    limits: PlanLimits,
    note: str,
) -> Explanation:
    """Return what a request would do; a leg is its hops, its KV group and its number of blocks."""
    present = [(hops, group, blocks) for hops, group, blocks in legs if blocks]
    shape = Shape(
        operation,
        tuple([chunked(hops, n, limits.chunk_blocks, group)[0] for hops, group, n in present]),
    )
    return Explanation(compile_shape(shape), tuple([n for _, _, n in present]), note)
