"""What an engine stands on: host memory, the disk port, and ports to devices as they register.

`LocalBackend` opens the adapters of this machine. `flexkv.testing` has one over fakes, so that the
whole engine, actors and all, runs in a simulation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from flexkv.common.config import MB, CacheConfig, CacheSizes, ModelConfig
from flexkv.common.errors import ConfigError
from flexkv.common.layout import Order, PagedLayout, infer_layout
from flexkv.index.keys import blocks_are
from flexkv.io.arena import Arena
from flexkv.io.cpu import CpuDevicePort
from flexkv.io.cuda.choice import Wish
from flexkv.io.cuda.driver import BoundDriver, why_no_gds
from flexkv.io.cuda.pinned import Pinned
from flexkv.io.cuda.port import CudaDevicePort
from flexkv.io.files import StripedFiles
from flexkv.io.ports import DevicePort, DurablePort, TransferPort
from flexkv.io.ranks import RanksPort
from flexkv.io.ssd import forget_earlier, open_journals, open_ssd, present, refuse
from flexkv.io.summed import SummedPort
from flexkv.io.sums import PoolSummer, Sums
from flexkv.io.superblock import FORMAT_VERSION, Superblock
from flexkv.io.tensors import describe, device_of, kv_cache_list
from flexkv.io.uring import RingOptions
from flexkv.ledger import Ledger
from flexkv.logs import get_logger
from flexkv.scrub import Scrubber

log = get_logger(__name__)

Progress = Callable[[int, int], None]


class Device(NamedTuple):
    """A registered device: the port to its blocks, how many there are, how they lie, and where."""

    port: DevicePort
    num_blocks: int
    layout: str
    place: tuple[str, int] = ("cpu", 0)
    order: Order = ""

    @property
    def facts(self) -> dict[str, object]:
        """Return what a log tells of it. Of agents' devices each one tells of its own."""
        kind, number = self.place
        if kind == "agents":
            return {"device": kind, "layout": self.layout}
        return {"device": f"{kind}:{number}", "layout": self.layout, "blocks": self.num_blocks}


class Backend(Protocol):
    """Opens the adapters of one engine."""

    host: str
    """What holds the host blocks."""
    disk: DurablePort | None
    disk_blocks: int
    ledger: Ledger | None
    """What makes the SSD tier survive; None when nothing does."""
    scrubber: Scrubber | None
    """What reads the SSD tier in idle time; None when nothing does."""
    ranks: int
    """How many devices have to be registered before requests are taken."""

    def open(self, undo: ExitStack, progress: Progress | None) -> None:
        """Take memory and files; `undo` gets what releases them."""
        ...

    def device(self, kv_caches: Any, layout: str | None, tp_rank: int) -> Device:
        """Open the port to a rank's KV caches."""
        ...

    def resumed(self, device: Device, kv_caches: Any, layout: str | None, tp_rank: int) -> Device:
        """Let a suspended device's port take KV caches again."""
        ...

    def joined(self, devices: Sequence[Device]) -> TransferPort:
        """Give one port over the devices of all ranks, in their order."""
        ...


class LocalBackend:
    """The adapters of this machine: an arena, SSD files over io_uring, KV caches on CPU or GPU."""

    shared = False
    """Whether other processes map the host memory."""

    def __init__(self, model: ModelConfig, cache: CacheConfig, sizes: CacheSizes) -> None:
        self.ranks = model.tp_size
        self.host = ""
        self.disk: DurablePort | None = None
        self.disk_blocks = 0
        self.ledger: Ledger | None = None
        self.scrubber: Scrubber | None = None
        self._model, self._cache, self._sizes = model, cache, sizes
        self._sums: Sums | None = None

    def open(self, undo: ExitStack, progress: Progress | None) -> None:
        """Take memory and files.

        Raises:
            ConfigError: memory, directory or disk space is not there.
        """
        cache, sizes = self._cache, self._sizes
        if cache.enable_gds:
            log.warning(
                "gds not used", reason=why_no_gds(), instead="SSD blocks go through the host"
            )
        self._arena = Arena.open(
            sizes.num_host_blocks,
            sizes.block_stride_bytes,
            cache.hugepage_size_bytes if cache.use_hugepage_cpu_buffer else None,
            shared=self.shared,
            progress=progress,
        )
        undo.callback(self._arena.close)
        self._pinned = Pinned(self._arena)
        self.host = self._arena.backing
        if sizes.num_disk_blocks and (folders := present(map(Path, cache.ssd_cache_dir))):
            self._open_ssd(folders, undo)
        if not self._model.model_id and (self.shared or self.ledger is not None):
            log.warning(
                "model_id_not_given",
                field="model_id",
                reason="blocks of any model of this shape are taken for this one's: name the "
                "weights if others may use this cache, now or after a restart",
            )

    def attach(self, arena: Arena) -> None:
        """Stand on host memory that another process has opened; there is no SSD then."""
        self._arena, self._pinned = arena, Pinned(arena)
        self.host = arena.backing

    @property
    def arena(self) -> Arena:
        """Give the host memory."""
        return self._arena

    def _open_ssd(self, folders: list[Path], undo: ExitStack) -> None:
        cache, sizes = self._cache, self._sizes
        if cache.ssd_on_mismatch == "refuse":
            refuse(folders, self._superblock())
        # Each directory has its part, whatever became of the others.
        self.disk_blocks = sizes.num_disk_blocks * len(folders) // len(cache.ssd_cache_dir) or 1
        per_file = sizes.max_file_blocks
        files = StripedFiles.open(
            folders,
            self.disk_blocks,
            sizes.block_stride_bytes,
            None if per_file is None else per_file * sizes.block_stride_bytes,
            cache.ssd_preallocate,
        )
        undo.callback(files.close)
        options = RingOptions(entries=cache.iouring_entries, flags=cache.iouring_flags)
        summer = PoolSummer(self._arena)
        self._sums = summer.sums
        port = self.disk = open_ssd(self._arena, files, options, summer, undo)
        if not cache.ssd_warm_restart:
            forget_earlier(files.folders)
            return
        journals = open_journals(files.folders, self._superblock(), undo)
        self.ledger = Ledger(journals, self.disk_blocks, port.sums)
        undo.callback(self.ledger.close)
        port.forget = self.ledger.forget
        if cache.ssd_scrub_mb_per_s:
            rate = cache.ssd_scrub_mb_per_s * MB
            self.scrubber = Scrubber(files, port.sums, self.ledger, rate)
            undo.callback(self.scrubber.close)

    def _superblock(self) -> Superblock:
        cache, sizes = self._cache, self._sizes
        secret = cache.key_secret.get_secret_value()
        return Superblock(
            FORMAT_VERSION,
            blocks_are(self._model, cache.tokens_per_block, secret),
            sizes.block_stride_bytes,
            sizes.max_file_blocks,
        )

    def device(
        self, kv_caches: Mapping[str, Any] | Sequence[Any], layout: str | None, tp_rank: int
    ) -> Device:
        """Open the port to a rank's per-layer tensors, in CPU memory or on a CUDA device.

        Raises:
            ConfigError: the tensors do not fit the model, or their layout is ambiguous.
            BackendUnavailableError: no adapter, or no driver, for where they are.
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
            sums=self._sums if self._model.parts == 1 else None,
        )
        return Device(port, pages.num_blocks, pages.name, order=pages.order)

    def _cuda(
        self, ordinal: int, pages: PagedLayout, tensors: Sequence[Any], tp_rank: int
    ) -> CudaDevicePort:
        log.warning(
            "the CUDA device has run on no GPU yet: check what it gives before relying on it"
        )
        cache = self._cache
        wishes = (
            Wish(cache.use_ce_transfer_d2h, cache.transfer_num_cta_d2h),
            Wish(cache.use_ce_transfer_h2d, cache.transfer_num_cta_h2d),
        )
        driver = BoundDriver(ordinal)
        port = CudaDevicePort(pages, self._pinned, tuple(tensors), driver, wishes)
        port.rank = tp_rank
        return port

    def resumed(
        self,
        device: Device,
        kv_caches: Mapping[str, Any] | Sequence[Any],
        layout: str | None,
        tp_rank: int,
    ) -> Device:
        """Let a suspended device's port take KV caches again.

        Raises:
            ConfigError: the tensors do not fit, or are on another device.
            DeviceError: the driver refused.
        """
        tensors = kv_cache_list(kv_caches)
        if (place := device_of(tensors)) != device.place:
            where, before = (":".join(map(str, each)) for each in (place, device.place))
            raise ConfigError("kv_caches", where, f"must be where they were: on {before}")
        pages = self.pages_of(tensors, layout, tp_rank)
        if pages.order != device.order:
            why = f"must lie as they did: {device.order}"
            raise ConfigError("kv_caches", f"blocks of {pages.order}", why)
        device.port.resume(pages, tuple(tensors))
        return Device(device.port, pages.num_blocks, pages.name, place, pages.order)

    def joined(self, devices: Sequence[Device]) -> TransferPort:
        """Give one port over the devices of all ranks, which keeps the sums that the SSD needs."""
        # A CPU device that brings whole blocks has summed them as it copied.
        summed = self._model.parts == 1 and {each.place[0] for each in devices} == {"cpu"}
        return self.summed(self._over_ranks(devices), summed)

    def summed(self, port: TransferPort, has_summed: bool = False) -> TransferPort:
        """Give a port that keeps the sums that the SSD needs, if there is one."""
        if self._sums is None:
            return port
        return SummedPort(port, PoolSummer(self._arena, sums=self._sums), has_summed)

    def _over_ranks(self, devices: Sequence[Device]) -> TransferPort:
        port: TransferPort = devices[0].port
        if len(devices) > 1:
            parts: list[list[DevicePort]] = [[] for _ in range(self._model.parts)]
            for rank, device in enumerate(devices):
                parts[self._model.part_of(rank).number].append(device.port)
            port = RanksPort(parts, self._arena.num_blocks)
        return port

    def pages_of(self, tensors: Sequence[Any], layout: str | None, tp_rank: int) -> PagedLayout:
        """Give where a rank's blocks are in its tensors.

        Raises:
            ConfigError: the tensors do not fit the model, or their layout is ambiguous.
        """
        model = self._model
        if len(tensors) != model.num_layers:
            why = f"must have one tensor per layer: {model.num_layers}"
            raise ConfigError("kv_caches", f"{len(tensors)} tensors", why)
        specs = [describe(tensor, f"kv_caches[{i}]") for i, tensor in enumerate(tensors)]
        shapes = model.shapes(self._cache.tokens_per_block)
        return infer_layout(specs, shapes, layout, model.part_of(tp_rank))
