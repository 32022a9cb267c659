"""The sums of host blocks: made as bytes reach host memory, and made again when they come back.

Every port that brings bytes from a device keeps the sum of what it brought; a summer sums what is
in host memory already.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flexkv._ext import CopyPool, PageMap
from flexkv.common.terms import BlockIds
from flexkv.io.memory.arena import Arena
from flexkv.process import forks

Sums = NDArray[np.uint64]


class Checksummer(Protocol):
    """Sums host blocks, beside the loop.

    Attributes:
        sums: uint64[host blocks].
    """

    sums: Sums

    def connect(self, wake: Callable[[], None]) -> None:
        """Attach to the running loop; `wake` is called on it when `reap` has something."""
        ...

    def submit(self, op_id: int, host_ids: BlockIds, urgent: bool) -> None:
        """Sum host blocks, each once, into `sums`: theirs mean nothing until the op is reaped.

        Raises:
            ValueError: an id out of range.
        """
        ...

    def reap(self) -> list[int]:
        """Return the ids of the ops that ended since the last call."""
        ...

    def close(self) -> None:
        """Detach, and end every thread."""
        ...


class PoolChecksummer:
    """Sums blocks of an arena in standing threads, without the GIL; XXH3-64 of their whole stride.

    Attributes:
        sums: uint64[blocks of the arena].
    """

    def __init__(self, arena: Arena, threads: int = 2, sums: Sums | None = None) -> None:
        """Start threads; `sums` is another summer's array, to keep the same sums."""
        stride = arena.block_stride_bytes
        self.sums: Sums = np.zeros(arena.num_blocks, np.uint64) if sums is None else sums
        pieces = np.array([[arena.address, stride, stride, 0]], np.int64)
        self._pages: PageMap | None = PageMap(
            pieces, arena.num_blocks, arena.buffer, stride, None, self.sums
        )
        self._pool = CopyPool(threads)
        forks.on_fork(self._let_go_in_child)
        self._loop: asyncio.AbstractEventLoop | None = None

    def connect(self, wake: Callable[[], None]) -> None:
        """Attach to the running loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._pool.fileno(), wake)

    def fileno(self) -> int:
        """Give an eventfd, readable while `reap` has something."""
        return self._pool.fileno()

    def submit(self, op_id: int, host_ids: BlockIds, urgent: bool) -> None:
        """Sum host blocks into `sums`."""
        assert self._pages is not None
        self._pool.checksum(op_id, self._pages, host_ids, urgent)

    def reap(self) -> list[int]:
        """Return the ids of the ops that ended since the last call."""
        return self._pool.reap()

    def _let_go_in_child(self) -> None:
        if self._pages is not None:
            forks.replace(self._pool.fileno())

    def close(self) -> None:
        """Detach from the loop, join the threads, let go of the arena. Idempotent."""
        if self._pages is None:
            return
        if self._loop is not None:
            self._loop.remove_reader(self._pool.fileno())
        self._pages = None
        self._pool.close()
