"""Which evictable block goes next. A policy is an object; a tier holds one.

A policy sees the blocks that could be evicted now: READY and not pinned. It never decides whether
a block may go, only in what order.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from itertools import islice
from typing import Protocol


class EvictionPolicy(Protocol):
    """The order in which evictable blocks go."""

    def __len__(self) -> int:
        """Count the evictable blocks."""
        ...

    def add(self, block_ids: Iterable[int]) -> None:
        """Blocks became evictable; the last of them was wanted most recently."""
        ...

    def discard(self, block_id: int) -> None:
        """A block stopped being evictable: pinned, or gone."""
        ...

    def victims(self, count: int) -> list[int]:
        """Name the `count` blocks to evict first, or all there are; changes nothing."""
        ...


class LeastRecentlyUsed:
    """Evicts what was used longest ago. O(1) a block.

    Users hand over a prefix from leaf to root, so that a leaf is always older than its parents
    and goes first: what stays is closed under prefixes.
    """

    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._order)

    def add(self, block_ids: Iterable[int]) -> None:
        """Append the blocks, the last as the most recent."""
        order = self._order
        for block_id in block_ids:
            order[block_id] = None
            order.move_to_end(block_id)

    def discard(self, block_id: int) -> None:
        """Take a block out; no matter when it is not in."""
        self._order.pop(block_id, None)

    def victims(self, count: int) -> list[int]:
        """Name the least recently used blocks."""
        return list(islice(self._order, count))
