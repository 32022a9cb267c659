"""The checks of a model by `flexkv doctor`: what its blocks need of each place in a tier."""

from __future__ import annotations

from collections.abc import Iterator

from flexkv.cli.doctor_tiers import Finding
from flexkv.common.config import ModelConfig
from flexkv.common.space import BlockSpace, Kind

WASTED_SHARE_MAX = 0.25
"""A KV group that wastes a larger share of its places gets advice."""


def kv_groups(model: ModelConfig, tokens_per_block: int) -> Iterator[Finding]:
    """Yield a finding for each KV group of a model: the size of its blocks, and what they waste.

    All groups share the tiers' pools, whose places are as large as the largest block.

    Raises:
        ConfigError: the groups' blocks do not fit each other.
    """
    spaces = model.spaces(tokens_per_block)
    largest = max(spaces, key=lambda space: space.block_bytes)
    for space in spaces:
        wasted = 1 - space.block_bytes / space.stride_bytes
        found = (
            f"a block has {space.block_bytes:,} bytes and takes {space.stride_bytes:,}: "
            f"{100 * wasted:.1f} % wasted"
        )
        advice = ""
        if wasted > WASTED_SHARE_MAX:
            advice = f"each place has room for a block of KV group {largest.group}, the largest"
            if space is largest:
                advice = "places are whole pages of memory: set tokens_per_block higher"
        yield Finding(f"KV group {space.group}: {_named(space)}", found, not advice, advice)


def _named(space: BlockSpace) -> str:
    """Return what a group is, in words."""
    what = {
        Kind.FULL: "full attention",
        Kind.WINDOW: f"window of {space.window} tokens",
        Kind.CHUNK: f"chunks of {space.window} tokens",
        Kind.STATE: "state",
    }[space.kind]
    layers = len(space.shapes)
    return f"{what}, {layers} layer{'' if layers == 1 else 's'}"
