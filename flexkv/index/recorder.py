"""What the table records of its changes: blocks that become READY in a tier, or stop being READY.

The records of changes, and of what is READY now, are rows of one type, `RECORD`. Whole batches of
them are kept and filtered without an object for each block.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flexkv import _ext
from flexkv.common.terms import BLOCK_KEY_BYTES, Tier

RECORD = np.dtype(
    [
        ("key", f"V{BLOCK_KEY_BYTES}"),
        ("tier", "u1"),
        ("is_ready", "?"),
        ("group", "u1"),
        ("ready", "u1"),
        ("depth", "=u4"),
    ]
)
"""A change as the table writes it. Tiers are numbers, and `ready` has a bit for each."""

Records = NDArray[np.void]
"""Changes, oldest first: RECORD[n]."""


class Change(NamedTuple):
    """A block that became READY in a tier, or is no longer READY there."""

    key: bytes
    tier: Tier
    is_ready: bool
    group: int
    """Its KV group: 0 for a block of the prefix chain, else that of a leaf."""
    depth: int
    """How many blocks of the chain it ends: its position + 1. A leaf's is that of its parent."""
    tiers: Set[Tier]
    """Those that have it READY after the change."""


class ChangeRecorder:
    """Records the changes of the table for one caller, the hub.

    Attributes:
        tiers: the tiers of the table, in the order of their numbers.
    """

    def __init__(self, table: _ext.BlockIndex, tiers: Sequence[Tier]) -> None:
        """Record nothing yet."""
        self._table, self.tiers = table, tuple(tiers)
        self._sets = [
            frozenset(tier for number, tier in enumerate(self.tiers) if mask >> number & 1)
            for mask in range(1 << len(self.tiers))
        ]

    def watch(self, limit: int) -> None:
        """Record up to `limit` changes from now on, or none with 0; earlier ones are dropped."""
        self._table.watch(limit)

    def take(self) -> Records | None:
        """Return the changes since the last call; None if there were too many, so they are lost."""
        blob = self._table.changes()
        return None if blob is None else np.frombuffer(blob, RECORD)

    def ends(self, begin: int, count: int, size: int) -> Records | None:
        """Return the ends of spans of `size` blocks, and the leaves, that are READY in some tier.

        Only the nodes of the table from number `begin` to `begin + count` are looked at. A block
        keeps its node, so looking at all of them finds everything that stays in the index
        meanwhile.

        Returns:
            A record for each, as if it had just become READY in its nearest tier; None if no node
            has a number from `begin` on.
        """
        blob = self._table.ends(begin, count, size)
        return None if blob is None else np.frombuffer(blob, RECORD)

    def mask(self, tier: Tier) -> int:
        """Return a tier's bit in `ready`, or 0 if the table has no such tier."""
        return 1 << self.tiers.index(tier) if tier in self.tiers else 0

    def decoded(self, records: Records) -> list[Change]:
        """Return records in the core's types."""
        tiers, sets = self.tiers, self._sets
        return [
            Change(key, tiers[tier], is_ready, group, depth, sets[ready])
            for key, tier, is_ready, group, ready, depth in records.tolist()
        ]
