"""Which blocks of a KV group a prefix needs, compared with which tokens the next one attends to."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv._ext import needed

FULL, WINDOW, CHUNK, STATE = range(4)


def attended(kind: int, window: int, end: int) -> range:
    """Return the tokens before `end` that the token at `end` attends to."""
    if kind == WINDOW:
        return range(max(0, end - window + 1), end)
    if kind == CHUNK:
        return range(end - end % window, end)
    return range(end)


@given(
    st.sampled_from([FULL, WINDOW, CHUNK]),
    st.integers(1, 70),
    st.integers(1, 20),
    st.integers(0, 12),
)
def test_a_prefix_needs_the_blocks_of_all_tokens_that_are_attended_to(
    kind: int, window: int, block: int, blocks: int
) -> None:
    """The needed blocks are those that hold a token which the next token attends to."""
    end = blocks * block
    tokens = attended(kind, window, end)
    first, last = needed(kind, 0 if kind == FULL else window, block, end)
    assert last == blocks
    assert set(range(first, last)) == {token // block for token in tokens}


@pytest.mark.parametrize(
    ("kind", "window", "block", "end", "first"),
    [
        (WINDOW, 64, 16, 128, 4),  # tokens 65 to 127
        (WINDOW, 65, 16, 128, 4),
        (WINDOW, 66, 16, 128, 3),
        (WINDOW, 1, 16, 128, 8),  # the next token attends to itself only
        (WINDOW, 128, 16, 128, 0),
        (WINDOW, 2**60, 16, 128, 0),
        (CHUNK, 64, 16, 128, 8),  # the next token begins a chunk
        (CHUNK, 64, 16, 112, 4),
        (CHUNK, 24, 16, 32, 1),  # a chunk that begins inside a block
        (STATE, 0, 16, 128, 7),
        (STATE, 0, 528, 528, 0),
        (FULL, 0, 16, 128, 0),
    ],
)
def test_examples(kind: int, window: int, block: int, end: int, first: int) -> None:
    """Boundaries of windows, chunks and states."""
    assert needed(kind, window, block, end) == (first, end // block)


@pytest.mark.parametrize("kind", range(4))
def test_an_empty_prefix_needs_nothing(kind: int) -> None:
    """A prefix of no tokens needs no block of any kind."""
    assert needed(kind, 32 if kind in (WINDOW, CHUNK) else 0, 16, 0) == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 0, 16, 32), r"kind=4 is outside 0\.\.3"),
        ((-1, 0, 16, 32), r"kind=-1 is outside 0\.\.3"),
        ((WINDOW, 0, 16, 32), "window=0 must be at least 1 for kind=1"),
        ((CHUNK, 0, 16, 32), "window=0 must be at least 1 for kind=2"),
        ((WINDOW, -1, 16, 32), "window=-1 is outside"),
        ((FULL, 8, 16, 32), "window=8 must be 0 for kind=0"),
        ((STATE, 8, 16, 32), "window=8 must be 0 for kind=3"),
        ((FULL, 0, 0, 32), "block_tokens=0 is outside 1"),
        ((FULL, 0, 16, -16), "end_tokens=-16 is outside 0"),
        ((FULL, 0, 16, 33), "end_tokens=33 is not a multiple of block_tokens=16"),
        ((FULL, 0, 16, 2**64), "end_tokens=18446744073709551616 is outside"),
    ],
)
def test_an_argument_that_breaks_a_rule_is_named(arguments: Any, message: str) -> None:
    """An error names the argument, its value and the rule."""
    with pytest.raises(ValueError, match=message):
        needed(*arguments)


@pytest.mark.parametrize("arguments", [("full", 0, 16, 32), (FULL, 0, 16.0, 32), (FULL, 0, 16)])
def test_an_argument_of_another_type_is_refused(arguments: Any) -> None:
    """Arguments are integers, and all of them are required."""
    with pytest.raises(TypeError):
        needed(*arguments)
