"""Flushes blocks to stable storage, and reports those that could not be written."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
import numpy as np

from flexkv.actors.actor import Supervisor
from flexkv.actors.scheduler import Scheduler
from flexkv.actors.write_behind import WriteBehind
from flexkv.common.errors import (
    ClosedError,
    DeadlineError,
    FlexKVError,
    StorageError,
    TransferError,
)
from flexkv.common.terms import Route, Tier
from flexkv.observe.logs import get_logger
from flexkv.tiers.parts import TierParts
from flexkv.tiers.unavailable import Unavailable

log = get_logger(__name__)

NO_BLOCKS = np.zeros(0, np.int64)
SYNC_TIMEOUT_S = 60.0
"""How long a flush waits for the disk to sync, or `io_deadline_s` if that is longer."""


class FlushReport(msgspec.Struct, frozen=True):
    """What a flush left unwritten.

    Attributes:
        lacking_blocks: by tier name, how many blocks of host memory the tier lacks, because it has
            no free place for them, or refuses them as worth less than what it has. Blocks that
            were put during the flush may be among them.
        missing_tiers: by tier name, why a configured tier is not there. Nothing survives there.
        unused_directories: by path, why a directory of the SSD tier is not used. Blocks that were
            stored there earlier are not available now.
    """

    lacking_blocks: dict[str, int] = {}
    missing_tiers: dict[str, str] = {}
    unused_directories: dict[str, str] = {}

    def __repr__(self) -> str:
        lacks = [f"{tier} lacks {count} blocks" for tier, count in self.lacking_blocks.items()]
        return f"FlushReport({', '.join(lacks) or 'everything is written'})"


_FROM_DEVICE = str(Route(Tier.DEVICE, Tier.HOST))


class Durability:
    """Flushes what an engine holds, so that it survives the engine."""

    def __init__(
        self,
        scheduler: Scheduler,
        behind: WriteBehind,
        tiers: Sequence[TierParts],
        unavailable: Unavailable,
        supervisor: Supervisor,
        deadline_s: float,
    ) -> None:
        self._scheduler, self._supervisor = scheduler, supervisor
        self._tiers, self._unavailable = tiers, unavailable
        self._behind = behind
        self._sync_timeout_s = max(SYNC_TIMEOUT_S, deadline_s)
        self._syncing: asyncio.Task[FlexKVError | None] | None = None
        self._syncs = self._syncs_failed = 0
        self._sync_failure: FlexKVError | None = None
        self._is_closed = False

    async def flush(self) -> FlushReport:
        """Return once everything resident that was put before is on stable storage.

        Returns:
            What is not, because a tier has no place for it, refuses it, or is missing.

        Raises:
            TransferError: a block could not be written, or the disk refused to sync; what could be
                written is safe. Or the files of the tier were removed or unmounted.
        """
        failed_before = self._syncs_failed
        failed: FlexKVError | None = await self._write_all()
        if self._scheduler.failure is not None:
            raise self._scheduler.failure
        failed = await self._synced() or failed  # make safe what could be written
        if failed is None and self._syncs_failed > failed_before:  # another flush saw it fail
            failed = self._sync_failure
        if failed is not None:
            raise failed
        gone = self._unavailable
        left = await self._behind.left_blocks()
        return FlushReport(left, dict(gone.tiers), dict(gone.directories))

    async def _write_all(self) -> TransferError | None:
        """Write the blocks of host memory that lower tiers lack; return the error, if any."""
        stuck: DeadlineError | None = None
        for flight in self._scheduler.under_way():
            try:
                await flight.wait_ended()
            except DeadlineError as late:
                if late.route != _FROM_DEVICE:
                    return late
                stuck = late  # one device hangs: the blocks of other devices are still written
        for owes_all in (False, True):
            if owes_all:
                await self._behind.owe_all()
            error = await self._behind.drain()
            failures = self._behind.take_failures()
            if error is not None or failures:
                return error or failures[0]
        return stuck

    async def finish(self, timeout_s: float) -> None:
        """Flush for at most `timeout_s`, since the engine is about to be closed."""
        if timeout_s <= 0 or not self._tiers:
            return
        try:
            async with asyncio.timeout(timeout_s):
                await self.flush()
        except (FlexKVError, TimeoutError) as error:
            left = await self._behind.left_blocks()
            reason = str(error) or f"it was not finished within {timeout_s} s"
            log.warning("closed_before_flush_finished", reason=reason, lacking_blocks=left)

    async def _synced(self) -> FlexKVError | None:
        """Wait for a sync that began no earlier than this call; return the error, if any."""
        loop = asyncio.get_running_loop()
        until_s, first = loop.time() + self._sync_timeout_s, self._syncs + 1
        while not self._is_closed:
            if self._syncing is None:
                self._syncs += 1
                self._syncing = self._supervisor.spawn("sync", self._sync())
            syncing, number = self._syncing, self._syncs
            ended, _ = await asyncio.wait([syncing], timeout=max(0.0, until_s - loop.time()))
            if not ended:
                return DeadlineError(-1, "sync", 0, "the disk did not sync in time")
            if syncing.cancelled():
                break
            if number >= first:  # an earlier sync may have missed recent writes
                return syncing.result()
        return ClosedError("the engine was closed before the flush was done")

    async def _sync(self) -> FlexKVError | None:
        """Sync disk and journals to the end, even if nobody waits: a failure must not be missed."""
        failed: FlexKVError | None = None
        try:
            for parts in self._tiers:
                try:
                    error = await self._sync_tier(parts)
                except FlexKVError as refused:
                    error = refused
                failed = failed or error
        finally:
            self._syncing = None
        return failed

    async def _sync_tier(self, parts: TierParts) -> FlexKVError | None:
        """Sync a tier; return the error of one that is lost.

        Raises:
            FlexKVError: it cannot be synced.
        """
        presence = parts.presence
        if presence is not None and presence.lost is not None:
            return presence.lost
        await self._sync_port(parts)
        if parts.persistence is not None:
            await parts.persistence.flush()
        return None if presence is None else await presence.look()

    async def _sync_port(self, parts: TierParts) -> None:
        """Sync the port; after a failure, drop the blocks stored since the last good sync."""
        persistence = parts.persistence
        unsynced = NO_BLOCKS if persistence is None else persistence.begin_sync()
        try:
            await parts.port.sync()
        except StorageError as error:
            if persistence is not None:
                self._syncs_failed, self._sync_failure = self._syncs_failed + 1, error
                lost = persistence.sync_failed(unsynced)
                log.warning("sync_failed", path=error.path, error=str(error), lost_blocks=len(lost))
                self._scheduler.drop_unsynced(parts.tier, lost)
                await self._behind.owe_all()
            raise

    def close(self) -> None:
        """Stop waiting for a sync."""
        self._is_closed = True
        if self._syncing is not None:
            self._syncing.cancel()
