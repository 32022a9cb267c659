"""The changes of a server's index that a client has been told of, until they are collected."""

from __future__ import annotations

from flexkv.server.wire import Changed

CHANGES_MAX = 1 << 20
"""Maximum number of changes kept; beyond it all are dropped and reported as lost."""


class Changes:
    """The changes since the last collection, in their order."""

    def __init__(self) -> None:
        self._changes: list[Changed] = []
        self._count = 0

    def add(self, changed: Changed) -> None:
        """Keep changes that the server has reported."""
        self._count += len(changed.changes)
        if self._count > CHANGES_MAX:
            self._changes, self._count = [], 0
            changed = Changed((), lost=True)
        self._changes.append(changed)

    def lose(self) -> None:
        """Record that later changes are unknown: the connection has ended."""
        self._changes.append(Changed((), lost=True))

    def collect(self) -> list[Changed]:
        """Return the changes, each once."""
        changes, self._changes, self._count = self._changes, [], 0
        return changes
