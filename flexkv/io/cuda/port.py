"""The transfer port of a CUDA device: copies between its KV caches and the host arena.

    submit ─▶ runs of bytes ─▶ copy engine ─┐
          └─▶ ids           ─▶ kernel      ─┴▶ stream ─▶ host function ─▶ eventfd ─▶ reap

One stream brings bytes to the device and goes first, one takes them away. A stream ends its work in
order, so its eventfd need only count. Large runs go by the copy engine, which costs the device
nothing but wants a descriptor for each; small ones by the kernel.
"""

from __future__ import annotations

import asyncio
import mmap
import os
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flexkv._ext import TO_DEVICE, TO_HOST, PageMap, list_runs
from flexkv.common.errors import ClosedError, DeviceError, InvariantError
from flexkv.common.extents import check_ids
from flexkv.common.layout import PagedLayout
from flexkv.common.terms import BlockIds, Tier, Transfer
from flexkv.io.arena import Arena
from flexkv.io.cuda import kernel, pinned
from flexkv.io.cuda.driver import CudaDriver, Launch
from flexkv.io.ports import Completion

CHECK_S = 0.5
"""How often a stream with work is asked whether it has failed: then it never tells."""
IDS_MAX = 1 << 17
"""Block ids of kernel launches in flight on one stream; with more, the copy engine does it."""


class Choice(NamedTuple):
    """How one direction is copied."""

    engine_run_bytes_min: int = 64 << 10
    """Runs of this many bytes go by the copy engine, on average."""
    thread_blocks: int = 8


class _Work(NamedTuple):
    token: int
    ids_end: int
    """Where in the ids of the stream the space that the kernel reads ends; ever growing."""
    error: DeviceError | None


class _Way:
    """One direction: a stream, what is under way on it, and the ids that its kernels read."""

    def __init__(self, driver: CudaDriver, urgent: bool, choice: Choice, undo: ExitStack) -> None:
        self.choice = choice
        self.eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        undo.callback(os.close, self.eventfd)
        memory = mmap.mmap(-1, 8 * IDS_MAX)
        self.ids = np.frombuffer(memory, np.int64)
        driver.register(self.ids.ctypes.data, self.ids.nbytes)
        undo.callback(driver.unregister, self.ids.ctypes.data)
        self.stream = driver.open_stream(urgent)
        undo.callback(driver.close_stream, self.stream)  # waits: a kernel may read the ids
        self.ids_begin = self.ids_end = 0
        self.under_way: deque[_Work] = deque()

    def take_ids(self, device_ids: BlockIds, host_ids: BlockIds) -> int | None:
        """Put ids where a kernel reads them, and give the address; None when there is no room."""
        wanted = 2 * len(device_ids)
        begin = self.ids_end
        if begin % IDS_MAX + wanted > IDS_MAX:  # not over the end: from the start
            begin += IDS_MAX - begin % IDS_MAX
        if begin + wanted - self.ids_begin > IDS_MAX:
            return None
        at = begin % IDS_MAX
        self.ids[at : at + len(device_ids)] = device_ids
        self.ids[at + len(device_ids) : at + wanted] = host_ids
        self.ids_end = begin + wanted
        return int(self.ids.ctypes.data) + 8 * at

    def ended(self) -> list[_Work]:
        """Give what has ended since the last call."""
        try:
            count = os.eventfd_read(self.eventfd)
        except BlockingIOError:
            return []
        works = [self.under_way.popleft() for _ in range(count)]
        self.ids_begin = works[-1].ids_end
        return works


class CudaDevicePort:
    """A transfer port between KV caches on a CUDA device and the host arena."""

    arrived_bytes = 0

    def __init__(
        self,
        layout: PagedLayout,
        arena: Arena,
        owner: object,
        driver: CudaDriver,
        choices: tuple[Choice, Choice] = (Choice(), Choice()),
    ) -> None:
        """Open streams, and register the arena with the device.

        Args:
            layout: where the device blocks are.
            arena: the host blocks, held until `close`.
            owner: whatever keeps the KV caches alive (the tensors), held until `close`.
            driver: of the device, closed with the port.
            choices: how to copy to the host, and to the device.

        Raises:
            DeviceError: the driver refused.
            ConfigError: it takes not so much host memory.
        """
        self._driver, self._block_bytes = driver, layout.block_bytes
        self._host_blocks, self._device_blocks = arena.num_blocks, layout.num_blocks
        self._pages: PageMap | None = PageMap(
            layout.pieces, layout.num_blocks, arena.buffer, arena.block_stride_bytes, owner
        )
        self._run_bytes = layout.block_bytes // len(layout.pieces)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wake: Callable[[], None] = lambda: None
        self._watching: asyncio.TimerHandle | None = None
        self._ended: list[Completion] = []
        self._failure: DeviceError | None = None
        with ExitStack() as undo:
            undo.callback(driver.close)
            self._bounds = pinned.register(driver, arena, undo)
            parts = kernel.part_starts(layout.pieces[:, 2])
            tables = [driver.upload(np.ascontiguousarray(layout.pieces))]
            undo.callback(driver.free, tables[0])
            tables.append(driver.upload(parts))
            undo.callback(driver.free, tables[1])
            self._launch = Launch(
                tables[0], tables[1], len(layout.pieces), 0, 0,
                arena.address, arena.block_stride_bytes, 0,
            )  # fmt: skip
            self._ways = [
                _Way(driver, urgent, choice, undo)
                for urgent, choice in zip((False, True), choices, strict=True)
            ]
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

    def submit(self, transfer: Transfer) -> None:
        """Start one transfer.

        Raises:
            ClosedError: after `close`.
            InvariantError: ids out of range, or of unequal length.
        """
        if self._pages is None:
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
            if to_device:
                self._queue(way, TO_DEVICE, transfer.target_ids, transfer.source_ids)
            else:
                self._queue(way, TO_HOST, transfer.source_ids, transfer.target_ids)
        except DeviceError as failure:  # some of it may be under way: it ends in its turn
            error = failure
        way.under_way.append(_Work(transfer.token, way.ids_end, error))
        try:
            self._driver.notify(way.stream, way.eventfd)
        except DeviceError as failure:
            self._fail(error or failure)
        if self._watching is None:
            self._watch()

    def _queue(self, way: _Way, direction: int, device_ids: BlockIds, host_ids: BlockIds) -> None:
        ids = None
        if self._run_bytes < way.choice.engine_run_bytes_min:
            ids = way.take_ids(device_ids, host_ids)
        if ids is None:
            self._driver.copy(self._runs(direction, device_ids, host_ids), way.stream)
            return
        launch = self._launch._replace(
            ids=ids, pairs=len(device_ids), to_host=int(direction == TO_HOST)
        )
        if launch.pairs:
            self._driver.launch(launch, way.choice.thread_blocks, way.stream)

    def _runs(self, direction: int, device_ids: BlockIds, host_ids: BlockIds) -> NDArray[np.uint64]:
        assert self._pages is not None
        out = np.empty((3, len(device_ids) * self._pages.piece_count), np.uint64)
        count = list_runs(self._pages, direction, device_ids, host_ids, out)
        return pinned.split(out[:, :count], self._bounds)

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
        if self._pages is None:
            return
        if self._watching is not None:
            self._watching.cancel()
        if self._loop is not None:
            for way in self._ways:
                self._loop.remove_reader(way.eventfd)
        self._pages = None
        with suppress(DeviceError) if self._failure else nullcontext():
            self._resources.close()
        if left := sum(len(way.under_way) for way in self._ways) + len(self._ended):
            raise InvariantError(f"CUDA device port closed with {left} transfers unreaped")
