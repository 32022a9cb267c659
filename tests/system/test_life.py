"""Tests of failures, shutdown under load and the README: nobody waits for ever."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading
from errno import EIO
from pathlib import Path

import numpy as np
import pytest

from flexkv.actors.actor import TransferActor
from flexkv.common.errors import ClosedError, InternalError, StorageError, TransferError
from flexkv.common.request import KVResponse, KVResponseStatus
from flexkv.engine.admission import Admission
from flexkv.io.ports import Completion
from flexkv.testing.virtual_time import DeadlockError, run_virtual

from .conftest import PER_BLOCK, MakeManager, kv_caches, slots_of

PROMPT = np.arange(10 * PER_BLOCK)
ROOT = Path(__file__).parents[2]


async def test_an_actor_that_fails_ends_every_wait(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If an actor fails, waiters and later calls get an InternalError, and close returns."""

    def broken(self: TransferActor) -> None:
        raise RuntimeError("planted")

    manager = make_manager()
    async with manager:
        manager.register_kv_caches(kv_caches())
        monkeypatch.setattr(TransferActor, "_turn", broken)
        with pytest.raises(InternalError, match="planted"):
            await manager.put(PROMPT, slots_of(range(10)))
        with pytest.raises(InternalError):
            manager.match(PROMPT)


async def test_a_port_that_fails_a_transfer_shortens_the_hit(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read error shortens the answer, which names it, and leaves no claim."""
    async with make_manager() as manager:
        manager.register_kv_caches(kv_caches())
        for start in range(0, 500_000, 100_000):
            await manager.put(PROMPT + start, slots_of(range(10)))
            await manager.flush()
        disk = manager.engine._backend.tiers()[0].port
        reap = disk.reap

        def failing() -> list[Completion]:
            error = TransferError(-1, "disk→host", 1, "planted")
            return [Completion(op_id, error) for op_id, *_ in reap()]

        monkeypatch.setattr(disk, "reap", failing)
        response = await manager.get(PROMPT, slots_of(range(20, 30)))
        assert response.status is KVResponseStatus.FAILED
        assert "planted" in str(response.error)
        assert manager.statistics().claims == 0
        assert manager.statistics().routes["disk→host"].failed_ops > 0


async def test_flush_tells_of_writes_that_failed(
    make_manager: MakeManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """flush raises if a write failed after its put was answered; the host serves the blocks."""
    async with make_manager() as manager:
        manager.register_kv_caches(kv_caches())
        disk = manager.engine._backend.tiers()[0].port
        reap = disk.reap
        error = StorageError("planted", 0, EIO)
        monkeypatch.setattr(disk, "reap", lambda: [Completion(t, error) for t, *_ in reap()])
        assert (await manager.put(PROMPT, slots_of(range(10)))).return_mask.all()
        with pytest.raises(StorageError, match="planted at byte 0: EIO"):
            await manager.flush()
        assert manager.statistics().tiers["disk"].used_blocks == 0
        assert (await manager.get(PROMPT, slots_of(range(20, 30)))).return_mask.all()


async def test_a_call_from_another_loop_ends_when_the_engine_stops(
    make_manager: MakeManager,
) -> None:
    """A call from another loop ends during the shutdown: answered, cancelled or a ClosedError."""
    for _ in range(20):
        manager = make_manager()
        manager.start()
        manager.register_kv_caches(kv_caches())
        putting = asyncio.ensure_future(manager.put(PROMPT, slots_of(range(10))))
        await asyncio.sleep(0)
        await asyncio.to_thread(manager.shutdown)
        (outcome,) = await asyncio.gather(putting, return_exceptions=True)
        assert isinstance(outcome, ClosedError | asyncio.CancelledError | KVResponse)


def test_shutdown_under_load_from_other_threads_ends_every_call(make_manager: MakeManager) -> None:
    """Threads that put and wait while another shuts down all return or get a ClosedError."""
    manager = make_manager(requests_max=2)
    manager.start()
    manager.register_kv_caches(kv_caches())
    ready = threading.Barrier(5)

    def worker(number: int) -> None:
        ready.wait()
        try:
            for turn in range(1000):
                tokens = PROMPT + (number * 1000 + turn) * 1000
                manager.wait(manager.put_async(tokens, slots_of(range(10))))
        except ClosedError:
            pass

    threads = [threading.Thread(target=worker, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    ready.wait()
    manager.shutdown()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)
    manager.shutdown()


async def test_a_cancelled_call_from_another_loop_waits_for_the_hardware(
    make_manager: MakeManager,
) -> None:
    """A call cancelled on another loop ends after its work on the engine's; no claim is left."""
    manager = make_manager()
    manager.start()
    try:
        manager.register_kv_caches(kv_caches())
        await manager.put(PROMPT, slots_of(range(10)))
        for _ in range(10):
            getting = asyncio.ensure_future(manager.get(PROMPT, slots_of(range(20, 30))))
            await asyncio.sleep(0)
            getting.cancel()
            await asyncio.wait([getting])
        await manager.flush()
        assert manager.statistics().claims == 0
    finally:
        manager.shutdown()


async def test_admission_is_fair_bounded_and_closes() -> None:
    """Admission is first come, first served; cancelled waiters are passed over; closing refuses."""
    admission = Admission(1)
    await admission.enter()
    order: list[int] = []

    async def visitor(number: int) -> None:
        await admission.enter()
        order.append(number)
        admission.leave()

    visitors = [asyncio.ensure_future(visitor(number)) for number in range(4)]
    await asyncio.sleep(0)
    assert admission.waiting == 4
    visitors[1].cancel()
    await asyncio.sleep(0)
    admission.leave()
    visitors[0].cancel()
    await asyncio.wait(visitors)
    assert order == [2, 3]
    await admission.enter()
    late = asyncio.ensure_future(admission.enter())
    await asyncio.sleep(0)
    admission.close()
    with pytest.raises(ClosedError):
        await late
    with pytest.raises(ClosedError):
        await admission.enter()


def test_the_virtual_loop_sees_a_deadlock() -> None:
    """On the virtual loop a wait that nothing can end raises; virtual time takes no real time."""

    async def sleeps() -> float:
        await asyncio.sleep(1e6)
        return asyncio.get_running_loop().time()

    assert run_virtual(sleeps()) >= 1e6

    async def waits() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(DeadlockError):
        run_virtual(waits())


def test_the_example_in_the_readme_runs(tmp_path: Path) -> None:
    """The README's example runs as it stands; its directory is made there, for its user alone."""
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(example)
    told = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "KVResponse(success, 64 of 64 tokens)" in told.stdout
    assert told.stderr == ""
    assert (tmp_path / "flexkv-ssd").stat().st_mode & 0o777 == 0o700
