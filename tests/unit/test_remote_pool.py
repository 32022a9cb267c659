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
from flexkv.tiers.remote_pool import ANSWER_S, CLEARS_MAX, SharedPool

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


async def generation_of(pool: SharedPool) -> int:
    """Return the generation that a pool joins, or is in."""
    running = asyncio.get_running_loop().create_task(pool.run())
    joined = await pool.joined()
    running.cancel()
    await asyncio.wait([running])
    return joined.description.generation


async def test_a_clear_outlives_a_restart_in_a_cluster_that_was_reset(tmp_path: Path) -> None:
    """What an engine has cleared after a reset, it does not read when it is started again."""
    store = DirectoryStore(tmp_path)
    first, again, other = (SharedPool(store, DESCRIPTION) for _ in range(3))
    first.follow(5)
    assert await generation_of(first) == 5 * CLEARS_MAX
    first.clear(None)
    assert await generation_of(first) == 5 * CLEARS_MAX + 1
    again.follow(5)
    assert await generation_of(again) == 5 * CLEARS_MAX + 1
    other.follow(6)
    assert await generation_of(other) == 6 * CLEARS_MAX
    store.close()


async def test_a_clear_before_a_reset_is_seen_begins_no_generation_behind_it(
    tmp_path: Path,
) -> None:
    """An engine that has not heard of a reset writes nothing where the others go after it."""
    store = DirectoryStore(tmp_path)
    late, early, after = (SharedPool(store, DESCRIPTION) for _ in range(3))
    assert await generation_of(late) == 0
    early.follow(1)
    assert await generation_of(early) == CLEARS_MAX
    late.clear(None)
    assert await generation_of(late) == 1
    after.follow(1)
    assert await generation_of(after) == CLEARS_MAX
    late.follow(1)
    assert await generation_of(late) == CLEARS_MAX
    store.close()


async def test_an_engine_with_blocks_of_an_earlier_run_stores_none_of_them_after_a_reset(
    tmp_path: Path,
) -> None:
    """The store may show a reset before the engine hears of it, and has cleared its blocks."""
    store = DirectoryStore(tmp_path)
    others, away, fresh = (SharedPool(store, DESCRIPTION) for _ in range(3))
    others.follow(3)
    assert await generation_of(others) == 3 * CLEARS_MAX
    away.stay(2)
    assert await generation_of(away) == 2 * CLEARS_MAX
    away.follow(3)
    assert await generation_of(away) == await generation_of(fresh) == 3 * CLEARS_MAX
    store.close()
