"""A backend without hardware: host memory, disk and device as arrays behind fake ports."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flexkv.actors.checks import BlockChecks, KeptSums
from flexkv.actors.write_behind import ShipLimits
from flexkv.common.config import CacheConfig
from flexkv.common.terms import BLOCK_KEY_BYTES, BlockIds, Tier
from flexkv.index.catalogue import NOTHING_IS_FAR, Catalogue
from flexkv.io.ssd.journal import Journal
from flexkv.testing.fake_far import FakeFar, FarPort
from flexkv.testing.fakes import FakeChecksummer, FakePort
from flexkv.testing.faults import FaultPlan
from flexkv.testing.lossy_files import LossyFiles
from flexkv.testing.virtual_time import VirtualThread
from flexkv.tiers.backend import Device, JoinedDevices, Progress
from flexkv.tiers.ledger import Ledger
from flexkv.tiers.limits import disk_windows
from flexkv.tiers.parts import TierHooks, TierParts, Work
from flexkv.tiers.unavailable import Unavailable


def empty(disk_blocks: int, journals: int = 0) -> CrashState:
    """Return what the first life of an SSD tier begins with."""
    store = np.zeros((disk_blocks, BLOCK_KEY_BYTES), np.uint8)
    return CrashState(store, [{} for _ in range(journals)], set(), True)


class CrashState(NamedTuple):
    """What a crash or a clean end leaves of an SSD tier."""

    store: NDArray[np.uint8]
    journals: list[dict[str, bytes]]
    flushed: set[tuple[bytes, int]]
    """Keys and places of the blocks that must have survived."""
    is_trusted: bool
    """Whether journals must be right: nothing failed, no bit flipped, power was never lost."""
    oldest: int = 0
    """The oldest generation of which blocks may be left: later ones were not cleared durably."""
    generation: int = 0
    """The generation of what was computed last: see `simulated_contents`."""


class WatchedLedger(Ledger):
    """A ledger that says when its tier begins to sync, and when blocks and journals are synced."""

    on_sync: Callable[[], None] = staticmethod(lambda: None)
    on_synced: Callable[[], None] = staticmethod(lambda: None)

    def begin_sync(self) -> BlockIds:
        """Call `on_sync`, and begin."""
        self.on_sync()
        return super().begin_sync()

    async def flush(self) -> None:
        """Flush, and call `on_synced`."""
        await super().flush()
        self.on_synced()


class FakeBackend:
    """Host memory, disk and device as plain arrays behind fake ports; journals in lossy files.

    Attributes:
        memory: uint8[host blocks, 16], host memory.
        faults: of the disk, its journals and the far tier.
        far: what is far; None without a far tier.
        windows: bounds on the bytes in flight from the disk, and to it; may be set before `open`.
        ship: how the far tier is written to, which may be set before `open`; None: only read.
    """

    def __init__(
        self,
        host_blocks: int,
        faults: FaultPlan,
        remains: CrashState,
        device_faults: FaultPlan | None = None,
        far: FakeFar | None = None,
    ) -> None:
        """Take the faults of the disk, those of the device if they differ, and what is far."""
        self.host, self.ranks = "fake", 1
        self.catalogue: Catalogue = far or NOTHING_IS_FAR
        self.far_port: FarPort | None = None
        self.far = far
        self._device_faults = device_faults or faults
        self.ledger: WatchedLedger | None = None
        self.windows = disk_windows(CacheConfig())
        self.ship: ShipLimits | None = None
        self._tiers: list[TierParts] = []
        self.unavailable = Unavailable()
        self.port: FakePort | None = None
        self.files = [LossyFiles(faults, contents) for contents in remains.journals]
        self.faults = faults
        self._sums: NDArray[np.uint64] | None = None
        self.memory = np.zeros((host_blocks, BLOCK_KEY_BYTES), np.uint8)
        self._store = remains.store

    async def take(self, undo: ExitStack, progress: Progress | None) -> None:
        """Do nothing: the arrays exist already."""

    def open(self, undo: ExitStack, progress: Progress | None) -> None:
        """Open the disk port and its journals, and the far tier."""
        if len(self._store):
            self._tiers.append(self._open_disk(undo))
        if self.far is not None:
            port = FarPort(self.far, self.memory, self.faults, self._sums)
            undo.callback(port.close)
            self._tiers.append(self._far_parts(self.far, port))
            self.far_port = port

    def _far_parts(self, far: FakeFar, port: FarPort) -> TierParts:
        inbound, outbound = self.windows
        span_bytes = far.span_blocks * BLOCK_KEY_BYTES
        piece_bytes_max = max(outbound.piece_bytes_max, span_bytes)
        # A pace could cut a span in two.
        inbound = inbound._replace(is_paced=False)
        outbound = outbound._replace(piece_bytes_max=piece_bytes_max, is_paced=False)
        return TierParts(far.tier, None, port, inbound, outbound, ship=self.ship)

    def _open_disk(self, undo: ExitStack) -> TierParts:
        disk_blocks = len(self._store)
        self.port = FakePort(self._store, self.memory, self.faults, BLOCK_KEY_BYTES)
        checksummer = FakeChecksummer(self.memory, self.faults)
        self._sums = checksummer.sums
        kept = KeptSums(disk_blocks, lambda block: ("fake", block))
        undo.callback(self.port.close)
        if self.files:
            self.ledger = WatchedLedger(
                [Journal(Path("fake"), files) for files in self.files],
                disk_blocks,
                kept.sums,
                lambda _: VirtualThread(self.faults.delay_s),
            )
            self.ledger.journal_bytes_min, self.ledger.snapshot_blocks = 300, 4
            undo.callback(self.ledger.close)
            kept.forget = self.ledger.forget
        return TierParts(
            Tier.DISK, disk_blocks, self.port, *self.windows, self.ledger, work=self._work,
            checks=BlockChecks(checksummer, kept),
        )  # fmt: skip

    def _work(self, hooks: TierHooks) -> Work:
        return {} if self.ledger is None else {"ledger": self.ledger.run()}

    def tiers(self) -> Sequence[TierParts]:
        """Return the fake disk, if it has blocks, and the far tier, if there is one."""
        return self._tiers

    def device(self, kv_caches: Any, layout: str | None, tp_rank: int) -> Device:
        """Open a port to the one array of `kv_caches`, uint8[blocks, 16]."""
        (store,) = kv_caches
        faults = self._device_faults
        port = FakePort(store, self.memory, faults, BLOCK_KEY_BYTES, sums=self._sums)
        return Device(port, "fake")

    def resumed(self, device: Device, kv_caches: Any, layout: str | None, tp_rank: int) -> Device:
        """Resume the port of a device, and return the device."""
        assert isinstance(device.port, FakePort)
        device.port.resume(layout, kv_caches)
        return device

    def joined(self, devices: Sequence[Device]) -> JoinedDevices:
        """Return the one device's port, and what sums the blocks that arrive layer by layer."""
        if self._sums is None:
            return JoinedDevices(devices[0].port, None)
        checksummer = FakeChecksummer(self.memory, self.faults, self._sums)
        return JoinedDevices(devices[0].port, BlockChecks(checksummer, port_sums=True))
