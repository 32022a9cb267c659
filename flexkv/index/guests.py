"""Blocks that were fetched from other nodes and not asked for again: guests of this node.

Another node has them, so they must not displace for long what this node has alone; and a prefix
that is hot everywhere must not fill the host memory of every node. On the other hand the request
for which they were fetched still needs them: it loads them, and stores what it computes behind
them, which host memory takes only while its parent is there. So the latest guests are evicted like
all other blocks. Once there are more of them than the budget allows, the earliest are *spent*: they
are evicted next, unless they are asked for before that.

    arrives ──▶ one of the latest ──newer ones use up the budget──▶ spent ──▶ evicted
                                                                      └─ asked for ──▶ one of ours

(The same idea, for pages of a database: 2Q, Johnson and Shasha, VLDB 1994.)
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np

from flexkv._ext import BlockIndex
from flexkv.common.terms import BLOCK_KEY_BYTES, BlockIds

GUEST_SHARE = 1 / 8
"""The share of host memory that guests may hold until the earliest are spent. It has to outlast the
requests for which they came."""


class _Arrival(NamedTuple):
    """Guests that arrived together.

    Attributes:
        block_ids: their places; they may hold other blocks by now.
        keys: 16 bytes each.
    """

    block_ids: BlockIds
    keys: bytes


class Guests:
    """The guests in one tier, in the order in which they have arrived."""

    def __init__(self, table: BlockIndex, tier: int, share: float) -> None:
        """Begin without guests.

        Args:
            table: the index.
            tier: the tier's number there.
            share: the share of the tier's places that guests may hold until they are spent.
        """
        self._table, self._tier, self._share = table, tier, share
        self._latest: deque[_Arrival] = deque()
        self._blocks = 0

    @property
    def blocks_max(self) -> int:
        """Return how many of the latest guests are not spent."""
        return int(self._share * self._table.counts(self._tier)[0])

    def arrived(self, block_ids: BlockIds) -> None:
        """Take note of guests that are READY, or not any more; spend those beyond the budget."""
        if not len(block_ids):
            return
        records = np.frombuffer(self._table.export(self._tier, block_ids), np.uint8)
        keys = records.reshape(len(block_ids), -1)[:, :BLOCK_KEY_BYTES]
        self._latest.append(_Arrival(block_ids, keys.tobytes()))
        self._blocks += len(block_ids)
        over = self._blocks - self.blocks_max
        while over > 0:
            block_ids, names = self._latest.popleft()
            if over < len(block_ids):
                kept = _Arrival(block_ids[over:], names[over * BLOCK_KEY_BYTES :])
                self._latest.appendleft(kept)
                block_ids, names = block_ids[:over], names[: over * BLOCK_KEY_BYTES]
            self._table.spend(self._tier, block_ids, names)
            self._blocks -= len(block_ids)
            over -= len(block_ids)
