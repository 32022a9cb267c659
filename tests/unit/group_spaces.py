"""Block spaces of models with several KV groups."""

from __future__ import annotations

from typing import Any, NamedTuple

from flexkv import _ext

FULL, WINDOW, CHUNK, STATE = range(4)


class Space(NamedTuple):
    """What is needed of a block space."""

    group: int
    kind: int
    window: int = 0
    tokens_per_block: int = 4

    def needed(self, end: int) -> tuple[int, int]:
        """Return which of the group's own blocks a prefix of `end` tokens needs."""
        return _ext.needed(self.kind, self.window, self.tokens_per_block, end)


def spaces_of(*leaves: tuple[int, int] | tuple[int, int, int]) -> list[Any]:
    """Return spaces with a chain of 4 tokens a block, and leaves of (kind, window, block)."""
    return [Space(0, FULL), *(Space(number, *each) for number, each in enumerate(leaves, 1))]
