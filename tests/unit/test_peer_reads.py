"""Reads of blocks over a data socket, between a real sender and a real receiver."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from errno import ECONNRESET, ENOBUFS
from typing import Any

import numpy as np
import pytest

from flexkv.common.errors import CorruptBlockError, InvariantError, MalformedError, PeerError
from flexkv.common.terms import BlockIds
from flexkv.io.peer import receiver as receiver_module
from flexkv.io.peer import sender as sender_module
from flexkv.io.peer.frames import BLOCKS_MAX, HEADER_BYTES, SUM_BYTES, Read, Status
from flexkv.io.peer.receiver import Receiver
from flexkv.io.peer.sender import Granted, Sender
from flexkv.io.peer.sockets import Extents, SocketRing
from flexkv.io.peer.transport import Fetched
from tests.peer_rig import (
    BLOCK_BYTES,
    NUMBER,
    PATIENCE_S,
    STRIDE_BYTES,
    Node,
    connected,
    fetch,
    nodes,
    serving,
)


@pytest.fixture(autouse=True)
def small_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a message carry three of the rig's blocks at the reader, and seven at the owner."""
    monkeypatch.setattr(receiver_module, "MESSAGE_BYTES", 3 * BLOCK_BYTES)
    monkeypatch.setattr(sender_module, "MESSAGE_BYTES", 7 * BLOCK_BYTES)


def places(*ids: int) -> BlockIds:
    """Return host ids."""
    return np.array(ids, np.int64)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_reads_bring_blocks_and_their_sums(kind: str) -> None:
    """Reads side by side on one socket bring each block to its place, and touch nothing else."""
    async with nodes() as (owner, reader), serving(owner, reader, kind) as receiver:
        shuffled = np.random.default_rng(5).permutation(96)
        parts = [(0, shuffled[:64]), (70, shuffled[64:65]), (20, shuffled[65:75])]
        expected = reader.arena.array.copy()
        for first, ids in parts:
            expected[ids, :BLOCK_BYTES] = owner.arena.array[first:][: len(ids), :BLOCK_BYTES]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(fetch(reader, receiver, *part)) for part in parts]
        assert [task.result() for task in tasks] == [Fetched(len(ids), None) for _, ids in parts]
        assert np.array_equal(reader.arena.array, expected)
        for first, ids in parts:
            assert np.array_equal(reader.host.sums[ids], owner.host.sums[first:][: len(ids)])


async def test_progress_is_told_in_order() -> None:
    """What has arrived is told message by message, with the sums of all blocks of the read."""
    async with nodes() as (owner, reader), serving(owner, reader) as receiver:
        told = []
        read = Read(NUMBER, 10, 7, BLOCK_BYTES)
        addresses = reader.arena.address + np.arange(7) * STRIDE_BYTES
        sums = await receiver.read(
            read, addresses, lambda count, sums: told.append((count, sums.tolist()))
        )
        assert sums.tolist() == owner.host.sums[10:17].tolist()
        assert told == [(count, sums.tolist()) for count in (3, 6, 7)]


@pytest.mark.parametrize(
    ("read", "status"),
    [
        (Read(NUMBER + 1, 0, 2, BLOCK_BYTES), Status.NO_GRANT),
        (Read(NUMBER, 95, 2, BLOCK_BYTES), Status.NOT_GRANTED),
        (Read(NUMBER, 0, 2, BLOCK_BYTES + 1), Status.OTHER_SIZE),
    ],
)
async def test_a_refusal_breaks_nothing(read: Read, status: Status) -> None:
    """A refused read raises the reason and moves no byte; the next read on the socket works."""
    async with nodes() as (owner, reader), serving(owner, reader) as receiver:
        before = reader.arena.array.copy()
        addresses = reader.arena.address + np.arange(2) * STRIDE_BYTES
        with pytest.raises(PeerError, match=status.why):
            await receiver.read(read, addresses)
        assert np.array_equal(reader.arena.array, before)
        assert not receiver.is_broken
        assert await fetch(reader, receiver, 0, places(4)) == Fetched(1, None)


async def test_a_wrong_sum_is_not_believed() -> None:
    """Blocks before the first one with a wrong sum count, it is named, and the socket is closed."""
    async with nodes() as (owner, reader), serving(owner, reader) as receiver:
        owner.host.sums[[12, 14]] ^= 1
        filled, error = await fetch(reader, receiver, 10, places(*range(50, 57)))
        assert filled == 2
        assert isinstance(error, CorruptBlockError)
        assert error.block_ids == (52, 54)
        assert receiver.is_broken
        filled, error = await fetch(reader, receiver, 10, places(50))
        assert (filled, type(error)) == (0, PeerError)


async def test_a_cancelled_turn_ends_the_reads_behind_it() -> None:
    """A read that is cancelled after its READ was sent breaks the connection, also for others."""
    async with nodes() as (_, reader):
        ours, theirs = connected()
        receiver = Receiver(reader.ring, reader.ring.add(ours), "owner", PATIENCE_S)
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(fetch(reader, receiver, 0, places(*range(at, at + 5))))
                for at in (0, 10, 20)
            ]
            asked = b""
            while len(asked) < 3 * HEADER_BYTES:
                asked += await asyncio.get_running_loop().sock_recv(theirs, 1000)
            tasks[1].cancel()
        assert tasks[1].cancelled()
        for task in (tasks[0], tasks[2]):
            filled, error = task.result()
            assert (filled, type(error)) == (0, PeerError)
        await reader.ring.remove(receiver.index)
        ours.close()
        theirs.close()


async def test_a_read_that_was_not_asked_for_breaks_nothing_when_cancelled() -> None:
    """A read that is cancelled before its READ is sent leaves the connection whole."""
    async with nodes() as (owner, reader), serving(owner, reader) as receiver:
        async with asyncio.TaskGroup() as group:
            first = group.create_task(fetch(reader, receiver, 0, places(0)))
            second = group.create_task(fetch(reader, receiver, 1, places(1)))
            await asyncio.sleep(0)
            second.cancel()
        assert first.result() == Fetched(1, None)
        assert not receiver.is_broken


async def test_a_stalled_owner_is_given_up() -> None:
    """A read of an owner that sends nothing fails after the time limit."""
    async with nodes() as (_, reader):
        ours, theirs = connected()
        receiver = Receiver(reader.ring, reader.ring.add(ours), "owner", 0.05)
        filled, error = await fetch(reader, receiver, 0, places(0))
        assert filled == 0
        assert isinstance(error, PeerError)
        assert "nothing moved" in str(error)
        await reader.ring.remove(receiver.index)
        ours.close()
        theirs.close()


async def test_a_stalled_reader_loses_its_blocks() -> None:
    """A sender gives up a reader that does not take what it asked for, and lets its blocks go."""
    async with nodes() as (owner, _):
        ours, theirs = connected("unix")
        index = owner.ring.add(theirs)
        ours.send(Read(NUMBER, 0, 64, BLOCK_BYTES).packed())
        with pytest.raises(TimeoutError):
            await Sender(owner.ring, 0.05).serve(index, owner.lookup)
        assert owner.pins == 0
        await owner.ring.remove(index)
        ours.close()
        theirs.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"x" * 32,
        Read(NUMBER, 0, 65, BLOCK_BYTES).packed(),
        Read(NUMBER, 0, 1, BLOCK_BYTES).packed()[:31],
    ],
    ids=["magic", "blocks", "part"],
)
async def test_a_malformed_read_ends_the_connection(sent: bytes) -> None:
    """A sender answers nothing to a malformed or broken-off READ, and shuts the socket down."""
    async with nodes() as (owner, _):
        ours, theirs = connected()
        index = owner.ring.add(theirs)
        ours.send(sent)
        ours.shutdown(1)
        with pytest.raises(MalformedError):
            await Sender(owner.ring, PATIENCE_S).serve(index, owner.lookup)
        await owner.ring.remove(index)
        theirs.close()
        with suppress(ConnectionResetError):
            assert await asyncio.get_running_loop().sock_recv(ours, 1) == b""
        ours.close()


async def test_a_cancelled_sender_lets_its_blocks_go() -> None:
    """When a cancelled sender has ended, the kernel reads none of its blocks any more."""
    async with nodes() as (owner, _):
        ours, theirs = connected("unix")
        index = owner.ring.add(theirs)
        ours.send(Read(NUMBER, 0, 64, BLOCK_BYTES).packed())
        granted = asyncio.Event()

        def lookup(read: Read) -> Granted | Status:
            granted.set()
            return owner.lookup(read)

        async with asyncio.TaskGroup() as group:
            task = group.create_task(Sender(owner.ring, PATIENCE_S).serve(index, lookup))
            await granted.wait()
            assert owner.pins == 64
            task.cancel()
        assert owner.pins == 0
        assert owner.ring._ring.in_flight == 0
        await owner.ring.remove(index)
        ours.close()
        theirs.close()


async def test_blocks_are_held_until_the_last_of_them_is_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While any message of an answer is being sent, all its blocks stay; then they are let go."""
    pins, send = [], SocketRing.send
    async with nodes() as (owner, reader), serving(owner, reader) as receiver:

        async def watched(
            ring: SocketRing, index: int, extents: Extents, head: bytes = b""
        ) -> None:
            await send(ring, index, extents, head)
            if ring is owner.ring:
                pins.append(owner.pins)

        monkeypatch.setattr(SocketRing, "send", watched)
        assert await fetch(reader, receiver, 0, places(*range(20))) == Fetched(20, None)
        assert await fetch(reader, receiver, 0, places(*range(5))) == Fetched(5, None)
    assert pins == [20, 20, 20, 5]


async def test_mistakes_of_ours_are_refused() -> None:
    """Addresses that do not fit the READ, and grants that do not fit it, are our own mistakes."""
    async with nodes() as (owner, reader), serving(owner, reader) as receiver:
        for count, blocks in ((1, 2), (0, 0), (BLOCKS_MAX + 1, BLOCKS_MAX + 1)):
            with pytest.raises(InvariantError):
                await receiver.read(Read(NUMBER, 0, blocks, 1), np.zeros(count, np.int64))
        assert not receiver.is_broken
    for found in (Status.OK, Granted(np.zeros(1, np.int64), np.zeros(2, np.uint64), lambda: None)):
        async with nodes() as (owner, _):
            await _serve_wrongly(owner, found)


async def _serve_wrongly(owner: Node, found: Granted | Status) -> None:
    ours, theirs = connected()
    index = owner.ring.add(theirs)
    ours.send(Read(NUMBER, 0, 1, BLOCK_BYTES).packed())
    with pytest.raises(InvariantError):
        await Sender(owner.ring, PATIENCE_S).serve(index, lambda _: found)
    await owner.ring.remove(index)
    ours.close()
    theirs.close()


async def test_both_ends_bound_how_long_the_bytes_of_a_read_may_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A peer that sends or takes byte by byte for ever is given up: all bytes have their time."""
    bounded, unless_stalled = [], SocketRing.unless_stalled

    def recorded(ring: SocketRing, index: int, stall_s: float, nbytes: int = 0) -> Any:
        bounded.append(nbytes)
        return unless_stalled(ring, index, stall_s, nbytes)

    monkeypatch.setattr(SocketRing, "unless_stalled", recorded)
    async with nodes() as (owner, reader), serving(owner, reader) as receiver:
        assert await fetch(reader, receiver, 0, places(*range(10))) == Fetched(10, None)
    answer_bytes = HEADER_BYTES + 10 * (SUM_BYTES + BLOCK_BYTES)
    assert sum(bounded) == 2 * answer_bytes


@pytest.mark.parametrize(("number", "is_own"), [(ENOBUFS, True), (ECONNRESET, False)])
async def test_a_read_for_which_this_node_lacks_memory_blames_no_peer(
    monkeypatch: pytest.MonkeyPatch, number: int, is_own: bool
) -> None:
    """A peer is left out for its own failures only."""

    async def refused(*_: object) -> None:
        raise OSError(number, "an error")

    async with nodes() as (owner, reader), serving(owner, reader) as receiver:
        monkeypatch.setattr(reader.ring, "send", refused)
        error = (await fetch(reader, receiver, 0, places(1, 2))).error
        assert isinstance(error, PeerError)
        assert error.is_own is is_own
        assert receiver.is_broken
