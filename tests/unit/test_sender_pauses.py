"""For how long an owner pauses before it sends, or reads the next READ."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from flexkv.io.peer import sender
from flexkv.io.peer.frames import Read, Status
from flexkv.io.peer.sender import REFUSED_S, Sender
from tests.peer_rig import BLOCK_BYTES, NUMBER, PATIENCE_S, Node, connected, nodes


async def sent(owner: Node, read: Read, *turn_s: Any) -> bytes:
    """Return what a sender answers to a READ."""
    ours, theirs = connected()
    index, loop, got = owner.ring.add(theirs), asyncio.get_running_loop(), b""
    theirs.close()
    async with asyncio.TaskGroup() as group:
        group.create_task(Sender(owner.ring, PATIENCE_S, *turn_s).serve(index, owner.lookup))
        await loop.sock_sendall(ours, read.packed())
        ours.shutdown(socket.SHUT_WR)
        while more := await loop.sock_recv(ours, 1 << 20):
            got += more
    await owner.ring.remove(index)
    ours.close()
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
    async with nodes() as (owner, _):
        read = Read(NUMBER + 1, 3, 5, BLOCK_BYTES)
        assert await sent(owner, read) == read.answer(Status.NO_GRANT)
        read = Read(NUMBER, 3, 5, BLOCK_BYTES)
        assert await sent(owner, read) == owner.answer(read)
    assert slept == [REFUSED_S]


async def test_a_sender_waits_for_its_turn(
    slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each message asks for its turn with its bytes, and is sent after the wait."""
    monkeypatch.setattr(sender, "MESSAGE_BYTES", 2 * BLOCK_BYTES)
    asked = list[int]()

    def turn_s(nbytes: int) -> float:
        asked.append(nbytes)
        return 7.0 if len(asked) == 2 else 0.0

    async with nodes() as (owner, _):
        read = Read(NUMBER, 3, 5, BLOCK_BYTES)
        assert await sent(owner, read, turn_s) == owner.answer(read)
    assert asked == [2 * BLOCK_BYTES, 2 * BLOCK_BYTES, BLOCK_BYTES]
    assert slept == [7.0]
