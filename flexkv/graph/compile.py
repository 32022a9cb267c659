"""Compiles a shape into a checked, frozen template: build → passes → check → freeze.

The graph is an `networkx.DiGraph`; its nodes are `Node`s, an edge means that the target op may
start only when the source op is done. Compiling a shape costs tens of microseconds, so the
templates are cached: `compile_shape` returns the same object for an equal shape.
"""

from __future__ import annotations

from functools import lru_cache

import networkx as nx

from flexkv.common.errors import InvariantError
from flexkv.common.terms import Tier
from flexkv.graph import passes
from flexkv.graph.ops import Node, OpSpec, OpState, Shape, answers, check_shape
from flexkv.graph.plan import Template

TEMPLATES_MAX = 1024
"""Templates that are cached; the least recently used one is dropped."""


@lru_cache(maxsize=TEMPLATES_MAX)
def compile_shape(shape: Shape) -> Template:
    """Return the template of a shape.

    Raises:
        InvariantError: the shape or its graph breaks a law.
    """
    check_shape(shape)
    graph = build(shape)
    graph = passes.drop_noops(graph, shape)
    graph = passes.chunk(graph, shape)
    check(graph, shape)
    return freeze(graph, shape)


def build(shape: Shape) -> nx.DiGraph[Node]:
    """Return the graph of whole legs, in which each hop follows the hop that fills its source."""
    graph: nx.DiGraph[Node] = nx.DiGraph()
    for number, leg in enumerate(shape.legs):
        filled_by: dict[Tier, Node] = {}
        if leg.waits:
            filled_by[leg.origin] = Node(number, -1, -1, None)
            graph.add_node(filled_by[leg.origin])
        for hop, route in enumerate(leg.hops):
            node = Node(number, -1, hop, route)
            graph.add_node(node)
            if route.source in filled_by:
                graph.add_edge(filled_by[route.source], node)
            filled_by[route.target] = node
    return graph


def check(graph: nx.DiGraph[Node], shape: Shape) -> None:
    """Check that the graph is acyclic and fills every chunk of every tier at most once.

    Raises:
        InvariantError: the graph is not like that.
    """
    if not nx.is_directed_acyclic_graph(graph):
        raise InvariantError(f"the graph of {shape} has a cycle: {nx.find_cycle(graph)}")
    filled: set[tuple[int, int, Tier]] = set()
    for node in graph:
        if node.route is None:
            continue
        target = (node.leg, node.chunk, node.route.target)
        if target in filled:
            raise InvariantError(f"{node} fills its chunk a second time")
        filled.add(target)
        origin = shape.legs[node.leg].origin
        sources = {before.route.target for before in graph.predecessors(node) if before.route}
        if node.route.source is not origin and node.route.source not in sources:
            raise InvariantError(f"{node} reads {node.route.source.label} before it is filled")


def freeze(graph: nx.DiGraph[Node], shape: Shape) -> Template:
    """Return the immutable template of a checked graph, its ops in the order they should start."""
    order = passes.order(graph)
    number = {node: index for index, node in enumerate(order)}
    ops = tuple(
        OpSpec(
            index=number[node],
            leg=node.leg,
            chunk=node.chunk,
            route=node.route,
            answers=answers(shape.goal, shape.legs[node.leg], node.route),
            keeps=node.route is None or node.route.source is not Tier.DEVICE,
            label="wait" if node.route is None else str(node.route),
            group=shape.legs[node.leg].group,
        )
        for node in order
    )
    blockers = tuple(graph.in_degree(node) for node in order)
    return Template(
        shape=shape,
        ops=ops,
        successors=tuple(
            tuple(sorted(number[after] for after in graph.successors(node))) for node in order
        ),
        predecessors=tuple(
            tuple(sorted(number[before] for before in graph.predecessors(node))) for node in order
        ),
        blockers=blockers,
        answer_count=sum(1 for op in ops if op.answers),
        start_states=tuple(OpState.BLOCKED if n else OpState.READY for n in blockers),
    )
