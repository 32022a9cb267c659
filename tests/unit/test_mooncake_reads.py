"""Reads by Mooncake over movers whose processes the tests play."""

from __future__ import annotations

import asyncio
import math
import socket
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import pytest

from flexkv.common.errors import PeerError
from flexkv.io.memory.arena import Arena
from flexkv.io.memory.copier import Copier
from flexkv.io.memory.host_blocks import HostBlocks
from flexkv.io.peer import mooncake
from flexkv.io.peer.mooncake import MooncakeTransport
from flexkv.io.peer.transport import Fetched, Part, Places
from flexkv.mover import engine_serving
from flexkv.mover import life as lives
from flexkv.mover.codes import READ_FAILED
from flexkv.mover.engine_config import EngineConfig
from flexkv.mover.engine_serving import EngineServing
from flexkv.mover.life import MoverSizes
from flexkv.mover.mover import Mover
from flexkv.mover.wire import PACKET_BYTES, TO_ENGINE, Begin, Done, Lent, Read, Ready
from tests.mover_rig import PATIENCE_S, Played, settled

BLOCKS, BLOCK_BYTES, SLOTS = 8, 4096, 8
CONFIG = EngineConfig("127.0.0.1", 0, "tcp", "")
LENT = Lent(0, 0, BLOCKS * BLOCK_BYTES)
HOLDER, ENDPOINT = 5, "192.0.2.1:7"
NO_SUMS = np.zeros(0, np.uint64)


class Rig:
    """A transport over movers that the test plays."""

    def __init__(self) -> None:
        self.processes: list[Played] = []
        self.arena = Arena.open(BLOCKS, BLOCK_BYTES)
        self.arena.array[:] = 7
        self.copier = Copier(1)
        self.copier.connect()
        self.host = HostBlocks(self.arena, np.zeros(BLOCKS, np.uint64), (BLOCK_BYTES,))
        self.mover = Mover(CONFIG, MoverSizes(SLOTS, BLOCK_BYTES, PATIENCE_S), LENT)
        self.transport = MooncakeTransport(self.mover, self.host, self.copier, PATIENCE_S)

    async def begun(self) -> Played:
        """Start a mover, and return it once its engine runs."""
        self.mover.life()
        process = self.processes[-1]
        begin = await process.asked()
        assert isinstance(begin, Begin)
        assert (begin.config, begin.lent) == (CONFIG, LENT)
        process.say(Ready("192.0.2.9:1", 1000))
        await settled()
        return process

    async def sum_of_zeros(self) -> int:
        """Return the sum of a block of zeros, as windows have it at first."""
        process = self.processes[-1]
        task = asyncio.ensure_future(self.fetch())
        read = await asked(process)
        process.say(Done(read.number, 0))
        await task
        return int(self.host.sums[0])

    async def fetch(self, address: int = 64, total: int = 0, until_s: float = math.inf) -> Fetched:
        """Read one block."""
        places = Places(ENDPOINT, np.array([address]), np.array([total], np.uint64), until_s)
        return await self.transport.fetch(Part(HOLDER, 1, 0, np.arange(1), 0, 0, places))


async def asked(process: Played) -> Read:
    """Return the next read that a mover is asked for."""
    read = await process.asked()
    assert isinstance(read, Read)
    return read


@pytest.fixture
async def rig(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    """Yield a transport without a mover."""
    made = Rig()

    def started(*_: object) -> tuple[socket.socket, Any]:
        made.processes.append(Played())
        return made.processes[-1].ours, made.processes[-1]

    monkeypatch.setattr(lives, "_started", started)
    monkeypatch.setattr(mooncake, "PAUSE_S", 0.0)
    yield made
    made.transport.close()
    made.copier.close()
    for process in made.processes:
        process.theirs.close()
    assert made.arena.close()


def error_of(end: Fetched) -> str:
    """Return why a read has failed."""
    assert (end.filled, type(end.error)) == (0, PeerError)
    return str(end.error)


async def test_a_read_is_one_batch_into_a_slot(rig: Rig) -> None:
    """The mover is told where the blocks are, and what arrives is copied to host memory."""
    process = await rig.begun()
    total = await rig.sum_of_zeros()
    rig.arena.array[:] = 7
    task = asyncio.ensure_future(rig.fetch(total=total))
    read = await asked(process)
    assert (read.endpoint, read.addresses, read.block_bytes) == (ENDPOINT, [64], BLOCK_BYTES)
    process.say(Done(read.number, 0))
    assert await task == Fetched(1, None)
    assert not rig.arena.array[0].any()
    assert (rig.arena.array[1:] == 7).all()
    assert rig.transport.counts.spoiled == 0
    assert len(rig.mover.life()._window._free) == SLOTS


async def test_slots_of_failed_reads_are_never_used_again(rig: Rig) -> None:
    """When a quarter of the slots may still be written to, the mover is killed: that is the fence.

    Nothing of a failed read reaches host memory.
    """
    process = await rig.begun()
    used: list[int] = []
    for _ in range(SLOTS // 4):
        assert rig.mover.ready is not None
        task = asyncio.ensure_future(rig.fetch())
        read = await asked(process)
        used.append(read.at)
        process.say(Done(read.number, READ_FAILED))
        assert "the transfer failed" in error_of(await task)
    assert len(set(used)) == SLOTS // 4
    assert process.is_killed
    assert rig.mover.ready is None
    assert "its mover is not there" in error_of(await rig.fetch())
    assert (rig.arena.array == 7).all()


@pytest.mark.parametrize(("code", "spoiled"), [(0, 0), (READ_FAILED, 1)])
async def test_a_read_that_is_given_up_keeps_its_slot_until_the_answer(
    rig: Rig, code: int, spoiled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A late success frees the slot, a late failure spoils it; nothing reaches host memory."""
    process = await rig.begun()
    monkeypatch.setattr(rig.transport, "_stall_s", 0.01)
    assert "no answer" in error_of(await rig.fetch())
    life = rig.mover.life()
    assert len(life._window._free) == SLOTS - 1
    read = await asked(process)
    process.say(Done(read.number, code))
    await settled()
    assert (len(life._window._free), life.spoiled) == (SLOTS - spoiled, spoiled)
    assert (rig.arena.array == 7).all()


@pytest.mark.parametrize("steps", range(6))
async def test_a_read_may_be_cancelled_at_any_moment(rig: Rig, steps: int) -> None:
    """Whether the answer has come, is coming or comes later, the slot is free in the end."""
    process = await rig.begun()
    task = asyncio.ensure_future(rig.fetch())
    read = await asked(process)
    process.say(Done(read.number, 0))
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    await settled()
    del task
    assert len(rig.mover.life()._window._free) == SLOTS


async def test_a_stop_ends_reads_at_once(rig: Rig) -> None:
    """Reads that wait for the mover, or for their turn, fail when they are stopped."""
    process = await rig.begun()
    tasks = [asyncio.ensure_future(rig.fetch()) for _ in range(mooncake.READS_AT_ONCE)]
    for _ in tasks:
        await asked(process)
    rig.transport.stop(HOLDER + 1)
    await settled()
    assert not any(task.done() for task in tasks)
    rig.transport.stop(HOLDER)
    for task in tasks:
        assert "stopped" in error_of(await task)


async def test_an_engine_that_fails_is_left_out_for_longer_and_longer(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each failure in turn the pause is twice as long; a success ends that."""
    process = await rig.begun()
    monkeypatch.setattr(mooncake, "PAUSE_S", 100.0)
    assert rig.transport.wants_places(HOLDER)
    task = asyncio.ensure_future(rig.fetch())
    process.say(Done((await asked(process)).number, READ_FAILED))
    await task
    assert not rig.transport.wants_places(HOLDER)
    assert rig.transport.wants_places(HOLDER + 1)
    assert "has failed a moment ago" in error_of(await rig.fetch())
    now_s = asyncio.get_running_loop().time()
    (first,) = rig.transport._failing.values()
    assert 90 < first.until_s - now_s <= 100
    rig.transport._fails(HOLDER, Places(ENDPOINT, np.zeros(0, np.int64), NO_SUMS, 0.0), "again")
    (second,) = rig.transport._failing.values()
    assert 190 < second.until_s - now_s <= 210
    await rig.transport.forget(HOLDER)
    assert rig.transport.wants_places(HOLDER)


async def test_places_are_used_for_as_long_as_the_grant_lasts(rig: Rig) -> None:
    """Nothing is asked of the mover for a grant that may be over, or a place without a block."""
    await rig.begun()
    now_s = asyncio.get_running_loop().time()
    assert "may be over" in error_of(await rig.fetch(until_s=now_s))
    assert "not in the grant" in error_of(await rig.fetch(address=-1))
    unknown = await rig.transport.fetch(Part(HOLDER, 1, 0, np.arange(1), 0, 0))
    assert "does not run" in error_of(unknown)
    assert rig.mover.life().requests == 0


async def test_without_a_mover_nothing_is_said_to_be_anywhere(rig: Rig) -> None:
    """Where our blocks are is known while the mover's engine runs; -1 stays -1."""
    ids = np.array([0, 4096, -4096])
    assert rig.transport.places(ids) is None
    assert not rig.transport.wants_places(HOLDER)
    process = await rig.begun()
    endpoint, addresses = rig.transport.places(ids) or ("", ids)
    assert (endpoint, addresses.tolist()) == ("192.0.2.9:1", [1000, 5096, -1])
    process.theirs.close()
    await settled()
    assert rig.transport.places(ids) is None


class Blocking:
    """An engine that reads from one node for as long as the test says."""

    def __init__(self) -> None:
        self.release = threading.Event()

    def read(self, endpoint: str, addresses: Sequence[int], at: int, block_bytes: int) -> int:
        """Block for the node that is silent."""
        if endpoint == "silent":
            assert self.release.wait(PATIENCE_S)
        return 0


def test_a_silent_node_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each node has a thread of its own, which ends when it is not needed, and comes back."""
    monkeypatch.setattr(engine_serving, "IDLE_S", 0.01)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(PATIENCE_S)
    engine = Blocking()
    serving = EngineServing(theirs, engine)

    def answered() -> int:
        reply = TO_ENGINE.decode(ours.recv(PACKET_BYTES))
        assert isinstance(reply, Done)
        return reply.number

    with ours, theirs:
        serving.take(Read(0, "silent", [1], 0, 1))
        for number in range(1, 20):
            serving.take(Read(number, "other", [1], 0, 1))
            assert answered() == number
            if number == 10:
                while "other" in serving._nodes:
                    threading.Event().wait(0.001)
        engine.release.set()
        assert answered() == 0
