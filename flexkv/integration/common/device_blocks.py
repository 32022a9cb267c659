"""Which blocks of the device puts read, and which were computed before a reset.

After a reset each block is old until a request that has no old block before it writes it anew: KV
that is computed from old KV is old as well. Old blocks are never stored.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flexkv import _ext
from flexkv.common.terms import BlockIds


class DeviceBlocks:
    """The blocks of one engine's device.

    Attributes:
        readers: how many puts read each block, by block id.
    """

    def __init__(self, has_null: bool = False) -> None:
        """Begin without blocks.

        Args:
            has_null: whether block 0 stands for blocks that a request no longer has.
        """
        self._has_null = has_null
        self.readers: NDArray[np.uint32] = np.zeros(0, np.uint32)
        self._puts = 0
        self._old: NDArray[np.bool_] | None = None
        """For each block, whether it is old; None before the first reset."""

    # -- puts -----------------------------------------------------------------------------------

    @property
    def any_read(self) -> bool:
        """Return whether any put reads any block."""
        return self._puts > 0

    def are_read(self, ids: BlockIds) -> bool:
        """Return whether a put reads any of these blocks."""
        return self._puts > 0 and _ext.any_counted(self.readers, ids)

    def begin_puts(self, puts: list[BlockIds], num_blocks: int) -> None:
        """Record new puts by the blocks that each reads; the device has `num_blocks` blocks."""
        if len(self.readers) < num_blocks:
            missing = num_blocks - len(self.readers)
            self.readers = np.concatenate([self.readers, np.zeros(missing, np.uint32)])
        for ids in puts:
            _ext.change_counts(self.readers, ids, 1)
        self._puts += len(puts)

    def end_put(self, ids: BlockIds) -> None:
        """Record that a put does not read its blocks any more."""
        _ext.change_counts(self.readers, ids, -1)
        self._puts -= 1

    # -- resets ---------------------------------------------------------------------------------

    @property
    def was_reset(self) -> bool:
        """Return whether any block may be old."""
        return self._old is not None

    def reset(self) -> None:
        """Record that all blocks of the device are old now."""
        if self._old is None:
            self._old = np.ones(len(self.readers), np.bool_)
        self._old[:] = True

    def are_old(self, ids: list[int]) -> bool:
        """Return whether any of these blocks is from before the last reset."""
        if self._old is None:
            return False
        if self._has_null:
            ids = [block for block in ids if block]
        return bool(self._old_of(ids).any())

    def written(self, ids: list[int], first: int) -> None:
        """Record that a request writes its blocks from `first` on: old if one before them is."""
        if self._old is not None and len(ids) > first:
            is_old = self.are_old(ids[:first])
            self._old_of(ids)
            self._old[ids[first:]] = is_old

    def _old_of(self, ids: list[int]) -> NDArray[np.bool_]:
        assert self._old is not None
        if ids and (missing := max(ids) + 1 - len(self._old)) > 0:
            self._old = np.concatenate([self._old, np.ones(missing, np.bool_)])
        return self._old[ids]
