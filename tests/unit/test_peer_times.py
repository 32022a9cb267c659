"""A load that another node keeps waiting is answered in time, whatever `io_deadline_s` is."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from functools import partial
from typing import cast

import numpy as np
import pytest

from flexkv.cluster.grants import IDLE_S
from flexkv.cluster.wire import Busy, Grant, Message, ToOwner, Want
from flexkv.common.errors import PeerError
from flexkv.common.terms import BlockNames, Positions, Route, Tier, Transfer
from flexkv.io.memory.arena import Arena
from flexkv.io.peer.mooncake import MooncakeTransport
from flexkv.io.peer.port import BUSY_S, Allowed, PeerPort, Wish
from flexkv.io.peer.preferred import PreferredTransport
from flexkv.io.peer.sockets import SocketRing
from flexkv.io.peer.tcp_transport import TcpTransport
from flexkv.io.peer.transport import Fetched, Part, Places
from flexkv.io.remote.landing import Copier, HostBlocks
from flexkv.tiers.peer_times import reader_times
from tests.cluster_rigs import pair
from tests.unit.scripted_owner import KEYS, Reading, answered, pongs, reading

DEADLINES_S = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
BLOCK_BYTES = 4096
PLACES = Places("there", np.zeros(2, np.int64), np.zeros(2, np.uint64), 1e9)


@pytest.mark.parametrize("deadline_s", DEADLINES_S)
def test_all_stages_together_take_no_longer_than_the_deadline(deadline_s: float) -> None:
    """A read that hangs in its last stage, after the others took all their time, ends in time."""
    times = reader_times(deadline_s)
    assert times.hang_s <= deadline_s + 0.5
    assert times.hang_s == times.asking_s + times.mooncake_s + times.connect_s + 1.5 * times.stall_s
    assert 0 < times.answer_s < times.asking_s
    assert times.answer_s + times.mooncake_s + times.places_s == pytest.approx(IDLE_S)
    assert times.places_s > times.mooncake_s
    assert (times.links.answer_s, times.links.data_s) == (times.answer_s, times.connect_s)


class SlowMooncake:
    """Reads by Mooncake that all take as long as they may, and fail."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s

    def connect(self) -> None:
        """Do nothing."""

    def wants_places(self, holder: int) -> bool:
        """Return True."""
        return True

    async def fetch(self, part: Part) -> Fetched:
        """Fail when the time is over."""
        await asyncio.sleep(self._limit_s)
        return Fetched(0, PeerError("owner", "reading", "no answer"))

    def close(self) -> None:
        """Do nothing."""


class SlowHolders:
    """A holder that takes as long as it may in every stage that it passes."""

    def __init__(self, rig: Reading, connect_s: float) -> None:
        self._rig, self._connect_s = rig, connect_s
        self.ends: list[socket.socket] = []

    async def want(self, holder: int, wish: Wish) -> Allowed:
        """Ask the owner."""
        grant = await self._rig.peers.want(holder, *wish)
        return Allowed(grant.number, grant.count, grant.is_cut, PLACES)

    def release(self, holder: int, number: int) -> None:
        """End a grant."""
        self._rig.peers.release(holder, number)

    def begin(self, holder: int, request: int) -> None:
        """Do nothing."""

    def blame(self, holder: int, error: PeerError) -> None:
        """Do nothing."""

    def arrived(self, holder: int) -> None:
        """Do nothing."""

    async def connect(self, holder: int) -> tuple[socket.socket, str]:
        """Return a connection on which nothing arrives, when the time is nearly over."""
        await asyncio.sleep(0.99 * self._connect_s)
        self.ends += pair()
        return self.ends[-2], "owner"


def busy_until(rig: Reading, until_s: float, message: ToOwner) -> list[Message]:
    """Return the answers of an owner that is busy, and grants what is wanted then."""
    if isinstance(message, Want) and rig.now_s < until_s:
        return [Busy(message.number, 10)]
    return answered(message)


def busy_then_silent(rig: Reading, until_s: float, message: ToOwner) -> list[Message]:
    """Return the answers of an owner that is busy, and does not answer at all then."""
    if isinstance(message, Want) and rig.now_s < until_s:
        return [Busy(message.number, 10)]
    return pongs(message)


def late(rig: Reading, until_s: float, message: ToOwner) -> list[Message]:
    """Answer a Want shortly before its reader gives up."""
    if not isinstance(message, Want):
        return answered(message)
    grant = Grant(message.number, message.first, message.last - message.first)
    loop, within_s = asyncio.get_running_loop(), message.within_ms / 1000
    loop.call_later(0.99 * within_s, rig.owner.links[0].send, grant)
    return []


Script = Callable[[Reading, float, ToOwner], list[Message]]


@pytest.mark.parametrize("script", [busy_until, busy_then_silent, late])
@pytest.mark.parametrize("deadline_s", [1.0, 10.0, 60.0])
def test_a_load_is_answered_within_the_deadline_and_a_second(
    deadline_s: float, script: Script
) -> None:
    """That holds wherever the holder hangs, and however slow it was before that."""
    times = reader_times(deadline_s)

    async def work(rig: Reading) -> None:
        rig.peers._shared = rig.peers._shared._replace(times=times.links)
        rig.owner.answer = partial(script, rig, times.asking_s - 2.2 * BUSY_S)
        arena, copier = Arena.open(4, BLOCK_BYTES), Copier(1)
        host = HostBlocks(arena, np.zeros(4, np.uint64), (BLOCK_BYTES,))
        ring = SocketRing([arena.buffer], 4, in_background=False)
        holders = SlowHolders(rig, times.connect_s)
        tcp = TcpTransport(ring, holders.connect, host, copier, times.stall_s)
        slow = cast("MooncakeTransport", SlowMooncake(times.mooncake_s))
        port = PeerPort(
            PreferredTransport(slow, tcp), copier, holders, host, [1], times.asking_s
        )
        port.spawn = rig.node.supervisor.spawn
        ended = asyncio.Event()
        port.connect(ended.set)
        names, route = BlockNames(KEYS, Positions(0, 2)), Route(Tier.PEER, Tier.HOST)
        begin_s = rig.now_s
        port.submit(Transfer(1, 1, route, np.full(2, 1), np.arange(2), names=names))
        await ended.wait()
        assert begin_s + times.answer_s <= rig.now_s <= begin_s + deadline_s + 1
        (end,) = port.reap()
        assert (type(end.error), end.filled) == (PeerError, 0)
        assert bool(holders.ends) == (script is not busy_then_silent)
        await tcp.forget(1)
        port.close()
        for each in holders.ends:
            each.close()
        assert arena.close()

    reading(work)
