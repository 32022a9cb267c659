"""Queues copies on a stream: runs of bytes for the copy engine, ids for the kernel, or both."""

from __future__ import annotations

import os
import select
import time
from contextlib import ExitStack
from functools import partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from flexkv._ext import TO_DEVICE, TO_HOST, list_runs
from flexkv.common.errors import DeviceError
from flexkv.common.layout import PagedLayout
from flexkv.common.terms import BlockIds, Layers
from flexkv.io.cuda import kept, kernel
from flexkv.io.cuda.choice import Choice, Choices, CopyMethod, decode, encode, measure
from flexkv.io.cuda.copy_stream import CopyStream
from flexkv.io.cuda.driver import CudaDriver, Launch
from flexkv.io.cuda.grids import Runs
from flexkv.io.cuda.pinned import OUT_OF_MEMORY, Pinned, split
from flexkv.io.device.pages import Pages
from flexkv.io.memory.arena import Arena
from flexkv.observe.logs import get_logger

log = get_logger(__name__)

MEASURED_BYTES, MEASURED_CHUNKS, MEASURED_S_MAX = 128 << 20, 1 << 14, 5
"""Limits of one measured copy: its bytes, its chunks, and how long it may take."""
STAGED_BYTES_MIN = 1 << 20
"""Layers of a block are staged only from this size on: with runs of 256 KiB the copy engine of an
H200 reaches nine tenths of the link's rate, and each run costs the CPU more than a microsecond."""
PAGE_BYTES = 4096
INT64 = 8


class DevicePages:
    """The tables of a device's pages, as the copy engine and the kernel need them."""

    def __init__(
        self, driver: CudaDriver, layout: PagedLayout, arena: Arena, owner: object, undo: ExitStack
    ) -> None:
        """Upload the tables that the kernel reads: for whole blocks, and by layer.

        `undo` frees the tables and releases the owner of the device memory.

        Raises:
            DeviceError: the driver reported an error.
        """
        self.layout, self.pages = layout, Pages(layout, arena, owner)
        undo.callback(self.pages.close)
        by_layer = np.concatenate(layout.layers)
        counts = [len(rows) for rows in layout.layers]
        self._first_piece = np.concatenate([[0], np.cumsum(counts)]).tolist()
        self._whole = self._upload(driver, layout.pieces, undo)
        self._layers = self._upload(driver, by_layer, undo)
        self._begins = [*by_layer[:, 3].tolist(), int(by_layer[-1, 2:].sum())]
        host = arena.address, arena.block_stride_bytes
        self.stage_bytes = kernel.stage_bytes(np.concatenate([layout.pieces, by_layer]), *host)

    @staticmethod
    def _upload(driver: CudaDriver, pieces: NDArray[np.int64], undo: ExitStack) -> tuple[int, int]:
        addresses = []
        for table in (np.ascontiguousarray(pieces), kernel.part_starts(pieces[:, 2])):
            addresses.append(driver.upload(table))
            undo.callback(driver.free, addresses[-1])
        return addresses[0], addresses[1]

    def tables(self, layers: Layers | None) -> tuple[int, int, int]:
        """Return a launch's `pieces`, `parts` and `piece_count`, for layers or whole blocks."""
        if layers is None:
            return *self._whole, len(self.layout.pieces)
        first, last = self._first_piece[layers.first], self._first_piece[layers.last]
        pieces, parts = self._layers
        return pieces + 4 * INT64 * first, parts + INT64 * first, last - first

    def extent(self, layers: Layers | None) -> tuple[int, int]:
        """Return the offset and bytes of some layers, or of the device's part, in a host block."""
        first, last = (0, -1) if layers is None else (layers.first, layers.last)
        begin = self._begins[self._first_piece[first]]
        return begin, self._begins[self._first_piece[last] if last > 0 else -1] - begin

    def launch(
        self,
        layers: Layers | None,
        ids: tuple[int, int],
        memory: tuple[int, int],
        direction: int,
    ) -> Launch:
        """Return a launch for ids (address, pairs) and blocks in memory (address, stride)."""
        return Launch(*self.tables(layers), *ids, *memory, to_host=int(direction == TO_HOST))


class CudaCopier:
    """Queues copies between a device's pages and one arena, which it registers with CUDA."""

    def __init__(self, driver: CudaDriver, pinned: Pinned, undo: ExitStack) -> None:
        """Register the arena, until `undo` ends.

        Raises:
            ConfigError: CUDA cannot register that much host memory.
            DeviceError: the driver reported an error.
        """
        pinned.hold(driver, undo)
        self._driver, self._arena, self._bounds = driver, pinned.arena, pinned.bounds
        self.pages: list[DevicePages] = []
        """The pages of each KV group; none while the device is suspended."""

    def queue(
        self,
        way: CopyStream,
        pages: DevicePages,
        direction: int,
        ids: tuple[BlockIds, BlockIds],
        layers: Layers | None = None,
    ) -> None:
        """Queue the copies of some blocks, or of some of their layers.

        Args:
            way: the stream, and how it copies.
            pages: those of the blocks' KV group.
            direction: TO_HOST or TO_DEVICE.
            ids: block ids in host memory, and as many on the device.
            layers: the layers to copy; None: whole blocks.

        Raises:
            DeviceError: the driver reported an error; some of the copies may be under way.
        """
        host_ids, device_ids = ids
        if not len(device_ids):
            return
        page_map = pages.pages.of(layers)
        chunks = len(device_ids) * page_map.piece_count
        choice = way.choices.of(chunks)
        if choice.method is CopyMethod.STAGED:
            if self._staged(way, pages, direction, ids, layers, choice):
                return
            choice = way.choices.unstaged(chunks)
        if choice.method is CopyMethod.KERNEL:
            address = way.take_ids(np.concatenate([device_ids, host_ids]))
            if address is not None:
                host = self._arena.address, self._arena.block_stride_bytes
                launch = pages.launch(layers, (address, len(device_ids)), host, direction)
                launch = launch._replace(stage_bytes=pages.stage_bytes)
                self._driver.launch(launch, choice.thread_blocks, way.stream)
                return
        out = np.empty((3, chunks), np.uint64)
        count = list_runs(page_map, direction, device_ids, host_ids, out)
        self._copy(out[:, :count], way.stream)

    def _copy(self, runs: Runs, stream: int) -> None:
        self._driver.copy(split(runs, self._bounds), stream)

    def _staged(
        self,
        way: CopyStream,
        pages: DevicePages,
        direction: int,
        ids: tuple[BlockIds, BlockIds],
        layers: Layers | None,
        choice: Choice,
    ) -> bool:
        """Queue copies through device memory; return False, queueing nothing, if they do not fit.

        Raises:
            DeviceError: the driver reported an error; no copy by the copy engine is under way.
        """
        stage, (host_ids, device_ids) = way.stage, ids
        offset, size = pages.extent(layers)
        if stage is None or size > stage.size:
            return False
        if layers is not None and size < STAGED_BYTES_MIN:  # too short a run for the copy engine
            return False
        at_once = stage.size // size
        lots = list(pairwise([*range(0, len(device_ids), at_once), len(device_ids)]))
        flat = [part for a, b in lots for part in (device_ids[a:b], np.arange(b - a))]
        address = way.take_ids(np.concatenate(flat))
        if address is None:
            return False
        try:
            for begin, end in lots:
                staged = (address + 2 * INT64 * begin, end - begin)
                slot = stage.next_slot()
                launch = pages.launch(layers, staged, (slot - offset, size), direction)
                host = self._arena.address + offset
                blocks = host + host_ids[begin:end] * self._arena.block_stride_bytes
                runs = _joined(blocks, slot, size)
                if direction == TO_DEVICE:
                    runs[[0, 1]] = runs[[1, 0]]
                stage.use(
                    partial(self._driver.launch, launch, choice.thread_blocks),
                    partial(self._copy, runs),
                    kernel_first=direction == TO_HOST,
                )
            stage.join()
        except DeviceError:
            stage.settle()  # the direction's stream may not wait for these copies
            raise
        return True


def _joined(blocks: NDArray[np.int64], slot: int, size: int) -> Runs:
    """Return the copies from a slot to blocks of `size` bytes; adjacent blocks are one copy."""
    firsts = np.flatnonzero(np.diff(blocks, prepend=blocks[0] - size - 1) != size)
    counts = np.diff(firsts, append=len(blocks))
    return np.stack([blocks[firsts], slot + firsts * size, counts * size]).astype(np.uint64)


def choices_for(driver: CudaDriver, layout: PagedLayout, ways: list[CopyStream]) -> list[Choices]:
    """Return the choices for each stream: those kept on disk, or measured now.

    Raises:
        DeviceError: the driver reported an error, or a copy did not end in time.
    """
    facts = kept.name_of(driver.named, layout.pieces[:, 2].tolist(), kernel.source())
    path = kept.folder() / f"choices-{facts}.json"
    if (text := kept.read(path)) and (found := decode(text)) and len(found) == len(ways):
        return found
    try:
        choices = measured(driver, layout, ways)
    except DeviceError as error:
        if error.code != OUT_OF_MEMORY:
            raise
        reason = "too little free device memory: the copy engine is used"
        log.warning("device_not_measured", reason=reason)
        return [Choices.always(CopyMethod.ENGINE)] * len(ways)
    kept.write(path, encode(choices))
    return choices


def measured(driver: CudaDriver, layout: PagedLayout, ways: list[CopyStream]) -> list[Choices]:
    """Return the choices for each stream, measured on memory laid out as the device's blocks are.

    Raises:
        DeviceError: the driver reported an error, or a copy did not end in time.
    """
    most = min(MEASURED_BYTES // layout.block_bytes, MEASURED_CHUNKS // len(layout.pieces))
    blocks = max(2, most)
    scattered = np.random.default_rng(0).permutation(blocks)
    with ExitStack() as undo:
        arena = Arena.open(blocks, -(-layout.block_bytes // PAGE_BYTES) * PAGE_BYTES)
        undo.callback(arena.close)
        scratch = driver.allocate(blocks * layout.block_bytes)
        undo.callback(driver.free, scratch)
        rows = layout.pieces.copy()
        rows[:, 3] -= rows[0, 3]
        rows[:, 0], rows[:, 1] = scratch + blocks * rows[:, 3], rows[:, 2]
        like = PagedLayout(rows, blocks, layout.block_bytes, layout.name, (rows,))
        copier = CudaCopier(driver, Pinned(arena), undo)
        pages = DevicePages(driver, like, arena, None, undo)
        for each in ways:
            undo.callback(each.drop_stage)
            undo.callback(each.settle)  # before what the copies use is freed

        def timed(way: CopyStream, direction: int, choice: Choice, chunks: int) -> float:
            count = max(1, min(blocks, chunks // len(rows)))
            way.choose(Choices((choice,)))
            begin_s = time.perf_counter()
            copier.queue(way, pages, direction, (np.arange(count), scattered[:count]))
            driver.notify(way.stream, way.eventfd)
            ended = select.poll()
            ended.register(way.eventfd, select.POLLIN)
            if not ended.poll(1000 * MEASURED_S_MAX):
                driver.check(way.stream)
                raise DeviceError(f"a measurement copy (no end within {MEASURED_S_MAX} s)", 0)
            os.eventfd_read(way.eventfd)
            return time.perf_counter() - begin_s

        return [
            measure(partial(timed, way, direction), blocks * len(rows))
            for way, direction in zip(ways, (TO_HOST, TO_DEVICE), strict=True)
        ]
