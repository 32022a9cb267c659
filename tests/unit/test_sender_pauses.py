"""For how long an owner pauses before it sends, or reads the next READ."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from flexkv.io.peer import sender
from flexkv.io.peer.frames import HEADER_BYTES, SUM_BYTES, Read, Status
from flexkv.io.peer.sender import REFUSED_S, Sender
from flexkv.io.peer.sockets import Extents, SocketRing, StreamEndedError
from tests.peer_rig import BLOCK_BYTES, NUMBER, PATIENCE_S, Node, connected, nodes

READ = Read(NUMBER, 3, 5, BLOCK_BYTES)
HEAD_BYTES = HEADER_BYTES + 5 * SUM_BYTES


class Turns:
    """Turns; the second one comes only once `free` is set.

    Attributes:
        told: the turns that were asked for and that came, what was sent, and what was not.
    """

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []
        self.free = asyncio.Event()
        self._number = 0

    async def turn(self, nbytes: int) -> float:
        """Return the number of the turn."""
        self._number += 1
        number = self._number
        self.told.append(("asked", nbytes))
        if number == 2:
            await self.free.wait()
        self.told.append(("came", number))
        return float(number)

    def unsent(self, begun_s: float, sent_bytes: int) -> None:
        """Take note of it."""
        self.told += [("ended", int(begun_s)), ("sent", sent_bytes)]

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Take note of what a ring sends."""
        send = SocketRing.send

        async def watched(
            ring: SocketRing, index: int, extents: Extents, head: bytes = b""
        ) -> None:
            self.told.append(("sent", len(head) + int(extents[:, 1].sum())))
            await send(ring, index, extents, head)

        monkeypatch.setattr(SocketRing, "send", watched)


@asynccontextmanager
async def served(owner: Node, *turns: Turns) -> AsyncIterator[tuple[socket.socket, list[object]]]:
    """Yield a reader's end of a socket, and the error with which serving the other end ends."""
    ours, theirs = connected()
    index, errors = owner.ring.add(theirs), list[object]()
    theirs.close()

    async def serve() -> None:
        try:
            await Sender(owner.ring, PATIENCE_S, *turns).serve(index, owner.lookup)
        except (OSError, EOFError) as error:
            errors.append(error)

    async with asyncio.TaskGroup() as group:
        group.create_task(serve())
        yield ours, errors
        ours.close()
    await owner.ring.remove(index)
    assert owner.pins == 0


async def received(end: socket.socket, nbytes: int) -> bytes:
    """Return the next bytes of a socket."""
    got = b""
    while len(got) < nbytes:
        got += await asyncio.get_running_loop().sock_recv(end, nbytes - len(got))
    return got


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list of the pauses asked of `asyncio.sleep`, which does not sleep any more."""
    sleeps, sleep = list[float](), asyncio.sleep

    async def watched(delay_s: float) -> None:
        sleeps.append(delay_s)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", watched)
    return sleeps


async def test_a_refused_read_is_followed_by_a_pause(slept: list[float]) -> None:
    """A reader that is refused again and again does not take up the owner's loop."""
    refused = READ._replace(number=NUMBER + 1)
    async with nodes() as (owner, _), served(owner) as (ours, _):
        answer = refused.answer(Status.NO_GRANT) + owner.answer(READ)
        ours.send(refused.packed() + READ.packed())
        assert await received(ours, len(answer)) == answer
    assert slept == [REFUSED_S]


async def test_a_sender_waits_for_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each message asks for its turn with its bytes, and is sent when that has come."""
    monkeypatch.setattr(sender, "MESSAGE_BYTES", 2 * BLOCK_BYTES)
    turns, two = Turns(), 2 * BLOCK_BYTES
    turns.watch(monkeypatch)
    async with nodes() as (owner, _), served(owner, turns) as (ours, _):
        answer = owner.answer(READ)
        ours.send(READ.packed())
        got = await received(ours, HEAD_BYTES + two)
        turns.free.set()
        assert got + await received(ours, len(answer) - len(got)) == answer
    assert turns.told == [
        *[("asked", two), ("came", 1), ("sent", HEAD_BYTES + two)],
        *[("asked", two), ("came", 2), ("sent", two)],
        *[("asked", BLOCK_BYTES), ("came", 3), ("sent", BLOCK_BYTES)],
    ]


@pytest.mark.parametrize("how", ["reset", "closed", "half closed"])
async def test_a_reader_that_hangs_up_while_it_waits_gives_its_turn_back(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Nothing more is sent to it, so the next reader waits for none of its bytes."""
    monkeypatch.setattr(sender, "MESSAGE_BYTES", 2 * BLOCK_BYTES)
    turns = Turns()
    turns.watch(monkeypatch)
    async with nodes() as (owner, _), served(owner, turns) as (ours, errors):
        ours.send(READ.packed())
        await received(ours, HEAD_BYTES + 2 * BLOCK_BYTES)
        if how == "half closed":
            ours.shutdown(socket.SHUT_WR)
        elif how == "reset":
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if how != "half closed":
            ours.close()
        turns.free.set()
    assert [type(each) for each in errors] == [StreamEndedError]
    assert turns.told[-3:] == [("came", 2), ("ended", 2), ("sent", 0)]


async def test_what_was_sent_of_a_message_is_not_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A send that ends early has taken the turn for the bytes that it moved."""
    turns = Turns()

    async def send(*_: object) -> None:
        raise StreamEndedError(12_345)

    monkeypatch.setattr(SocketRing, "send", send)
    async with nodes() as (owner, _), served(owner, turns) as (ours, errors):
        ours.send(READ.packed())
        assert await asyncio.get_running_loop().sock_recv(ours, 1) == b""
    assert [type(each) for each in errors] == [StreamEndedError]
    assert turns.told[1:] == [("came", 1), ("ended", 1), ("sent", 12_345)]
