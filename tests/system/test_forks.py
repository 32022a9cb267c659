"""Tests of a forked child: its calls fail at once, and nothing that it does reaches the parent."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv.common.errors import ClosedError
from flexkv.common.request import KVResponseStatus, Operation
from flexkv.common.terms import Tier
from flexkv.kvmanager import KVManager
from flexkv.metrics import MetricsServer

from .conftest import MODEL, PER_BLOCK, MakeManager, bytes_of, cache_config, kv_caches, slots_of
from .forked import forked_server
from .serving import BLOCKS, Instance, settings_in

PROMPT = np.arange(10 * PER_BLOCK)
SLOTS = slots_of(range(10))
CHILD_S = 20
"""A child that takes longer is killed, and its test fails."""


def in_child(work: Callable[[], None]) -> None:
    """Run a function in a forked child, and fail with its traceback if it fails."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:  # pragma: no cover -- only the parent measures
        status = 1
        try:
            signal.alarm(CHILD_S)
            work()
            status = 0
        except BaseException:  # noqa: BLE001 -- the parent reports it
            os.write(writer, traceback.format_exc().encode())
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as told:
        words = told.read().decode()
    _, status = os.waitpid(child, 0)
    assert status == 0, words or f"killed by signal {os.WTERMSIG(status)}"


def refused(call: Callable[[], Any]) -> None:
    """Check that a call raises an error that names the fork."""
    with pytest.raises(ClosedError, match=f"belongs to process {os.getppid()}.*fork"):
        call()


def calls_of(manager: KVManager, task_id: int) -> Iterator[Callable[[], Any]]:
    """Yield every call of a manager that is not awaited."""
    yield from (
        manager.start, manager.shutdown, manager.is_ready, manager.reset, manager.clear,
        manager.statistics, manager.trace_start, manager.trace_stop, manager._bridge.nudge_device,
        manager.suspend_device_blocking,
        lambda: manager.register_kv_caches(kv_caches()),
        lambda: manager.resume_device(kv_caches()),
        lambda: manager.match(PROMPT),
        lambda: manager.explain("get", PROMPT),
        lambda: manager.resize(Tier.HOST, 5),
        lambda: manager.set_quota("a", Tier.HOST, 5),
        lambda: manager.namespace_blocks("a"),
        lambda: manager.pin(PROMPT),
        lambda: manager.unpin(1),
        lambda: manager.unpin_owner("a"),
        lambda: manager.get_match(PROMPT),
        lambda: manager.put_match(PROMPT),
        lambda: manager.get_async(PROMPT, SLOTS),
        lambda: manager.put_async(PROMPT, SLOTS),
        lambda: manager.prefetch_async(PROMPT),
        lambda: manager.get_layerwise(PROMPT, SLOTS),
        lambda: manager.put_layerwise(PROMPT, SLOTS),
        lambda: manager.launch(task_id, SLOTS),
        lambda: manager.cancel(task_id),
        lambda: manager._bridge.cancel_soon(task_id),
        lambda: manager.wait(task_id),
        lambda: manager.try_wait(task_id),
        manager.engine.statistics,
        lambda: manager.engine.is_open,
    )  # fmt: skip


def awaitables_of(manager: KVManager) -> Iterator[Callable[[], Any]]:
    """Yield every call of a manager that is awaited."""
    yield from (
        lambda: manager.get(PROMPT, SLOTS),
        lambda: manager.put(PROMPT, SLOTS),
        lambda: manager.prefetch(PROMPT),
        manager.flush,
        manager.suspend_device,
        lambda: manager._bridge.task_response(1),
        manager.__aenter__,
        manager.engine.close,
    )


async def _raised(call: Callable[[], Any]) -> None:
    with pytest.raises(ClosedError, match="fork"):
        await call()


def descriptors_of(tmp_path: Path) -> list[str]:
    """Return the names of this process's descriptors that may be a manager's."""
    names = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            name = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
        if str(tmp_path) in name or "anon_inode" in name or "memfd" in name or "socket" in name:
            names.append(name)
    return sorted(names)


@pytest.mark.parametrize("changes", [{}, {"iouring_entries": 0}, {"ssd_scrub_mb_per_s": 1}])
def test_every_call_in_a_child_names_the_fork(
    make_manager: MakeManager, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Each call in a child names the fork; the child has no descriptors, and the parent goes on."""
    before = descriptors_of(tmp_path)
    manager = make_manager(**changes)
    manager.start()
    caches = kv_caches()
    manager.register_kv_caches(caches)
    manager.trace_start(tmp_path / "trace")
    task_id, _ = manager.put_match(PROMPT)
    layerwise = manager.get_layerwise(PROMPT, SLOTS)
    was = bytes_of(caches, range(10))

    def work() -> None:
        assert descriptors_of(tmp_path) == before
        for call in calls_of(manager, task_id):
            refused(call)
        for await_one in awaitables_of(manager):
            asyncio.run(_raised(await_one))
        refused(lambda: layerwise.wait_for_layer(0))

    in_child(work)
    manager.launch(task_id, SLOTS)
    assert manager.wait(task_id)[task_id].return_mask.all()
    manager.reset()
    put = manager.wait(manager.put_async(PROMPT, SLOTS), completely=True)
    assert [each.status for each in put.values()] == [KVResponseStatus.SUCCESS]
    got = manager.wait(manager.get_async(PROMPT, slots_of(range(20, 30))))
    assert all(each.return_mask.all() for each in got.values())
    assert (bytes_of(caches, range(20, 30)) == was).all()
    manager.shutdown()


async def test_every_call_of_a_manager_on_the_callers_loop_names_the_fork(
    make_manager: MakeManager, tmp_path: Path
) -> None:
    """Also within the manager's own task every call in a child names the fork; leaving works."""
    async with make_manager() as manager:
        manager.register_kv_caches(kv_caches())
        await manager.put(PROMPT, SLOTS)

        def work() -> None:
            for call in calls_of(manager, 1):
                refused(call)
            for await_one in awaitables_of(manager):
                waiting = await_one().__await__()
                refused(lambda waiting=waiting: next(waiting))  # type: ignore[misc]
            leaving = manager.__aexit__(None, None, None).__await__()
            with pytest.raises(StopIteration):
                next(leaving)

        in_child(work)
        assert (await manager.flush()).lacking_blocks == {}
        assert (await manager.get(PROMPT, slots_of(range(10, 20)))).return_mask.all()


def test_the_locks_are_free_when_the_parent_has_shut_down(
    make_manager: MakeManager, tmp_path: Path
) -> None:
    """Locks, files and port are free after the parent's shutdown, whatever a child inherited."""
    manager = make_manager()
    manager.start()
    manager.register_kv_caches(kv_caches())
    manager.trace_start(tmp_path / "trace")
    metrics = MetricsServer(manager, 0)
    port = int(metrics.url.split(":")[2].split("/")[0])
    child = multiprocessing.get_context("fork").Process(target=signal.pause)
    child.start()
    try:
        metrics.close()
        manager.shutdown()
        again = KVManager(MODEL, cache_config(tmp_path / "ssd"))
        again.start()
        again.trace_start(tmp_path / "trace")
        MetricsServer(again, port).close()
        again.shutdown()
    finally:
        child.kill()
        child.join()


def test_metrics_in_a_child_say_that_the_engine_is_not_here(make_manager: MakeManager) -> None:
    """A child's metrics say that no engine is up; closing them there does not affect the parent."""
    manager = make_manager()
    manager.start()
    metrics = MetricsServer(manager, 0)

    def work() -> None:
        assert [m.samples[0].value for m in metrics.metrics.collect()] == [0]
        refused(metrics.close)
        metrics.__exit__()

    in_child(work)
    metrics.close()
    manager.shutdown()


def test_a_manager_that_is_not_started_may_be_started_in_a_child(make_manager: MakeManager) -> None:
    """A manager that was made before a fork, but not started, may be started in each child."""
    manager = make_manager()

    def work() -> None:
        manager.start()
        manager.register_kv_caches(kv_caches())
        assert manager.wait(manager.put_async(PROMPT, SLOTS))
        manager.shutdown()

    in_child(work)
    in_child(work)


def test_a_client_and_an_agent_belong_to_their_process(tmp_path: Path) -> None:
    """A client's and an agent's calls in a child name the fork; the parent's connections go on."""
    settings = settings_in(tmp_path)
    server = forked_server(settings)
    instance = Instance(settings)
    instance.begin()
    client, keys = instance.client, instance.keys(1)
    before = instance.content(range(BLOCKS))
    assert instance.request(Operation.PUT, 1, range(BLOCKS)).moved == BLOCKS

    def work() -> None:
        for call in (
            lambda: client.match(keys), lambda: client.ask(keys), client.poll, client.changes,
            client.flush, lambda: client.release([1]), lambda: client.answer(1),
            lambda: client.cancel([1]), lambda: client.give_up("no reason"), client.close,
        ):  # fmt: skip
            refused(call)
        refused(instance.agents[0].close)
        assert not [name for name in descriptors_of(tmp_path) if "socket" in name]

    in_child(work)
    assert instance.request(Operation.GET, 1, range(BLOCKS, 2 * BLOCKS)).moved == BLOCKS
    for was, now in zip(before, instance.content(range(BLOCKS, 2 * BLOCKS)), strict=True):
        assert (was == now).all()
    instance.close()
    server.close()
    assert server.exit_status == 0


SCRIPT = """
import asyncio, atexit, multiprocessing, os, sys, weakref
os.environ["FLEXKV_LOG_LEVEL"] = "error"
import numpy as np
from flexkv.kvmanager import KVManager
from tests.system.conftest import MODEL, PER_BLOCK, cache_config, kv_caches, slots_of
from pathlib import Path

PROMPT, SLOTS = np.arange(10 * PER_BLOCK), slots_of(range(10))
manager = KVManager(MODEL, cache_config(Path(sys.argv[1])))

def parent_goes_on(child):
    assert os.waitpid(child, 0)[1] == 0
"""

THREAD_FORM = """
manager.start()
manager.register_kv_caches(kv_caches())
atexit.register(manager.shutdown)
class Holder: pass
holder = Holder()
weakref.finalize(holder, manager.shutdown)
child = os.fork()
if not child:
    sys.exit()
parent_goes_on(child)
assert manager.wait(manager.put_async(PROMPT, SLOTS), completely=True)
manager.shutdown()
"""

LOOP_FORM = """
async def main():
    async with manager:
        manager.register_kv_caches(kv_caches())
        waits = asyncio.ensure_future(manager.put(PROMPT, SLOTS))
        await asyncio.sleep(0)
        child = os.fork()
        if not child:
            sys.exit()
        parent_goes_on(child)
        await waits
        for number in range(3):
            await manager.put(PROMPT + 1000 * number, SLOTS)
        await manager.flush()
        got = await manager.get(PROMPT, slots_of(range(10, 20)))
        assert got.return_mask.all()
asyncio.run(main())
"""

PROCESS_FORM = """
manager.start()
manager.register_kv_caches(kv_caches())
def child():
    global manager
    del manager
for _ in range(3):
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 0
assert manager.wait(manager.put_async(PROMPT, SLOTS), completely=True)
manager.shutdown()
"""


@pytest.mark.parametrize("form", [THREAD_FORM, LOOP_FORM, PROCESS_FORM])
def test_a_child_exits_silently_and_the_parent_goes_on(form: str, tmp_path: Path) -> None:
    """A child exits silently despite exit callbacks, finalizers, `__del__` or a running loop."""
    done = subprocess.run(
        [sys.executable, "-W", "always::ResourceWarning", "-W", "ignore::DeprecationWarning",
         "-c", SCRIPT + textwrap.dedent(form), str(tmp_path / "ssd")],
        capture_output=True, text=True, timeout=60, check=False,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
