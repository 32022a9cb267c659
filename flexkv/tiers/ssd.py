"""The SSD tier: takes its files, opens its adapters, and returns its parts."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from functools import partial
from typing import Any

from flexkv.actors.checks import BlockChecks, KeptSums
from flexkv.common.config import MB, CacheConfig, CacheSizes
from flexkv.common.terms import Tier
from flexkv.index.keys import block_identity
from flexkv.io.checksums.sums import PoolChecksummer
from flexkv.io.memory.arena import Arena
from flexkv.io.ports import Sums
from flexkv.io.ssd import missed_clears
from flexkv.io.ssd.adapter import open_disk
from flexkv.io.ssd.files import FileOptions
from flexkv.io.ssd.open import SsdRequest, TakenSsd, distinct, refuse, take_ssd
from flexkv.io.ssd.superblock import FORMAT_VERSION, Superblock
from flexkv.io.ssd.uring import RingOptions
from flexkv.tiers.ledger import Ledger
from flexkv.tiers.limits import disk_windows
from flexkv.tiers.parts import TierHooks, TierParts, Work
from flexkv.tiers.presence import Presence
from flexkv.tiers.scrub import Scrubber
from flexkv.tiers.unavailable import Unavailable


class SsdTier:
    """The SSD tier of one engine.

    Attributes:
        scrubber: reads the tier in idle time; None if nothing does.
        ledger: makes the tier survive; None if nothing does.
    """

    def __init__(self, cache: CacheConfig, sizes: CacheSizes, unavailable: Unavailable) -> None:
        """Take the configuration, and where to note what cannot be used."""
        self.scrubber: Scrubber | None = None
        self.ledger: Ledger | None = None
        self._presence: Presence | None = None
        self._cache, self._sizes = cache, sizes
        self._unavailable = unavailable
        self._taken: TakenSsd | None = None

    def take(self, reserved_bytes: int, pause: Callable[[], None], undo: ExitStack) -> None:
        """Take the files; a directory that cannot be used costs only its part of the tier.

        Args:
            reserved_bytes: memory that is about to be taken, which files in memory must leave.
            pause: called between steps; may raise to give up.
            undo: gets what releases the files.

        Raises:
            ConfigError: the files are of another model, or a directory must not be used.
        """
        cache, sizes, superblock = self._cache, self._sizes, self._superblock()
        directories = distinct(cache.ssd_cache_dir)
        if cache.ssd_on_mismatch == "refuse":
            refuse(directories, superblock)
        request = SsdRequest(
            directories,
            sizes.num_disk_blocks,
            superblock,
            FileOptions(cache.ssd_preallocate, sizes.disk_given, reserved_bytes, pause),
            keeps_journal=cache.ssd_warm_restart,
            is_strict=cache.strict,
        )
        self._taken = take_ssd(request, self._unavailable.lose_directory, undo)
        if self._taken is None:
            faults = "; ".join(f"{at}: {why}" for at, why in self._unavailable.directories.items())
            self._unavailable.lose_tier(Tier.DISK, f"none of its directories can be used: {faults}")

    def open(self, arena: Arena, sums: Sums, undo: ExitStack) -> TierParts | None:
        """Open the adapters over the files; return None if there are no files.

        Args:
            arena: the host memory.
            sums: of its blocks: uint64[blocks].
            undo: gets what releases the adapters.
        """
        if self._taken is None:
            return None
        cache, files = self._cache, self._taken.files
        options = RingOptions(entries=cache.iouring_entries, flags=cache.iouring_flags)
        block_bytes = self._sizes.block_bytes
        checksummer = PoolChecksummer(arena, sums=sums, block_bytes=block_bytes)
        kept = KeptSums(files.num_blocks, files.place_of)
        undo.callback(checksummer.close)
        port = open_disk(arena, files, options)
        undo.callback(port.close)
        if self._taken.journals is not None:
            ledger = self.ledger = Ledger(self._taken.journals, files.num_blocks, kept.sums)
            if self._unavailable.directories:
                ledger.note_missed = partial(missed_clears.note, files.folders)
            undo.callback(ledger.close)
            kept.forget = ledger.forget
            if cache.ssd_scrub_mb_per_s:
                rate = cache.ssd_scrub_mb_per_s * MB
                self.scrubber = Scrubber(files, kept.sums, ledger, rate, block_bytes)
                undo.callback(self.scrubber.close)
        presence = self._presence = Presence(files, self.ledger, self._unavailable)
        undo.callback(presence.close)
        return TierParts(
            Tier.DISK,
            files.num_blocks,
            port,
            *disk_windows(cache),
            self.ledger,
            presence,
            self._work,
            BlockChecks(checksummer, kept),
        )

    def _work(self, hooks: TierHooks) -> Work:
        work: dict[str, Coroutine[Any, Any, None]] = {}
        if self.ledger is not None:
            work["ledger"] = self.ledger.run()
        if self.scrubber is not None:
            work["scrub"] = self.scrubber.run(hooks.is_idle, hooks.drop_corrupt)
        if self._presence is not None:
            self._presence.on_lost = hooks.lose
            work["presence"] = self._presence.run()
        return work

    def _superblock(self) -> Superblock:
        cache, sizes = self._cache, self._sizes
        secret = cache.key_secret.get_secret_value()
        return Superblock(
            FORMAT_VERSION,
            block_identity(sizes.spaces, secret),
            sizes.block_stride_bytes,
            sizes.max_file_blocks,
            tuple(sizes.block_bytes),
        )
