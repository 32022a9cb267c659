"""Connections to a holder: who waits for one, and for how long."""

from __future__ import annotations

import asyncio
import socket
from typing import cast

import pytest

from flexkv.common.errors import PeerError
from flexkv.io.peer.lanes import Lanes
from flexkv.io.peer.sockets import SocketRing
from flexkv.testing.virtual_time import run_virtual

CONNECT_S = 2.0


class Ring:
    """Stands for a ring, which these tests need to take sockets only."""

    def add(self, connection: socket.socket) -> int:
        """Return an index."""
        return connection.fileno()


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
        return self._ends[0], "a peer"

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
                await lanes.lane(1, 0)
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
        receiver = await lanes.lane(1, 0)
        assert await lanes.lane(1, 0) is receiver
        assert (receiver.peer, connecting.attempts) == ("a peer", 3)
        connecting.close()

    run_virtual(main())
