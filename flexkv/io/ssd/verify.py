"""Reads blocks of SSD files to check them, apart from an engine's own I/O, and sums them."""

from __future__ import annotations

import os
import select
from collections.abc import Iterable

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

    def __init__(self, stride_bytes: int, batch_bytes: int) -> None:
        """Allocate memory for as many blocks as `batch_bytes` holds, at least one."""
        self.num_blocks = max(1, batch_bytes // stride_bytes)
        self._stride = stride_bytes
        self._memory = Arena.open(self.num_blocks, stride_bytes)
        self._checksummer = PoolChecksummer(self._memory)

    def sums(self, places: Iterable[tuple[int | None, int]]) -> tuple[Sums, NDArray[np.bool_]]:
        """Read blocks, and return the sum of each, and whether it could be read whole.

        Args:
            places: descriptor, None for a missing file, and byte offset of each block.
        """
        whole = np.array([self._read(n, *place) for n, place in enumerate(places)], np.bool_)
        self._checksummer.submit(0, np.arange(len(whole)), urgent=False)
        ended = select.poll()
        ended.register(self._checksummer.fileno(), select.POLLIN)
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
