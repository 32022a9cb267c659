"""Reads blocks of SSD files to check them, apart from an engine's own I/O, and sums them."""

from __future__ import annotations

import os
import select
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from flexkv.io.checksums.sums import PoolChecksummer
from flexkv.io.memory.arena import Arena
from flexkv.io.ports import Sums


class BlockVerifier:
    """Reads blocks into memory of its own, and sums them in threads. Its calls block.

    Attributes:
        num_blocks: the most blocks that are read at once.
    """

    def __init__(self, stride_bytes: int, batch_bytes: int, block_bytes: Sequence[int]) -> None:
        """Allocate memory for as many blocks as `batch_bytes` holds, at least one.

        Args:
            stride_bytes: the bytes of a place.
            batch_bytes: the most memory to use.
            block_bytes: the bytes of a block of each KV group, which are summed.
        """
        self.num_blocks = max(1, batch_bytes // stride_bytes)
        self._stride = stride_bytes
        self._memory = Arena.open(self.num_blocks, stride_bytes)
        self._checksummer = PoolChecksummer(self._memory, block_bytes=block_bytes)
        self._groups = len(block_bytes)

    def sums(
        self, places: Iterable[tuple[int | None, int]], groups: NDArray[np.uint8]
    ) -> tuple[Sums, NDArray[np.bool_]]:
        """Read blocks, and return the sum of each, and whether it could be read whole.

        Args:
            places: descriptor, None for a missing file, and byte offset of each block.
            groups: uint8[n], the KV group of each block; one of an unknown group is not whole.
        """
        whole = np.array([self._read(n, *place) for n, place in enumerate(places)], np.bool_)
        whole &= groups < self._groups
        ended = select.poll()
        ended.register(self._checksummer.fileno(), select.POLLIN)
        for group in np.unique(groups[whole]).tolist():
            ids = np.flatnonzero(whole & (groups == group))
            self._checksummer.submit(0, ids, urgent=False, group=group)
            ended.poll()
            self._checksummer.reap()
        return self._checksummer.sums[: len(whole)].copy(), whole

    def _read(self, number: int, fd: int | None, offset_bytes: int) -> bool:
        if fd is None:
            return False
        block = self._memory.buffer[number * self._stride : (number + 1) * self._stride]
        try:
            return os.preadv(fd, [block], offset_bytes) == self._stride
        except OSError:
            return False

    def close(self) -> None:
        """Release the threads and the memory. Idempotent."""
        self._checksummer.close()
        self._memory.close()
