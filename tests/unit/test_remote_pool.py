"""The pool that an engine shares, and its generations, over a directory."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from random import Random

import pytest

from flexkv.io.remote.directory import DirectoryStore
from flexkv.io.remote.names import PoolDescription
from flexkv.testing.timed_store import TimedObjects, TimedStore
from flexkv.testing.virtual_time import run_virtual
from flexkv.tiers import remote_pool
from flexkv.tiers.remote_pool import ANSWER_S, SharedPool

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


class SlowStore(TimedStore):
    """A store that takes long for each request."""

    request_s = 0.8 * ANSWER_S

    async def _travel(self) -> None:
        await asyncio.sleep(self.request_s / 2)


def test_a_store_that_is_slow_is_joined(caplog: pytest.LogCaptureFixture) -> None:
    """Attempts get more time until one has enough for all its requests; the log says why."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        pool = SharedPool(SlowStore(TimedObjects(Random(1), 0.0, loop.time)), DESCRIPTION)
        pool.clear(None)
        joining = loop.create_task(pool.run())
        async with asyncio.timeout(20 * ANSWER_S):
            await pool.joined()
        joining.cancel()
        await asyncio.wait([joining])

    with caplog.at_level(logging.WARNING):
        run_virtual(main())
    assert "no answer within 10 s" in caplog.text
