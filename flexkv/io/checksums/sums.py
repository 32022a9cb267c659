"""Checksums of host blocks: computed when bytes reach host memory, and again after disk reads.

Ports that bring bytes from a device store the sums of what they bring, if they can. A checksummer
sums blocks that are in host memory already.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import numpy as np

from flexkv._ext import CopyPool, PageMap
from flexkv.common.terms import BlockIds
from flexkv.io.memory.arena import Arena
from flexkv.io.ports import Sums
from flexkv.process import forks


def sum_maps(arena: Arena, sums: Sums, block_bytes: Sequence[int]) -> list[PageMap]:
    """Return, for each KV group, what a copy pool needs to sum its blocks where they are.

    Args:
        arena: the host blocks, which each map holds on to.
        sums: where the sums go: uint64[blocks of the arena].
        block_bytes: the bytes of a block of each group.
    """
    stride = arena.block_stride_bytes
    return [
        PageMap(
            np.array([[arena.address, stride, size, 0]], np.int64),
            arena.num_blocks,
            arena.buffer,
            stride,
            None,
            sums,
        )
        for size in block_bytes
    ]


class PoolChecksummer:
    """Sums blocks of an arena in standing threads, without the GIL.

    A sum is over the bytes of a block, whatever is behind them in its place, and made of XXH3-64
    digests: see `_ext.PageMap`.

    Attributes:
        sums: uint64[blocks of the arena], the sum of each.
    """

    def __init__(
        self,
        arena: Arena,
        threads: int = 2,
        sums: Sums | None = None,
        block_bytes: Sequence[int] | None = None,
    ) -> None:
        """Start the threads.

        Args:
            arena: the host blocks.
            threads: number of standing threads.
            sums: another checksummer's, to share the array.
            block_bytes: the bytes of a block of each KV group; None: one group, with whole places.
        """
        self.sums: Sums = np.zeros(arena.num_blocks, np.uint64) if sums is None else sums
        self._pages = sum_maps(arena, self.sums, block_bytes or [arena.block_stride_bytes])
        self._pool = CopyPool(threads)
        forks.on_fork(self._let_go_in_child)
        self._loop: asyncio.AbstractEventLoop | None = None

    def connect(self, wake: Callable[[], None]) -> None:
        """Attach to the running loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._pool.fileno(), wake)

    def fileno(self) -> int:
        """Return an eventfd that is readable while `reap` has something to return."""
        return self._pool.fileno()

    def submit(self, op_id: int, host_ids: BlockIds, urgent: bool, group: int = 0) -> None:
        """Start to sum host blocks of a KV group into `sums`."""
        self._pool.checksum(op_id, self._pages[group], host_ids, urgent)

    def reap(self) -> list[int]:
        """Return the ids of the ops that ended since the last call."""
        return self._pool.reap()

    def _let_go_in_child(self) -> None:
        if self._pages:
            forks.replace(self._pool.fileno())

    def close(self) -> None:
        """Detach from the loop, join the threads, release the arena. Idempotent."""
        if not self._pages:
            return
        if self._loop is not None:
            self._loop.remove_reader(self._pool.fileno())
        self._pages = []
        self._pool.close()
