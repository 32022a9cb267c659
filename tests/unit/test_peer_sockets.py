"""The ring of sockets: what a move does, and that nothing moves after its end."""

from __future__ import annotations

import asyncio
import os
import socket
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from errno import ENOMEM
from typing import Any

import numpy as np
import pytest

from flexkv.common.errors import ClosedError, InvariantError
from flexkv.io.peer.fence import Fence
from flexkv.io.peer.sockets import (
    NO_EXTENTS,
    SLOWEST_BYTES_S,
    Extents,
    SocketRing,
    StreamEndedError,
)
from flexkv.testing.virtual_time import run_virtual
from tests.cluster_rigs import open_descriptors
from tests.peer_rig import connected, flood, nodes

BYTES = 4 << 20
Ends = tuple[socket.socket, socket.socket]


class Memory:
    """Memory that is lent to a ring."""

    def __init__(self) -> None:
        self.array = np.random.default_rng(3).integers(0, 256, BYTES, np.uint8)
        self.ring = SocketRing([self.array], 3)
        self.ring.connect()

    def extents(self, *parts: tuple[int, int]) -> Extents:
        """Return parts (first byte, bytes) as extents."""
        return np.array([(self.array.ctypes.data + at, size) for at, size in parts], np.int64)


@pytest.fixture
async def memory() -> AsyncIterator[Memory]:
    """Yield memory and its ring."""
    own = Memory()
    yield own
    own.ring.close()


@pytest.fixture(params=["tcp", "unix"])
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    """Yield both ends of a connection, which hold less than the memory between them."""
    pair = connected(request.param)
    for end, option in ((0, socket.SO_SNDBUF), (1, socket.SO_RCVBUF)):
        pair[end].setsockopt(socket.SOL_SOCKET, option, 64 << 10)
    yield pair
    for end in pair:
        end.close()


async def turns(count: int = 20) -> None:
    """Let the loop run what is ready."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_socket_with_nothing_in_flight_is_dropped_at_once(
    memory: Memory, ends: Ends
) -> None:
    """A removed socket ends its stream and frees its room; one that moves bytes is not removed."""
    before = open_descriptors()
    one, other = (memory.ring.add(end) for end in ends)
    for end in ends:
        end.close()
    receiving = asyncio.ensure_future(memory.ring.receive(other, NO_EXTENTS, 4))
    await turns()
    with pytest.raises(InvariantError, match="1 moves are in flight"):
        memory.ring.drop(other)
    memory.ring.drop(one)
    with pytest.raises(StreamEndedError):
        await receiving
    memory.ring.drop(other)
    memory.ring.stop(one)
    assert open_descriptors() == before - 2
    assert len(memory.ring._free) == 3


async def test_heads_and_extents_arrive_in_order(memory: Memory, ends: Ends) -> None:
    """A head and extents that are sent arrive as one stream, cut differently by the receiver."""
    one, other = (memory.ring.add(end) for end in ends)
    half, sent = BYTES // 2, memory.array.tobytes()
    stream = sent[9:109] + sent[300 : half - 3000]
    async with asyncio.TaskGroup() as group:
        group.create_task(
            memory.ring.send(one, memory.extents((9, 100), (300, half - 3300)), b"head")
        )
        into, rest = memory.extents((half, 60), (half + 500, 1040)), len(stream) - 1100
        head = await memory.ring.receive(other, into, 4, due_bytes=rest)
        await memory.ring.receive(other, memory.extents((half + 2000, rest)))
    expected = bytearray(sent)
    expected[half : half + 60] = stream[:60]
    expected[half + 500 : half + 1540] = stream[60:1100]
    expected[half + 2000 : half + 2000 + rest] = stream[1100:]
    assert head == b"head"
    assert memory.array.tobytes() == expected


async def test_the_last_bytes_wake_a_receive(memory: Memory, ends: Ends) -> None:
    """A few bytes are received, although more bytes than that were waited for before."""
    index = memory.ring.add(ends[0])
    async with asyncio.TaskGroup() as group:
        sent = b"a" * (2 << 20) + b"z" * 700_000
        group.create_task(asyncio.get_running_loop().sock_sendall(ends[1], sent))
        await memory.ring.receive(index, memory.extents((0, 2 << 20)), due_bytes=700_000)
        await memory.ring.receive(index, memory.extents((0, 700_000)))
        last = group.create_task(memory.ring.receive(index, NO_EXTENTS, 1))
        await turns()
        ends[1].send(b"!")
        async with asyncio.timeout(30):
            assert await last == b"!"


async def test_the_end_of_a_stream_is_an_error(memory: Memory, ends: Ends) -> None:
    """A receive reports how many bytes had come when the peer closed; a send fails, too."""
    index = memory.ring.add(ends[0])
    ends[1].send(b"12345")
    ends[1].close()
    with pytest.raises(StreamEndedError) as raised:
        await memory.ring.receive(index, memory.extents((0, 9)))
    assert raised.value.moved_bytes == 5
    assert bytes(memory.array[:5]) == b"12345"
    errors = [await _swallow(memory.ring.send(index, memory.extents((0, BYTES)))) for _ in "12"]
    assert isinstance(errors[1], BrokenPipeError | ConnectionResetError)


@pytest.mark.parametrize("write", [False, True])
async def test_a_cancelled_move_touches_nothing_later(
    memory: Memory, ends: Ends, write: bool
) -> None:
    """When a cancelled move has raised, the kernel neither writes nor reads its memory."""
    index = memory.ring.add(ends[0])
    move = memory.ring.send if write else memory.ring.receive
    async with asyncio.TaskGroup() as group:
        task = group.create_task(move(index, memory.extents((0, BYTES))))
        if not write:
            ends[1].send(b"x" * 1000)
        await turns()
        task.cancel()
        task.cancel()
    assert task.cancelled()
    assert memory.ring._ring.in_flight == 0
    before = memory.array.copy()
    flood(ends[1])
    assert np.array_equal(memory.array, before)
    with pytest.raises(StreamEndedError):
        await move(index, memory.extents((0, 1)))


async def test_a_timeout_ends_a_move(memory: Memory, ends: Ends) -> None:
    """A timeout around a move raises TimeoutError when nothing is in flight any more."""
    index = memory.ring.add(ends[0])
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await memory.ring.receive(index, memory.extents((0, 8)))
    assert memory.ring._ring.in_flight == 0


async def test_removing_waits_for_both_moves(memory: Memory, ends: Ends) -> None:
    """A socket is removed when its receive and its send have ended, even if that is cancelled."""
    index = memory.ring.add(ends[0])
    async with asyncio.TaskGroup() as group:
        moves = [
            group.create_task(_swallow(memory.ring.receive(index, memory.extents((0, 1000))))),
            group.create_task(_swallow(memory.ring.send(index, memory.extents((1000, 2 << 20))))),
        ]
        await turns()
        assert memory.ring._ring.in_flight == 2
        removal = group.create_task(memory.ring.remove(index))
        await turns(1)
        removal.cancel()
    assert removal.cancelled()
    assert memory.ring._ring.in_flight == 0
    assert [task.result() for task in moves] != [None, None]
    before = memory.array.copy()
    flood(ends[1])
    assert np.array_equal(memory.array, before)
    memory.ring.stop(index)
    with pytest.raises(StreamEndedError):
        await memory.ring.receive(index, memory.extents((0, 1)))


async def _swallow(move: object) -> Exception | None:
    try:
        await move  # type: ignore[misc]
    except (OSError, EOFError) as error:
        return error
    return None


async def test_places_are_used_again_under_other_numbers(memory: Memory) -> None:
    """A ring has room for so many sockets; a removed one's number never means another one."""
    pairs = [connected("unix") for _ in range(4)]
    indices = [memory.ring.add(own) for own, _ in pairs[:3]]
    with pytest.raises(OSError, match="open files"):
        memory.ring.add(pairs[3][0])
    await memory.ring.remove(indices[1])
    fresh = memory.ring.add(pairs[3][0])
    assert fresh not in indices
    memory.ring.stop(indices[1])
    pairs[3][1].send(b"abcd")
    assert await memory.ring.receive(fresh, NO_EXTENTS, 4) == b"abcd"
    assert pairs[1][1].recv(1) == b""
    for pair in pairs:
        for end in pair:
            end.close()


async def test_the_caller_may_close_its_socket(memory: Memory) -> None:
    """A socket works, and can be stopped, after its caller has closed its own copy."""
    ours, theirs = connected()
    index = memory.ring.add(ours)
    ours.close()
    theirs.send(b"ab")
    assert await memory.ring.receive(index, NO_EXTENTS, 2) == b"ab"
    async with asyncio.TaskGroup() as group:
        task = group.create_task(_swallow(memory.ring.receive(index, NO_EXTENTS, 1)))
        await turns()
        memory.ring.stop(index)
    assert isinstance(task.result(), StreamEndedError)
    theirs.close()


async def test_a_hang_up_is_seen_behind_what_was_sent_before_it(memory: Memory, ends: Ends) -> None:
    """The other end has hung up once it has closed its half, though not all it sent was read."""
    one, other = (memory.ring.add(end) for end in ends)
    ends[1].send(b"a READ that nobody has read yet")
    assert not memory.ring.has_hung_up(one)
    ends[1].shutdown(socket.SHUT_WR)
    assert memory.ring.has_hung_up(one)
    assert not memory.ring.has_hung_up(other)
    memory.ring.drop(one)
    assert memory.ring.has_hung_up(one)


async def test_wrong_sockets_and_memory_are_refused(memory: Memory, ends: Ends) -> None:
    """Datagrams, memory that was not lent, and a second receive are refused; nothing is begun."""
    with socket.socket(type=socket.SOCK_DGRAM) as datagrams, pytest.raises(ValueError, match="str"):
        memory.ring.add(datagrams)
    index = memory.ring.add(ends[0])
    with pytest.raises(ValueError, match="not lent"):
        await memory.ring.receive(index, memory.extents((BYTES, 1)))
    async with asyncio.TaskGroup() as group:
        task = group.create_task(memory.ring.receive(index, NO_EXTENTS, 1))
        await turns()
        with pytest.raises(OSError, match="busy"):
            await memory.ring.receive(index, NO_EXTENTS, 1)
        ends[1].send(b"!")
    assert task.result() == b"!"


async def test_close_ends_everything(ends: Ends) -> None:
    """Closing the ring ends its moves and its connections, and later calls are refused."""
    memory = Memory()
    with pytest.raises(ClosedError):
        await SocketRing([memory.array], 1).receive(0, NO_EXTENTS, 1)
    index = memory.ring.add(ends[0])
    ends[0].close()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(_swallow(memory.ring.receive(index, memory.extents((0, 8)))))
        await turns()
        memory.ring.close()
        memory.ring.close()
        removal = group.create_task(memory.ring.remove(index))
    assert isinstance(task.result(), StreamEndedError)
    assert removal.result() is None
    assert memory.ring.has_hung_up(index)
    ends[1].setblocking(True)
    assert ends[1].recv(1) == b""
    with pytest.raises(ClosedError):
        memory.ring.add(ends[1])
    with pytest.raises(ClosedError):
        await memory.ring.receive(index, NO_EXTENTS, 1)


async def test_a_forked_child_leaves_connections_alone(memory: Memory, ends: Ends) -> None:
    """A child's copy of the ring is released there; the parent's connection goes on."""
    index = memory.ring.add(ends[0])
    async with asyncio.TaskGroup() as group:
        task = group.create_task(memory.ring.receive(index, NO_EXTENTS, 4))
        await turns()
        assert _forked(lambda: memory.ring._places[index].socket.fileno()) == -1
        ends[1].send(b"1234")
    assert task.result() == b"1234"


def _forked(call: Callable[[], int]) -> int:
    """Return the small number that a call returns in a forked child."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it takes no lock before it exits
        if (child := os.fork()) == 0:
            os._exit(1 + call())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) - 1


async def test_a_fence_waits_for_all_work() -> None:
    """Every waiter passes when the last piece of work ends, the cancelled ones included."""
    fence, calls = Fence(), []
    await fence.passed()
    fence.begin()
    fence.begin()
    async with asyncio.TaskGroup() as group:
        plain = group.create_task(fence.passed())
        cancelled = group.create_task(fence.passed(lambda: calls.append(1)))
        await turns()
        cancelled.cancel()
        await turns()
        fence.end()
        await turns()
        assert not plain.done()
        assert not cancelled.done()
        fence.end()
    assert cancelled.cancelled()
    assert calls == [1]


class _Moving(SocketRing):
    """A ring without sockets, over which a byte moves each half second until some time."""

    def __init__(self, until_s: float) -> None:
        self._until_s = until_s

    def _moved_bytes(self, index: int) -> int:
        return int(2 * min(asyncio.get_running_loop().time(), self._until_s))


@pytest.mark.parametrize(
    ("until_s", "may_s", "lasts_s"), [(0.0, 50, 1.0), (10.0, 50, 11.0), (1000.0, 50, 52.0)]
)
def test_a_move_may_be_slow_as_long_as_bytes_move(
    until_s: float, may_s: float, lasts_s: float
) -> None:
    """A move is given up when nothing has moved for the time given, or half as long again.

    One that goes on for ever, byte by byte, is given up, too.
    """

    async def work() -> None:
        ring, loop = _Moving(until_s), asyncio.get_running_loop()
        nbytes = int(may_s * SLOWEST_BYTES_S)
        async with ring.unless_stalled(0, 1.0, nbytes):
            await asyncio.sleep(min(0.9 * until_s, may_s))
        begin_s = 0.0 if until_s < may_s else loop.time()
        with pytest.raises(TimeoutError):
            async with ring.unless_stalled(0, 1.0, nbytes):
                await asyncio.sleep(100)
        assert lasts_s <= loop.time() - begin_s <= lasts_s + 1

    run_virtual(work())


async def test_bytes_that_move_over_tcp_are_counted() -> None:
    """Both ends see that bytes move, whether the application has taken them yet or not."""
    async with nodes() as (owner, reader):
        ours, theirs = connected()
        rings = (owner.ring, owner.ring.add(theirs)), (reader.ring, reader.ring.add(ours))
        before = [ring._moved_bytes(index) for ring, index in rings]
        await owner.ring.send(rings[0][1], NO_EXTENTS, b"some bytes")
        await reader.ring.receive(rings[1][1], NO_EXTENTS, 4)
        after = [ring._moved_bytes(index) for ring, index in rings]
        assert after[1] - before[1] >= len(b"some bytes")
        assert rings[1][0]._moved_bytes(-1) == 0, "it has been removed"
        for ring, index in rings:
            await ring.remove(index)
        ours.close()
        theirs.close()


class _ShortOfMemory:
    """A ring of the kernel that accepts no move, and does not take sockets out."""

    def __init__(self, ring: Any) -> None:
        self._ring = ring

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ring, name)

    def stream(self, *_: object) -> bool:
        """Refuse a move."""
        return False

    def set_socket(self, slot: int, fd: int) -> None:
        """Put a socket in a slot."""
        if fd < 0:
            raise OSError(ENOMEM, "no memory")
        self._ring.set_socket(slot, fd)


@pytest.mark.parametrize("how", ["cancel", "stop", "remove"])
async def test_a_move_that_the_kernel_has_no_memory_for_can_be_ended(
    memory: Memory, ends: Ends, how: str
) -> None:
    """It waits for another move to end, which may never be; its socket's end ends it at once."""
    accepting = memory.ring._ring
    memory.ring._ring = _ShortOfMemory(accepting)  # type: ignore[assignment]
    index = memory.ring.add(ends[0])
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        moving = group.create_task(_ended(memory.ring.receive(index, memory.extents((0, 5)))))
        await turns()
        if how == "cancel":
            moving.cancel()
        elif how == "stop":
            memory.ring.stop(index)
        else:
            await memory.ring.remove(index)
    assert moving.cancelled() or moving.result() == StreamEndedError(0).args
    memory.ring._ring = accepting


async def _ended(move: Coroutine[Any, Any, bytes]) -> object:
    with pytest.raises(StreamEndedError) as raised:
        await move
    return raised.value.args


async def test_a_socket_that_the_kernel_keeps_costs_no_room(memory: Memory, ends: Ends) -> None:
    """A socket that could not be taken out of the ring is replaced by the next one."""
    accepting = memory.ring._ring
    for _ in range(5):
        index = memory.ring.add(ends[0])
        memory.ring._ring = _ShortOfMemory(accepting)  # type: ignore[assignment]
        await memory.ring.remove(index)
        memory.ring._ring = accepting
    pair = connected()
    index = memory.ring.add(pair[0])
    pair[1].send(b"12345")
    await memory.ring.receive(index, memory.extents((0, 5)))
    assert bytes(memory.array[:5]) == b"12345"
    for end in pair:
        end.close()
