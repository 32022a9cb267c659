"""Configurations, device memory, prompts and slots for the cases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexkv.common.config import CacheConfig, ModelConfig

PER_BLOCK = 16
PROMPT_STRIDE = 400_000
"""Distance between the first tokens of two prompts: 10,000 prompts fit into 32-bit ids."""

LARGE = ModelConfig(num_layers=32, num_kv_heads=8, head_size=128, dtype="float16")
"""An 8B-shaped model: a block of 16 tokens has 2 MiB, in 64 pieces of 32 KiB."""

SMALL = ModelConfig(num_layers=4, num_kv_heads=2, head_size=8, dtype="float16")
"""A block of 16 tokens has 4 KiB."""


def cache_of(host_blocks: int, directory: Path | None = None, **changes: Any) -> CacheConfig:
    """Return a cache configuration, for an SSD tier in `directory` if one is given."""
    values: dict[str, Any] = {"num_cpu_blocks": host_blocks, "evict_ratio": 0.0, **changes}
    if directory is not None:
        values["ssd_cache_dir"] = str(directory)
    return CacheConfig(tokens_per_block=PER_BLOCK, **values)


def kv_caches(model: ModelConfig, blocks: int) -> list[NDArray[np.float16]]:
    """Return per-layer caches of random bytes, since zeros would all share one page."""
    shape = (2, blocks, PER_BLOCK, model.num_kv_heads, model.head_size)
    random = np.random.default_rng(0)
    return [
        random.integers(0, 1 << 15, shape, np.uint16).view(np.float16)
        for _ in range(model.num_layers)
    ]


def prompt(number: int, blocks: int) -> NDArray[np.int64]:
    """Return a prompt that shares no block with prompts of other numbers."""
    return np.arange(blocks * PER_BLOCK) + number * PROMPT_STRIDE


def slots_of(blocks: Any) -> NDArray[np.int64]:
    """Return the slots of whole device blocks."""
    return (np.asarray(blocks)[:, None] * PER_BLOCK + np.arange(PER_BLOCK)).ravel()
