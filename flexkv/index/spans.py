"""Spans: the runs of blocks in which others hold, announce and send a prompt's blocks.

A span is G consecutive blocks of a prompt, at positions nG to nG + G - 1. Its key is that of its
last block. Keys are chained, so it also stands for every block before it. A leaf is a span of its
own, with its own key.

    positions   0 … G-1 │ G … 2G-1 │ …    blocks behind the last whole span are in none
    span            0   │     1    │
    key          of G-1 │  of 2G-1 │
"""

from __future__ import annotations

from math import log2

import numpy as np
from numpy.typing import NDArray

from flexkv.common.terms import BLOCK_KEY_BYTES, BlockIds

SPAN_BYTES = 16 << 20
"""About how large a span should be, so that a request to an object store is worth its price."""
SPAN_TOKENS_MAX = 256
"""A span has no more, unless it is one block: nobody else holds what is behind the last span."""


def span_blocks(stride_bytes: int, tokens_per_block: int, has_leaves: bool = False) -> int:
    """Return G, how many blocks a span has.

    It is 1 with several KV groups: prefixes are whole only at boundaries, and a state belongs to
    one boundary. It would be of no use if the chain's blocks before it were in no whole span.
    """
    if has_leaves:
        return 1
    wished = 1 << max(0, round(log2(SPAN_BYTES / stride_bytes)))
    return min(wished, max(1, SPAN_TOKENS_MAX // tokens_per_block))


def spans_ending(first: int, last: int, blocks: int) -> range:
    """Return the spans, of `blocks` blocks each, that end with a block from `first` up to `last`.

    If the blocks before `first` are there, these are the spans that become whole when the blocks
    from `first` up to `last` arrive.
    """
    return range(first // blocks, last // blocks)


def span_keys(keys: bytes, first: int, last: int, blocks: int) -> bytes:
    """Return the keys of the spans that end with a block from `first` up to `last`.

    Args:
        keys: the root and the keys of a prompt's blocks.
        first: a position.
        last: a position, exclusive.
        blocks: G.
    """
    spans = spans_ending(first, last, blocks)
    ends = slice((spans.start + 1) * blocks, spans.stop * blocks + 1, blocks)
    return rows_of(keys)[ends].tobytes()


def span_rows(positions: BlockIds, blocks: int) -> BlockIds:
    """Return the row of each position's span key among a prompt's keys, the root included."""
    return (positions // blocks + 1) * blocks


def rows_of(keys: bytes) -> NDArray[np.uint8]:
    """Return a prompt's keys in rows: uint8[1 + blocks, 16], the root first."""
    return np.frombuffer(keys, np.uint8).reshape(-1, BLOCK_KEY_BYTES)
