"""The generation of a node's blocks, in which others may read them."""

from __future__ import annotations

from pathlib import Path

from flexkv.tiers.generation import Generation


def test_nodes_that_are_apart_share_nothing_with_each_other(tmp_path: Path) -> None:
    """Each was cleared alone: the generations of both differ, and from those of all others."""
    first, second = Generation([tmp_path]), Generation([])
    assert first.shared == second.shared == 0
    apart = []
    for node in (first, second, first):
        node.adopt(7)
        node.clear(None)
        apart.append(node.shared)
    assert len({*apart, 7}) == 4
    assert max(apart) < 1 << 63, "it fits in a message"
    first.adopt(8)
    assert (first.shared, first.is_apart) == (8, False)
