"""The extension's io_uring ring, over real files and pipes."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from flexkv._ext import Ring

PAGE = 4096
MEMORY_BYTES = 64 * PAGE
SINGLE_ISSUER, DEFER_TASKRUN = 1 << 12, 1 << 13
IOPOLL, SQPOLL, SQE128 = 1, 2, 1 << 10


@pytest.fixture
def memory() -> NDArray[np.uint8]:
    """Return page-aligned memory of random bytes."""
    array = np.frombuffer(mmap.mmap(-1, MEMORY_BYTES), np.uint8)
    array[:] = np.random.default_rng(0).integers(0, 256, MEMORY_BYTES, np.uint8)
    return array


@pytest.fixture(params=[False, True], ids=["at once", "in background"])
def ring(request: pytest.FixtureRequest) -> Iterator[Ring]:
    """Yield a ring of 8 entries."""
    opened = Ring(8, in_background=request.param)
    yield opened
    opened.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Yield the reading and the writing end of a pipe."""
    ends = os.pipe()
    yield ends
    for end in ends:
        try:
            os.close(end)
        except OSError as error:
            assert error.errno == errno.EBADF  # noqa: PT017 -- the test closed it itself


def reap(ring: Ring, count: int) -> dict[int, int]:
    """Wait until `count` extents have ended; return the result of each op id, which is unique."""
    ended: dict[int, int] = {}
    while len(ended) < count:
        assert select.select([ring.fileno()], [], [], 30)[0], f"only {ended} ended"
        for op_id, result in ring.reap():
            assert op_id not in ended
            ended[op_id] = result
    return ended


def rows(*extents: tuple[int, int, int, int]) -> NDArray[np.int64]:
    """Return extents as the array that the ring takes."""
    return np.array(extents, np.int64).reshape(-1, 4)


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize("flag", [0, os.O_DIRECT], ids=["buffered", "direct"])
def test_bytes_go_out_and_come_back(
    tmp_path: Path, ring: Ring, memory: NDArray[np.uint8], registered: bool, flag: int
) -> None:
    """Bytes written at an offset are found there by a reader of the file, and by the ring."""
    base, half = memory.ctypes.data, MEMORY_BYTES // 2
    order = np.random.default_rng(1).permutation(16)
    fd = os.open(tmp_path / "blocks", os.O_RDWR | os.O_CREAT | flag)
    ring.lend([memory[:half], memory[half:]], registered)
    ring.register_files([fd])
    out = rows(*((0, int(at) * PAGE, base + i * PAGE, PAGE) for i, at in enumerate(order)))
    assert ring.submit(100, True, out) == 16
    assert reap(ring, 16) == dict.fromkeys(range(100, 116), PAGE)
    content = np.fromfile(tmp_path / "blocks", np.uint8)
    for i, at in enumerate(order):
        assert np.array_equal(content[at * PAGE :][:PAGE], memory[i * PAGE :][:PAGE])
    memory[half:] = 0
    assert ring.submit(0, write=False, extents=rows((0, 0, base + half, 16 * PAGE))) == 1
    assert reap(ring, 1) == {0: 16 * PAGE}
    assert np.array_equal(memory[half:][: 16 * PAGE], content)
    os.close(fd)


@pytest.mark.parametrize("flag", [0, os.O_DIRECT], ids=["buffered", "direct"])
@pytest.mark.parametrize("size", [0, 100, 512, PAGE, PAGE + 100])
def test_the_end_of_a_file_ends_a_read(
    tmp_path: Path, ring: Ring, memory: NDArray[np.uint8], flag: int, size: int
) -> None:
    """A read across the end of a file moves what the file has; one beyond the end moves nothing."""
    path = tmp_path / "short"
    path.write_bytes(bytes(memory[:size]))
    fd = os.open(path, os.O_RDONLY | flag)
    ring.lend([memory], True)
    ring.register_files([fd])
    base = memory.ctypes.data + 8 * PAGE
    assert ring.submit(1, False, rows((0, 0, base, 4 * PAGE), (0, 8 * PAGE, base, PAGE))) == 2
    assert reap(ring, 2) == {1: size, 2: 0}
    assert np.array_equal(memory[8 * PAGE :][:size], memory[:size])
    os.close(fd)


def test_a_short_read_is_continued(
    ring: Ring, memory: NDArray[np.uint8], pipe: tuple[int, int]
) -> None:
    """A read ends once all its bytes have arrived in order, in however many pieces."""
    ring.lend([memory], False)
    ring.register_files([pipe[0]])
    sent = bytes(memory[:300])
    assert ring.submit(5, False, rows((0, 0, memory.ctypes.data + PAGE, 300))) == 1
    for start in range(0, 300, 100):
        assert ring.reap() == []
        os.write(pipe[1], sent[start : start + 100])
        assert select.select([ring.fileno()], [], [], 30)[0]
    assert reap(ring, 1) == {5: 300}
    assert bytes(memory[PAGE : PAGE + 300]) == sent


def test_a_pipe_that_ends_ends_its_read(
    ring: Ring, memory: NDArray[np.uint8], pipe: tuple[int, int]
) -> None:
    """A continued read that reaches the end returns the bytes that came before it."""
    ring.lend([memory], False)
    ring.register_files([pipe[0]])
    assert ring.submit(0, False, rows((0, 0, memory.ctypes.data, 300))) == 1
    os.write(pipe[1], b"x" * 100)
    os.close(pipe[1])
    assert reap(ring, 1) == {0: 100}


def test_errors_arrive_as_negative_errno(
    tmp_path: Path, ring: Ring, memory: NDArray[np.uint8]
) -> None:
    """A refused extent ends with its negative errno, and does not affect the others."""
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE))
    writable, direct = os.open(path, os.O_WRONLY), os.open(path, os.O_RDONLY | os.O_DIRECT)
    ring.lend([memory], True)
    ring.register_files([writable, direct])
    base = memory.ctypes.data
    unreadable, unaligned, good = (0, 0, base, PAGE), (1, 3, base, PAGE), (1, 0, base, PAGE)
    assert ring.submit(0, False, rows(unreadable, unaligned, good)) == 3
    assert reap(ring, 3) == {0: -errno.EBADF, 1: -errno.EINVAL, 2: PAGE}
    os.close(writable)
    os.close(direct)


def test_a_read_that_would_block_waits_for_its_bytes(
    ring: Ring, memory: NDArray[np.uint8], pipe: tuple[int, int]
) -> None:
    """A read from a non-blocking pipe waits for its bytes instead of failing with EAGAIN."""
    os.set_blocking(pipe[0], False)
    ring.lend([memory], False)
    ring.register_files([pipe[0]])
    assert ring.submit(0, False, rows((0, 0, memory.ctypes.data, 8))) == 1
    assert ring.reap() == []
    os.write(pipe[1], b"12345678")
    assert reap(ring, 1) == {0: 8}


def test_impossible_extents_queue_nothing(
    tmp_path: Path, ring: Ring, memory: NDArray[np.uint8]
) -> None:
    """One bad row refuses the whole call, and nothing is in flight."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    base, end = memory.ctypes.data, memory.ctypes.data + MEMORY_BYTES
    good = (0, 0, base, PAGE)
    with pytest.raises(ValueError, match="not registered"):
        ring.submit(0, False, rows(good))
    ring.register_files([fd])
    with pytest.raises(ValueError, match="not lent"):
        ring.submit(0, False, rows(good))
    ring.lend([memory[: 32 * PAGE], memory[32 * PAGE :]], True)
    for bad, why in [
        ((1, 0, base, PAGE), "not registered"),
        ((-1, 0, base, PAGE), "not registered"),
        ((0, 0, base, 0), "below 1"),
        ((0, -1, base, 1), "offset"),
        ((0, 2**63 - 2, base, PAGE), "offset"),
        ((0, 0, base - 1, PAGE), "not lent"),
        ((0, 0, end - 1, 2), "not lent"),
        ((0, 0, base + 31 * PAGE, 2 * PAGE), "not lent"),
        ((0, 0, -1, 2), "not lent"),
        ((0, 0, base, 2**62), "not lent"),
    ]:
        with pytest.raises(ValueError, match=why):
            ring.submit(0, False, rows(good, bad))
    for op_id in (-1, 2**63 - 1):
        with pytest.raises(ValueError, match="op_id"):
            ring.submit(op_id, False, rows(good))
    assert ring.in_flight == 0
    os.close(fd)


def test_a_full_ring_takes_a_prefix(tmp_path: Path, ring: Ring, memory: NDArray[np.uint8]) -> None:
    """A full ring takes a prefix of the extents; the rest can be submitted once ends are reaped."""
    (tmp_path / "file").write_bytes(bytes(memory))
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    ring.lend([memory], True)
    ring.register_files([fd])
    base, count = memory.ctypes.data, 40
    extents = rows(*((0, i * PAGE, base + i * PAGE, PAGE) for i in range(count)))
    taken, ended = ring.submit(0, False, extents), {}
    assert taken == ring.capacity == ring.in_flight == 16
    assert ring.submit(taken, False, extents[taken:]) == 0
    while len(ended) < count:
        ended |= reap(ring, 1)
        taken += ring.submit(taken, False, extents[taken:])
    assert ended == dict.fromkeys(range(count), PAGE)
    assert ring.in_flight == 0
    os.close(fd)


def test_empty_operations_end_under_their_tokens(ring: Ring) -> None:
    """Every nop ends once, with 0, under its op id; zero nops or extents queue nothing."""
    assert ring.nop(10, 0) == 0
    assert ring.submit(0, False, rows()) == 0
    assert ring.nop(10, 12) == 12
    assert reap(ring, 12) == dict.fromkeys(range(10, 22), 0)
    assert ring.reap() == []


def test_close_waits_for_what_is_in_flight(tmp_path: Path, memory: NDArray[np.uint8]) -> None:
    """Close waits for I/O in flight; its ends can be reaped later, and new work is refused."""
    (tmp_path / "file").write_bytes(bytes(memory))
    fd, ring = os.open(tmp_path / "file", os.O_RDONLY | os.O_DIRECT), Ring(16)
    expected, base = memory.copy(), memory.ctypes.data
    memory[:] = 0
    ring.lend([memory], True)
    ring.register_files([fd])
    assert ring.submit(0, False, rows(*((0, i, base + i, PAGE) for i in range(0, 65536, PAGE))))
    ring.close()
    ring.close()
    assert np.array_equal(memory[:65536], expected[:65536])
    assert dict(ring.reap()) == dict.fromkeys(range(16), PAGE)
    for call in (ring.fileno, lambda: ring.nop(0, 1), lambda: ring.submit(0, False, rows())):
        with pytest.raises(RuntimeError, match="closed"):
            call()
    os.close(fd)


def test_memory_is_held_until_close() -> None:
    """Lent buffers cannot be resized or unmapped until the ring is closed or dropped."""
    memory, other, ring = bytearray(PAGE), bytearray(PAGE), Ring(1)
    ring.lend([memory], False)
    with pytest.raises(BufferError):
        memory.append(1)
    with pytest.raises(RuntimeError, match="already"):
        ring.lend([other], False)
    other.append(1)
    ring.close()
    memory.append(1)
    dropped = Ring(1)
    dropped.lend([memory], True)
    del dropped
    gc.collect()
    memory.append(1)


def test_what_the_kernel_refuses_is_not_lent(ring: Ring, memory: NDArray[np.uint8]) -> None:
    """A failed registration raises its errno and leaves the ring as it was."""
    empty = bytearray()
    with pytest.raises(OSError, match="address") as raised:
        ring.lend([memory, empty], True)
    assert raised.value.errno == errno.EFAULT
    empty.append(1)
    ring.lend([memory], True)
    with pytest.raises(OSError, match="descriptor") as raised:
        ring.register_files([2**30])
    assert raised.value.errno == errno.EBADF
    with pytest.raises(ValueError, match="not registered"):
        ring.submit(0, False, rows((0, 0, memory.ctypes.data, 1)))
    with pytest.raises(BufferError):
        Ring(1).lend([b"read-only"], False)


@pytest.mark.parametrize("flags", [IOPOLL, SQPOLL, SQE128, 1 << 31])
def test_flags_that_break_the_ring_are_refused(flags: int) -> None:
    """Setup flags that the ring cannot support, and bad sizes, raise EINVAL."""
    with pytest.raises(OSError, match="Invalid") as raised:
        Ring(8, flags)
    assert raised.value.errno == errno.EINVAL
    for entries in (0, -1, 1 << 30):
        with pytest.raises(OSError, match="Invalid"):
            Ring(entries)


def in_thread(call: object) -> object:
    """Return the result of a call in another thread, or the errno that it raises."""
    ended: list[object] = []

    def run() -> None:
        try:
            ended.append(call())  # type: ignore[operator]
        except OSError as error:
            ended.append(error.errno)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return ended[0]


def test_what_the_kernel_does_not_accept_is_taken_back() -> None:
    """A submission that the kernel refuses raises, and leaves nothing in flight."""
    ring = Ring(8, flags=SINGLE_ISSUER | DEFER_TASKRUN)
    assert in_thread(lambda: ring.nop(0, 12)) == errno.EEXIST
    assert ring.in_flight == 0
    assert ring.nop(100, 12) == 12
    assert reap(ring, 12) == dict.fromkeys(range(100, 112), 0)
    ring.close()


def test_threads_share_a_ring() -> None:
    """Concurrent calls from several threads lose no end and return none twice."""
    ring, ended, lock = Ring(16), [], threading.Lock()

    def work(first: int) -> None:
        taken = 0
        while taken < 500:
            taken += ring.nop(first + taken, min(500 - taken, 8))
            told = ring.reap()
            with lock:
                ended.extend(op_id for op_id, _ in told)

    threads = [threading.Thread(target=work, args=(i * 500,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ring.close()
    ended.extend(op_id for op_id, _ in ring.reap())
    assert sorted(ended) == list(range(2000))


def test_a_forked_child_can_drop_the_ring() -> None:
    """A forked child closes the ring without waiting for its parent's I/O, which goes on."""
    script = """
import os
from flexkv._ext import Ring
memory, ring, (reader, writer) = bytearray(8), Ring(8), os.pipe()
ring.lend([memory], True)
ring.register_files([reader])
address = __import__("ctypes").addressof(__import__("ctypes").c_char.from_buffer(memory))
assert ring.submit(1, False, memoryview(__import__("array").array("q", [0, 0, address, 8]))) == 1
child = os.fork()
if child == 0:
    ring.close()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
os.write(writer, b"12345678")
ring.close()
assert (ring.reap(), bytes(memory)) == ([(1, 8)], b"12345678")
"""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script]
    subprocess.run(command, check=True, timeout=60)


def test_deferred_work_is_announced(memory: NDArray[np.uint8], tmp_path: Path) -> None:
    """A ring that defers completions to its owner's calls makes its descriptor readable."""
    opened = Ring(8, SINGLE_ISSUER | DEFER_TASKRUN)
    opened.lend([memory], False)
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(fd, 0, PAGE)
    opened.register_files([fd])
    address = memory.__array_interface__["data"][0]
    for write in (True, False) * 4:
        assert opened.submit(7, write, np.array([[0, 0, address, PAGE]], np.int64)) == 1
        assert select.select([opened.fileno()], [], [], 20)[0]
        assert opened.reap() == [(7, PAGE)]
    opened.close()
    os.close(fd)
