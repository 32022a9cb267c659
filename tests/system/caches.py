"""A small model, the configuration of its cache, and device memory with known bytes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import default_rng  # now: a child that runs as another user cannot read it
from numpy.typing import NDArray

from flexkv.common.config import CacheConfig, ModelConfig

PER_BLOCK = 4
DEVICE_BLOCKS = 64
MODEL = ModelConfig(num_layers=3, num_kv_heads=2, head_size=8, dtype="float16")


def cache_config(directory: Path, **changes: Any) -> CacheConfig:
    """Return a small two-tier configuration."""
    values: dict[str, Any] = {
        "tokens_per_block": PER_BLOCK,
        "num_cpu_blocks": 32,
        "num_ssd_blocks": 128,
        "ssd_cache_dir": str(directory),
        "evict_ratio": 0.0,
    }
    return CacheConfig(**{**values, **changes})


def kv_caches(seed: int = 0) -> list[NDArray[np.float16]]:
    """Return per-layer caches [2, blocks, tokens, heads, dim] of random bytes."""
    shape = (2, DEVICE_BLOCKS, PER_BLOCK, MODEL.num_kv_heads, MODEL.head_size)
    random = default_rng(seed)
    return [
        random.integers(0, 1 << 16, shape, np.uint16).view(np.float16)
        for _ in range(MODEL.num_layers)
    ]


def slots_of(blocks: Any) -> NDArray[np.int64]:
    """Return the slots of whole device blocks."""
    return (np.asarray(blocks)[:, None] * PER_BLOCK + np.arange(PER_BLOCK)).ravel()


def bytes_of(caches: list[NDArray[np.float16]], blocks: Any) -> NDArray[np.uint16]:
    """Return a copy of the content of device blocks."""
    return np.stack([layer[:, list(blocks)].view(np.uint16).copy() for layer in caches])


def open_fds() -> int:
    """Count this process's file descriptors."""
    return len(os.listdir("/proc/self/fd"))
