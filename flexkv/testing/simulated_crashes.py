"""Crashes of a simulated life, and what its SSD tier must still have after one."""

from __future__ import annotations

from itertools import takewhile
from random import Random

import numpy as np
from numpy.typing import NDArray

from flexkv.common.request import Operation
from flexkv.common.terms import BLOCK_KEY_BYTES, BlockKey, Tier
from flexkv.engine.durability import FlushReport
from flexkv.engine.engine import Engine
from flexkv.index.keys import block_keys
from flexkv.testing.fake_backend import CrashState, FakeBackend
from flexkv.testing.simulated_contents import generation_of
from flexkv.testing.simulated_groups import SimulatedGroups


class Survival:
    """Lets one life crash before a step of the disk or a journal, and checks what survives.

    Attributes:
        remains: what the next life begins with; None until then, and without an SSD tier.
        is_sound: whether no bit flips.
        is_faultless: whether nothing fails, either.
        is_trusted: whether journals must be right as long as power is not lost.
        generation: of what is computed now; a clear of everything begins the next one.
        oldest: the oldest generation of which blocks may still be there.
    """

    def __init__(
        self, random: Random, engine: Engine, backend: FakeBackend, remains: CrashState
    ) -> None:
        """Begin with what the life before has left."""
        self._random, self._engine, self._backend = random, engine, backend
        self._begun_with = remains
        self.is_sound = not backend.faults.flip_probability
        self.is_faultless = self.is_sound and not backend.faults.failure_probability
        self.is_trusted = remains.is_trusted and self.is_faultless
        self.generation, self.oldest = remains.generation, remains.oldest
        self._oldest_after_crash = remains.oldest
        self.remains: CrashState | None = None
        self._ios = self._clears = 0
        self._power_loss = random.random() < 0.5
        self._crash_at = random.choice([0, random.randint(1, 10), random.randint(1, 60)])
        self._counts = random.random() < (0.2 if self._power_loss else 0.7)
        """Whether steps count towards the crash: from the start, or only after the first flush."""
        self._flushed: dict[tuple[bytes, int], int] = {}
        """Key and place of each block that must survive a crash, and the writes begun by then."""
        self._syncing: dict[tuple[bytes, int], int] = {}
        self._synced: dict[tuple[bytes, int], int] = {}
        """What was on SSD when the last sync began, and the last that has succeeded."""
        self._keys_syncing: set[bytes] = set()
        self._keys_synced: set[bytes] = set()
        """The same as keys, with blocks of earlier lives that may be wrong."""

    def watch(self) -> None:
        """Begin to watch what the tiers of an open engine do."""
        backend = self._backend
        for files in backend.files:
            files.faulty, files.on_io = True, self._on_io
        if backend.port is not None:
            backend.port.on_io = self._on_io
        if backend.ledger is not None:
            backend.ledger.on_sync, backend.ledger.on_synced = self._on_sync, self._on_synced

    # -- crashes --------------------------------------------------------------------------------

    def _on_io(self) -> None:
        """Count a step of the disk or a journal; before one of them, record what a crash leaves."""
        self._ios += self._counts
        if self._ios == self._crash_at and self.remains is None and self._counts:
            self.remains = self._crash(self._power_loss)

    def end(self) -> None:
        """Record what the end of the life leaves, unless it has crashed."""
        port = self._backend.port
        if self.remains is None and port is not None:
            if self.is_faultless:
                self._flushed = dict.fromkeys(self._on_disk(), len(port.touched))
                self._oldest_after_crash = self.oldest
            self.remains = self._crash(power_loss=False)

    def _crash(self, power_loss: bool) -> CrashState:
        port, random = self._backend.port, self._random
        assert port is not None
        last_touched = {at: number for number, at in enumerate(port.touched)}
        flushed = {
            (key, at)
            for key, at in self._flushed.keys() & self._on_disk()
            if last_touched.get(at, -1) < self._flushed[key, at]
        }
        return CrashState(
            port.remains(random, power_loss),
            [files.remains(random, power_loss) for files in self._backend.files],
            flushed,
            self.is_trusted and not power_loss,
            self._oldest_after_crash,
            self.generation,
        )

    # -- what is there --------------------------------------------------------------------------

    def _on_disk(self, all_of_it: bool = False) -> set[tuple[bytes, int]]:
        """Return key and place of blocks on SSD that are right; `all_of_it`: even if bits flip."""
        port = self._backend.port
        if port is None or not ((self.is_sound or all_of_it) and self._backend.files):
            return set()
        # Blocks that an earlier life left may be wrong, unless that life was to be trusted.
        places = sorted(set(port.touched))
        if self._begun_with.is_trusted:
            places = list(range(len(self._begun_with.store)))
        if not places:
            return set()
        exported = self._engine.residency.export(Tier.DISK, np.array(places, np.int64))
        pairs = zip(exported, places, strict=True)
        return {(record[:BLOCK_KEY_BYTES].tobytes(), at) for record, at in pairs if record.any()}

    def _keys_in(self, tier: Tier) -> set[bytes]:
        """Return the keys of the blocks that are READY in a tier."""
        blocks = {Tier.HOST: len(self._backend.memory), Tier.DISK: len(self._begun_with.store)}
        if tier not in self._engine.residency.tiers:
            return set()
        exported = self._engine.residency.export(tier, np.arange(blocks[tier]))
        return {record[:BLOCK_KEY_BYTES].tobytes() for record in exported if record.any()}

    # -- flushes and clears ---------------------------------------------------------------------

    def _on_sync(self) -> None:
        """Note what is on SSD when a sync begins: it has to be safe once the sync has succeeded."""
        port = self._backend.port
        assert port is not None
        self._syncing = dict.fromkeys(self._on_disk(), len(port.touched))
        self._keys_syncing = self._keys_in(Tier.DISK)

    def _on_synced(self) -> None:
        """Note that what was on SSD when the sync began is safe."""
        self._synced, self._keys_synced = self._syncing, self._keys_syncing

    def about_to_clear(self, everything: bool) -> None:
        """Expect nothing of what was flushed to survive the clear that follows."""
        self._flushed, self._clears = {}, self._clears + 1
        if everything:
            self.generation += 1
            self.oldest = self.generation

    async def flushed(self) -> FlushReport:
        """Flush; check that what is not safe then is reported, and return the report.

        Raises:
            TransferError: a write or the sync failed.
        """
        port, clears, in_host = self._backend.port, self._clears, self._keys_in(Tier.HOST)
        report = await self._engine.flush()
        if clears != self._clears or port is None:
            return report
        self._counts = True
        if self.is_faultless:
            self._oldest_after_crash = self.oldest
        on_disk = self._keys_in(Tier.DISK)
        if self._backend.files:
            self._flushed = self._synced
            on_disk &= self._keys_synced
        unsafe = in_host & self._keys_in(Tier.HOST) - on_disk
        assert len(unsafe) <= report.lacking_blocks.get(Tier.DISK.label, 0), (
            "a flush returned before all was written, and does not report it"
        )
        return report

    # -- checks ---------------------------------------------------------------------------------

    def check_restored(self, prompts: list[list[int]], groups: SimulatedGroups) -> None:
        """Check that flushed blocks are there, up to the first of a prompt that was not flushed."""
        begun_with, engine = self._begun_with, self._engine
        if begun_with.is_trusted and self._backend.files:
            for key, at in self._on_disk(all_of_it=True):
                assert self.is_right(key, begun_with.store[at]), (
                    "a journal names a block that is not there, or was cleared durably"
                )
        kept = [(key, at) for key, at in begun_with.flushed if at < len(begun_with.store)]
        for key, at in kept:
            assert self.is_right(key, begun_with.store[at]), "a flushed block was not synced"
        there = {key for key, _ in kept}
        for prompt in prompts:
            request = engine.requests.intake(Operation.PREFETCH, prompt)
            wanted = list(takewhile(there.__contains__, block_keys(request.keys)))
            found = engine.residency.find(request.keys).chain
            assert found >= len(wanted), f"{len(wanted) - found} flushed blocks are lost"
            leaves = set(groups.leaves_of(request.keys, len(wanted))) & there
            left = {key for _, key in groups.there(engine.residency, request.keys)}
            assert leaves <= left, f"{len(leaves - left)} flushed leaves are lost"

    def is_right(
        self, key: BlockKey, content: NDArray[np.uint8], oldest: int | None = None
    ) -> bool:
        """Return whether a block may have these bytes, uint8[16].

        A request may be served what was there when it began: `oldest` is that of then.
        """
        generation, oldest = generation_of(key, content), self.oldest if oldest is None else oldest
        return generation is not None and oldest <= generation <= self.generation

    def check_bytes(self) -> None:
        """Check the bytes of all blocks of host memory, and of those that are held far."""
        memory = self._backend.memory
        exported = self._engine.residency.export(Tier.HOST, np.arange(len(memory)))
        for record, content in zip(exported, memory, strict=True):
            if record.any():
                key = record[:BLOCK_KEY_BYTES].tobytes()
                assert self.is_right(key, content), "host memory has wrong bytes"
        if (far := self._backend.far) is None:
            return
        for key in far.held:
            content = far.content(key)
            is_damaged = generation_of(key, content) is None
            assert is_damaged or self.is_right(key, content), "a store got what was cleared"
