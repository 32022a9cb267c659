"""The generation of this node's blocks: what it shares, and what it notes beside them.

    local clear ──▶ apart: this node shares nothing, since nobody knows what the others still hold
                    └── nobody who starts later joins the generation, since that may be this node
    `reset` of the cluster ──▶ a new generation ──▶ every node clears its tiers, and shares again

A node's SSD tier outlives it, so the name of the generation of what is there is kept beside it, and
whether the node is apart. A node that comes back clears its tiers if its blocks are of another
generation than the cluster's (`cluster/generations.py`), and stays apart if it was.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from flexkv.actors.flight import wake
from flexkv.cluster.generations import Noted
from flexkv.common.errors import ClosedError, StorageError
from flexkv.common.terms import BlockIds, Tier
from flexkv.index.residency import Residency
from flexkv.observe.logs import get_logger
from flexkv.tiers.ssd_note import SsdNote

log = get_logger(__name__)

_ALONE_BITS = 62
"""A node that shares nothing has a generation of its own, of so many bits: others refuse it."""
NOTE = "cluster-generation"
_APART = "apart"


class Generation:
    """The generation of this node's blocks. It is the peers' tier's `Persistence`.

    Attributes:
        noted: what an earlier run has noted.
        name: of the cluster's, as far as this node knows; 0 before it was told.
        number: that of the cluster.
        is_apart: whether this node was cleared alone in it, or joined none since others were.
        is_adopting: whether the clear under way is the cluster's.
        has_restored: whether this node began with blocks of an earlier run.
        on_apart: is called when this node shares nothing any more.
    """

    def __init__(self, directories: Sequence[Path]) -> None:
        """Take the directories of the SSD tier, which have blocks of the generation noted there."""
        self._note = SsdNote(directories, NOTE)
        self.noted = _parsed(self._note.read())
        self.name = self.number = 0
        self.is_apart = self.is_adopting = self.has_restored = False
        self.on_apart: Callable[[], None] = lambda: None
        self._alone = _alone()
        self._changes = self._written = 0
        self._error: Exception | None = None
        self._is_stopped = False
        self._waiters: list[asyncio.Future[None]] = []

    @property
    def is_sharing(self) -> bool:
        """Return whether this node shares blocks with others."""
        return self.name != 0 and not self.is_apart

    @property
    def shared(self) -> int:
        """Return the generation in which this node shares blocks with others."""
        return self.number if self.is_sharing else self._alone

    def adopt(self, number: int, name: int) -> None:
        """Record which generation this node's blocks are of."""
        self.number, self.name, self.is_apart = number, name, False
        self._changes += 1

    def rename(self, name: int) -> None:
        """Record another name of the generation."""
        self.name = name
        self._changes += 1

    def part(self) -> None:
        """Share nothing any more, until the cluster begins a new generation."""
        if not self.is_apart:
            self.is_apart, self._alone = True, _alone()
            self._changes += 1
            self.on_apart()

    # -- notes ----------------------------------------------------------------------------------

    @property
    def to_note(self) -> tuple[int, Noted]:
        """Return what to note, and the number of the change that made it so."""
        return self._changes, Noted(self.name, self.is_apart)

    def note(self, noted: Noted) -> StorageError | None:
        """Write a generation beside the SSD tier's blocks; return what went wrong.

        If it is not that of older blocks, no crash may bring those back any more.
        """
        try:
            self._note.write(f"{noted.name} {_APART}" if noted.is_apart else f"{noted.name}")
        except StorageError as error:
            log.warning("cluster_generation_not_noted", error=str(error))
            return error
        return None

    def was_noted(self, change: int, error: Exception | None) -> None:
        """Record that a change is noted, or why it is not."""
        self._written, self._error = change, error
        wake(self._waiters)

    async def written(self) -> None:
        """Return once it is noted that this node was cleared alone.

        Raises:
            TransferError: it cannot be noted: after a restart it may share what is of before.
            ClosedError: the engine was closed meanwhile.
        """
        change = self._changes
        while self._note and self._written < change and not self._is_stopped:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
        if self._note and self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Let nobody wait any more: nothing is noted from now on."""
        self._is_stopped = True
        self.was_noted(self._changes, ClosedError("the engine was closed"))

    # -- persistence ----------------------------------------------------------------------------

    def restore(self, residency: Residency) -> int:
        """Restore nothing: the table does not have what is far, but it has what is on SSD."""
        ssd = Tier.DISK
        self.has_restored = ssd in residency.tiers and residency.counts(ssd).ready > 0
        return 0

    def stored(self, block_ids: BlockIds) -> None:
        """Do nothing: nothing is written to peers."""

    def erased(self, block_ids: BlockIds) -> None:
        """Do nothing: far blocks have no places."""

    def clear(self, root: bytes | None) -> None:
        """Share nothing any more, also after the clear of one namespace."""
        if not self.is_adopting and not self.is_apart:
            log.warning(
                "peers_not_shared_after_clear",
                reason="this node was cleared alone; `flexkv cluster reset` makes all nodes share "
                "again",
            )
            self.part()

    async def flush(self) -> None:
        """Do nothing."""

    def begin_sync(self) -> BlockIds:
        """Return no blocks."""
        return np.zeros(0, np.int64)

    def sync_failed(self, unsynced: BlockIds) -> BlockIds:
        """Return no blocks."""
        return unsynced

    async def finish(self) -> None:
        """Do nothing."""


def _alone() -> int:
    return 1 << _ALONE_BITS | secrets.randbits(_ALONE_BITS)


def _parsed(line: str) -> Noted:
    """Return the generation that a note says."""
    name, _, rest = line.partition(" ")
    return Noted(int(name), rest == _APART) if name.isdecimal() else Noted()
