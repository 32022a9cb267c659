"""Sizes of tiers: from blocks or GB, as a configuration gives them, to blocks of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexkv.common.config_keys import BLOCKS_MAX
from flexkv.common.config_model import ModelConfig
from flexkv.common.errors import ConfigError
from flexkv.common.space import CacheSizes, GivenSize

if TYPE_CHECKING:
    from flexkv.common.config_cache import CacheConfig

GB = 1024**3
MB = 1024**2

BLOCK_BYTES_MAX = 1 << 40

SIZE_PAIRS = (
    ("num_cpu_blocks", "cpu_cache_gb"),
    ("num_ssd_blocks", "ssd_cache_gb"),
    ("max_blocks_per_file", "max_file_size_gb"),
)
"""Pairs of keys that set the same size: as a count of blocks, or in GB."""


def sizes_of(cache: CacheConfig, model: ModelConfig) -> CacheSizes:
    """Return the tiers' sizes in blocks of a model: see `CacheConfig.sized`."""
    spaces = model.spaces(cache.tokens_per_block)
    stride, largest = spaces[0].stride_bytes, max(space.block_bytes for space in spaces)
    if largest > BLOCK_BYTES_MAX:
        why = f"a block of this model has {largest} bytes; the limit is {BLOCK_BYTES_MAX}"
        raise ConfigError("tokens_per_block", cache.tokens_per_block, why)
    host, disk, file = SIZE_PAIRS
    return CacheSizes(
        spaces=spaces,
        num_host_blocks=_blocks(cache, *host, stride) if cache.enable_cpu else 0,
        num_disk_blocks=_blocks(cache, *disk, stride) if cache.enable_ssd else 0,
        max_file_blocks=None if _files_uncapped(cache) else _blocks(cache, *file, stride),
        host_given=given_size(cache, *host),
        disk_given=given_size(cache, *disk),
    )


def given_size(cache: CacheConfig, blocks_key: str, gb_key: str) -> GivenSize:
    """Return which of two keys sets a size, and to what."""
    count: int | None = getattr(cache, blocks_key)
    if count is not None:
        return GivenSize(blocks_key, count)
    gb: float = getattr(cache, gb_key)
    return GivenSize(gb_key, int(gb) if gb.is_integer() else gb)


def _files_uncapped(cache: CacheConfig) -> bool:
    cap = cache.max_blocks_per_file
    return (cache.max_file_size_gb if cap is None else cap) == -1


def _blocks(cache: CacheConfig, blocks_key: str, gb_key: str, stride_bytes: int) -> int:
    """Return a size in blocks, from whichever of its two keys was given."""
    count: int | None = getattr(cache, blocks_key)
    gb: float = getattr(cache, gb_key)
    field, value = (gb_key, gb) if count is None else (blocks_key, count)
    blocks = int(gb * GB) // stride_bytes if count is None else count
    if blocks < 1:
        why = f"must have room for at least one block, which takes {stride_bytes / GB:.6g} GB"
        raise ConfigError(field, value, why)
    if blocks > BLOCKS_MAX:
        why = f"would hold {blocks} blocks of this model; the limit is {BLOCKS_MAX}"
        raise ConfigError(field, value, why)
    return blocks
