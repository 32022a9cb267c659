"""A disk port that checks: every block is summed before it is written and after it was read.

    write   submit ─▶ sum, and the ledger forgets what was there ─▶ (window) ─▶ inner port
            ─▶ the sum is kept
    read    submit ─▶ inner port ─▶ sum ─▶ equal to what was kept? else CorruptBlockError

Writes are summed ahead: the port takes more than its inner one may have in flight, so that the
device never waits for a sum. The sums are XXH3-64 over the whole stride of a block, made by
standing threads.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from flexkv._ext import CopyPool, PageMap
from flexkv.common.errors import CorruptBlockError, InvariantError
from flexkv.common.terms import BlockIds, Tier, Transfer
from flexkv.io.arena import Arena
from flexkv.io.ports import Completion, DurablePort

Sums = NDArray[np.uint64]

SUM_AHEAD = 2
"""An actor's window for writes, over what the inner port may have in flight."""


class Summer(Protocol):
    """Sums host blocks, beside the loop."""

    def connect(self, wake: Callable[[], None]) -> None:
        """Attach to the running loop; `wake` is called on it when `reap` has something."""
        ...

    def submit(self, token: int, host_ids: BlockIds, sums: Sums, urgent: bool) -> None:
        """Sum host blocks into `sums`, uint64[n], which is lent until the token is reaped."""
        ...

    def reap(self) -> list[int]:
        """Give the tokens that ended since the last call."""
        ...

    def close(self) -> None:
        """Detach, and end every thread."""
        ...


class PoolSummer:
    """Sums blocks of an arena in standing threads, without the GIL."""

    def __init__(self, arena: Arena, threads: int = 2) -> None:
        stride = arena.block_stride_bytes
        pieces = np.array([[arena.address, stride, stride, 0]], np.int64)
        self._pages: PageMap | None = PageMap(pieces, arena.num_blocks, arena.buffer, stride, None)
        self._pool = CopyPool(threads)
        self._loop: asyncio.AbstractEventLoop | None = None

    def connect(self, wake: Callable[[], None]) -> None:
        """Attach to the running loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._pool.fileno(), wake)

    def fileno(self) -> int:
        """Give an eventfd, readable while `reap` has something."""
        return self._pool.fileno()

    def submit(self, token: int, host_ids: BlockIds, sums: Sums, urgent: bool) -> None:
        """Sum host blocks into `sums`."""
        assert self._pages is not None
        self._pool.checksum(token, self._pages, host_ids, sums, urgent)

    def reap(self) -> list[int]:
        """Give the tokens that ended since the last call."""
        return self._pool.reap()

    def close(self) -> None:
        """Detach from the loop, join the threads, let go of the arena. Idempotent."""
        if self._pages is None:
            return
        if self._loop is not None:
            self._loop.remove_reader(self._pool.fileno())
        self._pages = None
        self._pool.close()


class Forget(Protocol):
    """Makes sure that no later run believes in blocks whose places are about to be written."""

    def __call__(self, disk_ids: BlockIds, then: Callable[[], None]) -> bool:
        """Tell whether nobody believes in them; if not, `then` is called once that is so."""
        ...


class _Work(NamedTuple):
    transfer: Transfer
    sums: Sums


class CheckedDiskPort:
    """A durable port over another, with a sum for each block.

    Attributes:
        sums: uint64[disk blocks], of what was last written to each place.
    """

    def __init__(
        self,
        inner: DurablePort,
        summer: Summer,
        num_blocks: int,
        place_of: Callable[[int], tuple[str, int]],
        write_bytes_max: int = 32 << 20,
    ) -> None:
        """Take both ports, which are closed with this one.

        Args:
            inner: moves the bytes.
            summer: sums host blocks.
            num_blocks: of the disk.
            place_of: gives path and byte offset of a disk block, for errors.
            write_bytes_max: bytes that the inner port is given to write at once.
        """
        self.sums: Sums = np.zeros(num_blocks, np.uint64)
        self.forget: Forget | None = None
        self._inner = inner
        self._summer = summer
        self._place_of = place_of
        self._reading: dict[int, Transfer] = {}
        self._checking: dict[int, _Work] = {}
        self._preparing: dict[int, _Work] = {}
        self._steps_left: dict[int, int] = {}
        self._writing: dict[int, _Work] = {}
        self._writing_bytes = 0
        self._write_bytes_max = write_bytes_max
        self._summed_ahead: deque[_Work] = deque()
        self._forgotten: list[int] = []
        self._ended: list[Completion] = []
        self._wake: Callable[[], None] = lambda: None

    @property
    def block_bytes(self) -> int:
        """Give the bytes moved for one block."""
        return self._inner.block_bytes

    @property
    def adapter(self) -> str:
        """Name what moves the bytes."""
        return type(self._inner).__name__

    def connect(self, wake: Callable[[], None]) -> None:
        """Attach to the running event loop."""
        self._wake = wake
        self._inner.connect(wake)
        self._summer.connect(wake)

    def submit(self, transfer: Transfer) -> None:
        """Start one transfer.

        Raises:
            ClosedError: after `close`.
            InvariantError: ids out of range, or of unequal length.
        """
        if transfer.route.source is not Tier.HOST:
            self._inner.submit(transfer)
            self._reading[transfer.token] = transfer
            return
        token = transfer.token
        self._steps_left[token] = 2
        self._sum(self._preparing, transfer, transfer.source_ids, urgent=False)
        if self.forget is None or self.forget(
            transfer.target_ids, lambda: self._was_forgotten(token)
        ):
            self._steps_left[token] -= 1

    def _was_forgotten(self, token: int) -> None:
        self._forgotten.append(token)
        self._wake()

    def _sum(
        self, works: dict[int, _Work], transfer: Transfer, host_ids: BlockIds, urgent: bool
    ) -> None:
        work = works[transfer.token] = _Work(transfer, np.empty(len(host_ids), np.uint64))
        try:
            self._summer.submit(transfer.token, host_ids, work.sums, urgent)
        except ValueError as error:
            raise InvariantError(f"transfer {transfer.token} {transfer.route}: {error}") from error

    def reap(self) -> list[Completion]:
        """Give every transfer that ended since the last call, each exactly once."""
        progress = True
        while progress:  # what one stage ends, another may begin, and end at once
            forgotten, self._forgotten = self._forgotten, []
            for token in forgotten:
                self._prepared(token)
            self._write()
            moved, summed = self._inner.reap(), self._summer.reap()
            for completion in moved:
                self._moved(completion)
            for token in summed:
                self._summed(token)
            self._write()
            progress = bool(moved or summed or self._forgotten)
        ended, self._ended = self._ended, []
        return ended

    def _moved(self, completion: Completion) -> None:
        token, error = completion
        transfer = self._reading.pop(token, None)
        if transfer is None:
            work = self._writing.pop(token)
            self._writing_bytes -= work.transfer.block_count * self.block_bytes
            if error is None:
                self.sums[work.transfer.target_ids] = work.sums
            self._ended.append(completion)
        elif error is not None:
            self._ended.append(completion)
        else:
            self._sum(self._checking, transfer, transfer.target_ids, urgent=True)

    def _summed(self, token: int) -> None:
        work = self._checking.pop(token, None)
        if work is None:
            self._prepared(token)
            return
        disk_ids = work.transfer.source_ids
        bad = disk_ids[work.sums != self.sums[disk_ids]].tolist()
        error = CorruptBlockError(*self._place_of(bad[0]), bad) if bad else None
        self._ended.append(Completion(token, error))

    def _prepared(self, token: int) -> None:
        """One step less before a write: it is summed, or what was there is forgotten."""
        self._steps_left[token] -= 1
        if not self._steps_left[token]:
            del self._steps_left[token]
            self._summed_ahead.append(self._preparing.pop(token))

    def _write(self) -> None:
        """Give the inner port what is summed, as far as its window has room; one always has."""
        while self._summed_ahead:
            transfer = self._summed_ahead[0].transfer
            more_bytes = transfer.block_count * self.block_bytes
            if self._writing and self._writing_bytes + more_bytes > self._write_bytes_max:
                return
            self._writing[transfer.token] = self._summed_ahead.popleft()
            self._writing_bytes += more_bytes
            self._inner.submit(transfer)

    async def sync(self) -> None:
        """Return once every completed write is on stable storage."""
        await self._inner.sync()

    def close(self) -> None:
        """Close both ports. Only legal with nothing in flight. Idempotent.

        Raises:
            InvariantError: transfers were in flight; nobody was told of their ends.
        """
        self._summer.close()
        self._inner.close()
        stages = (self._checking, self._preparing, self._ended, self._summed_ahead)
        if left := sum(map(len, stages)):
            raise InvariantError(f"checked disk port closed with {left} transfers unreaped")
