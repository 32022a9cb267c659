"""Brings what one tier holds to stable storage, for any number of flushes at once."""

from __future__ import annotations

import asyncio

import numpy as np

from flexkv.actors.scheduler import Scheduler
from flexkv.actors.supervisor import Supervisor
from flexkv.actors.write_behind import WriteBehind
from flexkv.common.errors import ClosedError, DeadlineError, FlexKVError, StorageError
from flexkv.observe.logs import get_logger
from flexkv.tiers.parts import TierParts

log = get_logger(__name__)

NO_BLOCKS = np.zeros(0, np.int64)


class TierSync:
    """The syncs of one tier, one at a time; a sync that hangs keeps no other tier from its own.

    Attributes:
        failures: how many syncs have failed; `failure` is the last one's error.
    """

    def __init__(
        self,
        parts: TierParts,
        scheduler: Scheduler,
        behind: WriteBehind,
        supervisor: Supervisor,
    ) -> None:
        self._parts, self._scheduler = parts, scheduler
        self._behind, self._supervisor = behind, supervisor
        self._syncing: asyncio.Task[FlexKVError | None] | None = None
        self._syncs = self.failures = 0
        self.failure: FlexKVError | None = None
        self._is_closed = False

    async def synced(self, timeout_s: float) -> FlexKVError | None:
        """Wait for a sync that began no earlier than this call; return the error, if any."""
        loop = asyncio.get_running_loop()
        until_s, first = loop.time() + timeout_s, self._syncs + 1
        while not self._is_closed:
            if self._syncing is None:
                self._syncs += 1
                self._syncing = self._supervisor.spawn("sync", self._sync())
            syncing, number = self._syncing, self._syncs
            ended, _ = await asyncio.wait([syncing], timeout=max(0.0, until_s - loop.time()))
            if not ended:
                label = self._parts.tier.label
                return DeadlineError(-1, "sync", 0, f"the {label} did not sync in time")
            if syncing.cancelled():
                break
            if number >= first:  # an earlier sync may have missed recent writes
                return syncing.result()
        return ClosedError("the engine was closed before the flush was done")

    async def _sync(self) -> FlexKVError | None:
        """Sync to the end, even if nobody waits, so that no failure is missed."""
        presence, persistence = self._parts.presence, self._parts.persistence
        try:
            if presence is not None and presence.lost is not None:
                return presence.lost
            await self._sync_port()
            if persistence is not None:
                await persistence.flush()
            if presence is not None:
                return await presence.look()
        except FlexKVError as error:
            return error
        finally:
            self._syncing = None
        return None

    async def _sync_port(self) -> None:
        """Sync the port; after a failure, drop the blocks stored since the last good sync."""
        persistence = self._parts.persistence
        unsynced = NO_BLOCKS if persistence is None else persistence.begin_sync()
        try:
            await self._parts.port.sync()
        except StorageError as error:
            if persistence is not None:
                self.failures, self.failure = self.failures + 1, error
                lost = persistence.sync_failed(unsynced)
                log.warning("sync_failed", path=error.path, error=str(error), lost_blocks=len(lost))
                self._scheduler.drop_unsynced(self._parts.tier, lost)
                await self._behind.owe_all()
            raise

    def close(self) -> None:
        """Stop waiting for a sync."""
        self._is_closed = True
        if self._syncing is not None:
            self._syncing.cancel()
