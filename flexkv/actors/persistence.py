"""What the scheduler tells of the blocks of a tier that survive the process."""

from __future__ import annotations

from typing import Protocol

from flexkv.common.terms import BlockIds


class PersistenceHooks(Protocol):
    """Records what a tier holds, so that a later run knows."""

    def stored(self, block_ids: BlockIds) -> None:
        """Record blocks that became READY, unless they were forgotten meanwhile."""
        ...

    def erased(self, block_ids: BlockIds) -> None:
        """Record blocks that a later run must not restore."""
        ...
