"""Tests of a mover: its engine's side, while the tests play the process, and its queue of gets."""

from __future__ import annotations

import asyncio
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
from typing import Any

import msgspec
import pytest

from flexkv.common.errors import RemoteError
from flexkv.mover.codes import NO_MASTER, NO_SPACE, NOT_FOUND
from flexkv.mover.life import NAMES_AT_ONCE
from flexkv.mover.serving import BYTES_AT_ONCE, GETS_AT_ONCE, Serving
from flexkv.mover.wire import (
    PACKET_BYTES,
    TO_ENGINE,
    Begin,
    Done,
    Exist,
    Found,
    Get,
    Put,
    Ready,
    Size,
    encode,
)
from flexkv.process.background import NICE_MAX, NICER_BY
from tests.mover_rig import PATIENCE_S, SIZES, Rig, playing, settled

FAILED = -800


@pytest.fixture
async def rig(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    """Yield a store without a mover."""
    with playing(monkeypatch) as made:
        yield made


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
