"""The transfer port of a CPU device: strided copies between KV caches and the host arena.

Small transfers are copied in the calling thread: handing 64 KiB to another thread costs more than
the copy. Larger ones go to standing threads, which announce their end on an eventfd. Transfers to
the device go first, because an engine waits for them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from flexkv._ext import TO_DEVICE, TO_HOST, CopyPool, copy_now
from flexkv.common.errors import ClosedError, InvariantError
from flexkv.common.layout import PagedLayout
from flexkv.common.terms import Tier, Transfer
from flexkv.io.device.pages import Pages
from flexkv.io.memory.arena import Arena
from flexkv.io.ports import Completion, Sums
from flexkv.process import forks

INLINE_BYTES_MAX = 64 << 10
"""Up to this size, a copy in the calling thread costs less than waking another thread."""


class CpuDevicePort:
    """A transfer port between KV caches in ordinary memory and the host arena."""

    failure = None

    def __init__(
        self,
        layout: PagedLayout,
        arena: Arena,
        owner: object,
        threads: int = 2,
        sums: Sums | None = None,
    ) -> None:
        """Map the pages of `layout`, and start the copy threads.

        Args:
            layout: where the device blocks are.
            arena: the host blocks, held until `close`.
            owner: what keeps the KV caches alive (the tensors), held until `suspend` or `close`.
            threads: number of standing copy threads.
            sums: uint64[host blocks]; copies of whole blocks store the sums of those they fill.
        """
        self._arena, self._sums = arena, sums
        self._block_bytes = layout.block_bytes
        self._inline_blocks_max = INLINE_BYTES_MAX // layout.block_bytes
        self._pages: Pages | None = None
        self.num_blocks = 0
        self.resume(layout, owner)
        self._pool: CopyPool | None = CopyPool(threads)
        forks.on_fork(self._let_go_in_child)
        self._pooled = 0
        self._ended: list[Completion] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def block_bytes(self) -> int:
        """Return the bytes moved for one block."""
        return self._block_bytes

    def order_after(self, to_device: bool) -> None:
        """Do nothing: what the CPU has written can be read at once."""

    def suspend(self) -> None:
        """Release the KV caches. Only legal with nothing in flight."""
        self._pages = None

    def resume(self, layout: PagedLayout, owner: object) -> None:
        """Attach KV caches again, with blocks of the same size."""
        self.num_blocks = layout.num_blocks
        self._pages = Pages(layout, self._arena, owner, self._sums)

    def connect(self, wake: Callable[[], None]) -> None:
        """Attach to the running loop, which calls `wake` when `reap` has something to return."""
        assert self._pool is not None
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._pool.fileno(), wake)

    def submit(self, transfer: Transfer) -> None:
        """Start one transfer; a small one has already ended when this returns, and can be reaped.

        Raises:
            ClosedError: after `close`.
            InvariantError: an id is out of range, or the id lists differ in length.
        """
        if self._pages is None or self._pool is None:
            raise ClosedError("the CPU device port is closed, or suspended")
        pages = self._pages.of(transfer.layers)
        urgent = transfer.route.target is Tier.DEVICE
        direction = TO_DEVICE if urgent else TO_HOST
        host_ids, device_ids = transfer.sides
        try:
            if len(device_ids) <= self._inline_blocks_max:
                copy_now(pages, direction, device_ids, host_ids)
                self._ended.append(Completion(transfer.op_id, None))
            else:
                self._pool.submit(transfer.op_id, pages, direction, device_ids, host_ids, urgent)
                self._pooled += 1
        except ValueError as error:
            raise InvariantError(f"transfer {transfer.op_id} {transfer.route}: {error}") from error

    def reap(self) -> list[Completion]:
        """Return every transfer that ended since the last call, each exactly once."""
        ended, self._ended = self._ended, []
        if self._pooled and self._pool is not None:
            pooled = self._pool.reap()
            self._pooled -= len(pooled)
            ended += [Completion(op_id, None) for op_id in pooled]
        return ended

    def _let_go_in_child(self) -> None:
        if self._pool is not None:
            forks.replace(self._pool.fileno())

    def close(self) -> None:
        """Detach from the loop, join the threads and release all memory. Idempotent.

        Raises:
            InvariantError: transfers were in flight; they have ended, but were not reported.
        """
        pool, self._pool, self._pages = self._pool, None, None
        if pool is None:
            return
        if self._loop is not None:
            self._loop.remove_reader(pool.fileno())
        pool.close()
        if unreaped := self._pooled + len(self._ended):
            raise InvariantError(f"CPU device port closed with {unreaped} transfers unreaped")
