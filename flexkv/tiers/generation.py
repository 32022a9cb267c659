"""The generation of a cluster's blocks, as one node follows it.

    local clear ──▶ apart: this node shares nothing, since nobody knows what the others still hold
    `reset` of the cluster ──▶ a new generation ──▶ every node clears its tiers, and shares again

A node's SSD tier outlives it, so the generation of what is there is kept beside it: a node that was
away during a reset clears its tiers when it comes back.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from flexkv.common.terms import BlockIds, Tier
from flexkv.index.residency import Residency
from flexkv.observe.logs import get_logger

log = get_logger(__name__)

_APART_BITS = 62
"""A node that is apart has a generation of its own, of so many bits: all other nodes refuse it."""
_NAME = "cluster-generation"


class Generation:
    """The generation of this node's blocks. It is the peers' tier's `Persistence`.

    Attributes:
        number: that of the cluster, as far as this node knows.
        is_apart: whether this node was cleared alone, since then.
        is_adopting: whether the clear under way is the cluster's.
        has_restored: whether this node began with blocks of an earlier run.
        on_apart: is called when this node shares nothing any more.
    """

    def __init__(self, directories: Sequence[Path]) -> None:
        """Take the directories of the SSD tier, which have blocks of the generation noted there."""
        self._files = [each / _NAME for each in directories]
        self.number = min([_read(file) for file in self._files], default=0)
        self.is_apart = self.is_adopting = self.has_restored = False
        self._alone = 0
        self.on_apart: Callable[[], None] = lambda: None

    @property
    def shared(self) -> int:
        """Return the generation in which this node shares blocks with others."""
        return self._alone if self.is_apart else self.number

    def adopt(self, number: int) -> None:
        """Record that this node's tiers were cleared for a generation of the cluster."""
        self.number, self.is_apart = number, False

    def note(self, number: int) -> None:
        """Write a generation beside the SSD tier's blocks, once no crash brings older ones back."""
        for file in self._files:
            try:
                _write(file, number)
            except OSError as error:
                log.warning("cluster_generation_not_noted", path=str(file), error=str(error))

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
            self.is_apart = True
            self._alone = 1 << _APART_BITS | secrets.randbits(_APART_BITS)
            log.warning(
                "peers_not_shared_after_clear",
                reason="this node was cleared alone; `flexkv cluster reset` makes all nodes share "
                "again, and so does a restart of this one",
            )
            self.on_apart()

    async def written(self) -> None:
        """Do nothing: a restart shares only what was put after the clear."""

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


def _read(file: Path) -> int:
    """Return the generation that a file notes; 0 if it notes none."""
    try:
        text = file.read_text("ascii")
    except (OSError, UnicodeDecodeError):
        return 0
    return int(text) if text.strip().isdecimal() else 0


def _write(file: Path, number: int) -> None:
    """Make a file note a generation, whole or not at all."""
    new = file.with_name(f"{_NAME}.new")
    with open(new, "w", encoding="ascii") as stream:
        stream.write(f"{number}\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(new, file)
