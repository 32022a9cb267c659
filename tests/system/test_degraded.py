"""Tests of a tier that fails or hangs: others serve, callers are answered in time, it recovers."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from errno import EIO, ENOSPC
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv.common.config import CacheConfig
from flexkv.common.errors import ConfigError, DeadlineError, StorageError
from flexkv.common.request import KVResponseStatus, Operation
from flexkv.common.terms import Tier
from flexkv.engine.engine import Engine
from flexkv.io.ports import Completion
from flexkv.kvmanager import KVManager
from flexkv.testing.fakes import FakePort
from flexkv.testing.faults import FaultPlan
from flexkv.testing.simulated_groups import TOKENS_PER_BLOCK
from flexkv.testing.virtual_time import VirtualTimeLoop
from tests.system.conftest import MODEL, PER_BLOCK, bytes_of, cache_config, kv_caches, slots_of
from tests.system.test_keeping import A, B, on_engine, perform, put, resident

C = A + 5000
QUICK = FaultPlan(1, 0.0, 0.0001, 0.001)


def disk_of(engine: Engine) -> FakePort:
    """Return the fake port that moves the bytes."""
    port = engine._backend.tiers()[0].port
    assert isinstance(port, FakePort)
    return port


async def get(engine: Engine, tokens: Any, seconds: float = 5.0) -> tuple[KVResponseStatus, int]:
    """Get a prompt within some seconds; return the status, and how many blocks came."""
    async with asyncio.timeout(seconds):
        response = await perform(engine, Operation.GET, tokens)
    return response.status, int(response.return_mask.sum()) // TOKENS_PER_BLOCK


async def on_disk_only(engine: Engine, *prompts: Any) -> None:
    """Store prompts, and clear host memory."""
    for tokens in prompts:
        await put(engine, tokens)
    engine.retention.clear(Tier.HOST)


def test_a_disk_that_hangs_costs_its_own_blocks_only() -> None:
    """Only gets of a hung disk's blocks fail, first at the deadline, then at once; it comes back.

    The hung reads keep their host places for these 30 s.
    """

    async def work(engine: Engine) -> None:
        await on_disk_only(engine, A, B)
        await put(engine, C)
        disk = disk_of(engine)
        disk._faults = FaultPlan(1, 0.0, 30.0, 30.0)
        first, joined = (asyncio.ensure_future(get(engine, A)) for _ in range(2))
        assert await first == (KVResponseStatus.FAILED, 0)
        assert (await joined)[1] == 0
        statistics = engine.statistics().tiers["disk"]
        assert (statistics.reads, statistics.writes) == ("hung", "hung")
        assert engine.residency.counts(Tier.HOST).reserved == 4
        disk._faults = QUICK  # a new transfer would be quick, but none may come
        submitted = disk.in_flight
        for _ in range(5):
            assert await get(engine, B, 0.1) == (KVResponseStatus.NOTFOUND, 0)
            assert await get(engine, A, 0.1) == (KVResponseStatus.NOTFOUND, 0)
            assert await get(engine, C, 0.1) == (KVResponseStatus.SUCCESS, 4)
            assert engine.match(A).tokens == 0
        with pytest.raises(DeadlineError):  # it is in host memory, but not on SSD
            await put(engine, C + 9000)
        assert disk.in_flight == submitted
        await asyncio.sleep(31)
        assert await get(engine, A) == (KVResponseStatus.SUCCESS, 4)
        assert await get(engine, B) == (KVResponseStatus.SUCCESS, 4)
        assert engine.statistics().tiers["disk"].reads == "up"
        await put(engine, C + 12_000)
        assert engine.statistics().tiers["disk"].writes == "up"

    on_engine(work, host=32, disk=64, io_deadline_s=2.0)


def test_a_disk_that_hung_comes_back_whatever_became_of_its_ops(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A hung disk is used again once it answers, even if every late op was partly recalled."""
    monkeypatch.setattr("flexkv.tiers.limits.DISK_READ_PIECE_BYTES", 16)

    async def work(engine: Engine) -> None:
        await on_disk_only(engine, A)
        disk_of(engine)._faults = FaultPlan(1, 0.0, 30.0, 30.0)
        assert (await get(engine, A))[0] is KVResponseStatus.FAILED
        disk_of(engine)._faults = QUICK
        assert engine.statistics().tiers["disk"].reads == "hung"
        await asyncio.sleep(31)
        assert await get(engine, A) == (KVResponseStatus.SUCCESS, 4)

    window_mb = 16 / 2**20
    on_engine(work, host=32, disk=64, io_deadline_s=2.0, disk_read_window_mb=window_mb)


def test_a_write_that_hangs_is_told_by_flush() -> None:
    """flush does not wait for a disk that hangs: it raises at the deadline."""

    async def work(engine: Engine) -> None:
        disk_of(engine)._faults = FaultPlan(1, 0.0, 30.0, 30.0)
        with pytest.raises(DeadlineError):
            await put(engine, A)
        assert resident(engine, A) == 4
        disk_of(engine)._faults = QUICK
        await asyncio.sleep(31)
        await put(engine, B)

    on_engine(work, host=32, disk=64, io_deadline_s=2.0)


def fail_with(engine: Engine, errno: int) -> Any:
    """Make every transfer of the disk fail; return a function that undoes this."""
    disk = disk_of(engine)
    reap, error = disk.reap, StorageError("planted", 0, errno)
    patch = pytest.MonkeyPatch()
    patch.setattr(disk, "reap", lambda: [Completion(op_id, error) for op_id, *_ in reap()])
    return patch.undo


def test_a_disk_that_fails_again_and_again_is_left_alone_for_a_while() -> None:
    """After three failed reads none is tried; after a pause one is, and reads are back."""

    async def work(engine: Engine) -> None:
        prompts = [A + 100 * number for number in range(6)]
        await on_disk_only(engine, *prompts)
        repair = fail_with(engine, EIO)
        for tokens in prompts[:3]:
            assert (await get(engine, tokens))[0] is KVResponseStatus.FAILED
        assert engine.statistics().tiers["disk"].reads == "down"
        assert engine.statistics().tiers["disk"].writes == "up"
        assert (await get(engine, prompts[3]))[0] is KVResponseStatus.NOTFOUND
        repair()
        await asyncio.sleep(1.1)
        assert await get(engine, prompts[3]) == (KVResponseStatus.SUCCESS, 4)
        assert engine.statistics().tiers["disk"].reads == "up"

    on_engine(work, host=32, disk=64)


def test_a_full_disk_stops_writes_and_not_reads() -> None:
    """While the disk is full, puts stop at host memory, and blocks on disk are still read."""

    async def work(engine: Engine) -> None:
        await put(engine, A)
        repair = fail_with(engine, ENOSPC)
        for number in range(1, 4):
            with pytest.raises(StorageError):
                await put(engine, A + 100 * number)
        repair()
        assert engine.statistics().tiers["disk"].writes == "down"
        written = engine.statistics().routes["host→disk"].ops
        with pytest.raises(StorageError):
            await put(engine, A + 900)
        assert engine.statistics().routes["host→disk"].ops == written
        assert resident(engine, A + 900) == 4
        engine.retention.clear(Tier.HOST)
        assert await get(engine, A) == (KVResponseStatus.SUCCESS, 4)
        await asyncio.sleep(1.1)
        await put(engine, B)
        assert engine.statistics().tiers["disk"].writes == "up"

    on_engine(work, host=32, disk=64)


@pytest.fixture
def small_filesystem(tmp_path: Path) -> Iterator[Path]:
    """Mount a real file system of 1 MiB."""
    mounted = tmp_path / "small"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs", str(mounted)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("this process may not mount")
    yield mounted
    # Lazily, since the kernel releases an io_uring's files a little after the ring is closed.
    subprocess.run(["umount", "--lazy", str(mounted)], check=True)


async def test_a_filesystem_that_is_full_stops_writes_alone(small_filesystem: Path) -> None:
    """On a full file system with sparse files puts stop at the host; written blocks stay good."""
    cache = cache_config(
        small_filesystem, num_cpu_blocks=512, num_ssd_blocks=2048, ssd_preallocate=False
    )
    prompt = np.arange(8 * PER_BLOCK)
    async with KVManager(MODEL, cache) as manager:
        caches = kv_caches()
        manager.register_kv_caches(caches)
        failed: list[int] = []
        for number in range(60):
            await manager.put(prompt + 1000 * number, slots_of(range(8)))
            try:
                await manager.flush()
            except StorageError as error:
                failed.append(error.errno)
        assert set(failed) == {ENOSPC}
        assert manager.statistics().tiers["disk"].writes == "down"
        on_disk = manager.statistics().tiers["disk"].ready_blocks
        assert 64 <= on_disk < 480
        manager.clear(Tier.HOST)
        response = await manager.get(prompt, slots_of(range(32, 40)))
        assert response.return_mask.all()
        assert np.array_equal(bytes_of(caches, range(32, 40)), bytes_of(caches, range(8)))


def test_preallocation_that_does_not_fit_is_refused(small_filesystem: Path) -> None:
    """A tier whose preallocation does not fit is refused."""
    with pytest.raises(ConfigError, match=r"needs 8\.00 MB more in"):
        asyncio.run(opened(cache_config(small_filesystem, num_ssd_blocks=2048)))


async def opened(cache: CacheConfig) -> None:
    """Open a manager, and close it."""
    async with KVManager(MODEL, cache):
        pass


def test_closing_while_a_read_is_late_waits_for_it() -> None:
    """Closing waits for a late read, since hardware may still write to its memory."""

    async def work(engine: Engine) -> None:
        await on_disk_only(engine, A)
        disk_of(engine)._faults = FaultPlan(1, 0.0, 10.0, 10.0)
        assert (await get(engine, A))[0] is KVResponseStatus.FAILED

    on_engine(work, host=32, disk=64, io_deadline_s=0.5)


def test_a_close_that_was_cancelled_can_be_done_again() -> None:
    """A close that was cancelled while it waited for hardware can be repeated, and ends then."""

    async def work(engine: Engine) -> None:
        await on_disk_only(engine, A)
        disk_of(engine)._faults = FaultPlan(1, 0.0, 10.0, 10.0)
        assert (await get(engine, A))[0] is KVResponseStatus.FAILED
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.close(), 1.0)
        assert not engine.is_open
        await engine.close()
        assert disk_of(engine)._closed

    on_engine(work, host=32, disk=64, io_deadline_s=0.5)


def test_a_loop_that_was_held_is_not_a_disk_that_hangs() -> None:
    """A blocked loop makes no disk look hung, since each check first reaps transfers that ended."""

    async def work(engine: Engine) -> None:
        await on_disk_only(engine, A)
        disk_of(engine)._faults = FaultPlan(1, 0.0, 0.9, 0.9)
        waits = asyncio.ensure_future(get(engine, A, 1000.0))
        await asyncio.sleep(0.1)
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        loop._virtual.now_s += 100.0
        assert await waits == (KVResponseStatus.SUCCESS, 4)
        assert engine.statistics().tiers["disk"].reads == "up"

    on_engine(work, host=32, disk=64, io_deadline_s=2.0)


def test_a_disk_that_hung_is_tried_as_soon_as_what_hung_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A hung disk is tried as soon as its transfer has ended, even if recalled, and not before."""
    monkeypatch.setattr("flexkv.tiers.limits.DISK_READ_PIECE_BYTES", 16)

    async def work(engine: Engine) -> None:
        await on_disk_only(engine, A, B)
        disk = disk_of(engine)
        disk._faults = FaultPlan(1, 0.0, 1010.0, 1010.0)
        assert (await get(engine, A, 1000.0))[0] is KVResponseStatus.FAILED
        assert engine.statistics().queues["disk"].inbound_bytes_in_flight == 16
        disk._faults = QUICK
        submit, submitted = disk.submit, []
        monkeypatch.setattr(disk, "submit", lambda each: (submitted.append(each), submit(each)))
        while disk.in_flight:
            assert engine.statistics().tiers["disk"].reads == "hung"
            assert (await get(engine, B))[0] is KVResponseStatus.NOTFOUND
            await asyncio.sleep(0.5)
        assert not submitted, "what hung is begun anew"
        assert await get(engine, B) == (KVResponseStatus.SUCCESS, 4)

    window_mb = 16 / 2**20
    on_engine(work, host=32, disk=64, io_deadline_s=100.0, disk_read_window_mb=window_mb)


def test_one_request_tries_a_disk_that_was_left_alone_and_others_wait_for_its_end() -> None:
    """After the pause a single read tries the disk; other requests are answered without it."""

    async def work(engine: Engine) -> None:
        prompts = [A + 100 * number for number in range(6)]
        await on_disk_only(engine, *prompts)
        repair = fail_with(engine, EIO)
        for tokens in prompts[:3]:
            assert (await get(engine, tokens))[0] is KVResponseStatus.FAILED
        repair()
        await asyncio.sleep(1.1)
        disk_of(engine)._faults = FaultPlan(1, 0.0, 0.3, 0.3)
        trial = asyncio.ensure_future(get(engine, prompts[3]))
        await asyncio.sleep(0.1)
        assert (await get(engine, prompts[4], 0.1))[0] is KVResponseStatus.NOTFOUND
        assert await trial == (KVResponseStatus.SUCCESS, 4)
        assert await get(engine, prompts[4]) == (KVResponseStatus.SUCCESS, 4)

    on_engine(work, host=32, disk=64)


def test_one_read_that_hangs_is_noticed_among_others_that_do_not() -> None:
    """A read that hangs is noticed while others go on, since the oldest one's deadline counts."""

    async def work(engine: Engine) -> None:
        others = [A + 100 * number for number in range(1, 15)]
        await on_disk_only(engine, A, *others)
        disk = disk_of(engine)
        disk._faults = FaultPlan(1, 0.0, 30.0, 30.0)
        hangs = asyncio.ensure_future(get(engine, A, 10.0))
        await asyncio.sleep(0.1)
        disk._faults = FaultPlan(1, 0.0, 0.5, 0.5)
        reads = []
        for tokens in others:  # one of them is always under way
            reads.append(asyncio.ensure_future(get(engine, tokens, 10.0)))
            await asyncio.sleep(0.2)
        assert hangs.done()
        assert await hangs == (KVResponseStatus.FAILED, 0)
        for read in reads:
            await read

    on_engine(work, host=80, disk=80, io_deadline_s=2.0)


@pytest.mark.parametrize("piece_bytes", [16, 1024])
def test_a_write_that_hung_is_told_by_one_flush_only(
    piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only one flush reports a hung write, even if it ends later, whole or partly recalled."""
    monkeypatch.setattr("flexkv.tiers.limits.DISK_WRITE_PIECE_BYTES", piece_bytes)

    async def work(engine: Engine) -> None:
        disk_of(engine)._faults = FaultPlan(1, 0.0, 30.0, 30.0)
        await perform(engine, Operation.PUT, A)
        await asyncio.sleep(0.1)
        disk_of(engine)._faults = QUICK
        with pytest.raises(DeadlineError):
            await engine.flush()
        assert disk_of(engine).in_flight
        await asyncio.sleep(31)
        assert not disk_of(engine).in_flight
        await engine.flush()

    window_mb = piece_bytes / 2**20
    on_engine(work, host=32, disk=64, io_deadline_s=2.0, disk_write_window_mb=window_mb)
