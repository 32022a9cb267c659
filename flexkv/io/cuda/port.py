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
from contextlib import ExitStack, suppress

from flexkv._ext import TO_DEVICE, TO_HOST
from flexkv.common.errors import ClosedError, ConfigError, DeviceError, InvariantError
from flexkv.common.extents import check_ids
from flexkv.common.layout import PagedLayout
from flexkv.common.terms import Tier, Transfer
from flexkv.io.cuda.choice import Choices, CopyPreference
from flexkv.io.cuda.copier import Copier, DevicePages, choices_for
from flexkv.io.cuda.copy_stream import CopyStream, Work
from flexkv.io.cuda.driver import CudaDriver
from flexkv.io.cuda.pinned import Pinned
from flexkv.io.ports import Completion
from flexkv.observe.logs import get_logger

log = get_logger(__name__)

CHECK_S = 0.5
"""How often a stream with work is asked whether it has failed: then it never tells."""


class Mark:
    """A point on a device's stream, for which other streams may wait."""

    def __init__(self, driver: CudaDriver, stream: int) -> None:
        """Mark what is queued on a stream by now.

        Raises:
            DeviceError: the driver refused.
        """
        self._driver, self._event = driver, driver.open_event()
        try:
            driver.record(self._event, stream)
        except DeviceError:
            self.close()
            raise

    def hold_back(self, stream: int) -> None:
        """Let another stream of the device wait for it.

        Raises:
            DeviceError: the driver refused.
        """
        self._driver.wait(stream, self._event)

    def close(self) -> None:
        """Let go of it; who waits for it still does."""
        with suppress(DeviceError):  # a device that is broken keeps nothing
            self._driver.drop(self._event)


class CudaDevicePort:
    """A transfer port between KV caches on a CUDA device and the host arena."""

    arrived_bytes = 0
    rank = 0
    """Which rank's device it is."""

    def __init__(
        self,
        layout: PagedLayout,
        pinned: Pinned,
        owner: object,
        driver: CudaDriver,
        wishes: Sequence[CopyPreference] = (CopyPreference(), CopyPreference()),
    ) -> None:
        """Open streams, and hold the arena registered.

        Args:
            layout: where the device blocks are.
            pinned: the host blocks, held until `close`.
            owner: whatever keeps the KV caches alive (the tensors), held until `suspend`.
            driver: of the device, closed with the port.
            wishes: how to copy to the host, and to the device. What is left open is measured now,
                in memory of its own, if it was not before.

        Raises:
            DeviceError: the driver refused.
            ConfigError: it takes not so much host memory.
        """
        self._driver, self._block_bytes = driver, layout.block_bytes
        self._arena, self.num_blocks = pinned.arena, layout.num_blocks
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: Callable[[], None] = lambda: None
        self._watching: asyncio.TimerHandle | None = None
        self._ended: list[Completion] = []
        self._failure: DeviceError | None = None
        with ExitStack() as undo:
            undo.callback(driver.close)
            self._copier: Copier | None = Copier(driver, pinned, undo)
            undo.callback(self.suspend)
            self.resume(layout, owner)
            self._ways = [CopyStream(driver, urgent, undo) for urgent in (False, True)]
            self._choose(layout, wishes)
            self._resources = undo.pop_all()

    def _choose(self, layout: PagedLayout, wishes: Sequence[CopyPreference]) -> None:
        settled = [wish.settled for wish in wishes]
        if None in settled:
            found = choices_for(self._driver, layout, self._ways)
            settled = [wish.made_of(each) for wish, each in zip(wishes, found, strict=True)]
        for way, choices in zip(self._ways, settled, strict=True):
            assert choices is not None
            way.choose(choices)

    @property
    def choices(self) -> dict[str, Choices]:
        """Give how copies are made, by direction."""
        to_host, to_device = self._ways
        return {"to host": to_host.choices, "to device": to_device.choices}

    def suspend(self) -> None:
        """Let go of the KV caches; streams and the registered arena stay. Idempotent.

        Only legal with nothing in flight.
        """
        pages = None if self._copier is None else self._copier.pages
        if self._copier is not None and pages is not None:
            self._copier.pages = None
            pages.close()

    def resume(self, layout: PagedLayout, owner: object) -> None:
        """Take KV caches again, with blocks of as many bytes.

        Raises:
            DeviceError: the driver refused.
        """
        assert self._copier is not None
        self.suspend()
        self._copier.pages = DevicePages(self._driver, layout, self._arena, owner)
        self.num_blocks = layout.num_blocks

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

    def order_after(self, to_device: bool) -> None:
        """Let later copies one way wait for what the calling thread's stream has queued by now.

        So a put reads what the engine's kernels have written, and a get writes what they no longer
        use. From any thread.

        Raises:
            DeviceError: the driver refused.
            ConfigError: a graph is being captured from that stream: what it queues is not run now.
        """
        stream = self._driver.current_stream()
        with self._driver.inside():
            if self._driver.is_capturing(stream):
                raise ConfigError(
                    "stream", stream, "a CUDA graph is being captured from it: put and get outside"
                )
            event = self._driver.open_event()
            try:
                self._driver.record(event, stream)
                self._driver.wait(self._ways[to_device].stream, event)
            finally:
                self._driver.drop(event)

    def submit(self, transfer: Transfer) -> None:
        """Start one transfer.

        Raises:
            ClosedError: after `close`.
            InvariantError: ids out of range, or of unequal length.
        """
        copier = self._copier
        if copier is None or copier.pages is None:
            raise ClosedError("the CUDA device port is closed, or suspended")
        to_device = transfer.route.target is Tier.DEVICE
        limits = (self._arena.num_blocks, self.num_blocks)
        check_ids(transfer, *(limits if to_device else limits[::-1]))
        if self._failure is not None:
            self._ended.append(Completion(transfer.op_id, self._failure))
            return
        way = self._ways[to_device]
        with self._driver.inside():
            self._begin(copier, way, transfer)
        if self._watching is None:
            self._watch()

    def _begin(self, copier: Copier, way: CopyStream, transfer: Transfer) -> None:
        to_device = transfer.route.target is Tier.DEVICE
        error: DeviceError | None = None
        try:
            direction = TO_DEVICE if to_device else TO_HOST
            copier.queue(way, direction, transfer.sides, transfer.layers)
            if to_device:
                self._mark(transfer, way)
        except DeviceError as failure:  # some of it may be under way: it ends in its turn
            error = failure
        way.under_way.append(Work(transfer.op_id, way.ids_end, error))
        try:
            self._driver.notify(way.stream, way.eventfd)
        except DeviceError as failure:  # there will be no word of the end: wait for it now
            self._end_now(way, error or failure)

    def _mark(self, transfer: Transfer, way: CopyStream) -> None:
        """Let streams of the engine wait for the layers that were queued."""
        layers, watch = transfer.layers, transfer.watch
        if layers is not None and watch is not None:
            watch.queued(self.rank, layers.whole, layers.last, Mark(self._driver, way.stream))

    def _end_now(self, way: CopyStream, failure: DeviceError) -> None:
        """Wait for all that is under way on a stream that cannot tell; it may be broken."""
        if not way.settle():
            self._fail(failure)
            return
        self._ended += [Completion(work.op_id, work.error) for work in way.under_way]
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
            way.settle()
            if self._loop is not None:
                self._loop.remove_reader(way.eventfd)
            self._ended += [Completion(work.op_id, failure) for work in way.under_way]
            way.under_way.clear()
        self._wake()

    def reap(self) -> list[Completion]:
        """Give every transfer that ended since the last call, each exactly once."""
        if self._failure is None:
            for way in self._ways:
                self._ended += [Completion(work.op_id, work.error) for work in way.ended()]
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """Detach from the loop, close the streams and let go of all memory. Idempotent.

        Raises:
            InvariantError: transfers were in flight; they have ended, nobody was told.
        """
        if self._copier is None:
            return
        if self._watching is not None:
            self._watching.cancel()
        if self._loop is not None:
            for way in self._ways:
                self._loop.remove_reader(way.eventfd)
        try:
            self._resources.close()
        except DeviceError as error:  # of a broken context, which the process cannot mend
            log.warning("device_not_released", call=error.call, code=error.code)
        self._copier = None
        if left := sum(len(way.under_way) for way in self._ways) + len(self._ended):
            raise InvariantError(f"CUDA device port closed with {left} transfers unreaped")
