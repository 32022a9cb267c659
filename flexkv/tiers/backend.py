"""Opens what an engine runs on: host memory, the disk port, and a port to each device.

`LocalBackend` opens the adapters of this machine. `flexkv.testing` has a backend over fakes, so
that the whole engine, actors included, runs in a simulation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol

from flexkv.common.config import CacheConfig, CacheSizes, ModelConfig
from flexkv.common.errors import ConfigError
from flexkv.common.layout import Order, PagedLayout, infer_layout
from flexkv.io.checksums.summed import SummedPort
from flexkv.io.checksums.sums import PoolChecksummer
from flexkv.io.cuda.choice import CopyPreference
from flexkv.io.cuda.driver import BoundDriver, why_no_gds
from flexkv.io.cuda.pinned import Pinned
from flexkv.io.cuda.port import CudaDevicePort
from flexkv.io.device.cpu import CpuDevicePort
from flexkv.io.device.ranks import RanksPort
from flexkv.io.device.tensors import KVCaches, check_dtype, describe, device_of, kv_cache_list
from flexkv.io.memory.arena import Arena, check_memory
from flexkv.io.ports import DevicePort, TransferPort
from flexkv.observe.logs import get_logger
from flexkv.process.stoppable import no_pause, run_stoppable
from flexkv.tiers.limits import memory_error_named
from flexkv.tiers.parts import TierParts
from flexkv.tiers.ssd import SsdTier
from flexkv.tiers.unavailable import Unavailable

log = get_logger(__name__)

Progress = Callable[[int, int], None]


class Device(NamedTuple):
    """A registered device: the port to its blocks, their number and layout, and where it is."""

    port: DevicePort
    num_blocks: int
    layout: str
    place: tuple[str, int] = ("cpu", 0)
    order: Order = ""

    @property
    def facts(self) -> dict[str, object]:
        """Return what the log says about the device. Agents log about their own devices."""
        kind, number = self.place
        if kind == "agents":
            return {"device": kind, "layout": self.layout}
        return {"device": f"{kind}:{number}", "layout": self.layout, "blocks": self.num_blocks}


class Backend(Protocol):
    """Opens the adapters of one engine."""

    host: str
    """The kind of memory that holds the host blocks."""
    unavailable: Unavailable
    """The configured tiers and directories that the engine goes on without."""
    ranks: int
    """The number of devices that must be registered before requests are accepted."""

    async def take(self, undo: ExitStack, progress: Progress | None) -> None:
        """Acquire memory and files, which may take minutes; `undo` gets what releases them.

        Cancellation: ends soon; `undo` has what was acquired.
        """
        ...

    def open(self, undo: ExitStack, progress: Progress | None) -> None:
        """Open the adapters over memory and files; acquire those first if `take` did not."""
        ...

    def tiers(self) -> Sequence[TierParts]:
        """Return the tiers below host memory, the nearest first, once they are open."""
        ...

    def device(self, kv_caches: Any, layout: str | None, tp_rank: int) -> Device:
        """Return a device with an open port to a rank's KV caches."""
        ...

    def resumed(self, device: Device, kv_caches: Any, layout: str | None, tp_rank: int) -> Device:
        """Return a suspended device with its port open to KV caches again."""
        ...

    def joined(self, devices: Sequence[Device]) -> TransferPort:
        """Return one port over the devices of all ranks, which come in rank order."""
        ...


class LocalBackend:
    """The adapters of this machine: an arena, SSD files over io_uring, KV caches on CPU or GPU."""

    shared = False
    """Whether other processes map the host memory."""

    def __init__(self, model: ModelConfig, cache: CacheConfig, sizes: CacheSizes) -> None:
        self.ranks = model.tp_size
        self.host = ""
        self.unavailable = Unavailable()
        self.ssd = SsdTier(model, cache, sizes, self.unavailable)
        self._tiers: list[TierParts] = []
        self._model, self._cache, self._sizes = model, cache, sizes
        self._has_taken = False

    async def take(self, undo: ExitStack, progress: Progress | None) -> None:
        """Acquire memory and files in a thread: touching and allocating may take minutes.

        Raises:
            ConfigError: memory, a directory or disk space is missing.

        Cancellation: ends soon, and raises once nothing is being acquired any more.
        """
        await run_stoppable("open", lambda pause: self._take(undo, progress, pause))

    def _take(
        self, undo: ExitStack, progress: Progress | None, pause: Callable[[], None] = no_pause
    ) -> None:
        """Check that there is enough memory, acquire files, which is quick, and then memory."""
        cache, sizes = self._cache, self._sizes
        self.unavailable.forget()  # what an earlier try found
        hugepage_bytes = cache.hugepage_size_bytes if cache.use_hugepage_cpu_buffer else None
        host_bytes = sizes.num_host_blocks * sizes.block_stride_bytes
        reserved_bytes = check_memory(host_bytes, hugepage_bytes, sizes.host_given)
        if sizes.num_disk_blocks:
            self.ssd.take(reserved_bytes, pause, undo)

        def touched(done_bytes: int, all_bytes: int) -> None:
            pause()
            if progress is not None:
                progress(done_bytes, all_bytes)

        self._arena = Arena.open(
            sizes.num_host_blocks,
            sizes.block_stride_bytes,
            hugepage_bytes,
            shared=self.shared,
            progress=touched,
            given=sizes.host_given,
        )
        undo.callback(self._arena.close)
        self._has_taken = True

    def open(self, undo: ExitStack, progress: Progress | None) -> None:
        """Open the adapters over memory and files; acquire those first if `take` did not.

        Raises:
            ConfigError: memory, a directory or disk space is missing.
        """
        if not self._has_taken:
            self._take(undo, progress)
        if self._cache.enable_gds:
            log.warning(
                "gds_not_used", reason=why_no_gds(), instead="SSD blocks go through host memory"
            )
        self._pinned = Pinned(self._arena)
        self.host = self._arena.backing
        with memory_error_named(self._sizes):
            opened = [self.ssd.open(self._arena, undo)]
        self._tiers = [parts for parts in opened if parts is not None]
        outlives = any(parts.persistence is not None for parts in self._tiers)
        if not self._model.model_id and (self.shared or outlives):
            log.warning(
                "model_id_not_given",
                field="model_id",
                reason="set it to a name of the weights: without it, another model of the same "
                "shape that uses this cache, now or after a restart, would be given these blocks",
            )

    def attach(self, arena: Arena) -> None:
        """Use host memory that another process has opened; there is no SSD tier then."""
        self._arena, self._pinned = arena, Pinned(arena)
        self.host = arena.backing

    def tiers(self) -> Sequence[TierParts]:
        """Return the tiers below host memory, the nearest first, once they are open."""
        return self._tiers

    @property
    def arena(self) -> Arena:
        """Return the host memory."""
        return self._arena

    def device(self, kv_caches: KVCaches, layout: str | None, tp_rank: int) -> Device:
        """Return a device with an open port to a rank's per-layer tensors, on CPU or CUDA.

        Raises:
            ConfigError: the tensors do not fit the model, or their layout is ambiguous.
            BackendUnavailableError: there is no adapter, or no driver, for where they are.
            DeviceError: the driver refused.
        """
        tensors = kv_cache_list(kv_caches)
        kind, ordinal = device_of(tensors)
        pages = self.pages_of(tensors, layout, tp_rank)
        if kind == "cuda":
            port: DevicePort = self._cuda(ordinal, pages, tensors, tp_rank)
            return Device(port, pages.num_blocks, pages.name, (kind, ordinal), pages.order)
        port = CpuDevicePort(
            pages,
            self._arena,
            owner=tuple(tensors),
            threads=self._cache.copy_threads or min(4, os.cpu_count() or 1),
            sums=self.ssd.sums if self._model.parts == 1 else None,
        )
        return Device(port, pages.num_blocks, pages.name, order=pages.order)

    def _cuda(
        self, ordinal: int, pages: PagedLayout, tensors: Sequence[Any], tp_rank: int
    ) -> CudaDevicePort:
        cache = self._cache
        preferences = (
            CopyPreference(cache.use_ce_transfer_d2h, cache.transfer_num_cta_d2h),
            CopyPreference(cache.use_ce_transfer_h2d, cache.transfer_num_cta_h2d),
        )
        driver = BoundDriver(ordinal)
        port = CudaDevicePort(pages, self._pinned, tuple(tensors), driver, preferences)
        port.rank = tp_rank
        return port

    def resumed(
        self,
        device: Device,
        kv_caches: KVCaches,
        layout: str | None,
        tp_rank: int,
    ) -> Device:
        """Return a suspended device with its port open to KV caches again.

        Raises:
            ConfigError: the tensors do not fit, or are on another device.
            DeviceError: the driver refused.
        """
        tensors = kv_cache_list(kv_caches)
        if (place := device_of(tensors)) != device.place:
            where, before = (":".join(map(str, each)) for each in (place, device.place))
            raise ConfigError("kv_caches", where, f"must be on the same device as before, {before}")
        pages = self.pages_of(tensors, layout, tp_rank)
        if pages.order != device.order:
            why = f"must have the same element order as before: {device.order}"
            raise ConfigError("kv_caches", f"element order {pages.order}", why)
        device.port.resume(pages, tuple(tensors))
        return Device(device.port, pages.num_blocks, pages.name, place, pages.order)

    def joined(self, devices: Sequence[Device]) -> TransferPort:
        """Return one port over the devices of all ranks that keeps the sums for the SSD tier."""
        # A CPU device that copies whole blocks sums them as it copies.
        summed = self._model.parts == 1 and {each.place[0] for each in devices} == {"cpu"}
        return self.summed(self._over_ranks(devices), summed)

    def summed(self, port: TransferPort, inner_keeps_sums: bool = False) -> TransferPort:
        """Return a port that also keeps the sums for the SSD tier, if there is one."""
        if self.ssd.sums is None:
            return port
        return SummedPort(port, PoolChecksummer(self._arena, sums=self.ssd.sums), inner_keeps_sums)

    def _over_ranks(self, devices: Sequence[Device]) -> TransferPort:
        port: TransferPort = devices[0].port
        if len(devices) > 1:
            parts: list[list[DevicePort]] = [[] for _ in range(self._model.parts)]
            for rank, device in enumerate(devices):
                parts[self._model.part_of(rank).number].append(device.port)
            port = RanksPort(parts, self._arena.num_blocks)
        return port

    def pages_of(self, tensors: Sequence[Any], layout: str | None, tp_rank: int) -> PagedLayout:
        """Return where a rank's blocks are in its tensors.

        Raises:
            ConfigError: the tensors do not fit the model, or their layout is ambiguous.
        """
        model = self._model
        if len(tensors) != model.num_layers:
            why = f"must have one tensor for each of the {model.num_layers} layers"
            raise ConfigError("kv_caches", f"{len(tensors)} tensors", why)
        fields = [f"kv_caches[{i}]" for i in range(len(tensors))]
        specs = [describe(*each) for each in zip(tensors, fields, strict=True)]
        for each in zip(tensors, model.dtypes, fields, strict=True):
            check_dtype(*each)
        shapes = model.shapes(self._cache.tokens_per_block)
        return infer_layout(specs, shapes, layout, model.part_of(tp_rank))
