"""Copies of the extension between device pages and host blocks, compared with numpy."""

from __future__ import annotations

import gc
import mmap
import os
import select
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flexkv._ext import TO_DEVICE, TO_HOST, CopyPool, PageMap, copy_now

Bytes = NDArray[np.uint8]
Copier = Callable[[PageMap, int, NDArray[np.int64], NDArray[np.int64]], None]


@pytest.fixture(scope="module")
def pool() -> Iterator[CopyPool]:
    """Yield a pool of two threads."""
    with_threads = CopyPool(2)
    yield with_threads
    with_threads.close()


def reap(pool: CopyPool, count: int = 1) -> list[int]:
    """Wait until `count` jobs have ended, and return their op ids."""
    tokens: list[int] = []
    while len(tokens) < count:
        assert select.select([pool.fileno()], [], [], 30)[0], "nothing ended"
        tokens += pool.reap()
    return tokens


@dataclass
class Pages:
    """Device and host memory, and the same copies made by numpy."""

    device: Bytes
    host: Bytes
    rows: list[tuple[int, int, int, int]]
    """Offset in `device`, stride, bytes, offset in the host block."""
    device_blocks: int
    host_stride: int

    def map(self) -> PageMap:
        """Return the extension's map of this memory."""
        base = self.device.ctypes.data
        rows = np.array([(base + at, *rest) for at, *rest in self.rows], np.int64)
        return PageMap(rows, self.device_blocks, self.host, self.host_stride, self.device)

    def expect(
        self, direction: int, device_ids: NDArray[np.int64], host_ids: NDArray[np.int64]
    ) -> tuple[Bytes, Bytes]:
        """Return the device and host memory expected after a job."""
        device, host = self.device.copy(), self.host.copy()
        for device_id, host_id in zip(device_ids, host_ids, strict=True):
            for at, stride, size, offset in self.rows:
                paged = slice(at + device_id * stride, at + device_id * stride + size)
                start = host_id * self.host_stride + offset
                if direction == TO_HOST:
                    host[start : start + size] = device[paged]
                else:
                    device[paged] = host[start : start + size]
        return device, host


def pages_of(sizes: list[int], device_blocks: int, host_blocks: int, skew: int = 0) -> Pages:
    """Return memory with pieces by layer on the device, and one after another in a host block."""
    rng = np.random.default_rng(sum(sizes) + skew)
    rows, at, offset = [], skew, skew
    for size in sizes:
        rows.append((at, size + skew, size, offset))
        at += (size + skew) * device_blocks
        offset += size + skew
    device = rng.integers(0, 256, at, np.uint8)
    host = rng.integers(0, 256, offset * host_blocks + skew, np.uint8)
    return Pages(device, host, rows, device_blocks, offset)


@st.composite
def jobs(draw: st.DrawFn) -> tuple[Pages, int, NDArray[np.int64], NDArray[np.int64]]:
    """Draw piece sizes around the kernels' limits, an unaligning skew, ids and a direction."""
    size = st.sampled_from([1, 63, 64, 65, 255, 1023, 1024, 1025, 1151, 4096, 40_000])
    sizes = draw(st.lists(size | st.integers(1, 3000), min_size=1, max_size=6))
    device_blocks, host_blocks = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    pages = pages_of(sizes, device_blocks, host_blocks, draw(st.integers(0, 70)))
    count = draw(st.integers(0, min(device_blocks, host_blocks)))
    device_ids = draw(st.permutations(range(device_blocks)))[:count]
    host_ids = draw(st.permutations(range(host_blocks)))[:count]
    direction = draw(st.sampled_from([TO_HOST, TO_DEVICE]))
    return pages, direction, np.array(device_ids, np.int64), np.array(host_ids, np.int64)


@settings(max_examples=150, deadline=None)
@given(jobs(), st.booleans(), st.booleans())
def test_copies_move_the_pieces_and_nothing_else(
    pool: CopyPool,
    job: tuple[Pages, int, NDArray[np.int64], NDArray[np.int64]],
    pooled: bool,
    urgent: bool,
) -> None:
    """A copy leaves every byte as numpy does, for any table, ids and alignment."""
    pages, direction, device_ids, host_ids = job
    device, host = pages.expect(direction, device_ids, host_ids)
    if pooled:
        pool.submit(7, pages.map(), direction, device_ids, host_ids, urgent=urgent)
        assert reap(pool) == [7]
    else:
        copy_now(pages.map(), direction, device_ids, host_ids)
    assert np.array_equal(pages.device, device)
    assert np.array_equal(pages.host, host)


@pytest.mark.parametrize("direction", [TO_HOST, TO_DEVICE])
@pytest.mark.parametrize("sizes", [[300_001] * 3, [2_100_000], [4096] * 100])
def test_jobs_of_many_units_are_whole(pool: CopyPool, sizes: list[int], direction: int) -> None:
    """A job cut into units, even inside pieces, copies every byte, in the pool or inline."""
    pages = pages_of(sizes, 8, 8, skew=3)
    device_ids, host_ids = np.arange(6)[::-1].copy(), np.array([0, 2, 4, 1, 3, 7])
    device, host = pages.expect(direction, device_ids, host_ids)
    before = pages.device.copy(), pages.host.copy()
    pool.submit(1, pages.map(), direction, device_ids, host_ids, True)
    assert reap(pool) == [1]
    assert np.array_equal(pages.device, device)
    assert np.array_equal(pages.host, host)
    pages.device[:], pages.host[:] = before
    copy_now(pages.map(), direction, device_ids, host_ids)
    assert np.array_equal(pages.device, device)
    assert np.array_equal(pages.host, host)


@pytest.mark.parametrize("size", [0, 1, 1000, (3 << 20) + 77])
def test_copy_moves_a_run(pool: CopyPool, size: int) -> None:
    """`CopyPool.copy` moves every byte of the run and no other byte."""
    source = np.random.default_rng(size).integers(0, 256, size + 2, np.uint8)
    target = np.zeros(size + 2, np.uint8)
    pool.copy(target[1:-1], source[1:-1])
    assert np.array_equal(target[1:-1], source[1:-1])
    assert target[0] == target[-1] == 0


def test_copy_refuses_what_does_not_fit(pool: CopyPool) -> None:
    """Unequal lengths, overlapping runs and read-only targets raise."""
    memory = bytearray(100)
    with pytest.raises(ValueError, match="target has"):
        pool.copy(bytearray(3), b"1234")
    with pytest.raises(ValueError, match="overlap"):
        pool.copy(memoryview(memory)[1:51], memoryview(memory)[:50])
    with pytest.raises(BufferError):
        pool.copy(b"1234", b"1234")


def test_urgent_jobs_pass_and_equal_jobs_take_turns() -> None:
    """Urgent jobs end before background jobs, which take turns, so a small one ends early."""
    pool = CopyPool(1)
    pages = pages_of([1 << 20], 1, 1)
    zeros = np.zeros(512, np.int64)
    mapped = pages.map()
    pool.submit(1, mapped, TO_HOST, zeros, zeros, False)
    pool.submit(2, mapped, TO_HOST, zeros[:1], zeros[:1], False)
    pool.submit(3, mapped, TO_HOST, zeros[:1], zeros[:1], True)
    assert reap(pool, 3) == [3, 2, 1]
    pool.close()


def refused_by(copy: Copier, pages: PageMap) -> None:
    """Check that bad ids, directions, dtypes and maps are refused."""
    good = np.array([0, 1])
    for bad in ([0, 3], [0, -1], [2**62, 0], [-(2**63), 0]):
        with pytest.raises(ValueError, match="device_ids"):
            copy(pages, TO_HOST, np.array(bad), good)
    with pytest.raises(ValueError, match="host_ids"):
        copy(pages, TO_DEVICE, good, np.array([0, 2]))
    with pytest.raises(ValueError, match="1 device ids for 2"):
        copy(pages, TO_HOST, good[:1], good)
    with pytest.raises(ValueError, match="direction"):
        copy(pages, 2, good, good)
    with pytest.raises(TypeError, match="8-byte"):
        copy(pages, TO_HOST, good.astype(np.int32), good)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="PageMap"):
        copy(object(), TO_HOST, good, good)  # type: ignore[arg-type]


def test_bad_ids_move_nothing(pool: CopyPool) -> None:
    """The pool and `copy_now` refuse a job with one bad id as a whole."""
    pages = pages_of([100], device_blocks=3, host_blocks=2)
    device, host = pages.device.copy(), pages.host.copy()
    refused_by(copy_now, pages.map())
    refused_by(lambda *job: pool.submit(1, *job, True), pages.map())
    assert pool.in_flight == 0
    assert np.array_equal(pages.device, device)
    assert np.array_equal(pages.host, host)


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ((0, 8, 8, 0), "out of range"),
        ((64, -8, 8, 0), "out of range"),
        ((64, 8, 0, 0), "out of range"),
        ((64, 8, 8, -1), "out of range"),
        ((64, 7, 8, 0), "overlap"),
        ((64, 64, 64, 1), "fit the host block"),
        ((64, 2**62, 8, 0), "overflow"),
        ((2**63 - 4, 8, 8, 0), "overflow"),
    ],
)
def test_impossible_pieces_are_refused(row: tuple[int, ...], why: str) -> None:
    """A piece with an impossible address or position in the host block raises."""
    with pytest.raises(ValueError, match=why):
        PageMap(np.array([row]), 4, bytearray(256), 64, None)


def test_impossible_tables_are_refused() -> None:
    """No pieces, rows of another width, no blocks or a read-only host raise."""
    row, host = np.array([[64, 8, 8, 0]]), bytearray(64)
    with pytest.raises(ValueError, match="no pieces"):
        PageMap(row[:0], 4, host, 64, None)
    with pytest.raises(ValueError, match="rows of four"):
        PageMap(np.zeros((4, 3), np.int64), 4, host, 64, None)
    with pytest.raises(ValueError, match="exceed"):
        PageMap(np.repeat(row, 9, axis=0), 4, host, 64, None)
    with pytest.raises(ValueError, match="1 or more"):
        PageMap(row, 0, host, 64, None)
    with pytest.raises(BufferError):
        PageMap(row, 4, bytes(64), 64, None)


class Owner:
    """An object that keeps device memory alive."""

    def __init__(self) -> None:
        self.pages: PageMap | None = None


def owned_map(owner: Owner, host: bytearray) -> PageMap:
    """Return a map of one 8-byte piece of a constant array, with an owner."""
    return PageMap(np.array([[CONSTANT.ctypes.data, 8, 8, 0]]), 1, host, 8, owner)


CONSTANT = np.arange(1)


def test_memory_is_held_until_the_job_is_reaped(pool: CopyPool) -> None:
    """A job keeps its map, owner and host memory alive until it is reaped."""
    owner, host, ids = Owner(), bytearray(8), np.zeros(1, np.int64)
    gone = weakref.ref(owner)
    pool.submit(1, owned_map(owner, host), TO_HOST, ids, ids, True)
    del owner
    gc.collect()
    assert gone() is not None
    with pytest.raises(BufferError):
        host.append(1)
    assert reap(pool) == [1]
    assert gone() is None
    host.append(1)


def test_a_cycle_through_the_owner_is_collected() -> None:
    """A map and its owner that refer to each other are garbage-collected."""
    owner = Owner()
    owner.pages = owned_map(owner, bytearray(8))
    gone = weakref.ref(owner)
    del owner
    gc.collect()
    assert gone() is None


def test_close_finishes_what_is_queued() -> None:
    """Jobs queued before close are copied, and can be reaped afterwards; later ones are refused."""
    pool, pages = CopyPool(1), pages_of([1 << 20], 4, 4)
    ids = np.arange(4)
    _, host = pages.expect(TO_HOST, ids, ids)
    pool.submit(1, pages.map(), TO_HOST, ids, ids, False)
    pool.close()
    pool.close()
    assert np.array_equal(pages.host, host)
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(2, pages.map(), TO_HOST, ids, ids, False)
    with pytest.raises(RuntimeError, match="closed"):
        pool.copy(bytearray(1), b"1")
    with pytest.raises(RuntimeError, match="closed"):
        pool.fileno()
    assert (pool.in_flight, pool.reap(), pool.in_flight) == (1, [1], 0)


def test_a_pool_that_is_dropped_finishes_first() -> None:
    """Dropping a pool without close waits for its jobs, and releases their memory."""
    owner, host, ids = Owner(), bytearray(8), np.zeros(1, np.int64)
    gone = weakref.ref(owner)
    pool = CopyPool(2)
    pool.submit(1, owned_map(owner, host), TO_HOST, ids, ids, False)
    del owner, pool
    gc.collect()
    assert gone() is None
    assert bytes(host) == CONSTANT.tobytes()


def test_threads_are_bounded() -> None:
    """A pool of no threads, or of far too many, is refused."""
    for threads in (0, -1, 257):
        with pytest.raises(ValueError, match="threads"):
            CopyPool(threads)


def test_a_forked_child_can_drop_the_pool() -> None:
    """A forked child can close the pool without a stall, and the parent's pool still works."""
    script = """
import os
from flexkv._ext import CopyPool
pool = CopyPool(2)
child = os.fork()
if child == 0:
    pool.close()
    del pool
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
target = bytearray(1 << 20)
pool.copy(target, bytes(1 << 20))
pool.close()
"""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script]
    subprocess.run(command, check=True, timeout=60)


def test_a_sum_is_that_of_what_was_stored_though_others_write_to_the_source(pool: CopyPool) -> None:
    """Whatever another process does to shared memory meanwhile, the sum fits the host block."""
    size = 1 << 20
    with mmap.mmap(-1, size) as shared:
        source = np.frombuffer(shared, np.uint8)
        host, sums = np.zeros((2, size), np.uint8), np.zeros(2, np.uint64)
        pages = PageMap(
            np.array([[source.ctypes.data, size, size, 0]]), 1, host, size, source, sums, True
        )
        child = os.fork()
        while not child:  # the other process
            source[size // 2] ^= 255
        try:
            for number in range(1000):
                pool.submit(number, pages, TO_HOST, np.array([0]), np.array([0]), True)
                reap(pool)
                host[1] = host[0]
                pool.checksum(number, pages, np.array([1]), True)
                reap(pool)
                assert sums[0] == sums[1]
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        del pages, source
