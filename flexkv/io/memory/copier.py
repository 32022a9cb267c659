"""Copy threads for tasks: they fill host blocks and sum them."""

from __future__ import annotations

import asyncio
from asyncio import Future
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count

import numpy as np

from flexkv._ext import TO_HOST, CopyPool, PageMap
from flexkv.common.errors import ClosedError
from flexkv.common.terms import BlockIds
from flexkv.process import forks
from flexkv.process.background import in_background


class Copier:
    """Copy threads whose jobs can be awaited. They yield to those that copy for devices."""

    def __init__(self, threads: int) -> None:
        self._pool: CopyPool | None = in_background(lambda: CopyPool(threads))
        self._numbers = count()
        self._jobs: dict[int, Callable[[], None]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        forks.on_fork(self._let_go_in_child)

    def connect(self) -> None:
        """Attach to the running loop."""
        assert self._pool is not None
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._pool.fileno(), self._reap)

    async def copy(self, blocks: Sequence[PageMap], host_ids: BlockIds) -> None:
        """Copy block 0 of each of these maps to a host block, and sum it.

        Cancellation: the copies go on, until `close` at the latest.
        """
        ends = []
        for at, pages in enumerate(blocks):
            ended = asyncio.get_running_loop().create_future()
            number, own = next(self._numbers), host_ids[at : at + 1]
            self._open_pool().submit(number, pages, TO_HOST, np.zeros(1, np.int64), own, True)
            self._jobs[number] = partial(_settle, ended)
            ends.append(ended)
        for ended in ends:
            await ended

    def start_copy(self, pages: PageMap, host_ids: BlockIds, ended: Callable[[], None]) -> None:
        """Start to copy blocks 0 to n of a map to n host blocks, and to sum them.

        `ended` is called on the loop's thread when it is done.
        """
        number = next(self._numbers)
        blocks = np.arange(len(host_ids))
        self._open_pool().submit(number, pages, TO_HOST, blocks, host_ids, True)
        self._jobs[number] = ended

    async def checksum(self, pages: PageMap, host_ids: BlockIds) -> None:
        """Sum host blocks; for the rest see `copy`."""
        ended = asyncio.get_running_loop().create_future()
        self.start_checksum(pages, host_ids, partial(_settle, ended))
        await ended

    def start_checksum(self, pages: PageMap, host_ids: BlockIds, ended: Callable[[], None]) -> None:
        """Start to sum host blocks; `ended` is called on the loop's thread when it is done."""
        number = next(self._numbers)
        self._open_pool().checksum(number, pages, host_ids, True)
        self._jobs[number] = ended

    def _open_pool(self) -> CopyPool:
        if self._pool is None or self._loop is None:
            raise ClosedError("the copy threads have ended, or are not connected")
        return self._pool

    def _reap(self) -> None:
        assert self._pool is not None
        for number in self._pool.reap():
            self._jobs.pop(number)()

    def _let_go_in_child(self) -> None:
        if self._pool is not None:
            forks.replace(self._pool.fileno())

    def close(self) -> None:
        """Detach from the loop, and join the threads: nothing is copied any more. Idempotent."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        if self._loop is not None:
            self._loop.remove_reader(pool.fileno())
        pool.close()


def _settle(ended: Future[None]) -> None:
    if not ended.done():
        ended.set_result(None)
