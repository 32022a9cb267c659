"""Block spaces of models with several KV groups."""

from __future__ import annotations

from flexkv.common.space import BlockSpace, Kind

FULL, WINDOW, CHUNK, STATE = Kind


def spaces_of(
    *leaves: tuple[Kind, int] | tuple[Kind, int, int], chain: tuple[Kind, int] = (FULL, 0)
) -> list[BlockSpace]:
    """Return spaces with a chain of 4 tokens a block, and leaves of (kind, window, block)."""
    return [
        BlockSpace(block[0] if block else 4, (), (), 1, 1, {}, group, 0, kind, window)
        for group, (kind, window, *block) in enumerate([chain, *leaves])
    ]
