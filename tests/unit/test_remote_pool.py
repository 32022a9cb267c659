"""The pool that an engine shares, and its generations, over a directory."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from flexkv.io.remote.directory import DirectoryStore
from flexkv.io.remote.names import PoolDescription
from flexkv.tiers import remote_pool
from flexkv.tiers.remote_pool import SharedPool

DESCRIPTION = PoolDescription({"model": "a model"}, (64,), 2)


async def test_a_generation_that_was_deleted_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a rule of the bucket deletes the object of the generation in use, it comes back."""
    monkeypatch.setattr(remote_pool, "RENEW_S", 0.01)
    store = DirectoryStore(tmp_path)
    pool = SharedPool(store, DESCRIPTION)
    pool.clear(None)
    running = asyncio.get_running_loop().create_task(pool.run())
    assert (await pool.joined()).description.generation == 1
    generation = tmp_path / pool.base.generations / "1"
    generation.unlink()
    async with asyncio.timeout(20):
        while not generation.exists():  # noqa: ASYNC110 -- another thread makes it
            await asyncio.sleep(0.005)
    later = SharedPool(store, DESCRIPTION)
    joining = asyncio.get_running_loop().create_task(later.run())
    assert (await later.joined()).name == (await pool.joined()).name
    for task in (running, joining):
        task.cancel()
    await asyncio.wait([running, joining])
    store.close()


async def test_who_stops_waiting_for_a_pool_leaves_nothing(tmp_path: Path) -> None:
    """A wait for a pool that is given up keeps nothing alive."""
    store = DirectoryStore(tmp_path)
    pool = SharedPool(store, DESCRIPTION)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pool.joined(), 0.001)
    assert not pool._waiters
    store.close()
