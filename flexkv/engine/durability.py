"""Flushes blocks to stable storage, and reports those that could not be written."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import msgspec

from flexkv.actors.scheduler import Scheduler
from flexkv.actors.supervisor import Supervisor
from flexkv.actors.write_behind import WriteBehind
from flexkv.common.errors import (
    ClosedError,
    DeadlineError,
    FlexKVError,
    TransferError,
)
from flexkv.common.terms import Route, Tier
from flexkv.engine.tier_sync import TierSync
from flexkv.observe.logs import get_logger
from flexkv.process.stoppable import failure_within
from flexkv.tiers.parts import TierParts
from flexkv.tiers.unavailable import Unavailable

log = get_logger(__name__)

SYNC_TIMEOUT_S = 60.0
"""How long a flush waits for the disk to sync, or `io_deadline_s` if that is longer."""


class FlushReport(msgspec.Struct, frozen=True):
    """What a flush left unwritten.

    Attributes:
        lacking_blocks: by tier name, how many blocks of host memory the tier lacks, because it has
            no free place for them, or refuses them as worth less than what it has. Blocks that
            were put, or that a put began to write, during the flush may be among them.
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
        self._behind, self._unavailable = behind, unavailable
        self._synced_tiers = {  # a store reports a write once it is safe
            parts.tier for parts in tiers if parts.capacity_blocks is not None
        }
        self._syncs = [TierSync(parts, scheduler, behind, supervisor) for parts in tiers]
        self._sync_timeout_s = max(SYNC_TIMEOUT_S, deadline_s)

    async def flush(self) -> FlushReport:
        """Return once everything resident that was put before is on stable storage.

        Returns:
            What is not, because a tier has no place for it, refuses it, or is missing.

        Raises:
            TransferError: a block could not be written, the disk refused to sync, or the tier's
                files were removed or unmounted; what could be written is safe.
        """
        failed_before = [sync.failures for sync in self._syncs]
        failed: FlexKVError | None = await self._write_all()
        if self._scheduler.failure is not None:
            raise self._scheduler.failure
        moved = self._scheduler.moved.copy()
        failed = await self._synced() or failed  # make safe what could be written
        for sync, before in zip(self._syncs, failed_before, strict=True):
            if failed is None and sync.failures > before:  # another flush saw it fail
                failed = sync.failure
        if failed is not None:
            raise failed
        gone = self._unavailable
        left = await self._left_blocks(moved)
        return FlushReport(left, dict(gone.tiers), dict(gone.directories))

    async def _write_all(self) -> TransferError | None:
        """Write the blocks of host memory that lower tiers lack; return the error, if any."""
        stuck: DeadlineError | None = None
        for flight in self._scheduler.under_way():
            if flight.unfed_op_ids():  # its layers may never be written
                continue
            try:
                await flight.wait_ended()
            except DeadlineError as late:
                if late.route != _FROM_DEVICE:
                    return late
                stuck = late  # one device hangs: the blocks of other devices are still written
        for owes_all in (False, True):
            if owes_all:
                await self._behind.owe_all()
                if (hung := await self._wait_written()) is not None:
                    return hung
            error = await self._behind.drain()
            failures = self._behind.take_failures()
            if error is not None or failures:
                return error or failures[0]
        return stuck

    async def _wait_written(self) -> DeadlineError | None:
        """Wait for the writes that puts have begun; return the error if one hangs.

        They may write blocks that were in host memory before the flush. Such a put may have begun
        during the flush, or its layers may never be written.
        """
        for flight in self._scheduler.under_way():
            try:
                await flight.wait_written()
            except DeadlineError as late:
                return late
        return None

    async def _left_blocks(self, moved: Counter[Tier]) -> dict[str, int]:
        """Return, by tier name, how many blocks of host memory are not safe there.

        Args:
            moved: what `Scheduler.moved` was when the last sync began, which may have missed all
                that was written since.
        """
        left = Counter(await self._behind.left_blocks())
        for tier, blocks in (self._scheduler.moved - moved).items():
            if tier in self._synced_tiers:
                left[tier.label] += blocks
        return dict(left)

    async def finish(self, timeout_s: float) -> None:
        """Flush for at most `timeout_s`, since the engine is about to be closed."""
        if timeout_s <= 0 or not self._syncs:
            return
        if reason := await failure_within(timeout_s, self.flush()):
            left = await self._left_blocks(self._scheduler.moved)
            log.warning("closed_before_flush_finished", reason=reason, lacking_blocks=left)

    async def _synced(self) -> FlexKVError | None:
        """Sync every tier; return the first tier's error, if any."""
        waits = [sync.synced(self._sync_timeout_s) for sync in self._syncs]
        if len(waits) == 1:
            return await waits[0]
        syncing = [self._supervisor.spawn("flush", wait) for wait in waits]
        if syncing:
            await asyncio.wait(syncing)
        if any(task.cancelled() for task in syncing):
            return ClosedError("the engine was closed before the flush was done")
        return next((error for task in syncing if (error := task.result()) is not None), None)

    def close(self) -> None:
        """Stop waiting for syncs."""
        for sync in self._syncs:
            sync.close()
