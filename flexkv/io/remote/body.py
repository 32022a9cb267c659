"""The bytes that a store has answered, in the chunks in which they came."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

import numpy as np
from typing_extensions import Buffer


class Body:
    """Bytes in chunks that are not joined, since that would cost a copy.

    Attributes:
        nbytes: how many bytes there are.
    """

    def __init__(self, chunks: Sequence[Buffer]) -> None:
        arrays = [np.frombuffer(memoryview(chunk), np.uint8) for chunk in chunks]
        self._chunks = [array for array in arrays if array.size]
        self._begins = [0, *accumulate(chunk.size for chunk in self._chunks)]
        self.nbytes = self._begins[-1]
        self._addresses = [int(chunk.ctypes.data) for chunk in self._chunks]

    def read(self, first: int, last: int) -> bytes:
        """Return the bytes from `first` to `last` (exclusive)."""
        return b"".join(
            self._chunks[number][begin:end].tobytes()
            for number, begin, end in self._within(first, last)
        )

    def pieces(self, first: int, last: int) -> list[tuple[int, int]]:
        """Return the addresses and lengths of the memory that has these bytes, in order."""
        return [
            (self._addresses[number] + begin, end - begin)
            for number, begin, end in self._within(first, last)
        ]

    def _within(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Yield the chunks that have some of these bytes, and which of their bytes these are."""
        number = bisect_right(self._begins, first) - 1
        while first < last:
            begin, end = self._begins[number], min(last, self._begins[number + 1])
            yield number, first - begin, end - begin
            first, number = end, number + 1
