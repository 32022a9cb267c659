"""Tests of managers that are clients, when calls are cancelled and servers stop or vanish."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np

from flexkv.common.request import KVResponseStatus
from flexkv.kvmanager import KVManager

from .caches import MODEL, PER_BLOCK, bytes_of, kv_caches, slots_of
from .forked import forked_server
from .serving import settings_in

PROMPT = np.arange(1000, 1000 + 10 * PER_BLOCK)
SLOTS = slots_of(range(10))


async def test_a_get_that_is_cancelled_at_once_touches_no_slots(tmp_path: Path) -> None:
    """A task that is cancelled in the step that started it never writes to its slots."""
    settings = settings_in(tmp_path, server_client_mode=True)
    server = forked_server(settings, MODEL)
    async with KVManager(MODEL, settings=settings) as manager:
        caches = kv_caches()
        manager.register_kv_caches(caches)
        assert (await manager.put(PROMPT, SLOTS)).return_mask.all()
        before = bytes_of(caches, range(20, 30)).copy()
        task = manager.get_async(PROMPT, slots_of(range(20, 30)))
        manager.cancel(task)
        while not (over := manager.try_wait(task)):
            await asyncio.sleep(0)
        assert over[task].status is KVResponseStatus.CANCELLED
        assert (await manager.get(PROMPT, slots_of(range(40, 50)))).return_mask.all()
        assert np.array_equal(bytes_of(caches, range(20, 30)), before)
        assert manager.statistics().requests["get"] == {"success": 1}
    server.close()
