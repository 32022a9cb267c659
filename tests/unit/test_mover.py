"""Tests of a mover: its engine's side, while the tests play the process, and its queue of gets."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from subprocess import TimeoutExpired
from typing import Any

import msgspec
import pytest

from flexkv.common.errors import RemoteError
from flexkv.io.remote.mooncake import MooncakeStore
from flexkv.mover import life as lives
from flexkv.mover import mover as movers
from flexkv.mover.codes import NO_MASTER, NO_SPACE, NOT_FOUND
from flexkv.mover.life import END_S, NAMES_AT_ONCE, MoverSizes
from flexkv.mover.mover import Mover
from flexkv.mover.serving import BYTES_AT_ONCE, GETS_AT_ONCE, Serving
from flexkv.mover.store_config import StoreConfig
from flexkv.mover.window import Window
from flexkv.mover.wire import (
    PACKET_BYTES,
    TO_ENGINE,
    TO_MOVER,
    Begin,
    Done,
    Exist,
    Found,
    Get,
    Put,
    Ready,
    Refused,
    Reply,
    Request,
    Size,
    encode,
)
from flexkv.process.background import NICE_MAX, NICER_BY

CONFIG = StoreConfig("here", "P2PHANDSHAKE", "there:1", "tcp", "", 0, 0, "", "default")
SIZES = MoverSizes(slots=4, slot_bytes=4096, answer_s=30.0)
FAILED = -800
PATIENCE_S = 20.0


class Played:
    """The process of a mover, as the engine sees it, and its end of the connection."""

    pid = 0

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ours.setblocking(False)
        self.is_killed = False

    def kill(self) -> None:
        """Note it."""
        self.is_killed = True
        self.theirs.close()

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status."""
        if timeout is not None and not self.is_killed:
            raise TimeoutExpired("mover", timeout)
        return 0

    def say(self, *replies: Reply) -> None:
        """Send replies to the engine."""
        for reply in replies:
            self.theirs.send(encode(reply))

    async def asked(self) -> Request | Begin:
        """Return the next request."""
        loop = asyncio.get_running_loop()
        self.theirs.setblocking(False)
        async with asyncio.timeout(PATIENCE_S):
            return TO_MOVER.decode(await loop.sock_recv(self.theirs, PACKET_BYTES))


class Rig:
    """A store over movers that the test plays."""

    def __init__(self, sizes: MoverSizes = SIZES) -> None:
        self.kind = Played
        self.processes: list[Played] = []
        self.store = MooncakeStore(Mover(CONFIG, sizes), "p/")

    @property
    def process(self) -> Played:
        """Return the mover that runs."""
        return self.processes[-1]

    async def begun(self) -> Played:
        """Start a mover, and return it once it is connected."""
        self.store.mover.life()
        assert isinstance(await self.process.asked(), Begin)
        self.process.say(Ready())
        return self.process


@pytest.fixture
async def rig(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    """Yield a store without a mover."""
    made = Rig()

    def started(window_fd: int, answer_s: float) -> tuple[socket.socket, Any]:
        made.processes.append(made.kind())
        return made.process.ours, made.process

    monkeypatch.setattr(lives, "_started", started)
    yield made
    made.store.close()
    for process in made.processes:
        process.theirs.close()


async def settled() -> None:
    """Let everything happen that is about to."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_body_keeps_its_slot(rig: Rig) -> None:
    """A slot is used for one object until nobody has its bytes any more; others wait for one."""
    process = await rig.begun()
    bodies: list[Any] = []
    places: list[int] = []
    gets = [rig.store.get("name", 1, 9) for _ in range(6)]
    for _ in range(4):
        get = await process.asked()
        assert isinstance(get, Get)
        places.append(get.at)
        process.say(Done(get.number, 8))
    for get in gets[:4]:
        bodies += await get
    assert [len(body) for body in bodies] == [7] * 4
    assert rig.store.mover.life().requests == 0
    gets.clear()
    freed = bodies.pop(2)
    at = freed.ctypes.data
    del freed
    again = await process.asked()
    assert isinstance(again, Get)
    assert again.at % SIZES.slot_bytes == 0
    assert at == bodies[0].ctypes.data - places[0] + again.at
    assert rig.store.mover.life().requests == 1


async def test_a_get_that_is_given_up_keeps_its_slot_until_the_answer(rig: Rig) -> None:
    """Mooncake may write to the slot of a cancelled get until it has answered."""
    process = await rig.begun()
    gets = [rig.store.get("name", 0, 9) for _ in range(5)]
    asked = [await process.asked() for _ in range(4)]
    for get in gets[:4]:
        get.cancel()
    await settled()
    assert rig.store.mover.life().requests == 4
    first = asked[0]
    assert isinstance(first, Get)
    process.say(Done(first.number, 9))
    last = await process.asked()
    assert isinstance(last, Get)
    assert last.at == first.at
    process.say(Done(last.number, 9))
    assert len(memoryview((await gets[4])[0])) == 9


@pytest.mark.parametrize("code", [NOT_FOUND, NO_SPACE, NO_MASTER])
async def test_a_clean_error_frees_the_slot(rig: Rig, code: int) -> None:
    """After an error that moved nothing, the slot is used again, however often that happens."""
    process = await rig.begun()
    for _ in range(9):
        get = rig.store.get("name", 0, 9)
        request = await process.asked()
        assert isinstance(request, Get)
        process.say(Done(request.number, code))
        with pytest.raises((RemoteError, FileNotFoundError)):
            await get
    assert not process.is_killed


async def test_a_failed_transfer_spoils_its_slot(monkeypatch: pytest.MonkeyPatch, rig: Rig) -> None:
    """A slot is not used again after a failed transfer; the mover ends when a quarter is gone."""
    rig.store.mover.sizes = SIZES._replace(slots=8)
    process = await rig.begun()
    places = set()
    for number in range(2):
        get = rig.store.get("name", 0, 9)
        request = await process.asked()
        assert isinstance(request, Get)
        places.add(request.at)
        assert not process.is_killed
        process.say(Done(request.number, FAILED))
        with pytest.raises(RemoteError, match="the transfer failed"):
            await get
        assert len(places) == number + 1
    assert process.is_killed
    with pytest.raises(RemoteError, match="may still write to too many slots"):
        await rig.store.get("name", 0, 9)


async def test_a_mover_that_does_not_answer_is_killed(rig: Rig) -> None:
    """A request that is not answered in time fails, and its mover is killed."""
    rig.store.mover.sizes = SIZES._replace(answer_s=0.05)
    process = await rig.begun()
    with pytest.raises(RemoteError, match=r"not answered for 0\.05 s"):
        await rig.store.head("name")
    assert process.is_killed


async def test_a_mover_that_answers_slowly_is_left_alone(rig: Rig) -> None:
    """A mover hangs only if no request of a kind is answered for too long, however many wait."""
    rig.store.mover.sizes = SIZES._replace(answer_s=1000.0)
    process = await rig.begun()
    life = rig.store.mover.life()
    heads = [asyncio.ensure_future(rig.store.head("name")) for _ in range(2)]
    first, _ = [await process.asked() for _ in heads]
    assert isinstance(first, Size)
    begun_s = life._overdue["name"].when()
    loop = asyncio.get_running_loop()
    await asyncio.sleep(2 * time.get_clock_info("monotonic").resolution)
    process.say(Done(first.number, 9))
    assert (await heads[0]).size_bytes == 9
    assert begun_s < life._overdue["name"].when() <= loop.time() + 1000.0
    heads[1].cancel()


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
    assert [each for each in process.waited if each is not None] == [END_S] * is_ready
    process.can_end.set()


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


async def test_a_mover_has_few_names_to_answer_at_once(rig: Rig) -> None:
    """What is given up while it waits for its turn is never asked; others follow each answer."""
    process = await rig.begun()
    heads = [asyncio.ensure_future(rig.store.head(f"{number}")) for number in range(9)]
    asked = [await process.asked() for _ in range(NAMES_AT_ONCE)]
    await settled()
    assert rig.store.mover.life().requests == NAMES_AT_ONCE
    for head in heads[:-1]:
        head.cancel()
    await asyncio.wait(heads[:-1])
    assert isinstance(asked[0], Size)
    process.say(Done(asked[0].number, 9))
    last = await process.asked()
    assert isinstance(last, Size)
    assert last.name == "p/8"
    process.say(Done(last.number, 9))
    assert (await heads[-1]).size_bytes == 9


@pytest.mark.parametrize("codes", [[], [1], [1, 1, 1]])
async def test_an_answer_about_other_names_is_none(rig: Rig, codes: list[int]) -> None:
    """Codes that do not match the names one by one say nothing about them."""
    process = await rig.begun()
    asking = asyncio.ensure_future(rig.store.exist(["a", "b"]))
    request = await process.asked()
    assert isinstance(request, Exist)
    process.say(Found(request.number, codes))
    with pytest.raises(RemoteError, match=f"answers {len(codes)} of 2 names"):
        await asking
    assert not process.is_killed


@pytest.mark.parametrize("answer", [Found(0, [1]), Done(0, SIZES.slot_bytes + 1)])
async def test_an_answer_that_does_not_fit_ends_the_mover(rig: Rig, answer: Done | Found) -> None:
    """A mover that answers a get with names, or with more bytes than a slot has, is not trusted."""
    process = await rig.begun()
    get = rig.store.get("name", 0, 9)
    request = await process.asked()
    assert isinstance(request, Get)
    process.say(type(answer)(request.number, *msgspec.structs.astuple(answer)[1:]))
    async with asyncio.timeout(PATIENCE_S):
        with pytest.raises(RemoteError, match="does not fit its request"):
            await get
    assert process.is_killed


async def test_a_full_connection_refuses_requests_as_busy(rig: Rig) -> None:
    """A mover that does not read for a moment goes on living; its slots are free again."""
    process = await rig.begun()
    await settled()
    life = rig.store.mover.life()
    filler, sent = encode(Size(-1, "x" * 9000)), 0
    with suppress(BlockingIOError):
        while life._socket.send(filler):
            sent += 1
    waiting = [rig.store.get("name", 0, 9) for _ in range(2 * SIZES.slots)]
    waiting.append(asyncio.ensure_future(rig.store.head("name")))
    for each in waiting:
        with pytest.raises(RemoteError, match="takes no more requests now") as failed:
            await each
        assert failed.value.is_busy
    assert not life.requests
    for _ in range(sent):
        await process.asked()
    get = rig.store.get("name", 0, 9)
    request = await process.asked()
    assert isinstance(request, Get)
    process.say(Done(request.number, 9))
    assert len(memoryview((await get)[0])) == 9
    assert not process.is_killed


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


async def test_a_put_whose_buffers_are_copied_lends_them_no_more(rig: Rig) -> None:
    """A cancelled put returns once nothing reads its buffers; its slot waits for the answer."""
    process = await rig.begun()
    buffer = bytearray(b"x" * 100)
    putting = asyncio.ensure_future(rig.store.put("name", [buffer, b"y"]))
    request = await process.asked()
    assert isinstance(request, Put)
    assert request.size == 101
    putting.cancel()
    await asyncio.wait([putting])
    assert putting.cancelled()
    del putting
    gc.collect()
    buffer.clear()  # BufferError if somebody still holds it
    process.say(Done(request.number, 0))


async def test_a_slot_that_is_granted_to_a_put_as_that_is_cancelled_is_free(rig: Rig) -> None:
    """No slot is lost to puts that are given up in the turn in which they get one."""
    rig.store.mover.life()
    puts = [asyncio.ensure_future(rig.store.put("name", [b"x"])) for _ in range(SIZES.slots)]
    await settled()
    assert isinstance(await rig.process.asked(), Begin)
    rig.process.say(Ready())
    rig.store.mover.life()._read()
    for put in puts:
        put.cancel()
    await asyncio.wait(puts)
    gets = [rig.store.get("name", 0, 9) for _ in range(SIZES.slots)]
    asked = [await rig.process.asked() for _ in gets]
    assert len({each.at for each in asked if isinstance(each, Get)}) == SIZES.slots


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


def test_a_window_keeps_its_size() -> None:
    """The mover cannot shrink the memory that its engine reads, nor lift that rule."""
    window = Window(1, 4096, lambda: None)
    for size in (0, 8192):
        with pytest.raises(PermissionError):
            os.ftruncate(window.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(window.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


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


def test_threads_that_fill_slots_yield(rig: Rig) -> None:
    """Filling slots takes no CPU from other threads that want it, as copying does not."""
    own = os.getpriority(os.PRIO_PROCESS, 0)
    filler = rig.store._fillers.submit(threading.get_native_id).result()
    assert os.getpriority(os.PRIO_PROCESS, filler) == min(NICE_MAX, own + NICER_BY)


def test_a_process_in_the_background_yields_to_other_sessions(tmp_path: Path) -> None:
    """Its nice value is raised, and its session's; a kernel without such groups is no error."""
    session = tmp_path / "autogroup"
    own = os.getpriority(os.PRIO_PROCESS, 0)
    for there in (True, False):
        session.unlink(missing_ok=True)
        path = session if there else session / "nothing"
        code = f"""
import os
from pathlib import Path
from flexkv.process import background, wakeups
wakeups.AUTOGROUP = Path({str(path)!r})
background.yield_to_all()
print(os.getpriority(os.PRIO_PROCESS, 0))
"""
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        assert int(told.stdout) == min(NICE_MAX, own + NICER_BY)
        assert session.exists() == there
        assert not there or session.read_text() == str(NICER_BY)


class SlowClient:
    """A store's client whose first read waits."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self.reads: list[list[str]] = []

    def get(self, names: list[str], at: list[int], sizes: list[int]) -> list[int]:
        """Record the names."""
        self.reads.append(names)
        self.begun.set()
        assert self.go.wait(PATIENCE_S)
        return sizes


def reads_of(gets: list[tuple[str, int]]) -> list[list[str]]:
    """Return the names that each call reads if all of these gets wait while the first is read."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client: Any = SlowClient()
    serving = Serving(theirs, client)
    serving.take(Get(0, gets[0][0], 0, gets[0][1]))
    assert client.begun.wait(PATIENCE_S)
    for number, (name, size) in enumerate(gets[1:], 1):
        serving.take(Get(number, name, 0, size))
    client.go.set()
    ours.settimeout(PATIENCE_S)
    ended = [TO_ENGINE.decode(ours.recv(PACKET_BYTES)) for _ in gets]
    assert ended == [Done(number, size) for number, (_, size) in enumerate(gets)]
    ours.close()
    theirs.close()
    return client.reads


def test_a_call_reads_no_object_twice() -> None:
    """Gets that wait are read together, in order, but one object is never twice in a call."""
    names = ["first", "a", "b", "a", "c"]
    reads = reads_of([(name, 9) for name in names])
    assert reads == [["first"], ["a", "b"], ["a", "c"]]


def test_a_call_reads_some_objects_or_bytes_only() -> None:
    """Small objects are read together, up to a number; large ones are read one by one."""
    small = [(f"small {number}", 9) for number in range(GETS_AT_ONCE + 3)]
    reads = reads_of([("first", 9), *small])
    assert [len(names) for names in reads] == [1, GETS_AT_ONCE, 3]
    large = [(f"large {number}", size) for number, size in enumerate((1, 1, 2, 9))]
    reads = reads_of([(name, size * BYTES_AT_ONCE // 2) for name, size in large])
    assert [len(names) for names in reads] == [1, 1, 1, 1]
    reads = reads_of([(name, BYTES_AT_ONCE // 2) for name, _ in large])
    assert [len(names) for names in reads] == [1, 2, 1]
