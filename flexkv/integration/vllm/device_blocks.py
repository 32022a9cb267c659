"""What is known of the device's blocks: which of them puts read, and which are of before a reset.

A block is old after a reset until it is written anew, by a request that has no old block before it:
what is computed behind old KV is old as well. What is old is never stored.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flexkv.common.terms import BlockIds


class DeviceBlocks:
    """The blocks of one engine's device.

    Attributes:
        readers: of each block, how many puts read it.
    """

    def __init__(self) -> None:
        self.readers: NDArray[np.uint16] = np.zeros(0, np.uint16)
        self._puts = 0
        self._old: NDArray[np.bool_] | None = None
        """Of each block; None as long as there was no reset."""

    # -- puts -----------------------------------------------------------------------------------

    @property
    def any_read(self) -> bool:
        """Tell whether any put reads any block."""
        return self._puts > 0

    def are_read(self, ids: BlockIds) -> bool:
        """Tell whether a put reads any of these blocks."""
        return self._puts > 0 and bool(self.readers[ids].any())

    def begin_puts(self, puts: list[BlockIds], num_blocks: int) -> None:
        """Count puts that read these blocks, of as many as the device has."""
        if len(self.readers) < num_blocks:
            missing = num_blocks - len(self.readers)
            self.readers = np.concatenate([self.readers, np.zeros(missing, np.uint16)])
        for ids in puts:
            self.readers[ids] += 1
        self._puts += len(puts)

    def end_put(self, ids: BlockIds) -> None:
        """Count a put no more."""
        self.readers[ids] -= 1
        self._puts -= 1

    # -- resets ---------------------------------------------------------------------------------

    def reset(self) -> None:
        """Take that whatever is on the device now is old."""
        if self._old is None:
            self._old = np.ones(len(self.readers), np.bool_)
        self._old[:] = True

    def are_old(self, ids: list[int]) -> bool:
        """Tell whether any of these blocks is of before the last reset."""
        return self._old is not None and bool(self._old_of(ids).any())

    def written(self, ids: list[int], first: int) -> None:
        """Take that a request's blocks from `first` on are written anew, behind those before."""
        if self._old is not None and len(ids) > first:
            is_old = self.are_old(ids[:first])
            self._old_of(ids)
            self._old[ids[first:]] = is_old

    def _old_of(self, ids: list[int]) -> NDArray[np.bool_]:
        assert self._old is not None
        if ids and (missing := max(ids) + 1 - len(self._old)) > 0:
            self._old = np.concatenate([self._old, np.ones(missing, np.bool_)])
        return self._old[ids]
