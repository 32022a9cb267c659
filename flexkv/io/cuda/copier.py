"""Queues copies on a stream, as runs of bytes for the copy engine or ids for the kernel."""

from __future__ import annotations

import mmap
import os
import select
import time
from collections import deque
from contextlib import ExitStack, suppress
from functools import partial
from typing import NamedTuple

import numpy as np

from flexkv._ext import TO_DEVICE, TO_HOST, PageMap, list_runs
from flexkv.common.errors import DeviceError
from flexkv.common.layout import PagedLayout
from flexkv.common.terms import BlockIds
from flexkv.io.arena import Arena
from flexkv.io.cuda import kernel, pinned
from flexkv.io.cuda.choice import Choice, measure
from flexkv.io.cuda.driver import CudaDriver, Launch

IDS_MAX = 1 << 17
"""Block ids of kernel launches in flight on one stream; with more, the copy engine does it."""
MEASURED_BYTES, MEASURED_S_MAX = 32 << 20, 5
"""What is copied at a time to measure a way, and how long that may take at most."""
PAGE_BYTES = 4096


class Work(NamedTuple):
    """A transfer under way on a stream, and how it will have ended."""

    token: int
    ids_end: int
    """Where in the ids of the stream the space that the kernel reads ends; ever growing."""
    error: DeviceError | None


class Way:
    """One direction: a stream, what is under way on it, and the ids that its kernels read."""

    def __init__(self, driver: CudaDriver, urgent: bool, undo: ExitStack) -> None:
        self.choice = Choice()
        self.eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        undo.callback(os.close, self.eventfd)
        memory = mmap.mmap(-1, 8 * IDS_MAX)
        self.ids = np.frombuffer(memory, np.int64)
        driver.register(self.ids.ctypes.data, self.ids.nbytes)
        undo.callback(driver.unregister, self.ids.ctypes.data)
        self.stream = driver.open_stream(urgent)
        undo.callback(driver.close_stream, self.stream)  # waits: a kernel may read the ids
        self.ids_begin = self.ids_end = 0
        self.under_way: deque[Work] = deque()

    def take_ids(self, device_ids: BlockIds, host_ids: BlockIds) -> int | None:
        """Put ids where a kernel reads them, and give the address; None when there is no room."""
        wanted = 2 * len(device_ids)
        if not self.under_way:
            self.ids_begin = self.ids_end = 0
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

    def ended(self) -> list[Work]:
        """Give what has ended since the last call."""
        try:
            count = os.eventfd_read(self.eventfd)
        except BlockingIOError:
            return []
        works = [self.under_way.popleft() for _ in range(count)]
        self.ids_begin = works[-1].ids_end
        return works


class Tables(NamedTuple):
    """What the kernel knows of a device's pages, in device memory."""

    pieces: int
    parts: int
    piece_count: int

    @classmethod
    def of(cls, layout: PagedLayout, driver: CudaDriver, undo: ExitStack) -> Tables:
        """Upload them; `undo` gets what frees them."""
        addresses = []
        for table in (np.ascontiguousarray(layout.pieces), kernel.part_starts(layout.pieces[:, 2])):
            addresses.append(driver.upload(table))
            undo.callback(driver.free, addresses[-1])
        return cls(addresses[0], addresses[1], len(layout.pieces))


class Copier:
    """Queues copies between a device's pages and one arena, which it registers."""

    def __init__(
        self,
        driver: CudaDriver,
        pages: tuple[PagedLayout, Tables, object],
        arena: Arena,
        undo: ExitStack,
    ) -> None:
        """Register the arena; `undo` gets what takes that back.

        Args:
            driver: of the device.
            pages: where the device blocks are, the tables of that, and who keeps them alive.
            arena: the host blocks.
            undo: gets what undoes it.

        Raises:
            ConfigError: CUDA takes not so much host memory.
            DeviceError: the driver refused.
        """
        layout, tables, owner = pages
        self._driver = driver
        self._pages: PageMap | None = PageMap(
            layout.pieces, layout.num_blocks, arena.buffer, arena.block_stride_bytes, owner
        )
        self._bounds = pinned.register(driver, arena, undo)
        self._launch = Launch(
            *tables, ids=0, pairs=0, host=arena.address, host_stride=arena.block_stride_bytes,
            to_host=0,
        )  # fmt: skip

    def queue(self, way: Way, direction: int, device_ids: BlockIds, host_ids: BlockIds) -> None:
        """Queue the copies of some blocks.

        Raises:
            DeviceError: the driver refused; some of the copies may be under way.
        """
        assert self._pages is not None
        if not len(device_ids):
            return
        ids = None if way.choice.by_engine else way.take_ids(device_ids, host_ids)
        if ids is None:
            out = np.empty((3, len(device_ids) * self._pages.piece_count), np.uint64)
            count = list_runs(self._pages, direction, device_ids, host_ids, out)
            self._driver.copy(pinned.split(out[:, :count], self._bounds), way.stream)
            return
        launch = self._launch._replace(
            ids=ids, pairs=len(device_ids), to_host=int(direction == TO_HOST)
        )
        self._driver.launch(launch, way.choice.thread_blocks, way.stream)

    def close(self) -> None:
        """Let go of the arena and of who keeps the device memory alive. Idempotent."""
        self._pages = None


def settle(driver: CudaDriver, way: Way) -> bool:
    """Wait until a stream has ended all that is queued, or never will; tells whether it has."""
    try:
        driver.synchronize(way.stream)
    except DeviceError:
        return False
    with suppress(BlockingIOError):
        os.eventfd_read(way.eventfd)
    return True


def measured(driver: CudaDriver, layout: PagedLayout, ways: list[Way]) -> list[Choice]:
    """Give the choice for each way, from copies of memory that is as the device's blocks are.

    Raises:
        DeviceError: the driver refused, or a copy did not end.
    """
    blocks = min(max(2, MEASURED_BYTES // layout.block_bytes), IDS_MAX // 4)
    scattered = np.random.default_rng(0).permutation(blocks)
    with ExitStack() as undo:
        arena = Arena.open(blocks, -(-layout.block_bytes // PAGE_BYTES) * PAGE_BYTES)
        undo.callback(arena.close)
        scratch = driver.allocate(blocks * layout.block_bytes)
        undo.callback(driver.free, scratch)
        rows = layout.pieces.copy()
        rows[:, 0], rows[:, 1] = scratch + blocks * rows[:, 3], rows[:, 2]
        like = PagedLayout(rows, blocks, layout.block_bytes, layout.name)
        copier = Copier(driver, (like, Tables.of(like, driver, undo), None), arena, undo)
        undo.callback(copier.close)
        for each in ways:
            undo.callback(settle, driver, each)  # whatever happens: nothing is under way then

        def timed(way: Way, direction: int, choice: Choice) -> float:
            way.choice, begin_s = choice, time.perf_counter()
            copier.queue(way, direction, scattered, np.arange(blocks))
            driver.notify(way.stream, way.eventfd)
            ended = select.poll()
            ended.register(way.eventfd, select.POLLIN)
            if not ended.poll(1000 * MEASURED_S_MAX):
                driver.check(way.stream)
                raise DeviceError("a copy that measures the device", 0)
            os.eventfd_read(way.eventfd)
            return time.perf_counter() - begin_s

        return [
            measure(partial(timed, way, direction))
            for way, direction in zip(ways, (TO_HOST, TO_DEVICE), strict=True)
        ]
