"""Checks that the files of the SSD tier are in place: removed files are lost at the next restart.

An open file keeps working after it or its directory was removed, or its file system was unmounted
lazily. Writes to it succeed, and so does a sync; only its name is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from errno import ENOENT

from flexkv.common.errors import StorageError
from flexkv.common.terms import Tier
from flexkv.io.ssd import superblock
from flexkv.io.ssd.files import Missing, StripedFiles
from flexkv.process.workers import Workers
from flexkv.tiers.ledger import Ledger
from flexkv.tiers.unavailable import Unavailable

LOOK_S = 2.0
"""Time between two checks; each flush makes one more."""


class Presence:
    """Checks that directories and files are in place; the first that is not ends the tier.

    Attributes:
        lost: the error that a flush raises, once the tier is lost.
        on_lost: called with the reason when the loss is found.
    """

    def __init__(
        self, files: StripedFiles, ledger: Ledger | None, unavailable: Unavailable
    ) -> None:
        """Take what to check, and where to record the reasons; the caller owns all of it."""
        self.lost: StorageError | None = None
        self.on_lost: Callable[[str], None] = lambda why: None
        self._files, self._ledger, self._unavailable = files, ledger, unavailable
        # A thread of its own: on a file system that hangs, a check does not end.
        self._thread = Workers(1, "flexkv-presence")

    async def run(self) -> None:
        """Check at intervals, until cancelled or until the tier is lost."""
        while True:
            await asyncio.sleep(LOOK_S)
            if await self.look() is not None:
                return

    async def look(self) -> StorageError | None:
        """Check now; return the error if the tier is lost."""
        if self.lost is None:
            loop = asyncio.get_running_loop()
            missing = await loop.run_in_executor(self._thread, self._missing)
            if missing is None and self._ledger is not None and self._files.identity_lasts:
                missing = await self._ledger.missing()
            if missing is not None and self.lost is None:
                self._lose(missing)
        return self.lost

    def _missing(self) -> Missing | None:
        missing = self._files.missing()
        if missing is None and self._ledger is not None:
            for folder in self._files.folders:
                if not superblock.is_there(folder):
                    path = folder.path / superblock.NAME
                    return Missing(str(folder.path), str(path), "was removed")
        return missing

    def _lose(self, missing: Missing) -> None:
        self.lost = StorageError(missing.path, 0, ENOENT)
        why = f"{missing.path} {missing.why}: nothing on SSD survives a restart of this engine"
        self._unavailable.lose_directory(missing.directory, f"{missing.path} {missing.why}")
        self._unavailable.lose_tier(Tier.DISK, why)
        self.on_lost(why)

    def close(self) -> None:
        """Stop checking."""
        self._thread.shutdown(wait=False, cancel_futures=True)
