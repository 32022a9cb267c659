"""The transfer port of a CUDA device: copies between its KV caches and the host arena.

    submit ─▶ runs of bytes ─▶ copy engine ─┐
          └─▶ ids           ─▶ kernel      ─┴▶ stream ─▶ host function ─▶ eventfd ─▶ reap

One stream copies to the device, and goes first; the other copies to the host. A stream ends its
work in order, so its eventfd only has to count. The copy engine costs the device nothing, but
needs a descriptor for each run; the kernel copies runs of any size. Which is faster is measured.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from operator import attrgetter

from flexkv._ext import TO_DEVICE, TO_HOST
from flexkv.common.errors import ClosedError, ConfigError, DeviceError, InvariantError
from flexkv.common.extents import check_ids
from flexkv.common.layout import PagedLayout
from flexkv.common.terms import Tier, Transfer
from flexkv.io.cuda.choice import Choices, CopyPreference
from flexkv.io.cuda.copier import CudaCopier, DevicePages, choices_for
from flexkv.io.cuda.copy_stream import CopyStream, Work
from flexkv.io.cuda.driver import CudaDriver
from flexkv.io.cuda.pinned import Pinned
from flexkv.io.ports import Completion
from flexkv.observe.logs import get_logger

log = get_logger(__name__)

CHECK_S = 0.5
"""Time between two checks of a stream with work: one that has failed reports nothing itself."""


class Mark:
    """A point on a device's stream that other streams can wait for."""

    def __init__(self, driver: CudaDriver, stream: int) -> None:
        """Mark the end of the work queued on a stream so far.

        Raises:
            DeviceError: the driver reported an error.
        """
        self._driver, self._event = driver, driver.open_event()
        try:
            driver.record(self._event, stream)
        except DeviceError:
            self.close()
            raise

    def hold_back(self, stream: int) -> None:
        """Make later work of another stream of the device wait for this point.

        Raises:
            DeviceError: the driver reported an error.
        """
        self._driver.wait(stream, self._event)

    def close(self) -> None:
        """Release the mark; streams that wait for it still do."""
        with suppress(DeviceError):  # a broken device holds nothing
            self._driver.drop(self._event)


class CudaDevicePort:
    """A transfer port between KV caches on a CUDA device and the host arena.

    Attributes:
        failure: what broke the device, or None; all transfers then fail with it.
    """

    rank = 0
    """The rank whose device this is."""

    def __init__(
        self,
        layouts: Sequence[PagedLayout],
        pinned: Pinned,
        owner: object,
        driver: CudaDriver,
        preferences: Sequence[CopyPreference] = (CopyPreference(), CopyPreference()),
    ) -> None:
        """Open the streams, register the arena, and choose how to copy.

        Args:
            layouts: where the device blocks of each KV group are.
            pinned: the host blocks, kept registered until `close`.
            owner: what keeps the KV caches alive (the tensors), held until `suspend`.
            driver: the device's driver, closed with the port.
            preferences: how to copy to the host, and to the device. What they leave open is
                measured now, in separate memory, unless it was measured before. The largest
                block's layout is measured.

        Raises:
            DeviceError: the driver reported an error.
            ConfigError: CUDA cannot register that much host memory.
        """
        self._driver, self._arena, self.num_blocks = driver, pinned.arena, 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: Callable[[], None] = lambda: None
        self._watching: asyncio.TimerHandle | None = None
        self._ended: list[Completion] = []
        self.failure: DeviceError | None = None
        self._caches = ExitStack()
        """Releases the KV caches."""
        with ExitStack() as undo:
            undo.callback(driver.close)
            self._copier: CudaCopier | None = CudaCopier(driver, pinned, undo)
            undo.callback(self.suspend)
            self.resume(layouts, owner)
            self._streams = [CopyStream(driver, urgent, undo) for urgent in (False, True)]
            self._choose(max(layouts, key=attrgetter("block_bytes")), preferences)
            self._resources = undo.pop_all()

    def _choose(self, layout: PagedLayout, preferences: Sequence[CopyPreference]) -> None:
        settled = [preference.settled for preference in preferences]
        if None in settled:
            found = choices_for(self._driver, layout, self._streams)
            settled = [
                preference.made_of(each)
                for preference, each in zip(preferences, found, strict=True)
            ]
        for way, choices in zip(self._streams, settled, strict=True):
            assert choices is not None
            way.choose(choices)

    @property
    def choices(self) -> dict[str, Choices]:
        """Return how copies are made, by direction."""
        to_host, to_device = self._streams
        return {"to host": to_host.choices, "to device": to_device.choices}

    def suspend(self) -> None:
        """Release the KV caches; the streams and the registered arena stay. Idempotent.

        Only legal with nothing in flight.
        """
        if self._copier is not None:
            self._copier.pages = []
        self._caches.close()

    def resume(self, layouts: Sequence[PagedLayout], owner: object) -> None:
        """Attach KV caches again, with blocks of the same sizes.

        Raises:
            DeviceError: the driver reported an error.
        """
        assert self._copier is not None
        self.suspend()
        with ExitStack() as undo:
            driver, arena = self._driver, self._arena
            pages = [DevicePages(driver, layout, arena, owner, undo) for layout in layouts]
            self._copier.pages, self._caches = pages, undo.pop_all()
        self.num_blocks = min(layout.num_blocks for layout in layouts)

    def connect(self, wake: Callable[[], None]) -> None:
        """Attach to the running loop, which calls `wake` when `reap` has something to return."""
        self._loop, self._wake = asyncio.get_running_loop(), wake
        for way in self._streams:
            self._loop.add_reader(way.eventfd, wake)

    def order_after(self, to_device: bool) -> None:
        """Make later copies in one direction wait for the work queued on the caller's stream.

        So a put reads what the engine's kernels have written, and a get overwrites only what they
        no longer use. May be called from any thread.

        Raises:
            DeviceError: the driver reported an error.
            ConfigError: a CUDA graph is being captured from that stream, so its work does not run.
        """
        stream = self._driver.current_stream()
        with self._driver.inside():
            if self._driver.is_capturing(stream):
                why = "a CUDA graph is being captured on it: put and get outside the capture"
                raise ConfigError("stream", stream, why)
            event = self._driver.open_event()
            try:
                self._driver.record(event, stream)
                self._driver.wait(self._streams[to_device].stream, event)
            finally:
                self._driver.drop(event)

    def submit(self, transfer: Transfer) -> None:
        """Start one transfer.

        Raises:
            ClosedError: after `close`.
            InvariantError: a group or an id is out of range, or the id lists differ in length.
        """
        copier = self._copier
        if copier is None or not copier.pages:
            raise ClosedError("the CUDA device port is closed, or suspended")
        if transfer.group >= len(copier.pages):
            raise InvariantError(f"transfer {transfer.op_id}: no layout of group {transfer.group}")
        to_device = transfer.route.target is Tier.DEVICE
        check_ids(transfer, self._arena.num_blocks, self.num_blocks)
        if self.failure is not None:
            self._ended.append(Completion(transfer.op_id, self.failure))
            return
        way = self._streams[to_device]
        with self._driver.inside():
            self._begin(copier, way, transfer)
        if self._watching is None:
            self._watch()

    def _begin(self, copier: CudaCopier, way: CopyStream, transfer: Transfer) -> None:
        to_device = transfer.route.target is Tier.DEVICE
        error: DeviceError | None = None
        try:
            direction = TO_DEVICE if to_device else TO_HOST
            pages = copier.pages[transfer.group]
            copier.queue(way, pages, direction, transfer.sides, transfer.layers)
            if to_device:
                self._mark(transfer, way)
        except DeviceError as failure:  # some copies may be under way, and end in turn
            error = failure
        way.under_way.append(Work(transfer.op_id, way.ids_end, error))
        try:
            self._driver.notify(way.stream, way.eventfd)
        except DeviceError as failure:  # the end will not be announced: wait now
            self._end_now(way, error or failure)

    def _mark(self, transfer: Transfer, way: CopyStream) -> None:
        """Report the queued layers, with a mark that the engine's streams can wait for."""
        layers, watch = transfer.layers, transfer.watch
        if layers is not None and watch is not None:
            watch.queued(self.rank, layers.whole, layers.last, Mark(self._driver, way.stream))

    def _end_now(self, way: CopyStream, failure: DeviceError) -> None:
        """Wait for all transfers on a stream that cannot announce their ends; it may be broken."""
        if not way.settle():
            self._fail(failure)
            return
        self._ended += [Completion(work.op_id, work.error) for work in way.under_way]
        way.under_way.clear()

    def _watch(self) -> None:
        """Check whether a stream has failed, and check again later while any has work."""
        self._watching = None
        try:
            for way in self._streams:
                if way.under_way:
                    self._driver.check(way.stream)
        except DeviceError as failure:
            self._fail(failure)
        if self._loop is not None and any(way.under_way for way in self._streams):
            self._watching = self._loop.call_later(CHECK_S, self._watch)

    def _fail(self, failure: DeviceError) -> None:
        """Fail all transfers: the device is broken, touches no memory, and announces no ends."""
        self.failure = failure
        for way in self._streams:
            way.settle()
            if self._loop is not None:
                self._loop.remove_reader(way.eventfd)
            self._ended += [Completion(work.op_id, failure) for work in way.under_way]
            way.under_way.clear()
        self._wake()

    def reap(self) -> list[Completion]:
        """Return every transfer that ended since the last call, each exactly once."""
        if self.failure is None:
            for way in self._streams:
                self._ended += [Completion(work.op_id, work.error) for work in way.ended()]
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """Detach from the loop, close the streams and release all memory. Idempotent.

        Raises:
            InvariantError: transfers were in flight; they have ended, but were not reported.
        """
        if self._copier is None:
            return
        if self._watching is not None:
            self._watching.cancel()
        if self._loop is not None:
            for way in self._streams:
                self._loop.remove_reader(way.eventfd)
        try:
            self._resources.close()
        except DeviceError as error:  # a broken context, which cannot be repaired
            log.warning("device_not_released", call=error.call, code=error.code)
        self._copier = None
        if left := sum(len(way.under_way) for way in self._streams) + len(self._ended):
            raise InvariantError(f"CUDA device port closed with {left} transfers unreaped")
