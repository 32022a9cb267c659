"""The passes that turn a graph of whole legs into the ordered ops of a template.

No pass depends on the block ids of a request. Runs of blocks that are contiguous at both ends are
found later, by the adapter that moves them as one extent (`common/extents.py`).
"""

from __future__ import annotations

import networkx as nx

from flexkv.graph.ops import Node, Shape

__all__ = ["chunk", "drop_noops", "order"]


def drop_noops(graph: nx.DiGraph[Node], shape: Shape) -> nx.DiGraph[Node]:
    """Drop the ops of legs without blocks."""
    graph.remove_nodes_from([node for node in graph if not shape.legs[node.leg].chunks])
    return graph


def chunk(graph: nx.DiGraph[Node], shape: Shape) -> nx.DiGraph[Node]:
    """Split every op into its leg's chunks, so that a chunk's hops overlap the next chunk's."""
    split: nx.DiGraph[Node] = nx.DiGraph()
    for node in graph:
        chunks = range(shape.legs[node.leg].chunks)
        split.add_nodes_from(node._replace(chunk=number) for number in chunks)
        for after in graph.successors(node):
            split.add_edges_from(
                (node._replace(chunk=number), after._replace(chunk=number)) for number in chunks
            )
    return split


def order(graph: nx.DiGraph[Node]) -> list[Node]:
    """Return a topological order with reads before writes, and earlier chunks first."""

    def rank(node: Node) -> tuple[bool, int, int, int]:
        outbound = node.route is not None and not node.route.inbound
        return outbound, node.chunk, node.leg, node.hop

    return list(nx.lexicographical_topological_sort(graph, key=rank))
