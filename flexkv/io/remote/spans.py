"""Divides transfers by spans: which records of which objects they move.

A span is G consecutive blocks of the chain, at positions nG to nG+G−1 of a prompt; its key is that
of its last block. One span is one object. A leaf is a span of its own.

    positions      0 … G−1 │ G … 2G−1 │ 2G …
    a transfer        ▐████│██████████│███▌         parts: records 1…G−1, 0…G−1, 0…2
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flexkv.common.errors import InvariantError
from flexkv.common.terms import BLOCK_KEY_BYTES, BlockIds, BlockKey, Transfer
from flexkv.index.keys import leaf_salt
from flexkv.io.remote.seal import BlockName


class SpanPart(NamedTuple):
    """The blocks of a transfer that are in one span.

    Attributes:
        span_key: names the object.
        first_record: where the blocks begin in the object.
        is_whole: whether they are all blocks of the span.
        names: what identifies each block.
        host_ids: where they are, or go, in host memory: int64[n].
        outer_ids: what the transfer calls them at the other end: int64[n].
        begin: index of the first of them among the transfer's blocks.
        group: the KV group.
    """

    span_key: BlockKey
    first_record: int
    is_whole: bool
    names: list[BlockName]
    host_ids: BlockIds
    outer_ids: BlockIds
    begin: int
    group: int

    @property
    def blocks(self) -> int:
        """Return the number of blocks."""
        return len(self.names)


def parts_of(transfer: Transfer, span_blocks: int) -> list[SpanPart]:
    """Return the parts of a transfer, in the order of its blocks.

    Raises:
        InvariantError: it has no names, or blocks of the chain that are not consecutive, or the
            key of one of its spans is unknown.
    """
    if not transfer.block_count:
        return []
    if transfer.names is None:
        raise InvariantError(f"transfer {transfer.op_id} {transfer.route} has no keys")
    return _leaf_parts(transfer) if transfer.group else _chain_parts(transfer, span_blocks)


def _chain_parts(transfer: Transfer, span_blocks: int) -> list[SpanPart]:
    assert transfer.names is not None
    keys, size, positions = transfer.names.keys, BLOCK_KEY_BYTES, transfer.positions
    if positions.places is not None:
        raise InvariantError(f"transfer {transfer.op_id} {transfer.route} has gaps")
    first, last = positions.first, positions.first + positions.block_count
    (host_ids, outer_ids), parts = transfer.sides, []
    for span in range(first // span_blocks, -(-last // span_blocks)):
        span_first, span_last = span * span_blocks, (span + 1) * span_blocks
        begin, end = max(first, span_first), min(last, span_last)
        span_key = keys[size * span_last : size * (span_last + 1)]
        if len(span_key) < size:
            raise InvariantError(f"the key of span {span} of transfer {transfer.op_id} is unknown")
        parts.append(
            SpanPart(
                span_key,
                begin - span_first,
                end - begin == span_blocks,
                [
                    BlockName(
                        keys[size * (at + 1) : size * (at + 2)], keys[size * at : size * (at + 1)]
                    )
                    for at in range(begin, end)
                ],
                host_ids[begin - first : end - first],
                outer_ids[begin - first : end - first],
                begin - first,
                0,
            )
        )
    return parts


def _leaf_parts(transfer: Transfer) -> list[SpanPart]:
    """Return a part for each leaf; its parent's key follows from its own."""
    salt, (host_ids, outer_ids) = leaf_salt(transfer.group), transfer.sides
    return [
        SpanPart(
            key,
            0,
            True,
            [BlockName(key, (np.frombuffer(key, np.uint64) ^ salt).tobytes())],
            host_ids[at : at + 1],
            outer_ids[at : at + 1],
            at,
            transfer.group,
        )
        for at, key in enumerate(transfer.block_keys)
    ]
