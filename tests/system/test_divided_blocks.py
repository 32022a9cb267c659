"""Blocks that engines divide for their attention kernels: which devices find them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv.common.config import ModelConfig
from flexkv.common.errors import ConfigError
from flexkv.kvmanager import KVManager

from .conftest import PER_BLOCK, cache_config, slots_of
from .test_device_order import TARGETS, caches_in
from .test_devices import PROMPT, SHAPE


def divided(form: str, splits: int) -> list[Any]:
    """Return caches whose blocks are `splits` smaller ones, behind K and V or around them."""
    outer = {"outside": (2, 64, splits), "inside": (64, splits, 2)}[form]
    caches = caches_in("tokens heads")
    return [each.reshape(*outer, PER_BLOCK // splits, 2, 8) for each in caches]


async def test_blocks_that_are_divided_otherwise_are_other_blocks(tmp_path: Path) -> None:
    """Divided blocks are found only by devices whose bytes come in the same order."""
    model, found, loaded = ModelConfig(**SHAPE, num_kv_heads=2), list[int](), list[Any]()
    whole = caches_in("tokens heads")
    for caches, refused in (
        (divided("inside", 2), divided("inside", 4)),
        (divided("inside", 4), whole),
        (whole, divided("inside", 2)),
        (divided("outside", 2), divided("inside", 2)),
        (divided("inside", 2), divided("outside", 2)),
    ):
        async with KVManager(model, cache_config(tmp_path)) as manager:
            manager.register_kv_caches(caches)
            found.append(manager.match(PROMPT).tokens)
            await manager.put(PROMPT, slots_of(range(10)))
            await manager.get(PROMPT, slots_of(TARGETS))
            loaded.append(caches[0])
            await manager.flush()
            await manager.suspend_device()
            with pytest.raises(ConfigError, match="element order as before"):
                manager.resume_device(refused)
            manager.resume_device(caches)
    assert found == [0, 0, 0, len(PROMPT), len(PROMPT)]
    for layer in loaded[2:4]:
        read = layer.reshape(2, 64, PER_BLOCK, 2, 8)[:, [*TARGETS]]
        assert np.array_equal(read, whole[0][:, :10])
    first, last = (layer[[*TARGETS]] for layer in (loaded[0], loaded[-1]))
    assert np.array_equal(first, last)


async def test_ranks_that_divide_blocks_otherwise_are_refused(tmp_path: Path) -> None:
    """All ranks need kernel blocks of one size, unless the order of their bytes is the same."""
    model = ModelConfig(**SHAPE, num_kv_heads=4, tp_size=2)
    async with KVManager(model, cache_config(tmp_path)) as manager:
        manager.register_kv_caches(divided("inside", 2))
        for other in (divided("inside", 4), caches_in("tokens heads"), divided("outside", 2)):
            with pytest.raises(ConfigError, match="as the other ranks: splits=2 kv tokens"):
                manager.register_kv_caches(other, tp_rank=1)
        manager.register_kv_caches(divided("inside", 2), tp_rank=1)
    async with KVManager(model, cache_config(tmp_path / "other")) as manager:
        manager.register_kv_caches(divided("outside", 2))
        manager.register_kv_caches(caches_in("tokens heads"), tp_rank=1)
        assert manager.is_ready()
