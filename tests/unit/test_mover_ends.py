"""Tests of the end of a mover: its requests, its process, and the memory of its window."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import gc
import logging
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from subprocess import TimeoutExpired

import pytest

from flexkv.common.errors import RemoteError
from flexkv.mover import life as lives
from flexkv.mover import mover as movers
from flexkv.mover.codes import NOT_FOUND
from flexkv.mover.life import END_S, TERMINATE_S
from flexkv.mover.window import Window
from flexkv.mover.wire import (
    Begin,
    Done,
    Get,
    Ready,
    Refused,
)
from tests.mover_rig import PATIENCE_S, SIZES, Played, Rig, playing, settled


@pytest.fixture
async def rig(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    """Yield a store without a mover."""
    with playing(monkeypatch) as made:
        yield made


async def test_a_mover_that_does_not_answer_is_killed(rig: Rig) -> None:
    """A request that is not answered in time fails, and its mover is killed."""
    rig.store.mover.sizes = SIZES._replace(answer_s=0.05)
    process = await rig.begun()
    with pytest.raises(RemoteError, match=r"not answered for 0\.05 s"):
        await rig.store.head("name")
    assert process.is_killed


NOEXEC_SEAL = 8
"""The kernel's number, from Linux 6.3 on."""


class Unreapable(Played):
    """A process that the kernel cannot end yet: it waits for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.can_end = threading.Event()
        self.waited: list[float | None] = []

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status, once it ends."""
        self.waited.append(timeout)
        if timeout is not None:
            raise TimeoutExpired("mover", timeout)
        assert threading.current_thread() is not threading.main_thread()
        assert self.can_end.wait(PATIENCE_S)
        return 0


@pytest.mark.parametrize("is_ready", [False, True])
async def test_a_mover_that_does_not_end_holds_nobody_up(rig: Rig, is_ready: bool) -> None:
    """A close gives a mover that is connected a limited time, and others none; both are killed."""
    rig.kind = Unreapable
    rig.store.mover.life()
    process = rig.process
    assert isinstance(process, Unreapable)
    if is_ready:
        process.say(Ready())
        await settled()
    rig.store.close()
    assert process.is_killed
    limits_s = [END_S, TERMINATE_S] if is_ready else []
    assert [each for each in process.waited if each is not None] == limits_s
    assert process.is_terminated == is_ready
    process.can_end.set()


class Leaving(Played):
    """A process that leaves the store when the test lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.has_left = threading.Event()

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status, once it has left."""
        assert threading.current_thread() is not threading.main_thread()
        assert self.has_left.wait(PATIENCE_S)
        return 0


async def test_a_mover_that_leaves_holds_up_no_loop(rig: Rig) -> None:
    """While a store waits for its mover to leave, the loop goes on; the close does not wait."""
    rig.kind = Leaving
    process = await rig.begun()
    assert isinstance(process, Leaving)
    await settled()
    leaving = asyncio.ensure_future(rig.store.leave())
    await settled()
    assert not leaving.done()
    with pytest.raises(RemoteError, match="it was closed"):
        await rig.store.head("name")
    process.has_left.set()
    await leaving
    assert not process.is_killed
    rig.store.close()


async def test_a_mover_that_does_not_leave_is_killed(rig: Rig) -> None:
    """Leaving takes a limited time; then the process is killed, and a thread waits for its end."""
    rig.kind = Unreapable
    process = await rig.begun()
    assert isinstance(process, Unreapable)
    await settled()
    await rig.store.leave()
    assert process.is_killed
    assert process.waited[:2] == [END_S, TERMINATE_S]
    process.can_end.set()


class Stubborn(Played):
    """A process that does not leave by itself, and ends when it is terminated."""

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status, once it is terminated."""
        if not self.is_terminated:
            raise TimeoutExpired("mover", timeout or 0.0)
        return 0


@pytest.mark.parametrize("is_closed", [True, False])
async def test_a_mover_that_does_not_leave_is_terminated_before_it_is_killed(
    rig: Rig, is_closed: bool
) -> None:
    """A process that ends after it was terminated is not killed."""
    rig.kind = Stubborn
    process = await rig.begun()
    await settled()
    if is_closed:
        rig.store.close()
    else:
        await rig.store.leave()
    assert process.is_terminated
    assert not process.is_killed


async def test_a_mover_can_end_when_no_thread_can_start(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request over a broken connection fails as one of the store, also at the thread limit."""
    process = await rig.begun()
    await settled()

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        process.theirs.close()
        with pytest.raises(RemoteError, match="it takes no requests"):
            await rig.store.head("name")
    assert process.is_killed


@pytest.mark.parametrize("end", ["refused", "malformed", "closed"])
async def test_the_end_of_a_mover_fails_what_waits(rig: Rig, end: str) -> None:
    """A mover that refuses, breaks the protocol or goes away fails every request, with a reason."""
    rig.store.mover.life()
    process = rig.process
    assert isinstance(await process.asked(), Begin)
    waiting = [rig.store.get("name", 0, 9), asyncio.ensure_future(rig.store.head("name"))]
    await settled()
    if end == "refused":
        process.say(Refused("no such device"))
    elif end == "malformed":
        process.theirs.send(b"\xc1\x00")
    else:
        process.theirs.close()
    for each in waiting:
        with pytest.raises(RemoteError) as failed:
            await each
        assert not failed.value.is_lasting
        assert (end != "refused") or "no such device" in str(failed.value)
    assert process.is_killed


async def test_a_mover_that_cannot_start_is_started_less_and_less_often(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each failed start doubles the pause; requests during the pause fail at once."""
    monkeypatch.setattr(movers, "PAUSE_S", 1000.0)
    monkeypatch.setattr(movers, "PAUSE_MAX_S", 3000.0)
    mover = rig.store.mover
    for pause_s in (1000.0, 2000.0, 3000.0):
        mover._not_before_s = 0.0
        mover.life()
        rig.process.say(Refused("no"))
        await mover.life().ended
        await settled()
        assert pause_s - 100 < mover.pause_s <= pause_s
        with pytest.raises(RemoteError, match="its mover is not there: no"):
            mover.life()
    assert mover.lives == 3


async def test_a_mover_that_cannot_be_started_is_logged(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If no process can be started, the log says why, as when one has ended."""

    def refuse(window_fd: int, answer_s: float) -> None:
        raise OSError(errno.EAGAIN, "no process is left")

    monkeypatch.setattr(lives, "_started", refuse)
    with caplog.at_level(logging.WARNING), pytest.raises(RemoteError, match="no process is left"):
        rig.store.mover.life()
    assert "mover_ended" in caplog.text
    assert "no process is left" in caplog.text


async def test_a_mover_that_dies_while_a_slot_is_filled_fails_the_put(rig: Rig) -> None:
    """The bytes are copied to the window of the life that has ended; then the put fails."""
    process = await rig.begun()
    go = threading.Event()
    for _ in range(2):
        rig.store._fillers.submit(go.wait, PATIENCE_S)
    putting = asyncio.ensure_future(rig.store.put("name", [b"x" * 100]))
    await settled()
    life = rig.store.mover.life()
    process.theirs.close()
    await life.ended
    go.set()
    with pytest.raises(RemoteError, match="its process has ended"):
        await putting


async def test_a_store_that_is_closed_before_a_slot_is_filled_fails_the_put(rig: Rig) -> None:
    """A put whose slot can be filled by no thread any more ends with an error of the store."""
    process = await rig.begun()
    life = rig.store.mover.life()
    gets = [rig.store.get("name", 0, 9) for _ in range(SIZES.slots)]
    request = await process.asked()
    assert isinstance(request, Get)
    putting = asyncio.ensure_future(rig.store.put("name", [b"x"]))
    await settled()
    process.say(Done(request.number, NOT_FOUND))
    life._read()
    life._grant()
    rig.process.is_killed = True  # so that it ends in time
    rig.store.close()
    with pytest.raises(RemoteError, match="it was closed"):
        await putting
    await asyncio.wait(gets)
    assert all(get.exception() for get in gets)


async def test_a_get_that_is_answered_as_the_mover_ends_is_done(rig: Rig) -> None:
    """What has arrived before the end of the life can be read after it."""
    process = await rig.begun()
    life = rig.store.mover.life()
    get = rig.store.get("name", 0, 9)
    request = await process.asked()
    assert isinstance(request, Get)
    process.say(Done(request.number, 9))
    life._read()
    life.end("the test ends it")
    await settled()
    assert get.done()
    assert len(memoryview((await get)[0])) == 9


async def test_the_last_body_of_a_life_unmaps_its_window(rig: Rig) -> None:
    """After the end of a life, its window is mapped as long as somebody has bytes of it."""
    process = await rig.begun()
    life = rig.store.mover.life()
    number = os.fstat(life._window.fd).st_ino

    def is_open() -> bool:
        descriptors = [f"/proc/self/fd/{each}" for each in os.listdir("/proc/self/fd")]
        files = {os.stat(each).st_ino for each in descriptors if os.path.exists(each)}
        is_mapped = f" {number} " in Path("/proc/self/maps").read_text()
        assert is_mapped == (number in files)
        return is_mapped

    get = rig.store.get("name", 0, 9)
    request = await process.asked()
    assert isinstance(request, Get)
    process.say(Done(request.number, 9))
    (body,) = await get
    del get
    life.end("the test ends it")
    await settled()
    assert is_open()
    del body
    gc.collect()
    assert not is_open()


def test_a_body_may_end_while_a_slot_is_taken() -> None:
    """A collection of garbage that frees a slot, as another is taken, does not wait for itself."""
    window = Window(1, 4096, lambda: None)

    def work() -> None:
        slot = window.take()
        assert slot is not None
        body = slot.body(0, 9)
        with window._lock:
            del body
            assert window.take() is not None

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert window.take() is None


def test_a_window_keeps_its_size() -> None:
    """The mover cannot shrink the memory that its engine reads, nor lift that rule."""
    window = Window(1, 4096, lambda: None)
    for size in (0, 8192):
        with pytest.raises(PermissionError):
            os.ftruncate(window.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(window.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_a_window_cannot_be_executed() -> None:
    """What a mover writes to memory of its engine cannot be run, if the kernel has such a seal."""
    try:
        fd = os.memfd_create("any", NOEXEC_SEAL)
    except OSError:
        fd = os.memfd_create("any", os.MFD_ALLOW_SEALING)
    best = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    os.close(fd)
    window = Window(1, 4096, lambda: None)
    assert fcntl.fcntl(window.fd, fcntl.F_GET_SEALS) & best == best
    if best:
        with pytest.raises(PermissionError):
            os.fchmod(window.fd, 0o700)


@pytest.mark.parametrize("has_ended", [False, True])
def test_a_forked_child_keeps_no_window(has_ended: bool) -> None:
    """A child that lives longer than its engine holds no memory of a window, and unmaps no own."""
    code = f"""
import gc, mmap, os
from pathlib import Path
from flexkv.mover.window import Window
window = Window(1, 4096, lambda: None)
number = os.fstat(window.fd).st_ino
body = window.take().body(0, 9)
body[:] = 7
if {has_ended}:
    window.close()
if os.fork() == 0:
    assert f" {{number}} " not in Path("/proc/self/maps").read_text()
    assert "flexkv-mover" not in os.popen(f"ls -l /proc/{{os.getpid()}}/fd").read()
    own = [mmap.mmap(-1, 4096) for _ in range(8)]
    for each in own:
        each[0] = 1
    del body, window
    gc.collect()
    os._exit(sum(each[0] for each in own) - 8)
assert os.wait()[1] == 0
assert body.tolist() == [7] * 9
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
