"""A small model with several KV groups, and device memory with known bytes for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import default_rng
from numpy.typing import NDArray

from flexkv.common.config import CacheConfig, LayerGroup, ModelConfig
from flexkv.common.layout import KVShape
from flexkv.common.space import BlockSpace

PER_BLOCK = 4
DEVICE_BLOCKS = 64
LAYERS = [
    LayerGroup(num_layers=2, num_kv_heads=2, head_size=8, layer_indices=(0, 3)),
    LayerGroup(
        num_layers=1, num_kv_heads=4, head_size=8, layer_indices=(1,),
        kv_group=1, kind="sliding_window", window=10,
    ),
    LayerGroup(
        num_layers=1, num_kv_heads=1, head_size=16, layer_indices=(2,), dtype="uint8",
        kv_group=2, kind="chunked", window=16,
    ),
    LayerGroup(
        num_layers=2, layer_indices=(4, 5), kv_group=3, kind="state", state_bytes=100,
        tokens_per_block=2 * PER_BLOCK,
    ),
]  # fmt: skip
MODEL = ModelConfig(
    num_layers=6, num_kv_heads=2, head_size=8, dtype="float16", layer_groups=tuple(LAYERS)
)
"""Prefixes end on multiples of eight tokens, where the groups' blocks end together."""

Ids = Mapping[int, int]
"""Device blocks of a group, by the number of its own block in the prompt."""


def cache_config(directory: Path, **changes: Any) -> CacheConfig:
    """Return a small two-tier configuration."""
    values: dict[str, Any] = {
        "tokens_per_block": PER_BLOCK,
        "num_cpu_blocks": 64,
        "num_ssd_blocks": 256,
        "ssd_cache_dir": str(directory),
        "evict_ratio": 0.0,
    }
    return CacheConfig(**{**values, **changes})


class GroupCaches:
    """The KV caches of a model with several groups, each with blocks of its own.

    Attributes:
        spaces: what a block of each group is.
        tensors: one for each layer, in the model's order.
    """

    def __init__(
        self, model: ModelConfig = MODEL, seed: int = 0, backing: NDArray[np.uint8] | None = None
    ) -> None:
        """Make the tensors of one rank; those of all groups overlay `backing`, if that is given.

        `backing` is uint8[layers of a group, DEVICE_BLOCKS, bytes of the largest layer].
        """
        self.spaces = model.spaces(PER_BLOCK)
        random, tensors = default_rng(seed), {}
        for space in self.spaces:
            layers = zip(space.layers, space.shapes, space.dtypes, strict=True)
            for number, (layer, shape, dtype) in enumerate(layers):
                size = shape.block_bytes
                memory = random.integers(0, 256, (DEVICE_BLOCKS, size)).astype(np.uint8)
                if backing is not None:
                    memory = backing[number]
                tensors[layer] = _tensor(memory, shape, dtype, space.kind.label == "state")
        self.tensors = [tensors[layer] for layer in sorted(tensors)]

    def needed(self, group: int, end: int, first: int = 0) -> range:
        """Return a group's blocks that a prefix of `end` tokens needs from token `first` on."""
        space = self.spaces[group]
        begin, last = space.needed(end)
        return range(max(begin, first // space.tokens_per_block), last)

    def bytes_of(self, group: int, blocks: Iterable[int]) -> list[NDArray[np.uint8]]:
        """Return a copy of the content of device blocks of a group, one array for each layer."""
        space, ids = self.spaces[group], list(blocks)
        layers = [self.tensors[layer] for layer in space.layers]
        blocks = [layer[ids] if len(layer) > 2 else layer[:, ids] for layer in layers]
        return [np.ascontiguousarray(each).view(np.uint8) for each in blocks]

    def slots(self, tokens: int, *groups: Ids) -> list[NDArray[np.int64]]:
        """Return the slot mapping of a prompt whose blocks of each group are in these places."""
        return [_slots(space, tokens, ids) for space, ids in zip(self.spaces, groups, strict=True)]

    def places(
        self, tokens: int, start: int = 0, groups: Sequence[int] = (0, 1, 2, 3)
    ) -> list[Ids]:
        """Return consecutive device blocks for every block of some groups, and none of others."""
        return [
            {n: start + n for n in range(tokens // space.tokens_per_block)}
            if space.group in groups
            else {}
            for space in self.spaces
        ]


def _tensor(memory: NDArray[np.uint8], shape: KVShape, dtype: str, is_state: bool) -> NDArray[Any]:
    """Return the tensor of a layer over memory, uint8[blocks, at least the bytes of a block]."""
    blocks = memory[:, : shape.block_bytes]
    if is_state:
        return blocks.view(np.int8)[:, None, None]
    sizes = (shape.kv_dim, shape.tokens, shape.heads, shape.head_size)
    tensor = np.lib.stride_tricks.as_strided(
        blocks[:, : shape.item_bytes].view(dtype),
        (len(memory), *sizes),
        (memory.strides[0], *_strides(sizes, shape.item_bytes)),
    )
    return np.moveaxis(tensor, 0, 1)


def _strides(sizes: Sequence[int], item_bytes: int) -> list[int]:
    """Return the strides of an array without gaps."""
    return [item_bytes * prod(sizes[number + 1 :]) for number in range(len(sizes))]


def _slots(space: BlockSpace, tokens: int, ids: Ids) -> NDArray[np.int64]:
    per_block = space.tokens_per_block
    slots = np.full(tokens, -1)
    for number, block in ids.items():
        begin = number * per_block
        slots[begin : begin + per_block] = block * per_block + np.arange(per_block)
    tail = tokens // per_block * per_block
    if space.group == 0:
        slots[tail:] = 0
    return slots
