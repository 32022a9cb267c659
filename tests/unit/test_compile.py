"""Shapes compile into checked templates; shapes that break a law are refused."""

from __future__ import annotations

import networkx as nx
import pytest

from flexkv.common.errors import InvariantError
from flexkv.common.request import Operation
from flexkv.common.terms import Route, Tier
from flexkv.graph import passes
from flexkv.graph.compile import build, check, compile_shape
from flexkv.graph.draft import PlanLimits, chunk_count
from flexkv.graph.explain import Explanation, hypothetical
from flexkv.graph.ops import CHUNKS_MAX, Leg, Node, Shape

LOAD, STORE = Route(Tier.HOST, Tier.DEVICE), Route(Tier.DEVICE, Tier.HOST)
READ, WRITE = Route(Tier.DISK, Tier.HOST), Route(Tier.HOST, Tier.DISK)


def test_chunks_pipeline_independently() -> None:
    """The load of a chunk waits for the read of that chunk alone."""
    template = compile_shape(Shape(Operation.GET, (Leg((READ, LOAD), 4),)))
    for op in template.ops:
        after = [template.ops[i] for i in template.successors[op.index]]
        if op.route == READ:
            assert [(a.route, a.chunk) for a in after] == [(LOAD, op.chunk)]
        else:
            assert after == []


def test_reads_start_before_writes() -> None:
    """Among ops that may start at once, those towards the device come first."""
    template = compile_shape(Shape(Operation.PUT, (Leg((WRITE,), 2), Leg((READ,), 2))))
    assert [op.route for op in template.ops] == [READ, READ, WRITE, WRITE]


def test_an_equal_shape_gives_the_same_template() -> None:
    """Equal shapes are compiled once."""
    shapes = [Shape(Operation.GET, (Leg((LOAD,), 2),)) for _ in range(2)]
    assert compile_shape(shapes[0]) is compile_shape(shapes[1])


def test_legs_of_other_groups_are_other_shapes() -> None:
    """Shapes that differ in a leg's group have templates of their own; ops have their leg's group.

    An explanation names every group but the first.
    """
    legs = Leg((READ, LOAD), 1), Leg((READ, LOAD), 1, group=2)
    templates = [compile_shape(Shape(Operation.GET, (leg,))) for leg in legs]
    assert templates[0] is not templates[1]
    assert [[op.group for op in template.ops] for template in templates] == [[0, 0], [2, 2]]
    assert [op.label for op in templates[0].ops] == [op.label for op in templates[1].ops]
    mixed = compile_shape(Shape(Operation.GET, legs))
    assert {(op.leg, op.group) for op in mixed.ops} == {(0, 0), (1, 2)}
    told = str(Explanation(mixed, (8, 4), "get"))
    assert told.count("disk→host 8 blocks\n") == 1
    assert told.count("disk→host 4 blocks of group 2\n") == 1
    assert told.count("host→device 4 blocks of group 2 (answers)") == 1


def test_legs_without_blocks_leave_no_op() -> None:
    """Legs without blocks have no ops in the template."""
    template = compile_shape(Shape(Operation.GET, (Leg((LOAD,), 0), Leg((READ, LOAD), 1))))
    assert [op.route for op in template.ops] == [READ, LOAD]


@pytest.mark.parametrize(
    "hops", [(LOAD, LOAD), (READ, WRITE), (STORE, Route(Tier.REMOTE, Tier.HOST))]
)
def test_hops_that_cannot_run_are_refused(hops: tuple[Route, ...]) -> None:
    """Hops that fill a tier twice, or begin where the blocks are not, raise InvariantError."""
    with pytest.raises(InvariantError):
        compile_shape(Shape(Operation.GET, (Leg(hops, 1),)))


def test_a_leg_has_a_bound_of_chunks() -> None:
    """A leg has 0 to CHUNKS_MAX chunks; any other number is refused."""
    template = compile_shape(Shape(Operation.GET, (Leg((LOAD,), CHUNKS_MAX),)))
    assert len(template.ops) == CHUNKS_MAX
    for chunks in (-1, CHUNKS_MAX + 1):
        with pytest.raises(InvariantError, match="chunks"):
            compile_shape(Shape(Operation.GET, (Leg((LOAD,), chunks),)))


def test_a_cycle_is_refused() -> None:
    """A graph with a cycle is refused."""
    shape = Shape(Operation.GET, (Leg((READ, LOAD), 1),))
    graph = build(shape)
    first, second = list(graph)
    graph.add_edge(second, first)
    with pytest.raises(InvariantError, match="cycle"):
        check(graph, shape)


def test_a_chunk_filled_twice_is_refused() -> None:
    """A chunk that is filled twice, or read before it is filled, is refused."""
    shape = Shape(Operation.GET, (Leg((READ, LOAD), 1),))
    twice: nx.DiGraph[Node] = nx.DiGraph()
    twice.add_nodes_from([Node(0, 0, 0, READ), Node(0, 0, 1, READ)])
    with pytest.raises(InvariantError, match="second time"):
        check(twice, shape)
    unfilled: nx.DiGraph[Node] = nx.DiGraph()
    unfilled.add_node(Node(0, 0, 1, LOAD))
    with pytest.raises(InvariantError, match="before it is filled"):
        check(unfilled, shape)


def test_a_graph_that_a_pass_has_broken_becomes_no_template(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A shape is not compiled if a pass drops a hop that another one depends on."""

    def broken(graph: nx.DiGraph[Node], _: Shape) -> nx.DiGraph[Node]:
        graph.remove_node(next(iter(graph)))
        return graph

    monkeypatch.setattr(passes, "chunk", broken)
    with pytest.raises(InvariantError, match="before it is filled"):
        compile_shape(Shape(Operation.GET, (Leg((READ, LOAD), 5),)))


@pytest.mark.parametrize(
    ("blocks", "chunk_blocks", "chunks"),
    [(1, 8, 1), (8, 8, 1), (9, 8, 2), (3, 1, 2), (24, 8, 4), (10_000, 8, 32)],
)
def test_chunk_counts_are_few_powers_of_two(blocks: int, chunk_blocks: int, chunks: int) -> None:
    """Chunk counts are powers of two, so that few shapes serve all sizes and no chunk is empty."""
    assert chunk_count(blocks, chunk_blocks) == chunks


def test_an_explanation_draws_text_and_dot() -> None:
    """Text and DOT show every op with its blocks, and its edges."""
    legs = {(READ, LOAD): 16, (LOAD,): 8}
    told = hypothetical(Operation.GET, legs, PlanLimits(8, 64), "get of 24 whole blocks")
    text, dot = str(told), told.dot()
    assert "get of 24 whole blocks" in text
    assert text.count("disk→host 8 blocks") == 2
    assert text.count("(answers)") == 3
    assert dot.count("->") == 2
    assert dot.startswith("digraph")
