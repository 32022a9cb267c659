"""Opens what an engine runs on: host memory, the tiers below it, and a port to each device.

`LocalBackend` opens the adapters of this machine. `flexkv.testing` has a backend over fakes, so
that the whole engine, actors included, runs in a simulation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol

import numpy as np

from flexkv.actors.checks import BlockChecks
from flexkv.common.config import CacheConfig, CacheSizes
from flexkv.common.errors import ConfigError
from flexkv.common.layout import Order, PagedLayout, order_of
from flexkv.index.catalogue import NOTHING_IS_FAR, Catalogue
from flexkv.index.hints import HintedCatalogue
from flexkv.io.checksums.sums import PoolChecksummer
from flexkv.io.cuda.choice import CopyPreference
from flexkv.io.cuda.driver import BoundDriver, why_no_gds
from flexkv.io.cuda.pinned import Pinned
from flexkv.io.cuda.port import CudaDevicePort
from flexkv.io.device.cpu import CpuDevicePort
from flexkv.io.device.ranks import RanksPort
from flexkv.io.device.tensors import KVCaches, device_of, kv_cache_list, layouts_of
from flexkv.io.memory.arena import Arena, check_memory
from flexkv.io.ports import DevicePort, Sums, TransferPort
from flexkv.observe.logs import get_logger
from flexkv.process.stoppable import no_pause, run_stoppable
from flexkv.tiers.far import hints_of
from flexkv.tiers.limits import memory_error_named
from flexkv.tiers.parts import TierParts
from flexkv.tiers.peer import PeerTier
from flexkv.tiers.peer_transport import lends_memory
from flexkv.tiers.remote import RemoteTier
from flexkv.tiers.ssd import SsdTier
from flexkv.tiers.unavailable import Unavailable

log = get_logger(__name__)

Progress = Callable[[int, int], None]


class Device(NamedTuple):
    """A registered device: the port to its blocks, their layout, and where it is."""

    port: DevicePort
    layout: str
    place: tuple[str, int] = ("cpu", 0)
    order: Order = ""

    @property
    def facts(self) -> dict[str, object]:
        """Return what the log says about the device. Agents log about their own devices."""
        kind, number = self.place
        if kind == "agents":
            return {"device": kind, "layout": self.layout}
        return {"device": f"{kind}:{number}", "layout": self.layout, "blocks": self.port.num_blocks}


class JoinedDevices(NamedTuple):
    """One port over the devices of all ranks, and what sums the blocks that it brings."""

    port: TransferPort
    checks: BlockChecks | None
    """None if no tier needs the sums."""


class Backend(Protocol):
    """Opens the adapters of one engine."""

    host: str
    """The kind of memory that holds the host blocks."""
    unavailable: Unavailable
    """The configured tiers and directories that the engine goes on without."""
    ranks: int
    """The number of devices that must be registered before requests are accepted."""
    catalogue: Catalogue
    """What its far tiers are said to have."""

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

    def joined(self, devices: Sequence[Device]) -> JoinedDevices:
        """Return one port over the devices of all ranks, which come in rank order."""
        ...


class LocalBackend:
    """The adapters of this machine: an arena, SSD files over io_uring, KV caches on CPU or GPU."""

    shared = False
    """Whether other processes map the host memory."""
    catalogue: Catalogue = NOTHING_IS_FAR

    def __init__(self, cache: CacheConfig, sizes: CacheSizes) -> None:
        self.space = sizes.spaces[0]
        self.ranks = self.space.ranks
        self.host = ""
        self.unavailable = Unavailable()
        self.ssd = SsdTier(cache, sizes, self.unavailable)
        self.hints = hints_of(cache, sizes)
        self.remote = RemoteTier(cache, sizes, self.unavailable, self.hints)
        self.peers = PeerTier(cache, sizes, self.unavailable, self.hints, self.remote)
        self._openers = [self.ssd.open, self.peers.open, self.remote.open]
        """Open one tier each, the nearest first; they share the sums of host memory."""
        self._tiers: list[TierParts] = []
        self._sums: Sums | None = None
        self._cache, self._sizes = cache, sizes
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
            shared=self.shared or lends_memory(cache),
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
            self._tiers, sums = [], np.zeros(self._sizes.num_host_blocks, np.uint64)
            for open_tier in self._openers:
                parts = open_tier(self._arena, sums, undo)
                self._tiers += [] if parts is None else [parts]
        self._sums = sums if self._tiers else None
        if self.remote.catalogue is not NOTHING_IS_FAR:
            self.catalogue = self.remote.catalogue
        elif self.hints is not None:
            self.catalogue = HintedCatalogue(self.hints)
        outlives = any(parts.persistence is not None for parts in self._tiers)
        if not self.space.facts["model_id"] and (self.shared or outlives):
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
    def sums(self) -> Sums | None:
        """Return the sums of host memory, which all tiers share: uint64[blocks]; None without."""
        return self._sums

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
        layouts = layouts_of(self._sizes.spaces, tensors, layout, tp_rank)
        names, order = _names_of(layouts), order_of(layouts)
        if kind == "cuda":
            port: DevicePort = self._cuda(ordinal, layouts, tensors, tp_rank)
            return Device(port, names, (kind, ordinal), order)
        port = CpuDevicePort(
            layouts,
            self._arena,
            owner=tuple(tensors),
            threads=self._cache.copy_threads or min(4, os.cpu_count() or 1),
            sums=self.sums if self._has_whole_blocks else None,
        )
        return Device(port, names, order=order)

    @property
    def _has_whole_blocks(self) -> bool:
        """Return whether each rank's device has whole blocks, of all KV groups."""
        return all(space.parts == 1 for space in self._sizes.spaces)

    def _cuda(
        self, ordinal: int, layouts: Sequence[PagedLayout], tensors: Sequence[Any], tp_rank: int
    ) -> CudaDevicePort:
        cache = self._cache
        preferences = (
            CopyPreference(cache.use_ce_transfer_d2h, cache.transfer_num_cta_d2h),
            CopyPreference(cache.use_ce_transfer_h2d, cache.transfer_num_cta_h2d),
        )
        driver = BoundDriver(ordinal)
        port = CudaDevicePort(layouts, self._pinned, tuple(tensors), driver, preferences)
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
        layouts = layouts_of(self._sizes.spaces, tensors, layout, tp_rank)
        if (order := order_of(layouts)) != device.order:
            why = f"must have the same element order as before: {device.order}"
            raise ConfigError("kv_caches", f"element order {order}", why)
        device.port.resume(layouts, tuple(tensors))
        return device._replace(layout=_names_of(layouts))

    def joined(self, devices: Sequence[Device]) -> JoinedDevices:
        """Return one port over the devices of all ranks, with the sums that the tiers need."""
        port, sums = self._over_ranks(devices), self.sums
        if sums is None:
            return JoinedDevices(port, None)
        # A CPU device that copies whole blocks sums them as it copies.
        port_sums = self._has_whole_blocks and {each.place[0] for each in devices} == {"cpu"}
        checksummer = PoolChecksummer(self._arena, sums=sums, block_bytes=self._sizes.block_bytes)
        return JoinedDevices(port, BlockChecks(checksummer, port_sums=port_sums))

    def _over_ranks(self, devices: Sequence[Device]) -> TransferPort:
        if len(devices) == 1:
            return devices[0].port
        ports = [device.port for device in devices]
        return RanksPort(ports, self._sizes.spaces, self._arena.num_blocks)


def _names_of(layouts: Sequence[PagedLayout]) -> str:
    """Return the names of the layouts of all KV groups, each once."""
    return "+".join(dict.fromkeys(layout.name for layout in layouts))
