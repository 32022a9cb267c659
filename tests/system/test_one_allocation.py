"""A manager over KV caches cut from one allocation, in which the groups overlay each other."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from flexkv.common.config import CacheConfig, LayerGroup, ModelConfig
from flexkv.common.space import BlockSpace
from flexkv.kvmanager import KVManager
from tests.unit.backing import LAYOUTS, Backing, pages_of

BLOCKS, TOKENS, PROMPT = 48, 4, np.arange(32)
MODEL = ModelConfig(
    num_layers=6, num_kv_heads=2, head_size=8, dtype="float16", model_id="one allocation",
    layer_groups=(
        LayerGroup(num_layers=2, num_kv_heads=1, head_size=16, layer_indices=(1, 4)),
        LayerGroup(
            num_layers=2, num_kv_heads=1, head_size=16, layer_indices=(0, 3),
            kind="sliding_window", window=9, kv_group=1,
        ),
        LayerGroup(
            num_layers=2, kind="state", state_bytes=200, layer_indices=(2, 5), kv_group=2,
        ),
    ),
)  # fmt: skip
"""Pages of 256 bytes: those of the state end in 56 bytes that belong to no layer."""


def _slots(space: BlockSpace, first_block: int) -> NDArray[np.int64]:
    """Return slots in blocks from `first_block` on, -1 where the prompt's end needs no block."""
    blocks = np.arange(len(PROMPT) // TOKENS)
    wanted = range(*space.needed(len(PROMPT)))
    slots = (first_block + blocks)[:, None] * TOKENS + np.arange(TOKENS)
    slots[[block not in wanted for block in blocks.tolist()]] = -1
    return slots.ravel()


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_groups_in_one_allocation_come_back(layout: str) -> None:
    """What a put stored of each group comes back in other blocks; no other byte changes."""
    spaces = MODEL.spaces(TOKENS)
    device = Backing(pages_of(MODEL, TOKENS, [0, 0, 56]), layout, BLOCKS)
    before = device.memory.copy()
    cache = CacheConfig(tokens_per_block=TOKENS, num_cpu_blocks=64)
    async with KVManager(MODEL, cache) as manager:
        manager.register_kv_caches(device.tensors())
        stored = await manager.put(PROMPT, [_slots(space, 8 * space.group) for space in spaces])
        assert stored.return_mask.all()
        assert np.array_equal(device.memory, before)
        device.memory[:] = np.random.default_rng(9).integers(0, 256, len(before), np.uint8)
        changed = device.memory.copy()
        got = await manager.get(PROMPT, [_slots(space, 24 + 8 * space.group) for space in spaces])
        assert got.return_mask.all()
    found = device.memory.copy()
    device.memory[:] = before
    kept = {layer: view.copy() for layer, view in device.bytes_of.items()}
    device.memory[:] = changed
    for space in spaces:
        for block in range(*space.needed(len(PROMPT))):
            for layer in space.layers:
                target = 24 + 8 * space.group + block
                device.bytes_of[layer][target] = kept[layer][8 * space.group + block]
    assert np.array_equal(found, device.memory)
