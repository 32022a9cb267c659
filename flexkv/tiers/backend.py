"""Opens what an engine runs on: host memory, the disk port, and a port to each device.

`LocalBackend` opens the adapters of this machine. `flexkv.testing` has a backend over fakes, so
that the whole engine, actors included, runs in a simulation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from flexkv.common.config import MB, CacheConfig, CacheSizes, ModelConfig
from flexkv.common.errors import ConfigError
from flexkv.common.layout import Order, PagedLayout, infer_layout
from flexkv.common.terms import Tier
from flexkv.index.keys import block_identity
from flexkv.io.checksums.summed import SummedPort
from flexkv.io.checksums.sums import PoolChecksummer, Sums
from flexkv.io.cuda.choice import CopyPreference
from flexkv.io.cuda.driver import BoundDriver, why_no_gds
from flexkv.io.cuda.pinned import Pinned
from flexkv.io.cuda.port import CudaDevicePort
from flexkv.io.device.cpu import CpuDevicePort
from flexkv.io.device.ranks import RanksPort
from flexkv.io.device.tensors import check_dtype, describe, device_of, kv_cache_list
from flexkv.io.memory.arena import Arena, check_memory
from flexkv.io.ports import DevicePort, DurablePort, TransferPort
from flexkv.io.ssd import missed_clears
from flexkv.io.ssd.files import FileOptions
from flexkv.io.ssd.open import (
    SsdRequest,
    TakenSsd,
    distinct,
    open_ssd,
    refuse,
    take_ssd,
)
from flexkv.io.ssd.superblock import FORMAT_VERSION, Superblock
from flexkv.io.ssd.uring import RingOptions
from flexkv.observe.logs import get_logger
from flexkv.process.stoppable import no_pause, run_stoppable
from flexkv.tiers.ledger import Ledger
from flexkv.tiers.limits import memory_named
from flexkv.tiers.presence import Presence
from flexkv.tiers.scrub import Scrubber
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
    disk: DurablePort | None
    disk_blocks: int
    ledger: Ledger | None
    """Makes the SSD tier survive a restart; None if nothing does."""
    scrubber: Scrubber | None
    """Checks the blocks of the SSD tier in idle time; None if nothing does."""
    presence: Presence | None
    """Checks that the files of the SSD tier are in place; None if nothing does."""
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
        self.disk: DurablePort | None = None
        self.disk_blocks = 0
        self.ledger: Ledger | None = None
        self.scrubber: Scrubber | None = None
        self.presence: Presence | None = None
        self.unavailable = Unavailable()
        self._model, self._cache, self._sizes = model, cache, sizes
        self._sums: Sums | None = None
        self._taken: TakenSsd | None = None
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
            options = FileOptions(cache.ssd_preallocate, sizes.disk_given, reserved_bytes, pause)
            self._take_ssd(distinct(cache.ssd_cache_dir), options, undo)

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

    def _take_ssd(
        self, directories: tuple[Path, ...], options: FileOptions, undo: ExitStack
    ) -> None:
        cache, sizes, superblock = self._cache, self._sizes, self._superblock()
        if cache.ssd_on_mismatch == "refuse":
            refuse(directories, superblock)
        wish = SsdRequest(
            directories,
            sizes.num_disk_blocks,
            superblock,
            options,
            keeps_journal=cache.ssd_warm_restart,
            is_strict=cache.strict,
        )
        self._taken = take_ssd(wish, self.unavailable.lose_directory, undo)
        if self._taken is None:
            faults = "; ".join(f"{at}: {why}" for at, why in self.unavailable.directories.items())
            self.unavailable.lose_tier(Tier.DISK, f"none of its directories can be used: {faults}")

    def open(self, undo: ExitStack, progress: Progress | None) -> None:
        """Open the adapters over memory and files; acquire those first if `take` did not.

        Raises:
            ConfigError: memory, a directory or disk space is missing.
        """
        if not self._has_taken:
            self._take(undo, progress)
        if self._cache.enable_gds:
            log.warning(
                "gds_not_used", reason=why_no_gds(), instead="SSD blocks go through the host"
            )
        self._pinned = Pinned(self._arena)
        self.host = self._arena.backing
        if self._taken is not None:
            with memory_named(self._sizes):
                self._open_ssd(self._taken, undo)
        if not self._model.model_id and (self.shared or self.ledger is not None):
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

    @property
    def arena(self) -> Arena:
        """Return the host memory."""
        return self._arena

    def _open_ssd(self, taken: TakenSsd, undo: ExitStack) -> None:
        cache, files = self._cache, taken.files
        self.disk_blocks = files.num_blocks
        options = RingOptions(entries=cache.iouring_entries, flags=cache.iouring_flags)
        summer = PoolChecksummer(self._arena)
        self._sums = summer.sums
        port = self.disk = open_ssd(self._arena, files, options, summer, undo)
        if taken.journals is not None:
            self.ledger = Ledger(taken.journals, self.disk_blocks, port.sums)
            if self.unavailable.directories:
                self.ledger.note_missed = partial(missed_clears.note, files.folders)
            undo.callback(self.ledger.close)
            port.forget = self.ledger.forget
            if cache.ssd_scrub_mb_per_s:
                rate = cache.ssd_scrub_mb_per_s * MB
                self.scrubber = Scrubber(files, port.sums, self.ledger, rate)
                undo.callback(self.scrubber.close)
        self.presence = Presence(files, self.ledger, self.unavailable)
        undo.callback(self.presence.close)

    def _superblock(self) -> Superblock:
        cache, sizes = self._cache, self._sizes
        secret = cache.key_secret.get_secret_value()
        return Superblock(
            FORMAT_VERSION,
            block_identity(self._model, cache.tokens_per_block, secret),
            sizes.block_stride_bytes,
            sizes.max_file_blocks,
        )

    def device(
        self, kv_caches: Mapping[str, Any] | Sequence[Any], layout: str | None, tp_rank: int
    ) -> Device:
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
            sums=self._sums if self._model.parts == 1 else None,
        )
        return Device(port, pages.num_blocks, pages.name, order=pages.order)

    def _cuda(
        self, ordinal: int, pages: PagedLayout, tensors: Sequence[Any], tp_rank: int
    ) -> CudaDevicePort:
        cache = self._cache
        wishes = (
            CopyPreference(cache.use_ce_transfer_d2h, cache.transfer_num_cta_d2h),
            CopyPreference(cache.use_ce_transfer_h2d, cache.transfer_num_cta_h2d),
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
        """Return a suspended device with its port open to KV caches again.

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
        """Return one port over the devices of all ranks that keeps the sums for the SSD tier."""
        # A CPU device that copies whole blocks sums them as it copies.
        summed = self._model.parts == 1 and {each.place[0] for each in devices} == {"cpu"}
        return self.summed(self._over_ranks(devices), summed)

    def summed(self, port: TransferPort, has_summed: bool = False) -> TransferPort:
        """Return a port that also keeps the sums for the SSD tier, if there is one."""
        if self._sums is None:
            return port
        return SummedPort(port, PoolChecksummer(self._arena, sums=self._sums), has_summed)

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
            why = f"must have one tensor per layer: {model.num_layers}"
            raise ConfigError("kv_caches", f"{len(tensors)} tensors", why)
        fields = [f"kv_caches[{i}]" for i in range(len(tensors))]
        specs = [describe(*each) for each in zip(tensors, fields, strict=True)]
        for each in zip(tensors, model.dtypes, fields, strict=True):
            check_dtype(*each)
        shapes = model.shapes(self._cache.tokens_per_block)
        return infer_layout(specs, shapes, layout, model.part_of(tp_rank))
