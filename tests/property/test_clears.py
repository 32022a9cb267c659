"""The history of clears, compared with a model that remembers every clear."""

from __future__ import annotations

from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st

from flexkv.index.clears import ClearHistory

ROOTS_MAX = 3
NAMES = [bytes([n]) for n in range(6)]

clears = st.lists(st.sampled_from([None, *NAMES]), max_size=30)


def is_stale(history: list[bytes | None], begun: int, root: bytes) -> bool:
    """Return whether any clear after the first `begun` ones affects a namespace."""
    return any(cleared in (None, root) for cleared in history[begun:])


@given(clears, st.integers(0, 1000))
def test_what_began_before_a_clear_is_always_stale(history: list[bytes | None], first: int) -> None:
    """What began before a clear of its namespace is stale, even after that clear is forgotten.

    This holds for any clears in any order. Nothing else is stale while all clears are remembered.
    `on_clear` is called once for each clear.
    """
    with patch("flexkv.index.clears.ROOTS_MAX", ROOTS_MAX):
        clears, told = ClearHistory(first), []
        clears.on_clear = lambda: told.append(clears.generation)
        for root in history:
            clears.note(root)
    assert told == list(range(first + 1, first + 1 + len(history)))
    since_all = history[len(history) - (history[::-1].index(None) if None in history else 0) :]
    remembers_all = len(set(since_all if None in history else history)) <= ROOTS_MAX
    for begun in range(len(history) + 1):
        for root in NAMES:
            stale = is_stale(history, begun, root)
            if stale or remembers_all:
                assert clears.is_stale(first + begun, root) == stale
        assert not clears.is_stale(first + len(history), root)


@given(clears)
def test_what_an_earlier_engine_began_is_stale_after_a_clear_only(
    history: list[bytes | None],
) -> None:
    """What an earlier engine began is stale only once this engine clears its namespace.

    The generations of an earlier engine are lower than all of this one's.
    """
    clears = ClearHistory(1000)
    for root in history:
        clears.note(root)
    for root in NAMES:
        assert clears.is_stale(7, root) == is_stale(history, 0, root)
