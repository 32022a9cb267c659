"""Device memory whose correct content is known: a block's bytes follow from its key alone.

A block is a fixed pattern of distinct 64-bit words, each xor-ed with a seed from the key. So a
block under a wrong key, or a shifted, swapped, stale or torn block, differs from what is expected.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from flexkv.common.config import ModelConfig
from flexkv.common.terms import BlockKey

WORD_BYTES = 8
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
"""An odd constant: multiples of it are distinct words that differ in all their bytes."""


class KnownDevice:
    """KV caches, for each layer [2, blocks, tokens, heads, dim], filled and checked by key."""

    def __init__(self, model: ModelConfig, tokens_per_block: int, num_blocks: int) -> None:
        heads = model.num_kv_heads * model.head_size
        shape = (2, num_blocks, tokens_per_block, model.num_kv_heads, model.head_size)
        self.kv_caches = [np.zeros(shape, model.dtype) for _ in range(model.num_layers)]
        half_bytes = tokens_per_block * heads * self.kv_caches[0].itemsize
        if half_bytes % WORD_BYTES:
            raise ValueError(f"K of a block has {half_bytes} bytes: not a multiple of {WORD_BYTES}")
        words = half_bytes // WORD_BYTES
        self._words = [
            layer.view(np.uint8).reshape(2, num_blocks, half_bytes).view(np.uint64)
            for layer in self.kv_caches
        ]
        pattern = np.arange(1, 2 * model.num_layers * words + 1, dtype=np.uint64) * _SPREAD
        self._pattern = pattern.reshape(model.num_layers, 2, words)

    def fill(self, block_ids: Sequence[int], keys: Sequence[BlockKey]) -> None:
        """Fill blocks with the content that belongs to these keys."""
        seeds = _seeds(keys)
        ids = np.asarray(block_ids, np.int64)
        for words, pattern in zip(self._words, self._pattern, strict=True):
            words[:, ids] = pattern[:, None] ^ seeds[None, :, None]

    def mismatches(self, block_ids: Sequence[int], keys: Sequence[BlockKey]) -> int:
        """Return how many blocks do not have the content that belongs to these keys."""
        seeds = _seeds(keys)
        ids = np.asarray(block_ids, np.int64)
        wrong = np.zeros(len(ids), np.bool_)
        for words, pattern in zip(self._words, self._pattern, strict=True):
            differ = words[:, ids] != pattern[:, None] ^ seeds[None, :, None]
            wrong |= differ.any(axis=(0, 2))
        return int(wrong.sum())

    def clear(self, block_ids: Sequence[int]) -> None:
        """Overwrite blocks, so that later content cannot be a remainder of this one."""
        for words in self._words:
            words[:, np.asarray(block_ids, np.int64)] = 0


def _seeds(keys: Sequence[BlockKey]) -> NDArray[np.uint64]:
    """Return a 64-bit seed from each key, uint64[keys]."""
    return np.frombuffer(b"".join(keys), np.uint64)[::2].copy()
