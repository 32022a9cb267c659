"""Managers in each of their forms, and device memory with known bytes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flexkv.common.config import CacheConfig, ModelConfig
from flexkv.common.request import KVResponse
from flexkv.kvmanager import KVManager

PER_BLOCK = 4
DEVICE_BLOCKS = 64
MODEL = ModelConfig(num_layers=3, num_kv_heads=2, head_size=8, dtype="float16")


def cache_config(directory: Path, **changes: Any) -> CacheConfig:
    """Give a small two-tier configuration."""
    values: dict[str, Any] = {
        "tokens_per_block": PER_BLOCK,
        "num_cpu_blocks": 32,
        "num_ssd_blocks": 128,
        "ssd_cache_dir": str(directory),
        "evict_ratio": 0.0,
    }
    return CacheConfig(**{**values, **changes})


def kv_caches(seed: int = 0) -> list[NDArray[np.float16]]:
    """Give per-layer caches [2, blocks, tokens, heads, dim] of random bytes."""
    shape = (2, DEVICE_BLOCKS, PER_BLOCK, MODEL.num_kv_heads, MODEL.head_size)
    random = np.random.default_rng(seed)
    return [
        random.integers(0, 1 << 16, shape, np.uint16).view(np.float16)
        for _ in range(MODEL.num_layers)
    ]


def slots_of(blocks: Any) -> NDArray[np.int64]:
    """Give the slots of whole device blocks."""
    return (np.asarray(blocks)[:, None] * PER_BLOCK + np.arange(PER_BLOCK)).ravel()


def bytes_of(caches: list[NDArray[np.float16]], blocks: Any) -> NDArray[np.uint16]:
    """Give a copy of the content of device blocks."""
    return np.stack([layer[:, list(blocks)].view(np.uint16).copy() for layer in caches])


def open_fds() -> int:
    """Count this process's file descriptors."""
    return len(os.listdir("/proc/self/fd"))


class Rig:
    """A manager, its device, and get and put in one of the three forms."""

    def __init__(self, manager: KVManager, form: str) -> None:
        self.manager = manager
        self.form = form
        self.caches = kv_caches()
        manager.register_kv_caches(self.caches)

    async def request(self, operation: str, *args: Any, **named: Any) -> KVResponse:
        """Do a get, put or prefetch in the rig's form."""
        if self.form != "task":
            response: KVResponse = await getattr(self.manager, operation)(*args, **named)
            return response
        task_id = getattr(self.manager, f"{operation}_async")(*args, **named)
        waited = await asyncio.to_thread(self.manager.wait, [task_id])
        return waited[task_id]


FORMS = ["loop", "thread", "task"]


@pytest.fixture(params=FORMS)
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    """A rig in each form; closing it must leave no descriptor behind."""
    before = open_fds()
    manager = KVManager(MODEL, cache_config(tmp_path))
    if request.param == "loop":
        async with manager:
            yield Rig(manager, request.param)
    else:
        manager.start()
        try:
            yield Rig(manager, request.param)
        finally:
            manager.shutdown()
    assert open_fds() <= before + (request.param == "task")  # to_thread keeps its executor


MakeManager = Callable[..., KVManager]


@pytest.fixture
def make_manager(tmp_path: Path) -> MakeManager:
    """Make managers over one SSD directory, with changes to their cache configuration."""
    return lambda **changes: KVManager(MODEL, cache_config(tmp_path, **changes))
