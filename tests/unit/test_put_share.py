"""The share of blocks that puts may be filling at once: bounded, in order, never zero."""

from __future__ import annotations

import asyncio

import pytest

from flexkv.common.errors import ClosedError
from flexkv.server.put_share import PutShare


async def begun(share: PutShare, *puts: int) -> list[asyncio.Task[None]]:
    """Return tasks of puts of these block counts, which have entered or wait."""
    tasks = [asyncio.ensure_future(share.enter(blocks)) for blocks in puts]
    await asyncio.sleep(0)
    return tasks


async def test_puts_beyond_the_share_wait_in_their_order() -> None:
    """Puts beyond the share wait in order; a small put does not pass an earlier large one."""
    share = PutShare(10)
    puts = await begun(share, 6, 6, 1)
    assert [put.done() for put in puts] == [True, False, False]
    share.leave(6)
    await asyncio.sleep(0)
    assert all(put.done() for put in puts)


async def test_one_put_may_always_be_under_way() -> None:
    """One put may always be under way, however large it is."""
    share = PutShare(10)
    (first, second) = await begun(share, 100, 100)
    assert [first.done(), second.done()] == [True, False]
    share.leave(100)
    await asyncio.sleep(0)
    assert second.done()


async def test_a_put_that_is_given_up_takes_no_room() -> None:
    """A put cancelled while it waits, or in the turn that admits it, takes no room."""
    share = PutShare(10)
    _, second, third = await begun(share, 10, 10, 10)
    second.cancel()
    await asyncio.sleep(0)
    share.leave(10)
    third.cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    (fourth,) = await begun(share, 10)
    assert fourth.done()


async def test_those_that_wait_can_be_turned_away() -> None:
    """Turning puts away fails those that wait; puts under way go on."""
    share = PutShare(10)
    _, second = await begun(share, 10, 10)
    share.turn_away(ClosedError("the devices do not answer"))
    with pytest.raises(ClosedError, match="do not answer"):
        await second
    (third,) = await begun(share, 10)
    assert not third.done()
    third.cancel()
