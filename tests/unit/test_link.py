"""A link cuts off peers that do not read, refuses overlong frames, and lets other tasks run."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from flexkv.links.link import MESSAGES_A_TURN, Link
from flexkv.server.wire import FRAMING, TO_SERVER, Cancel, ProtocolError, Settled, ToServer, framed


@pytest.fixture
async def ends() -> AsyncIterator[tuple[Link[ToServer], socket.socket]]:
    """Yield a link and the socket at its other end."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    link = await Link.over(ours, FRAMING, TO_SERVER)
    yield link, theirs
    link.abort()
    await link.wait_closed()
    theirs.close()


async def test_who_does_not_read_is_cut_off(ends: tuple[Link[ToServer], socket.socket]) -> None:
    """A peer with more than `unsent_bytes_max` unsent bytes is cut off; by default, none is."""
    link, _ = ends
    while link.unsent_bytes < 1 << 20:
        link.send(Settled(1))
    assert link.is_open
    link.unsent_bytes_max = 1 << 20
    while link.is_open:
        link.send(Settled(1))
    assert link.unsent_bytes <= (1 << 20) + 4096
    assert await link.receive() is None


async def test_a_frame_that_is_longer_than_the_peer_may_send_is_refused(
    ends: tuple[Link[ToServer], socket.socket],
) -> None:
    """An overlong frame is refused by its length, before any of it is received."""
    link, theirs = ends
    link.frame_bytes_max = 100
    theirs.send(framed(Cancel((1,))))
    assert await link.receive() == Cancel((1,))
    theirs.send((101).to_bytes(4, "little"))
    with pytest.raises(ProtocolError, match="a frame of 101 bytes"):
        await link.receive()


async def test_who_talks_without_end_holds_nobody_up(
    ends: tuple[Link[ToServer], socket.socket],
) -> None:
    """Other tasks run between a peer's messages, even if all of them have already arrived."""
    link, theirs = ends
    theirs.send(framed(Cancel((1,))) * 200)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.ensure_future(other())
    await link.receive()
    before = turns
    for _ in range(199):
        await link.receive()
    assert turns - before >= 199 // MESSAGES_A_TURN
    task.cancel()


async def test_nothing_is_sent_behind_the_end(
    ends: tuple[Link[ToServer], socket.socket],
) -> None:
    """A link that has sent its end takes no more to send, and still receives."""
    link, theirs = ends
    link.send(Settled(1))
    link.end()
    assert not link.is_open
    link.send(Settled(2))
    link.end()
    theirs.setblocking(True)
    assert theirs.recv(4096) == framed(Settled(1))
    assert theirs.recv(4096) == b""
    theirs.send(framed(Cancel((1,))))
    assert await link.receive() == Cancel((1,))
