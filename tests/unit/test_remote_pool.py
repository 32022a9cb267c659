"""The pool that an engine shares, and its generations, over a directory."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Iterator
from errno import EIO
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import cast
from unittest.mock import MagicMock

import pytest

from flexkv.common.errors import StorageError
from flexkv.common.terms import Tier
from flexkv.index.residency import Residency
from flexkv.io.remote.directory import DirectoryStore
from flexkv.io.remote.names import PoolDescription
from flexkv.testing.timed_store import TimedObjects, TimedStore
from flexkv.testing.virtual_time import run_virtual
from flexkv.tiers import remote_pool
from flexkv.tiers.generation import Generation
from flexkv.tiers.generation_changes import GenerationChanges, NodeActions
from flexkv.tiers.remote import RemoteTier
from flexkv.tiers.remote_pool import ANSWER_S, CLEARS_MAX, NOTE, SharedPool
from flexkv.tiers.ssd_note import SsdNote

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


class Restored:
    """An index that has blocks on SSD of an earlier run."""

    tiers = (Tier.HOST, Tier.DISK)

    def counts(self, tier: Tier) -> SimpleNamespace:
        """Return that some blocks are there."""
        return SimpleNamespace(ready=int(tier is Tier.DISK))


class Engines:
    """Engines that are started again, each with an SSD tier of its own, and share a store."""

    def __init__(self, folder: Path) -> None:
        self.store = DirectoryStore(folder / "store")
        self.cleared: list[str] = []
        self._folder = folder

    def start(self, name: str, has_blocks: bool = True) -> SharedPool:
        """Start an engine, whose SSD tier has blocks or not."""
        (self._folder / name).mkdir(exist_ok=True)
        pool = SharedPool(self.store, DESCRIPTION, [self._folder / name])
        if has_blocks:
            pool.restore(cast(Residency, Restored()))

        def clear_engine() -> None:
            self.cleared.append(name)
            pool.clear(None)

        pool.clear_engine = clear_engine
        return pool

    def note(self, name: str) -> Path:
        """Return the note beside an engine's SSD tier."""
        return self._folder / name / NOTE


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[Engines]:
    """Yield engines over an empty store; none of them runs yet."""
    made = Engines(tmp_path)
    yield made
    made.store.close()


async def test_blocks_of_before_a_clear_of_another_engine_get_into_no_later_pool(
    engines: Engines,
) -> None:
    """An engine that starts again forgets its SSD tier if another one was cleared since then."""
    assert await generation_of(engines.start("away", has_blocks=False)) == 0
    cleared = engines.start("cleared", has_blocks=False)
    cleared.clear(None)
    assert await generation_of(cleared) == 1
    for _ in range(2):
        assert await generation_of(engines.start("away")) == 1
        assert engines.cleared == ["away"]
    assert await generation_of(engines.start("cleared")) == 1
    assert engines.cleared == ["away"]


async def test_the_tiers_are_cleared_before_a_later_generation_is_noted(engines: Engines) -> None:
    """If the clear of the SSD tier does not last, the next run clears it again."""

    async def fails() -> None:
        assert engines.cleared
        raise StorageError("a journal", 0, EIO)

    engines.start("other", has_blocks=False).clear(None)
    cleared = engines.start("cleared", has_blocks=False)
    cleared.clear(None)
    assert await generation_of(cleared) == 1
    pool = engines.start("away")
    pool.ssd_cleared = fails
    assert await generation_of(pool) == 1
    assert not engines.note("away").exists()
    assert await generation_of(engines.start("away")) == 1
    assert engines.cleared == ["away"] * 2
    assert engines.note("away").exists()


async def test_a_note_that_cannot_be_written_keeps_no_engine_from_the_store(
    engines: Engines, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory that is gone, or a disk that hangs, costs a warning."""
    pool = engines.start("engine", has_blocks=False)
    engines.note("engine").parent.rmdir()
    assert await generation_of(pool) == 0
    assert "ENOENT" in caplog.text
    monkeypatch.setattr(remote_pool, "NOTE_S", 0.01)
    pool = engines.start("engine", has_blocks=False)
    pool.ssd_cleared = asyncio.get_running_loop().create_future
    assert await generation_of(pool) == 0
    assert "not finished within" in caplog.text


async def test_a_generation_that_the_store_has_lost_is_begun_again(
    engines: Engines, tmp_path: Path
) -> None:
    """Engines that start later find it then, so that they do not join an older one."""
    cleared = engines.start("cleared", has_blocks=False)
    cleared.clear(None)
    assert await generation_of(cleared) == 1
    (tmp_path / "store" / cleared.base.generations / "1").unlink()
    assert await generation_of(engines.start("cleared")) == 1
    assert await generation_of(engines.start("later", has_blocks=False)) == 1
    assert engines.cleared == []


@pytest.mark.parametrize("line", ["", "1", "1 elsewhere", "one file", "\xff", "-1 file"])
async def test_a_note_of_another_store_is_not_believed(engines: Engines, line: str) -> None:
    """Blocks whose generation is not known count as older than every clear."""
    cleared = engines.start("cleared", has_blocks=False)
    cleared.clear(None)
    assert await generation_of(cleared) == 1
    engines.start("engine")
    engines.note("engine").write_text(line, "latin-1")
    assert await generation_of(engines.start("engine")) == 1
    assert engines.cleared == ["engine"]


async def test_an_engine_of_a_cluster_stays_in_the_pool_of_its_blocks(engines: Engines) -> None:
    """The cluster says what is cleared: a lone clear of another engine is nothing to this one."""
    for era in (0, 2):
        member = engines.start("member", has_blocks=False)
        if era:
            member.follow(era)
        assert await generation_of(member) == era * CLEARS_MAX
        cleared = engines.start("cleared", has_blocks=False)
        if era:
            cleared.follow(era)
            assert await generation_of(cleared) == era * CLEARS_MAX
        cleared.clear(None)
        assert await generation_of(cleared) == era * CLEARS_MAX + 1
        for name, is_apart in (("member", False), ("cleared", True)):
            again = engines.start(name)
            again.stay(era, is_apart)
            assert await generation_of(again) == era * CLEARS_MAX + is_apart
    assert engines.cleared == []


async def test_an_engine_that_was_cleared_alone_is_in_a_generation_of_its_own(
    engines: Engines,
) -> None:
    """If it ended before that was noted, it begins one when it starts again."""
    member = engines.start("engine", has_blocks=False)
    member.follow(2)
    assert await generation_of(member) == 2 * CLEARS_MAX
    again = engines.start("engine")
    again.stay(2, True)
    assert await generation_of(again) == 2 * CLEARS_MAX + 1


async def test_an_engine_with_blocks_of_an_earlier_run_stores_none_of_them_after_a_reset(
    tmp_path: Path,
) -> None:
    """The store may show a reset before the engine hears of it, and has cleared its blocks."""
    store = DirectoryStore(tmp_path)
    others, away, fresh = (SharedPool(store, DESCRIPTION) for _ in range(3))
    others.follow(3)
    assert await generation_of(others) == 3 * CLEARS_MAX
    away.stay(2, False)
    assert await generation_of(away) == 2 * CLEARS_MAX
    away.follow(3)
    assert await generation_of(away) == await generation_of(fresh) == 3 * CLEARS_MAX
    store.close()


async def test_an_engine_of_a_cluster_does_not_go_back_to_before_its_own_clears(
    engines: Engines,
) -> None:
    """Without a note it may have been cleared since the first generation: it joins the latest.

    The note is gone after a run without the remote tier, or with another store. The tiers are
    cleared then, and the engine goes on sharing.
    """
    cleared = engines.start("engine", has_blocks=False)
    cleared.clear(None)
    assert await generation_of(cleared) == 1
    engines.note("engine").unlink()
    again = engines.start("engine")
    generation = Generation(())
    generation.has_restored, generation.name = True, 1
    plane, resynced = MagicMock(), []
    plane.follower.resync = lambda: resynced.append(engines.cleared[:])

    def clear_engine() -> None:
        again.clear_engine()
        generation.clear(None)

    async def ssd_cleared() -> None:
        pass

    actions = NodeActions(clear_engine, ssd_cleared, *[lambda: None] * 3)
    remote = cast(RemoteTier, SimpleNamespace(stay=again.stay))
    GenerationChanges(generation, plane, remote, actions)
    assert await generation_of(again) == 1
    assert resynced == [["engine"]]
    assert generation.is_sharing


async def test_what_was_cleared_stays_cleared_if_that_could_not_be_noted(
    engines: Engines,
) -> None:
    """An engine of a cluster that is restarted joins no pool that it has left."""

    async def fails() -> None:
        raise StorageError("a journal", 0, EIO)

    member = engines.start("engine", has_blocks=False)
    member.follow(2)
    assert await generation_of(member) == 2 * CLEARS_MAX
    for clears in (1, 2):
        member.clear(None)
        if clears == 2:
            member.ssd_cleared = fails
        assert await generation_of(member) == 2 * CLEARS_MAX + clears
    again = engines.start("engine")
    again.stay(2, True)
    assert await generation_of(again) > 2 * CLEARS_MAX + 1


def test_a_disk_that_hangs_leaves_the_latest_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that hangs and ends late does not displace one that was asked for after it."""
    note, hangs, goes_on = SsdNote([tmp_path], NOTE), threading.Event(), threading.Event()
    sync = os.fsync

    def hang(descriptor: int) -> None:
        if not hangs.is_set():
            hangs.set()
            assert goes_on.wait(60)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", hang)
    writers = [threading.Thread(target=note.write, args=(line,)) for line in ("1", "2")]
    writers[0].start()
    assert hangs.wait(60)
    writers[1].start()
    goes_on.set()
    for writer in writers:
        writer.join()
    assert note.read() == "2"
