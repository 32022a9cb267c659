"""Tests of cases that once went wrong: tails that fill the host, bad sectors, odd moments."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from errno import EIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv.common.errors import ClosedError, ConfigError, StorageError
from flexkv.common.request import KVResponseStatus
from flexkv.common.terms import Tier
from flexkv.io.ports import Completion
from flexkv.kvmanager import KVManager
from tests.system.conftest import MODEL, PER_BLOCK, bytes_of, cache_config, kv_caches, slots_of

from .clients import started_client

PROMPT = np.arange(16 * PER_BLOCK)


def manager_of(directory: Path, **changes: Any) -> KVManager:
    """Return a manager with a host of eight blocks, and a larger SSD tier."""
    return KVManager(MODEL, cache_config(directory, num_cpu_blocks=8, num_ssd_blocks=64, **changes))


def fail_reads(manager: KVManager, patch: pytest.MonkeyPatch) -> None:
    """Make every transfer of the disk end in EIO."""
    disk = manager.engine._backend.tiers()[0].port
    reap, error = disk.reap, StorageError("planted", 0, EIO)
    patch.setattr(disk, "reap", lambda: [Completion(op_id, error) for op_id, *_ in reap()])


async def test_a_prefix_whose_tail_fills_the_host_is_loaded_as_far_as_it_fits(
    tmp_path: Path,
) -> None:
    """A prompt's tail that fills the host is evicted for its head: eight blocks come, not none."""
    async with manager_of(tmp_path) as manager:
        caches = kv_caches()
        manager.register_kv_caches(caches)
        for blocks in (8, 16):
            tokens = PROMPT[: blocks * PER_BLOCK]
            task, mask = manager.put_match(tokens)
            first = int(mask.argmax()) // PER_BLOCK
            manager.launch([task], [slots_of(range(first, blocks))])
            work = manager._bridge.tasks._find(task).work
            assert work is not None
            await asyncio.wait([work])
            await manager.flush()
            assert task in manager.try_wait([task])
        assert manager.match(PROMPT).tokens > 8 * PER_BLOCK
        expected = bytes_of(caches, range(8))
        response = await manager.get(PROMPT, slots_of(range(32, 48)))
        assert response.status is KVResponseStatus.SUCCESS
        assert int(response.return_mask.sum()) >= 8 * PER_BLOCK
        assert np.array_equal(bytes_of(caches, range(32, 40)), expected)
        assert 1 <= manager.statistics().disk_written_per_hit <= 16


async def test_a_put_longer_than_the_host_reaches_the_ssd_in_parts(tmp_path: Path) -> None:
    """Each put stores what the host has room for, behind what the SSD already has."""
    async with manager_of(tmp_path, write_behind_max_gb=1.0) as manager:
        manager.register_kv_caches(kv_caches())
        for _ in range(2):
            await manager.put(PROMPT, slots_of(range(16)))
            await manager.flush()
        assert manager.statistics().tiers["disk"].ready_blocks == 16


async def test_a_block_that_cannot_be_read_is_forgotten_and_put_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a read error the next put writes the block again, and gets serve it."""
    tokens = PROMPT[: 4 * PER_BLOCK]
    async with manager_of(tmp_path) as manager:
        caches = kv_caches()
        manager.register_kv_caches(caches)
        await manager.put(tokens, slots_of(range(4)))
        await manager.flush()
        for other in (1, 2):
            await manager.put(tokens + 1000 * other, slots_of(range(4)))
            await manager.flush()
        with monkeypatch.context() as patch:
            fail_reads(manager, patch)
            failed = await manager.get(tokens, slots_of(range(8, 12)))
        assert failed.status is KVResponseStatus.FAILED
        assert manager.match(tokens).tokens == 0
        assert manager.statistics().hit_rate == 0
        await manager.put(tokens, slots_of(range(4)))
        assert (await manager.get(tokens, slots_of(range(8, 12)))).return_mask.all()
        assert np.array_equal(bytes_of(caches, range(8, 12)), bytes_of(caches, range(4)))


async def test_a_flush_tells_of_a_write_that_failed_until_it_is_made_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flush reports even an old failed write; its blocks are written once the disk works."""
    async with manager_of(tmp_path) as manager:
        manager.register_kv_caches(kv_caches())
        with monkeypatch.context() as patch:
            fail_reads(manager, patch)
            await manager.put(PROMPT[: 4 * PER_BLOCK], slots_of(range(4)))
            await manager.engine.scheduler.wait_idle()
        with pytest.raises(StorageError, match="planted"):
            await manager.flush()
        async with asyncio.timeout(20.0):
            while manager.statistics().write_behind["disk"].owed_blocks:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert (await manager.flush()).lacking_blocks == {}
        manager.clear(Tier.HOST)
        assert manager.match(PROMPT).tokens == 4 * PER_BLOCK


def test_a_task_waited_for_completely_tells_what_failed_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The response of a put that waits for write-behind is a success with the SSD's error."""
    manager = manager_of(tmp_path)
    manager.start()
    manager.register_kv_caches(kv_caches())
    fail_reads(manager, monkeypatch)
    task = manager.put_async(PROMPT[: 4 * PER_BLOCK], slots_of(range(4)))
    response = manager.wait([task], completely=True)[task]
    assert response.status is KVResponseStatus.SUCCESS
    assert isinstance(response.error, StorageError)
    manager.shutdown()


@pytest.fixture(params=["own", "client"])
def started(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    """Yield a started manager with a device, with an engine of its own or a server's."""
    if request.param == "client":
        with started_client(tmp_path) as made:
            made.register_kv_caches(kv_caches())
            yield made
        return
    manager = manager_of(tmp_path)
    manager.start()
    manager.register_kv_caches(kv_caches())
    yield manager
    manager.shutdown()


def test_a_wait_begun_before_the_launch_ends_with_the_task(started: KVManager) -> None:
    """A wait that begins before another thread launches the task returns its response."""
    task, _ = started.put_match(PROMPT[: 4 * PER_BLOCK])
    got: list[Any] = []
    waiter = threading.Thread(target=lambda: got.append(started.wait([task], timeout=60)))
    waiter.start()
    started.launch([task], [slots_of(range(4))])
    waiter.join(30)
    assert got[0][task].status is KVResponseStatus.SUCCESS


async def test_a_task_cancelled_before_its_first_step_is_answered(tmp_path: Path) -> None:
    """A task that is cancelled in the turn of its issue ends as cancelled."""
    async with manager_of(tmp_path) as manager:
        manager.register_kv_caches(kv_caches())
        task = manager.get_async(PROMPT, slots_of(range(16)))
        manager.cancel([task])
        work = manager._bridge.tasks._find(task).work
        assert work is not None
        await asyncio.wait([work])
        assert manager.try_wait([task])[task].status is KVResponseStatus.CANCELLED


def test_an_id_given_twice_is_one_task(started: KVManager) -> None:
    """A task whose id is given twice is launched once and collected once."""
    tokens = PROMPT[: 4 * PER_BLOCK]
    task, _ = started.put_match(tokens)
    started.launch([task, task], [slots_of(range(4)), slots_of(range(4, 8))])
    assert list(started.wait([task, task])) == [task]
    assert started.statistics().requests["put"] == {"success": 1}


def test_two_threads_may_wait_for_one_task(started: KVManager) -> None:
    """Two threads that wait for one task both get the response."""
    task, _ = started.put_match(PROMPT[: 4 * PER_BLOCK])
    got: list[Any] = []
    waiters = [
        threading.Thread(target=lambda: got.append(started.wait([task], timeout=60)))
        for _ in range(2)
    ]
    for waiter in waiters:
        waiter.start()
    started.launch([task], [slots_of(range(4))])
    for waiter in waiters:
        waiter.join(30)
    assert [answer[task].status for answer in got] == [KVResponseStatus.SUCCESS] * 2


async def test_a_get_whose_filler_gave_up_finds_the_blocks_elsewhere(tmp_path: Path) -> None:
    """A get that joined a put that was cancelled loads the blocks from SSD instead."""
    tokens = PROMPT[: 4 * PER_BLOCK]
    async with manager_of(tmp_path) as manager:
        manager.register_kv_caches(kv_caches())
        await manager.put(tokens, slots_of(range(4)))
        await manager.flush()
        manager.clear(manager.engine.residency.tiers[0])
        put = asyncio.create_task(manager.put(tokens, slots_of(range(4))))
        await asyncio.sleep(0)
        get = asyncio.create_task(manager.get(tokens, slots_of(range(8, 12))))
        await asyncio.sleep(0)
        put.cancel()
        assert (await get).return_mask.all()
        statistics = manager.statistics()
        assert statistics.requests["get"] == {"success": 1}
        assert statistics.hit_rate == 1


def test_a_manager_is_used_once_and_in_one_form(tmp_path: Path) -> None:
    """A manager cannot be used in both forms, nor be opened a second time."""
    manager = manager_of(tmp_path)
    manager.start()

    async def enter() -> None:
        async with manager:
            pass

    with pytest.raises(ConfigError, match="not both"):
        asyncio.run(enter())
    manager.shutdown()
    with pytest.raises(ClosedError, match="opened only once"):
        manager.start()
    with pytest.raises(ClosedError, match="opened only once"):
        asyncio.run(enter())


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda m: m.match(np.array([1, 2**63 + 5], np.uint64)), "token_ids"),
        (lambda m: m.match(PROMPT, "\ud800"), "namespace"),
        (lambda m: m.get_match(PROMPT, [[True], [True, False]]), "token_mask"),
    ],
)
def test_bad_input_names_its_field(
    started: KVManager, call: Callable[[KVManager], object], field: str
) -> None:
    """Bad input raises a ConfigError with the name of the argument."""
    with pytest.raises(ConfigError) as caught:
        call(started)
    assert caught.value.field == field
