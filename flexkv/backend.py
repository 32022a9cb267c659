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
from flexkv.common.layout import PagedLayout, infer_layout
from flexkv.index.keys import blocks_are
from flexkv.io.arena import Arena
from flexkv.io.cpu import CpuDevicePort
from flexkv.io.files import StripedFiles
from flexkv.io.ports import DurablePort, TransferPort
from flexkv.io.ssd import forget_earlier, open_journals, open_ssd, present, refuse
from flexkv.io.sums import PoolSummer, Sums
from flexkv.io.superblock import FORMAT_VERSION, Superblock
from flexkv.io.tensors import describe, kv_cache_list
from flexkv.io.uring import RingOptions
from flexkv.ledger import Ledger
from flexkv.scrub import Scrubber

Progress = Callable[[int, int], None]


class Device(NamedTuple):
    """A registered device: the port to its blocks, how many there are, how they lie."""

    port: TransferPort
    num_blocks: int
    layout: str


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

    def open(self, undo: ExitStack, progress: Progress | None) -> None:
        """Take memory and files; `undo` gets what releases them."""
        ...

    def device(self, kv_caches: Any, layout: str | None) -> Device:
        """Open the port to a device's KV caches."""
        ...


class LocalBackend:
    """The adapters of this machine: an arena, SSD files over io_uring, KV caches in CPU memory."""

    def __init__(self, model: ModelConfig, cache: CacheConfig, sizes: CacheSizes) -> None:
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
        self._arena = Arena.open(
            sizes.num_host_blocks,
            sizes.block_stride_bytes,
            cache.hugepage_size_bytes if cache.use_hugepage_cpu_buffer else None,
            shared=False,
            progress=progress,
        )
        undo.callback(self._arena.close)
        self.host = self._arena.backing
        if sizes.num_disk_blocks and (folders := present(map(Path, cache.ssd_cache_dir))):
            self._open_ssd(folders, undo)

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
            forget_earlier(folders)
            return
        journals = open_journals(folders, self._superblock(), undo)
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

    def device(self, kv_caches: Mapping[str, Any] | Sequence[Any], layout: str | None) -> Device:
        """Open the port to per-layer tensors in CPU memory.

        Raises:
            ConfigError: the tensors do not fit the model, or their layout is ambiguous.
        """
        tensors = kv_cache_list(kv_caches)
        pages = self._pages(tensors, layout)
        port = CpuDevicePort(
            pages,
            self._arena,
            owner=tuple(tensors),
            threads=self._cache.copy_threads or min(4, os.cpu_count() or 1),
            sums=self._sums,
        )
        return Device(port, pages.num_blocks, pages.name)

    def _pages(self, tensors: Sequence[Any], layout: str | None) -> PagedLayout:
        model = self._model
        if len(tensors) != model.num_layers:
            why = f"must have one tensor per layer: {model.num_layers}"
            raise ConfigError("kv_caches", f"{len(tensors)} tensors", why)
        specs = [describe(tensor, f"kv_caches[{i}]") for i, tensor in enumerate(tensors)]
        pages = infer_layout(
            specs,
            self._cache.tokens_per_block,
            model.num_kv_heads,
            model.head_size,
            model.kv_dim,
            layout,
        )
        if pages.block_bytes != self._sizes.block_bytes:
            why = f"a block of this model has {self._sizes.block_bytes} bytes (dtype {model.dtype})"
            raise ConfigError("kv_caches", f"blocks of {pages.block_bytes} bytes", why)
        return pages
