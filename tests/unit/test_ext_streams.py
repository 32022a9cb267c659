"""The extension's ring over sockets."""

from __future__ import annotations

import errno
import random
import select
import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from flexkv._ext import Ring

MEMORY_BYTES = 8 << 20
Ends = tuple[socket.socket, socket.socket]


@pytest.fixture
def memory() -> NDArray[np.uint8]:
    """Return memory of random bytes."""
    return np.random.default_rng(0).integers(0, 256, MEMORY_BYTES, np.uint8)


@pytest.fixture(params=[False, True], ids=["at once", "in background"])
def ring(request: pytest.FixtureRequest, memory: NDArray[np.uint8]) -> Iterator[Ring]:
    """Yield a ring of 4 entries with room for 3 sockets, to which the memory is lent."""
    opened = Ring(4, in_background=request.param)
    opened.lend([memory], False)
    opened.reserve_sockets(3)
    yield opened
    opened.close()


def tcp_pair() -> Ends:
    """Return both ends of a connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        one = socket.create_connection(listening.getsockname())
        return one, listening.accept()[0]


@pytest.fixture(params=["unix", "tcp"])
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    """Yield both ends of a connection."""
    pair = socket.socketpair() if request.param == "unix" else tcp_pair()
    yield pair
    for end in pair:
        end.close()


def reap(ring: Ring, count: int) -> dict[int, int]:
    """Wait until `count` moves have ended; return the result of each op id."""
    ended: dict[int, int] = {}
    while len(ended) < count:
        assert select.select([ring.fileno()], [], [], 30)[0], f"only {ended} ended"
        for op_id, result in ring.reap():
            assert op_id not in ended
            ended[op_id] = result
    return ended


def ranges(memory: NDArray[np.uint8], *parts: tuple[int, int]) -> NDArray[np.int64]:
    """Return parts of the memory (first byte, bytes) as the ring takes them."""
    return np.array([(memory.ctypes.data + at, size) for at, size in parts], np.int64)


@pytest.mark.parametrize("seed", range(6))
def test_bytes_arrive_in_order_however_they_are_cut(
    ring: Ring, memory: NDArray[np.uint8], ends: Ends, seed: int
) -> None:
    """What the peer writes in pieces fills the ranges in order, and nothing beside them."""
    rng = random.Random(seed)
    sizes = [rng.choice((1, 7, 4096, 100_000, 900_000)) for _ in range(rng.randint(1, 9))]
    places = rng.sample(range(8), 8)
    parts = [(places[i % 8] * (MEMORY_BYTES // 8), size) for i, size in enumerate(sizes[:8])]
    sent = random.Random(seed + 1).randbytes(sum(size for _, size in parts))
    expected, at = memory.copy(), 0
    for first, size in parts:
        expected[first : first + size] = np.frombuffer(sent[at : at + size], np.uint8)
        at += size

    def write() -> None:
        left = memoryview(sent)
        while left:
            size = rng.choice((1, 100, 65536, 3_000_000))
            ends[1].sendall(left[:size])
            left = left[size:]

    ring.set_socket(1, ends[0].fileno())
    assert ring.stream(7, False, 1, ranges(memory, *parts))
    writer = threading.Thread(target=write)
    writer.start()
    assert reap(ring, 1) == {7: len(sent)}
    writer.join()
    assert np.array_equal(memory, expected)


def test_both_directions_move_at_once(ring: Ring, memory: NDArray[np.uint8], ends: Ends) -> None:
    """Megabytes go from one socket of a ring to another, both ways, through small buffers."""
    for end in ends:
        end.setblocking(False)
    quarter = MEMORY_BYTES // 4
    want = memory.copy()
    want[2 * quarter : 3 * quarter], want[3 * quarter :] = want[:quarter], want[quarter:][:quarter]
    for place, end in enumerate(ends):
        ring.set_socket(place, end.fileno())
    for place in (0, 1):
        into = ranges(memory, ((3 - place) * quarter, quarter))
        half = quarter // 2
        out = ranges(memory, (place * quarter, half), (place * quarter + half, half))
        assert ring.stream(place, False, place, into)
        assert ring.stream(2 + place, True, place, out)
    assert reap(ring, 4) == dict.fromkeys(range(4), quarter)
    assert np.array_equal(memory, want)


@pytest.mark.parametrize("size", [0, 10, 300_000])
def test_the_end_of_a_stream_is_fewer_bytes(
    ring: Ring, memory: NDArray[np.uint8], ends: Ends, size: int
) -> None:
    """A receive ends with what the peer sent before it closed."""
    ring.set_socket(0, ends[0].fileno())
    assert ring.stream(0, False, 0, ranges(memory, (0, 200_000), (300_000, 200_000)))
    ends[1].sendall(bytes(size))
    ends[1].close()
    assert reap(ring, 1) == {0: size}


def test_a_send_to_nobody_ends_with_its_errno(
    ring: Ring, memory: NDArray[np.uint8], ends: Ends
) -> None:
    """A send that waits for a reader who closes ends with an error, without a signal."""
    ring.set_socket(0, ends[0].fileno())
    assert ring.stream(0, True, 0, ranges(memory, (0, MEMORY_BYTES)))
    ends[1].recv(1)
    ends[1].close()
    assert reap(ring, 1)[0] in (-errno.EPIPE, -errno.ECONNRESET)
    assert ring.stream(1, True, 0, ranges(memory, (0, 1)))
    assert reap(ring, 1)[1] == -errno.EPIPE


def test_a_shutdown_is_a_fence(ring: Ring, memory: NDArray[np.uint8], ends: Ends) -> None:
    """A stalled receive ends when its socket is shut down; then nothing is written any more."""
    ring.set_socket(0, ends[0].fileno())
    memory[:] = 1
    assert ring.stream(0, False, 0, ranges(memory, (0, 1 << 20), (1 << 20, 1 << 20)))
    ends[1].sendall(b"\2" * 1000)
    ends[0].shutdown(socket.SHUT_RDWR)
    moved = reap(ring, 1)[0]
    assert moved <= 1000
    expected = memory.copy()
    assert not expected[:moved].tobytes().strip(b"\2")
    assert not expected[moved:].tobytes().strip(b"\1")
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        ends[1].sendall(b"\2" * (100 << 20))
    ring.set_socket(0, -1)
    assert np.array_equal(memory, expected)


def test_a_place_is_changed_only_when_nothing_moves(
    ring: Ring, memory: NDArray[np.uint8], ends: Ends
) -> None:
    """A place cannot be emptied or get another socket under a move; afterwards it can."""
    ring.set_socket(2, ends[0].fileno())
    assert ring.stream(0, False, 2, ranges(memory, (0, 8)))
    for call in (
        lambda: ring.set_socket(2, -1),
        lambda: ring.set_socket(2, ends[1].fileno()),
        lambda: ring.stream(1, False, 2, ranges(memory, (8, 8))),
    ):
        with pytest.raises(OSError, match="busy") as raised:
            call()
        assert raised.value.errno == errno.EBUSY
    assert ring.stream(1, True, 2, ranges(memory, (16, 8)))
    ends[1].sendall(b"12345678")
    assert reap(ring, 2) == {0: 8, 1: 8}
    ring.set_socket(2, -1)
    assert ring.stream(3, False, 2, ranges(memory, (0, 8)))
    assert reap(ring, 1) == {3: -errno.EBADF}
    one, other = socket.socketpair()
    ring.set_socket(2, one.fileno())
    one.close()
    other.sendall(b"abcdefgh")
    assert ring.stream(4, False, 2, ranges(memory, (0, 8)))
    assert reap(ring, 1) == {4: 8}
    assert bytes(memory[:8]) == b"abcdefgh"
    ring.set_socket(2, -1)
    assert other.recv(1) == b""
    other.close()


def test_impossible_moves_queue_nothing(ring: Ring, memory: NDArray[np.uint8], ends: Ends) -> None:
    """One bad range refuses the whole move, and nothing is in flight."""
    ring.set_socket(0, ends[0].fileno())
    good = (0, 8)
    for bad, why in [
        ((0, 0), "below 1"),
        ((0, -1), "below 1"),
        ((-1, 8), "not lent"),
        ((MEMORY_BYTES - 1, 2), "not lent"),
        ((0, 2**62), "not lent"),
    ]:
        with pytest.raises(ValueError, match=why):
            ring.stream(0, False, 0, ranges(memory, good, bad))
    for rows in (ranges(memory), np.zeros(3, np.int64), ranges(memory, *[good] * 1025)):
        with pytest.raises(ValueError, match="rows"):
            ring.stream(0, False, 0, rows)
    for place in (3, -1):
        with pytest.raises(ValueError, match="socket"):
            ring.stream(0, False, place, ranges(memory, good))
        with pytest.raises(ValueError, match="socket"):
            ring.set_socket(place, -1)
    with pytest.raises(ValueError, match="op_id"):
        ring.stream(-1, False, 0, ranges(memory, good))
    with pytest.raises(TypeError):
        ring.stream(0, False, 0, np.zeros(2, np.int32))
    assert ring.in_flight == 0
    assert ring.stream(0, False, 0, ranges(memory, *[(i, 1) for i in range(1024)]))
    ends[1].sendall(bytes(1024))
    assert reap(ring, 1) == {0: 1024}


def test_a_ring_has_files_or_sockets(ring: Ring, ends: Ends) -> None:
    """Files and room for sockets are registered once, and exclude each other."""
    with pytest.raises(RuntimeError, match="already"):
        ring.reserve_sockets(1)
    with pytest.raises(RuntimeError, match="already"):
        ring.register_files([ends[0].fileno()])
    other = Ring(1)
    with pytest.raises(ValueError, match="count"):
        other.reserve_sockets(0)
    other.register_files([ends[0].fileno()])
    with pytest.raises(RuntimeError, match="already"):
        other.reserve_sockets(1)
    with pytest.raises(ValueError, match="room for 0"):
        other.set_socket(0, ends[0].fileno())
    other.close()
    for call in (lambda: other.reserve_sockets(1), lambda: other.set_socket(0, -1)):
        with pytest.raises(RuntimeError, match="closed"):
            call()


def test_a_full_ring_takes_no_move(memory: NDArray[np.uint8]) -> None:
    """A move that finds no room is not queued, and can be tried again after an end."""
    ring, pairs = Ring(1), [socket.socketpair() for _ in range(3)]
    ring.lend([memory], False)
    ring.reserve_sockets(3)
    for place, (own, _) in enumerate(pairs):
        ring.set_socket(place, own.fileno())
    took = [ring.stream(place, False, place, ranges(memory, (place, 1))) for place in range(3)]
    assert took == [True, True, False]
    pairs[0][1].sendall(b"x")
    assert reap(ring, 1) == {0: 1}
    assert ring.stream(2, False, 2, ranges(memory, (2, 1)))
    for own, other in pairs:
        own.shutdown(socket.SHUT_RDWR)
        other.close()
        own.close()
    ring.close()
    assert dict(ring.reap()) == {1: 0, 2: 0}


def test_close_waits_for_a_move(memory: NDArray[np.uint8], ends: Ends) -> None:
    """Close returns only when no move can write any more; until then it waits."""
    ring = Ring(4)
    ring.lend([memory], False)
    ring.reserve_sockets(1)
    ring.set_socket(0, ends[0].fileno())
    assert ring.stream(5, False, 0, ranges(memory, (0, 1 << 20)))
    closing = threading.Thread(target=ring.close)
    closing.start()
    ends[1].sendall(b"\7" * (1 << 20))
    closing.join(30)
    assert not closing.is_alive()
    assert ring.reap() == [(5, 1 << 20)]
    assert not bytes(memory[: 1 << 20]).strip(b"\7")
