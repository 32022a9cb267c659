"""A store over movers whose processes the tests play."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import TimeoutExpired
from typing import Any

import pytest

from flexkv.io.remote.mooncake import MooncakeStore
from flexkv.mover import life as lives
from flexkv.mover.life import MoverSizes
from flexkv.mover.mover import Mover
from flexkv.mover.store_config import StoreConfig
from flexkv.mover.wire import (
    PACKET_BYTES,
    TO_MOVER,
    Begin,
    Ready,
    Reply,
    Request,
    encode,
)

CONFIG = StoreConfig("here", "P2PHANDSHAKE", "there:1", "tcp", "", 0, 0, "", "default")
SIZES = MoverSizes(slots=4, slot_bytes=4096, answer_s=30.0)
PATIENCE_S = 20.0


class Played:
    """The process of a mover, as the engine sees it, and its end of the connection."""

    pid = 0

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ours.setblocking(False)
        self.is_killed = False
        self.is_terminated = False

    def terminate(self) -> None:
        """Note it."""
        self.is_terminated = True

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


@contextmanager
def playing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """Yield a store without a mover; the ones that it starts are played."""
    made = Rig()

    def started(*_: object) -> tuple[socket.socket, Any]:
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
