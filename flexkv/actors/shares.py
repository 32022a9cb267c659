"""Bounds on what is in flight from each source of a tier: one that hangs leaves room for others.

window of the tier   ├── source 1 ──┤── source 2 ──┤── what others may use ──┤
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TypeAlias

from flexkv.actors.mailbox import Cursor
from flexkv.common.terms import Transfer

SourceOf: TypeAlias = Callable[[Transfer, int], int]
"""Returns the source of a block of a transfer."""


class Shares:
    """The bytes in flight from each source. A piece counts for the source of its first block."""

    def __init__(self, source_of: SourceOf, bytes_max: int) -> None:
        """Begin no piece of a source that has so many bytes in flight."""
        self._source_of, self._bytes_max = source_of, bytes_max
        self._in_flight = Counter[int]()

    def has_room(self, cursor: Cursor) -> bool:
        """Return whether the next piece of a transfer may begin."""
        source = self._source_of(cursor.transfer, cursor.next_unit)
        return self._in_flight[source] < self._bytes_max

    def begun(self, cursor: Cursor, begin: int, units: int) -> None:
        """Count a piece."""
        source = self._source_of(cursor.transfer, begin)
        self._in_flight[source] += units * cursor.unit_bytes

    def over(self, cursor: Cursor, begin: int, units: int) -> None:
        """Count the end of a piece."""
        source = self._source_of(cursor.transfer, begin)
        self._in_flight[source] -= units * cursor.unit_bytes
        if not self._in_flight[source]:
            del self._in_flight[source]
