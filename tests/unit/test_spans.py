"""How many blocks a span has, and which spans end where."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv.index.spans import rows_of, span_blocks, span_keys, span_rows, spans_ending

MIB = 1 << 20


@pytest.mark.parametrize(
    ("stride_bytes", "tokens_per_block", "blocks"),
    [
        (2 * MIB, 16, 8),
        (21 * MIB, 64, 1),
        (64 * MIB, 16, 1),
        (1 << 40, 1, 1),
        (3 * MIB, 16, 4),
        (11 * MIB, 16, 2),
        (12 * MIB, 16, 1),
        (MIB, 16, 16),
        (512, 16, 16),
        (512, 64, 4),
        (512, 256, 1),
        (512, 512, 1),
        (1, 1, 256),
    ],
)
def test_a_span_is_about_16_mib(stride_bytes: int, tokens_per_block: int, blocks: int) -> None:
    """The blocks of a span are a power of two near 16 MiB, one at least, and 256 tokens at most."""
    assert span_blocks(stride_bytes, tokens_per_block) == blocks


def test_a_span_of_a_model_with_leaves_is_one_block() -> None:
    """Any boundary can be the end of what is far, however small the blocks are."""
    assert span_blocks(512, 16, has_leaves=True) == 1


@given(
    blocks=st.integers(1, 5),
    count=st.integers(0, 30),
    bounds=st.tuples(st.integers(0, 30), st.integers(0, 30)),
)
def test_spans_end_with_their_last_block(blocks: int, count: int, bounds: tuple[int, int]) -> None:
    """A range has the spans whose last block is in it, and their keys are those of these blocks."""
    keys = np.random.default_rng(count).bytes(16 * (1 + count))
    first, last = sorted(min(bound, count) for bound in bounds)
    ends = [at for at in range(first, last) if at % blocks == blocks - 1]
    assert [span * blocks + blocks - 1 for span in spans_ending(first, last, blocks)] == ends
    rows = rows_of(keys)
    assert span_keys(keys, first, last, blocks) == b"".join(bytes(rows[at + 1]) for at in ends)
    positions = np.arange(first, last)
    for at, row in zip(positions, span_rows(positions, blocks), strict=True):
        assert (row - 1) % blocks == blocks - 1
        assert at <= row - 1 < at + blocks
