"""What an engine's KV groups need, and where leaves are worth storing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flexkv.common.errors import ConfigError
from flexkv.common.request import LeafBlocks
from flexkv.common.terms import Positions
from flexkv.integration.common.kv_groups import KVGroups, joined
from tests.unit.group_spaces import CHUNK, FULL, STATE, WINDOW, spaces_of


def groups_of(*leaves: Any, alignment: int = 4, drops_last: bool = False) -> KVGroups:
    """Return the groups of an engine whose chain has blocks of 4 tokens."""
    return KVGroups(spaces_of(*leaves), alignment, drops_last)


def told(leaves: tuple[LeafBlocks, ...] | None) -> list[tuple[int, dict[int, int]]] | None:
    """Return leaves as (group, {position: device block})."""
    if leaves is None:
        return None
    return [
        (group, dict(zip(positions, ids.tolist(), strict=True))) for group, positions, ids in leaves
    ]


@pytest.mark.parametrize(
    ("tokens", "alignment", "drops_last", "blocks"),
    [
        (0, 4, False, 0),
        (1, 4, False, 0),
        (4, 4, False, 0),
        (5, 4, False, 1),
        (8, 4, False, 1),
        (9, 4, False, 2),
        (25, 8, False, 6),
        (32, 8, False, 6),
        (33, 8, False, 8),
        (4, 4, True, 0),
        (9, 4, True, 2),
        (30, 8, True, 7),
    ],
)
def test_a_match_never_asks_for_the_whole_prompt(
    tokens: int, alignment: int, drops_last: bool, blocks: int
) -> None:
    """A hit ends before the last token, on the alignment; a draft's match asks for one block more.

    The index drops that block, so that a hit of a draft ends on the alignment as well.
    """
    groups = groups_of((FULL, 0, alignment), alignment=alignment, drops_last=drops_last)
    assert groups.wanted(tokens) == blocks
    assert groups.drop == drops_last


@pytest.mark.parametrize(
    ("leaf", "blocks", "local", "needed"),
    [
        ((FULL, 0), 3, 0, [0, 1, 2]),
        ((FULL, 0), 3, 2, [2]),
        ((FULL, 0), 0, 0, []),
        ((WINDOW, 8), 5, 0, [3, 4]),
        ((WINDOW, 8), 5, 4, [4]),
        ((WINDOW, 8), 1, 0, [0]),
        ((WINDOW, 1), 5, 0, []),
        ((WINDOW, 2), 5, 0, [4]),
        ((CHUNK, 8), 5, 0, [4]),
        ((CHUNK, 8), 4, 0, []),
        ((CHUNK, 8), 3, 0, [2]),
        ((STATE, 0), 5, 0, [4]),
        ((STATE, 0), 5, 5, [4]),
        ((STATE, 0), 0, 0, []),
        ((FULL, 0, 8), 4, 0, [1, 3]),
        ((FULL, 0, 8), 4, 2, [3]),
        ((WINDOW, 10, 8), 6, 0, [3, 5]),
        ((STATE, 0, 12), 6, 3, [5]),
    ],
)
def test_a_prefix_needs_what_its_groups_look_at(
    leaf: Any, blocks: int, local: int, needed: list[int]
) -> None:
    """Positions are the chain's; what the device has is left out, but never a state."""
    block = leaf[2] if len(leaf) > 2 else 4
    groups = groups_of(leaf, alignment=block)
    assert list(groups.needed(1, blocks, local)) == needed


@pytest.mark.parametrize(
    ("alignment", "drops_last", "tokens", "junction", "ends"),
    [
        (4, False, 0, 0, ()),
        (4, False, 3, 0, ()),
        (4, False, 4, 0, (1,)),
        (4, False, 22, 0, (5,)),
        (4, False, 24, 0, (5, 6)),
        (4, False, 24, 2, (2, 5, 6)),
        (4, False, 24, 99, (5, 6)),
        (8, False, 24, 3, (2, 4, 6)),
        (8, False, 30, 0, (6,)),
        (4, True, 24, 0, (4, 5)),
        (4, True, 22, 0, (4,)),
        (8, True, 30, 4, (2, 6)),
        (4, True, 4, 0, ()),
    ],
)
def test_leaves_are_stored_where_a_later_hit_can_end(
    alignment: int, drops_last: bool, tokens: int, junction: int, ends: tuple[int, ...]
) -> None:
    """Those are the ends of the prompt's replay, of its extension, and of a shared chain."""
    groups = groups_of((WINDOW, 8, alignment), alignment=alignment, drops_last=drops_last)
    assert groups.boundaries(tokens, junction) == ends


@pytest.mark.parametrize("drops_last", [False, True])
@pytest.mark.parametrize("alignment", [4, 8])
@pytest.mark.parametrize("tokens", range(1, 60))
def test_what_is_stored_is_what_a_replay_asks_for(
    tokens: int, alignment: int, drops_last: bool
) -> None:
    """The longest hit that the same prompt can have ends where its leaves were stored."""
    groups = groups_of((WINDOW, 8, alignment), alignment=alignment, drops_last=drops_last)
    hit = (groups.wanted(tokens) - groups.drop) // (alignment // 4) * (alignment // 4)
    assert hit <= 0 or hit in groups.boundaries(tokens)
    assert hit * 4 < tokens


def test_null_blocks_are_never_loaded_nor_stored() -> None:
    """A null block where a load needs one makes it impossible; a put leaves it out."""
    groups = groups_of((WINDOW, 8), (STATE, 0), (FULL, 0))
    ids = [[1, 2, 3, 4], [0, 0, 7, 8], [None, 0, 0, 9], [11, 12, 13, 14]]
    assert told(groups.to_load(ids, 4, 1)) == [
        (1, {2: 7, 3: 8}),
        (2, {3: 9}),
        (3, {1: 12, 2: 13, 3: 14}),
    ]
    assert groups.to_load(ids, 3, 0) is None
    assert groups.to_load([*ids[:3], ids[3][:3]], 4, 0) is None
    assert told(groups.to_store(ids, 4)) == [
        (1, {2: 7, 3: 8}),
        (3, {0: 11, 1: 12, 2: 13, 3: 14}),
    ]
    assert told(groups.to_store([[1], [-1], [0], [5]], 1)) == [(3, {0: 5})]


def test_a_state_is_stored_only_where_the_engine_says_it_is() -> None:
    """A state's block comes with its boundary; what no hit can reach is not stored."""
    groups = groups_of((STATE, 0), (WINDOW, 8, 8), alignment=8)
    assert told(groups.state(1, 16, 5)) == [(1, {3: 5})]
    assert groups.state(1, 12, 5) == groups.state(1, 16, 0) == groups.state(1, 16, None) == ()
    assert groups.state(1, 0, 5) == groups.state(2, 16, 5) == ()


def test_leaves_of_several_boundaries_are_joined() -> None:
    """A group has one entry, by position; the last one counts, and null blocks are left out."""
    one = LeafBlocks(2, Positions(4, 3), np.array([14, -1, 16]))
    two = LeafBlocks(1, Positions(1, 2), np.array([21, 22]))
    three = LeafBlocks(2, Positions(1, 2, np.array([1, 6])), np.array([11, 17]))
    entries = joined([one, two, three])
    assert told(entries) == [(1, {1: 21, 2: 22}), (2, {1: 11, 4: 14, 6: 17})]
    assert [each.positions.places is None for each in entries] == [True, False]
    assert joined([LeafBlocks(1, Positions(0, 1), np.array([-1]))]) == ()


@pytest.mark.parametrize(
    ("leaves", "alignment", "why"),
    [
        ([(WINDOW, 8)], 8, "must be the least common multiple of the groups' blocks: 4"),
        ([(WINDOW, 8, 8), (STATE, 0, 12)], 48, "the groups' blocks: 24"),
        ([(WINDOW, 8, 8)], 4, "the groups' blocks: 8"),
        ([], 6, "must be a multiple of 4"),
        ([], 0, "must be a multiple of 4"),
    ],
)
def test_an_alignment_that_does_not_fit_is_refused(
    leaves: list[Any], alignment: int, why: str
) -> None:
    """The index finds hits on the least common multiple of all blocks."""
    with pytest.raises(ConfigError, match=f"alignment_tokens.*{why}"):
        groups_of(*leaves, alignment=alignment)


def test_a_plain_model_has_no_leaves() -> None:
    """With one group a match asks for whole blocks, and there is nothing else to load or store."""
    groups = groups_of()
    assert (groups.several, groups.wanted(13), groups.to_load([[1, 2]], 2, 0)) == (False, 3, ())
    assert groups.to_store([[1, 2]], 2) == ()


def test_a_load_of_a_window_alone_moves_its_last_window() -> None:
    """Without full attention a request has no blocks before the last window of the hit."""
    full, alone = groups_of(), KVGroups(spaces_of(chain=(WINDOW, 10)), 4)
    assert [full.first_to_load(9, local) for local in (0, 3)] == [0, 3]
    # After 36 tokens, the window of the next one begins at token 27.
    assert [alone.first_to_load(9, local) for local in (0, 3, 8)] == [6, 6, 8]
    assert alone.first_to_load(2, 0) == 0
    assert (full.fail_whole, alone.fail_whole) == (False, True)
    assert (full.chain_is_full, alone.chain_is_full) == (True, False)
