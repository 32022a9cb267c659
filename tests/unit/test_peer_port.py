"""The port to other nodes over real sockets, with a node that grants what a test tells it to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from errno import ENOMEM

import numpy as np
import pytest

from flexkv.common.errors import PeerError
from flexkv.io.peer.port import Allowed, Wish
from flexkv.io.ports import Completion
from tests.cluster_rigs import open_descriptors, turns
from tests.peer_port_rig import BEHIND, BLOCKS_READ, HOLDER, OWNER, reading
from tests.peer_rig import NUMBER


async def test_a_transfer_brings_what_is_granted() -> None:
    """The blocks come with their bytes, over all lanes, and the grant ends."""
    async with reading() as own:
        own.submit()
        assert await own.completion() == Completion(1, None, BLOCKS_READ)
        ids = np.arange(BLOCKS_READ)
        assert own.node.blocks(ids + BEHIND) == own.holders.owner.blocks(ids)


@pytest.mark.parametrize("is_cleared", [True, False])
async def test_a_transfer_of_before_a_clear_reads_nothing_that_is_granted_after_it(
    is_cleared: bool,
) -> None:
    """The node may be in the next generation by then, and be granted blocks of that."""
    async with reading() as own:
        own.holders.may_answer.clear()
        before = own.node.arena.array.copy()
        own.submit()
        await own.holders.asked.wait()
        if is_cleared:
            own.port.cleared()
        own.holders.may_answer.set()
        ended = await own.completion()
        if not is_cleared:
            assert ended == Completion(1, None, BLOCKS_READ)
            return
        assert (type(ended.error), ended.filled) == (PeerError, 0)
        assert np.array_equal(own.node.arena.array, before)
        own.submit()
        assert await own.completion() == Completion(2, None, BLOCKS_READ)


async def test_a_transfer_of_before_a_clear_asks_for_nothing_more() -> None:
    """What a limit has cut off is not asked for in the next generation."""
    async with reading() as own:

        def half(wish: Wish) -> Allowed:
            own.port.cleared()
            return Allowed(NUMBER, (wish.last - wish.first) // 2, True)

        own.submit()
        own.holders.answer = half
        ended = await own.completion()
        assert (type(ended.error), len(own.holders.wishes)) == (PeerError, 1)


async def test_a_port_that_is_stopped_reads_nothing_over_a_new_connection() -> None:
    """A connection that was being made when the engine was closed is not used."""
    async with reading() as own:
        own.holders.may_connect.clear()
        before = own.node.arena.array.copy()
        own.submit()
        await own.holders.connecting.wait()
        own.port.stop()
        own.holders.may_connect.set()
        ended = await own.completion()
        assert (type(ended.error), ended.filled) == (PeerError, 0)
        assert np.array_equal(own.node.arena.array, before)


async def test_the_port_says_who_reads_and_how_that_ended() -> None:
    """The port reports each part that arrives or fails, so that its holder can be judged."""
    async with reading() as own:
        own.submit()
        await own.completion()
        assert own.holders.requests == [OWNER]
        assert own.holders.told == ["arrived"]
        own.holders.owner.ring.stop(own.holders.sockets[0])
        own.holders.on_connect = refuse
        own.submit()
        ended = await own.completion()
        assert type(ended.error) is PeerError
        assert own.holders.told[1:] == [ended.error.why]


async def test_a_holder_that_is_left_out_is_not_asked() -> None:
    """A transfer that may not read from its holder ends at once; that is no failure of it."""
    async with reading() as own:
        own.holders.on_begin = refuse
        own.submit()
        ended = await own.completion()
        assert (type(ended.error), ended.filled) == (PeerError, 0)
        assert (own.holders.wishes, own.holders.told) == ([], [])


@pytest.mark.parametrize(
    "failure",
    [PeerError("it", "connecting", "no descriptors", is_own=True), OSError(ENOMEM, "no memory")],
    ids=["told", "raised"],
)
async def test_nobody_is_blamed_for_what_this_node_lacks(failure: Exception) -> None:
    """A read that this node could not make fails, and its holder may be read from at once."""
    async with reading() as own:

        def lack() -> None:
            raise failure

        own.holders.on_connect = lack
        own.submit()
        ended = await own.completion()
        assert isinstance(ended.error, PeerError)
        assert (ended.error.is_own, ended.filled, own.holders.told) == (True, 0, [])
        own.holders.on_connect = lambda: None
        own.submit()
        assert (await own.completion()).error is None
        assert own.port.counts[HOLDER]["failed"] == 1


@pytest.mark.parametrize("is_silent", [True, False])
async def test_a_holder_that_lends_nothing_for_a_while_is_to_blame(is_silent: bool) -> None:
    """The transfer's error blames the holder, whether that says it is busy or says nothing."""
    async with reading(patience_s=0.05) as own:

        def busy(wish: Wish) -> Allowed:
            raise PeerError("it", "asking", "it is busy", is_busy=True)

        own.holders.answer = busy
        if is_silent:
            own.holders.may_answer.clear()
        own.submit()
        ended = await own.completion()
        assert isinstance(ended.error, PeerError)
        assert ended.error.is_busy == (not is_silent)
        assert own.holders.told == [ended.error.why]


def refuse() -> None:
    """Fail as a peer does."""
    raise PeerError("it", "connecting", "no")


async def test_a_connection_to_a_holder_takes_one_descriptor() -> None:
    """With hundreds of nodes they are scarce; a connection that is forgotten keeps none."""
    async with reading() as own:
        before = open_descriptors()
        own.submit()
        await own.completion()
        assert open_descriptors() == before + 2, "one at each end, as the part has one lane"
        await own.port._transport.forget(HOLDER)
        await turns()
        assert await until(lambda: open_descriptors() == before)


async def until(condition: Callable[[], bool]) -> bool:
    """Wait until a condition holds."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 -- the other end notices it by and by
            await asyncio.sleep(0.001)
    return True
