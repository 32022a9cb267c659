"""The transfer port of a CUDA device: copies between its KV caches and the host arena.

    submit ─▶ runs of bytes ─▶ copy engine ─┐
          └─▶ ids           ─▶ kernel      ─┴▶ stream ─▶ host function ─▶ eventfd ─▶ reap

One stream brings bytes to the device and goes first, one takes them away. A stream ends its work in
order, so its eventfd need only count. The copy engine costs the device nothing but wants a
descriptor for each run; the kernel takes runs of any size. What is faster here is measured.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress

from flexkv._ext import TO_DEVICE, TO_HOST
from flexkv.common.errors import ClosedError, DeviceError, InvariantError
from flexkv.common.extents import check_ids
from flexkv.common.layout import PagedLayout
from flexkv.common.terms import Tier, Transfer
from flexkv.io.arena import Arena
from flexkv.io.cuda.choice import Choice
from flexkv.io.cuda.copier import Copier, Tables, Way, Work, measured, settle
from flexkv.io.cuda.driver import CudaDriver
from flexkv.io.ports import Completion

CHECK_S = 0.5
"""How often a stream with work is asked whether it has failed: then it never tells."""


class CudaDevicePort:
    """A transfer port between KV caches on a CUDA device and the host arena."""

    arrived_bytes = 0

    def __init__(
        self,
        layout: PagedLayout,
        arena: Arena,
        owner: object,
        driver: CudaDriver,
        choices: Sequence[Choice] | None = None,
    ) -> None:
        """Open streams, and register the arena with the device.

        Args:
            layout: where the device blocks are.
            arena: the host blocks, held until `close`.
            owner: whatever keeps the KV caches alive (the tensors), held until `close`.
            driver: of the device, closed with the port.
            choices: how to copy to the host, and to the device; None: measured now, in memory of
                its own.

        Raises:
            DeviceError: the driver refused.
            ConfigError: it takes not so much host memory.
        """
        self._driver, self._block_bytes = driver, layout.block_bytes
        self._host_blocks, self._device_blocks = arena.num_blocks, layout.num_blocks
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: Callable[[], None] = lambda: None
        self._watching: asyncio.TimerHandle | None = None
        self._ended: list[Completion] = []
        self._failure: DeviceError | None = None
        with ExitStack() as undo:
            undo.callback(driver.close)
            pages = layout, Tables.of(layout, driver, undo), owner
            self._copier: Copier | None = Copier(driver, pages, arena, undo)
            undo.callback(self._copier.close)
            self._ways = [Way(driver, urgent, undo) for urgent in (False, True)]
            if choices is None:
                choices = measured(driver, layout, self._ways)
            for way, choice in zip(self._ways, choices, strict=True):
                way.choice = choice
            self._resources = undo.pop_all()

    @property
    def block_bytes(self) -> int:
        """Give the bytes moved for one block."""
        return self._block_bytes

    @property
    def failure(self) -> DeviceError | None:
        """Give what broke the device, if anything did: every transfer fails with it."""
        return self._failure

    def connect(self, wake: Callable[[], None]) -> None:
        """Attach to the running event loop; `wake` is called on it when `reap` has something."""
        self._loop, self._wake = asyncio.get_running_loop(), wake
        for way in self._ways:
            self._loop.add_reader(way.eventfd, wake)

    def order_after(self, engine_stream: int, to_device: bool = False) -> None:
        """Let later copies one way wait for what is queued on another stream by now.

        So a put reads what the engine's kernels have written, and a get writes what they no longer
        use. From any thread.

        Raises:
            DeviceError: the driver refused.
        """
        self._driver.order(self._ways[to_device].stream, engine_stream)

    def submit(self, transfer: Transfer) -> None:
        """Start one transfer.

        Raises:
            ClosedError: after `close`.
            InvariantError: ids out of range, or of unequal length.
        """
        copier = self._copier
        if copier is None:
            raise ClosedError("the CUDA device port is closed")
        to_device = transfer.route.target is Tier.DEVICE
        limits = (self._host_blocks, self._device_blocks)
        check_ids(transfer, *(limits if to_device else limits[::-1]))
        if self._failure is not None:
            self._ended.append(Completion(transfer.token, self._failure))
            return
        way = self._ways[to_device]
        error: DeviceError | None = None
        try:
            host_ids, device_ids = transfer.sides
            copier.queue(way, TO_DEVICE if to_device else TO_HOST, device_ids, host_ids)
        except DeviceError as failure:  # some of it may be under way: it ends in its turn
            error = failure
        way.under_way.append(Work(transfer.token, way.ids_end, error))
        try:
            self._driver.notify(way.stream, way.eventfd)
        except DeviceError as failure:  # there will be no word of the end: wait for it now
            self._end_now(way, error or failure)
        if self._watching is None:
            self._watch()

    def _end_now(self, way: Way, failure: DeviceError) -> None:
        """Wait for all that is under way on a stream that cannot tell; it may be broken."""
        if not settle(self._driver, way):
            self._fail(failure)
            return
        self._ended += [Completion(work.token, work.error) for work in way.under_way]
        way.under_way.clear()

    def _watch(self) -> None:
        """Ask the streams now and then, while they have work, whether they have failed."""
        self._watching = None
        try:
            for way in self._ways:
                if way.under_way:
                    self._driver.check(way.stream)
        except DeviceError as failure:
            self._fail(failure)
        if self._loop is not None and any(way.under_way for way in self._ways):
            self._watching = self._loop.call_later(CHECK_S, self._watch)

    def _fail(self, failure: DeviceError) -> None:
        """The device is broken: it touches no memory any more, and will not tell of any end."""
        self._failure = failure
        for way in self._ways:
            settle(self._driver, way)
            if self._loop is not None:
                self._loop.remove_reader(way.eventfd)
            self._ended += [Completion(work.token, failure) for work in way.under_way]
            way.under_way.clear()
        self._wake()

    def reap(self) -> list[Completion]:
        """Give every transfer that ended since the last call, each exactly once."""
        if self._failure is None:
            for way in self._ways:
                self._ended += [Completion(work.token, work.error) for work in way.ended()]
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """Detach from the loop, close the streams and let go of all memory. Idempotent.

        Raises:
            InvariantError: transfers were in flight; they have ended, nobody was told.
            DeviceError: the driver refused to let go of something.
        """
        if self._copier is None:
            return
        if self._watching is not None:
            self._watching.cancel()
        if self._loop is not None:
            for way in self._ways:
                self._loop.remove_reader(way.eventfd)
        self._copier = None
        with suppress(DeviceError) if self._failure else nullcontext():
            self._resources.close()
        if left := sum(len(way.under_way) for way in self._ways) + len(self._ended):
            raise InvariantError(f"CUDA device port closed with {left} transfers unreaped")
