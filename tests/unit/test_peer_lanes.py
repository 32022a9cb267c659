"""Connections to a holder: who waits for one, and for how long."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, nullcontext
from errno import ENOMEM
from itertools import count
from typing import Any, Literal, cast

import pytest

from flexkv.cluster import tcp
from flexkv.common.errors import PeerError
from flexkv.io.peer.lanes import IDLE_S, Lanes
from flexkv.io.peer.receiver import Receiver
from flexkv.io.peer.sockets import SocketRing
from flexkv.observe.logs import configure_logging
from flexkv.testing.virtual_time import run_virtual
from tests.cluster_rigs import open_descriptors
from tests.unit.scripted_owner import Reading, reading

CONNECT_S = 2.0


class Ring:
    """Stands for a ring, which these tests need to take sockets only.

    Attributes:
        dropped: the indices of sockets that were closed.
        is_full: whether it takes no socket.
    """

    def __init__(self) -> None:
        self.dropped: list[int] = []
        self.is_full = False
        self._indices = count()

    def add(self, connection: socket.socket) -> int:
        """Return an index."""
        if self.is_full:
            raise OSError(ENOMEM, "Cannot allocate memory")
        return next(self._indices)

    def drop(self, index: int) -> None:
        """Take note of it."""
        assert index not in self.dropped
        self.dropped.append(index)


class Connecting:
    """Makes connections.

    Attributes:
        attempts: how often it was asked.
        works: whether attempts succeed.
    """

    def __init__(self) -> None:
        self.attempts, self.works, self._ends = 0, False, socket.socketpair()

    async def __call__(self, holder: int) -> tuple[socket.socket, str]:
        """Connect, or try to for a while."""
        self.attempts += 1
        if not self.works:
            await asyncio.sleep(CONNECT_S)
            raise PeerError("a peer", "connecting", "no answer")
        return self._ends[0].dup(), "a peer"

    def close(self) -> None:
        """Close both ends."""
        for end in self._ends:
            end.close()


def test_a_connection_that_does_not_come_is_waited_for_once() -> None:
    """All that wait for an attempt fail when it fails; the next one begins another."""

    async def main() -> None:
        connecting, loop = Connecting(), asyncio.get_running_loop()
        lanes = Lanes(cast("SocketRing", Ring()), connecting, 1.0)
        ends_s: list[float] = []

        async def fail() -> None:
            with pytest.raises(PeerError, match="a peer: connecting failed: no answer"):
                await borrow(lanes)
            ends_s.append(loop.time())

        begin_s = loop.time()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(3):
                tasks.create_task(fail())
        assert ends_s == [begin_s + CONNECT_S] * 3
        assert connecting.attempts == 1
        await fail()
        assert connecting.attempts == 2
        connecting.works = True
        receiver = await borrow(lanes)
        assert await borrow(lanes) is receiver
        assert (receiver.peer, connecting.attempts) == ("a peer", 3)
        lanes.close()
        connecting.close()

    run_virtual(main())


def test_a_ring_that_takes_no_connection_is_this_nodes_own_failure(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """All that wait for the connection are told so, and there is one log line; the next is made."""
    configure_logging("info", as_json=True)

    async def work(own: Idle) -> None:
        own.ring.is_full = True
        connect = own.connecting.__call__

        async def slowly(holder: int) -> tuple[socket.socket, str]:
            await asyncio.sleep(CONNECT_S)
            return await connect(holder)

        own.lanes._connect = slowly
        before = open_descriptors()
        tasks = [asyncio.ensure_future(borrow(own.lanes)) for _ in range(3)]
        for failure in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(failure, PeerError)
            assert failure.is_own
            assert "this node has no room for another connection" in failure.why
        assert (own.connecting.attempts, open_descriptors()) == (1, before)
        own.ring.is_full = False
        await borrow(own.lanes)

    idle(work)
    assert capfd.readouterr().err.count("peer_not_connected") == 1


@pytest.mark.parametrize("is_own", [True, False])
def test_a_lack_of_descriptors_is_not_the_peers_failure(is_own: bool) -> None:
    """The error of a data connection that this node has no descriptor for says so; others do not.

    The peer stays up.
    """

    async def work(rig: Reading) -> None:
        await rig.want()
        with socket.create_server(("127.0.0.1", 0)) as listening:
            address = tcp.address_of(*listening.getsockname())
        rig.peers._peer(rig.owner.node)._shared = rig.peers._shared._replace(
            dial=lambda _: tcp.connected(address)
        )
        why = "no descriptors or memory left.*Too many open files" if is_own else "Errno 111"
        lacking = without_descriptors() if is_own else nullcontext()
        with lacking, pytest.raises(PeerError, match=why) as raised:
            await rig.peers.data_socket(1)
        assert raised.value.is_own == is_own
        assert rig.peers.is_up(1)

    reading(work)


@contextmanager
def without_descriptors() -> Iterator[None]:
    """Keep this process from opening any descriptor."""
    limits, lowest = resource.getrlimit(resource.RLIMIT_NOFILE), os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


async def borrow(lanes: Lanes, lane: int = 0) -> Receiver:
    """Use a lane to holder 1 for a moment, and return its connection."""
    async with lanes.borrowed(1, lane) as receiver:
        return receiver


class Idle:
    """Lanes, and what was closed of them."""

    def __init__(self) -> None:
        self.ring, self.connecting = Ring(), Connecting()
        self.connecting.works = True
        self.lanes = Lanes(cast("SocketRing", self.ring), self.connecting, 1.0)


def idle(work: Callable[[Idle], Coroutine[Any, Any, None]]) -> None:
    """Run a test on a virtual clock; afterwards no timer may be left."""

    async def main() -> None:
        own = Idle()
        await work(own)
        own.lanes.close()
        await borrow(own.lanes)
        timers = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]
        assert all(timer.cancelled() for timer in timers)
        own.connecting.close()

    run_virtual(main())


def test_a_connection_that_nobody_uses_is_closed_and_made_again_when_needed() -> None:
    """Each lane has a time of its own, which every use starts anew."""

    async def work(own: Idle) -> None:
        first = await borrow(own.lanes)
        await asyncio.sleep(IDLE_S / 2)
        other = await borrow(own.lanes, 1)
        await asyncio.sleep(0.4 * IDLE_S)
        assert await borrow(own.lanes) is first
        await asyncio.sleep(0.5 * IDLE_S)
        assert own.ring.dropped == []
        await asyncio.sleep(0.2 * IDLE_S)
        assert own.ring.dropped == [other.index]
        await asyncio.sleep(0.4 * IDLE_S)
        assert own.ring.dropped == [other.index, first.index]
        await asyncio.sleep(9 * IDLE_S)
        assert len(own.ring.dropped) == 2
        assert await borrow(own.lanes) is not first
        assert own.connecting.attempts == 3

    idle(work)


def test_a_connection_that_is_used_stays_open() -> None:
    """A read may take long; the time begins at its end, and with several at that of the last."""

    async def work(own: Idle) -> None:
        await borrow(own.lanes)
        async with own.lanes.borrowed(1, 0) as receiver:
            async with own.lanes.borrowed(1, 0):
                await asyncio.sleep(2 * IDLE_S)
            await asyncio.sleep(2 * IDLE_S)
            assert own.ring.dropped == []
        await asyncio.sleep(0.9 * IDLE_S)
        assert own.ring.dropped == []
        await asyncio.sleep(0.2 * IDLE_S)
        assert own.ring.dropped == [receiver.index]

    idle(work)


@pytest.mark.parametrize("is_before", [True, False])
def test_a_read_that_begins_as_its_connection_is_closed_has_an_open_one(is_before: bool) -> None:
    """The read keeps the connection that was about to be closed, or gets a new one."""

    async def work(own: Idle) -> None:
        first = await borrow(own.lanes)
        if is_before:
            own.lanes._lanes[1][0].lock = Suspending()
        loop, reading = asyncio.get_running_loop(), asyncio.Event()

        async def read() -> None:
            async with own.lanes.borrowed(1, 0) as receiver:
                assert (receiver is first) == is_before
                assert receiver.index not in own.ring.dropped
                reading.set()
                await asyncio.sleep(2 * IDLE_S)
                assert receiver.index not in own.ring.dropped

        await asyncio.sleep(IDLE_S - 1)
        tasks: list[asyncio.Task[None]] = []
        # It waits for the lock when the time is over, or begins right after that.
        delay_s = 0.5 if is_before else 1.0
        loop.call_later(delay_s, lambda: tasks.append(loop.create_task(read())))
        await reading.wait()
        await tasks[0]
        assert (first.index in own.ring.dropped) != is_before

    idle(work)


class Suspending(asyncio.Lock):
    """A lock that is held for a second before its holder goes on."""

    async def acquire(self) -> Literal[True]:
        """Acquire it, and wait."""
        await super().acquire()
        await asyncio.sleep(1.0)
        return True


def test_a_broken_connection_is_closed_too() -> None:
    """A connection that broke and was not used since is closed, so it keeps no descriptor."""

    async def work(own: Idle) -> None:
        receiver = await borrow(own.lanes)
        receiver.is_broken = True
        await asyncio.sleep(1.1 * IDLE_S)
        assert own.ring.dropped == [receiver.index]

    idle(work)
