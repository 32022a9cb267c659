"""Tests that a server that an engine has launched outlives the engine, but not for long."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from flexkv.cli import serve
from flexkv.common.config import Settings
from flexkv.common.errors import BackendUnavailableError, ConfigError
from flexkv.common.request import Operation
from flexkv.process.wakeups import SLICE_NS, scheduling_of
from flexkv.server import launch
from flexkv.server.launch import LaunchedServer, ProcessHandle
from flexkv.server.listen import Listener

from .conftest import MODEL
from .serving import BLOCKS, Instance, eventually, settings_in


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Return settings with all files in the test's folder."""
    return settings_in(tmp_path)


def engine(settings: Settings, pipe: Connection) -> None:
    """Launch a server, put a prompt, fork a child that inherits all descriptors, and stay."""
    server = LaunchedServer(MODEL, settings)
    instance = Instance(settings)
    instance.begin()
    assert instance.request(Operation.PUT, 1, range(BLOCKS)).moved == BLOCKS
    child = os.fork()
    if not child:
        time.sleep(600)
    pipe.send((server.pid, child))
    time.sleep(600)


@pytest.fixture
def begun(settings: Settings) -> Iterator[tuple[psutil.Process, psutil.Process, psutil.Process]]:
    """Yield an engine in a process of its own, its server, and its child."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=engine, args=(settings, theirs))
    process.start()
    theirs.close()
    assert ours.poll(60)
    server, child = (psutil.Process(pid) for pid in ours.recv())
    yield psutil.Process(process.pid), server, child
    for each in (child, server):
        if each.is_running():
            each.kill()
    process.kill()
    process.join()


def gone(process: psutil.Process) -> bool:
    """Return whether a process has ended, reaped or not."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def check_left_in_order(settings: Settings) -> None:
    """Check that nothing is left of a server but its SSD tier, which is warm."""
    folder = Path(settings.server_recv_port.removeprefix("ipc://")).parent
    assert list(folder.glob("socket*")) == []
    again = LaunchedServer(MODEL, settings)
    instance = Instance(settings)
    before = instance.content(range(BLOCKS))
    instance.begin()
    assert instance.client.match(instance.keys(1)).by_tier == {"disk": BLOCKS}
    assert instance.request(Operation.GET, 1, range(20, 20 + BLOCKS)).moved == BLOCKS
    np.testing.assert_array_equal(instance.content(range(20, 20 + BLOCKS)), before)
    instance.close()
    again.close()
    assert again.exit_status == 0


Begun = tuple[psutil.Process, psutil.Process, psutil.Process]


def test_a_server_is_in_no_tree_of_its_engine(begun: Begun) -> None:
    """A server is neither in its engine's process tree nor in its session or process group."""
    engine, server, child = begun
    assert child in engine.children(recursive=True)
    assert server not in engine.children(recursive=True)
    assert os.getsid(server.pid) == os.getpgid(server.pid) == server.pid


def test_a_server_runs_soon_after_it_wakes(settings: Settings) -> None:
    """The loop's thread has asked for a short time slice; the server's other threads have not."""
    server = LaunchedServer(MODEL, settings)
    loop, *others = sorted(int(name) for name in os.listdir(f"/proc/{server.pid}/task"))
    slice_ns = scheduling_of(loop).slice_ns
    assert slice_ns in (SLICE_NS, 0)  # kernels before 6.12 have no slices
    assert others
    assert all(scheduling_of(each).slice_ns > slice_ns or not slice_ns for each in others)
    server.close()


@pytest.mark.parametrize("whole_tree", [False, True], ids=["engine", "tree"])
def test_a_server_whose_engine_is_killed_writes_what_it_has_and_ends(
    begun: Begun, settings: Settings, whole_tree: bool
) -> None:
    """A server whose engine is killed writes all and ends, even if a child keeps the pipe open."""
    engine, server, child = begun
    for each in [*engine.children(recursive=True), engine] if whole_tree else [engine]:
        each.kill()
    eventually(lambda: gone(server), within_s=60)
    assert gone(child) is whole_tree
    check_left_in_order(settings)


def test_a_server_ends_when_its_engine_is_a_zombie(begun: Begun, settings: Settings) -> None:
    """A server ends when its engine is a zombie, which nobody may ever reap."""
    engine, server, _ = begun
    engine.kill()
    eventually(lambda: engine.status() == psutil.STATUS_ZOMBIE)
    eventually(lambda: gone(server), within_s=60)
    check_left_in_order(settings)


def test_a_server_that_was_killed_is_told_from_one_that_ended(settings: Settings) -> None:
    """A launcher can tell whether its server was killed or ended well, though it is no parent."""
    server = LaunchedServer(MODEL, settings)
    assert (server.has_ended, server.exit_status) == (False, None)
    os.kill(server.pid, signal.SIGKILL)
    eventually(lambda: server.has_ended)
    assert server.exit_status == 1
    server.close()
    server.close()
    again = LaunchedServer(MODEL, settings)
    again.close()
    assert (again.has_ended, again.exit_status) == (True, 0)


def test_a_server_that_does_not_end_is_killed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that does not end in time is killed, and its address can be used again."""
    server = LaunchedServer(MODEL, settings)
    os.kill(server.pid, signal.SIGSTOP)
    monkeypatch.setattr(launch, "END_S", 0.2)
    server.close()
    assert server.exit_status == 1
    monkeypatch.undo()
    check_ends_well(LaunchedServer(MODEL, settings))


def check_ends_well(server: LaunchedServer) -> None:
    """End a server, and check that nothing was wrong with it."""
    server.close()
    assert server.exit_status == 0


def test_a_server_waits_for_one_that_is_ending(settings: Settings) -> None:
    """A new server waits for one that is ending, which keeps its address while it writes."""
    ending = Listener(Path(settings.server_recv_port.removeprefix("ipc://")))
    timer = threading.Timer(0.5, ending.close)
    timer.start()
    server = LaunchedServer(MODEL, settings)
    assert timer.finished.is_set()
    check_ends_well(server)


def test_a_server_that_may_not_wait_is_refused_at_once(settings: Settings) -> None:
    """A server that must not wait, since a scheduler's step launches it, is refused at once."""
    ending = Listener(Path(settings.server_recv_port.removeprefix("ipc://")))
    with pytest.raises(ConfigError, match="in use by another server"):
        LaunchedServer(MODEL, settings, waits=False)
    ending.close()


def test_a_server_does_not_wait_for_an_address_that_it_cannot_have(tmp_path: Path) -> None:
    """An address that is a file is refused at once."""
    (tmp_path / "socket").write_text("mine")
    with pytest.raises(ConfigError, match="is not a socket"):
        LaunchedServer(MODEL, settings_in(tmp_path))


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the kernel refuse pidfds."""

    def refused(*_: Any) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", refused)


@pytest.fixture
def sleeping() -> Iterator[subprocess.Popen[bytes]]:
    """Yield a process that does nothing."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("descriptors", [True, False])
def test_a_process_is_watched_with_and_without_its_descriptor(
    sleeping: subprocess.Popen[bytes], request: pytest.FixtureRequest, descriptors: bool
) -> None:
    """A killed process has ended, whether it was reaped or not, with pidfds and without them."""
    if not descriptors:
        request.getfixturevalue("blind")
    watch = ProcessHandle(sleeping.pid)
    assert (watch.fd >= 0) is descriptors
    assert not watch.has_ended
    assert not watch.wait(0.1)
    watch.signal(signal.SIGKILL)
    assert watch.wait(10)
    assert watch.has_ended
    sleeping.wait()
    assert watch.has_ended
    watch.signal(signal.SIGKILL)
    watch.close()
    watch.close()


def test_a_process_that_never_was_has_ended(blind: None) -> None:
    """A process id that nobody has counts as ended: it may be an old one."""
    assert ProcessHandle(1 << 22).has_ended


async def test_a_parent_is_looked_at_where_the_kernel_does_not_tell_of_it(
    sleeping: subprocess.Popen[bytes], blind: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without pidfds the parent is checked at intervals; our stdin stays open."""
    monkeypatch.setattr(serve, "LOOK_S", 0.01)
    read, write = os.pipe()
    with os.fdopen(read) as stdin, os.fdopen(write):
        monkeypatch.setattr(sys, "stdin", stdin)
        ended = asyncio.Event()
        serve._on_end(ended.set, ProcessHandle(sleeping.pid))
        await asyncio.sleep(0.05)
        assert not ended.is_set()
        sleeping.kill()
        async with asyncio.timeout(10):
            await ended.wait()
        asyncio.get_running_loop().remove_reader(read)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("cpu", {"num_cpu_blocks": 1 << 30}),
        ("ssd_cache_dir", {"ssd_cache_dir": "/proc/flexkv", "strict": True}),
    ],
)
def test_a_server_that_cannot_have_what_it_needs_says_so_at_its_start(
    tmp_path: Path, field: str, changes: dict[str, Any]
) -> None:
    """If a server cannot start, its launcher gets the error with its field, and nothing is left."""
    settings = settings_in(tmp_path, **changes)
    with pytest.raises(ConfigError) as caught:
        LaunchedServer(MODEL, settings)
    assert field in caught.value.field
    assert caught.value.field != "server_recv_port"
    check_ends_well(
        LaunchedServer(MODEL, settings_in(tmp_path))
    )  # nothing is left of the failed one


def test_a_server_listens_when_its_files_are_its_own(settings: Settings, tmp_path: Path) -> None:
    """A strict server refuses another engine's directory by name, before it listens."""
    first = LaunchedServer(MODEL, settings)
    cache = settings.cache_config.model_copy(update={"strict": True})
    other = Settings(server_recv_port=f"ipc://{tmp_path}/other", cache_config=cache)
    with pytest.raises(ConfigError, match="in use") as caught:
        LaunchedServer(MODEL, other)
    assert caught.value.field == "ssd_cache_dir"
    assert not (tmp_path / "other").exists()
    check_ends_well(first)


def test_a_server_that_dies_before_it_listens_is_not_waited_for(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a server dies silently before it listens, as without memory, its launcher says so."""
    says_its_id = "import os; os.write(1, b'%d\\n' % os.getpid())"
    monkeypatch.setattr(launch, "_BETWEEN", says_its_id)
    with pytest.raises(BackendUnavailableError, match="ended before it listened"):
        LaunchedServer(MODEL, settings)


def test_a_server_that_is_not_waited_for_tells_later(settings: Settings) -> None:
    """A server need not be waited for at its launch, so that a scheduler's step can launch it."""
    server = LaunchedServer(MODEL, settings, is_awaited=False)
    eventually(server.look, within_s=60)
    assert server.look()
    check_ends_well(server)


def test_a_launch_that_hangs_holds_no_step(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch that hangs delays no step, and ending it takes a bounded time."""
    monkeypatch.setattr(launch, "_BETWEEN", "import time; time.sleep(20)")
    monkeypatch.setattr(launch, "END_S", 0.1)
    server = LaunchedServer(MODEL, settings, is_awaited=False)
    between = psutil.Process(server._between.pid)
    for _ in range(3):
        assert not server.look()
        assert not server.has_ended
    assert between.is_running()
    server.close()
    assert not between.is_running()
    assert (server.has_ended, server.exit_status, server.pid) == (True, 1, 0)
    server.close()


def test_a_launch_that_cannot_fork_leaves_nothing(settings: Settings) -> None:
    """A launch for which descriptors are lacking raises that error, and closes what it opened."""
    highest = max(map(int, os.listdir("/proc/self/fd")))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as opened:
        fillers = [opened.enter_context(open(os.devnull, "rb"))]
        while fillers[-1].fileno() <= highest:  # free numbers between those in use are taken, too
            fillers.append(opened.enter_context(open(os.devnull, "rb")))
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (fillers[-1].fileno() + 1, hard))
        fillers[-1].close()
        before = os.listdir("/proc/self/fd")
        with pytest.raises(OSError, match="Too many open files"):
            LaunchedServer(MODEL, settings, is_awaited=False)
        assert os.listdir("/proc/self/fd") == before


def test_a_server_whose_pipes_have_high_numbers_is_launched(settings: Settings) -> None:
    """A server can be launched when no low descriptor is free, as with thousands of connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    with ExitStack() as opened:
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(1100):
            opened.enter_context(open(os.devnull, "rb"))
        server = LaunchedServer(MODEL, settings)
        assert server.look()
        check_ends_well(server)
