"""Laws of the disk adapters: few large I/Os, every error reported, threads without io_uring."""

import asyncio
import errno
import fcntl
import os
import threading
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
from structlog.testing import capture_logs

from flexkv._ext import Ring
from flexkv.common.errors import ShortTransferError, StorageError
from flexkv.common.terms import Route, Tier, Transfer
from flexkv.io.memory.arena import Arena
from flexkv.io.ssd import disk_jobs
from flexkv.io.ssd.adapter import open_disk
from flexkv.io.ssd.disk_jobs import DiskGeometry
from flexkv.io.ssd.files import StripedFiles
from flexkv.io.ssd.posix import thread_port
from flexkv.io.ssd.uring import RingOptions, try_nothing, uring_port

STRIDE = 4096
BLOCKS = 64
READ, WRITE = Route(Tier.DISK, Tier.HOST), Route(Tier.HOST, Tier.DISK)
PATIENCE_S = 20.0

PORTS = {
    "uring": lambda arena, files: uring_port(arena, files, RingOptions(16)),
    "threads": thread_port,
}
every_port = pytest.mark.parametrize("make", PORTS.values(), ids=PORTS.keys())


def transfer(route, source_ids, target_ids, op_id=1):
    """Return a transfer of the given ids."""
    source_ids, target_ids = np.array(source_ids, np.int64), np.array(target_ids, np.int64)
    return Transfer(op_id=op_id, owner=1, route=route, source_ids=source_ids, target_ids=target_ids)


@contextmanager
def tiers(*folders, num_blocks=BLOCKS, stride=STRIDE, max_file_size_bytes=None):
    """Yield an arena and files of the same number of blocks."""
    files = StripedFiles.open(folders, num_blocks, stride, max_file_size_bytes)
    arena = Arena.open(num_blocks, stride)
    try:
        yield arena, files
    finally:
        arena.close()
        files.close()


@contextmanager
def opened(port):
    """Yield a connected port and the event that it sets; close the port afterwards."""
    woken = asyncio.Event()
    port.connect(woken.set)
    try:
        yield port, woken
    finally:
        port.close()


async def run(port, woken, *transfers):
    """Run transfers, and return the error of each, in the order of their op ids."""
    for each in transfers:
        port.submit(each)
    ended = port.reap()
    async with asyncio.timeout(PATIENCE_S):
        while len(ended) < len(transfers):
            await woken.wait()
            woken.clear()
            ended += port.reap()
    return [completion.error for completion in sorted(ended, key=lambda each: each.op_id)]


def extents(arena, files, route, source_ids, target_ids, io_bytes_max=4 * STRIDE):
    """Return the extents of a transfer, with the host block id instead of the address."""
    job = DiskGeometry(arena, files, io_bytes_max).job(transfer(route, source_ids, target_ids), 0)
    rows = job.extents.tolist()
    return [(index, at, (to - arena.address) // STRIDE, size) for index, at, to, size in rows]


def test_neighbours_are_one_io(tmp_path):
    """Blocks that are contiguous on both ends form one I/O, up to the largest I/O."""
    with tiers(tmp_path) as (arena, files):
        found = extents(arena, files, WRITE, [5, 6, 7, 8, 9, 20], [0, 1, 2, 3, 4, 5])
    assert found == [
        (0, 0, 5, 4 * STRIDE),
        (0, 4 * STRIDE, 9, STRIDE),
        (0, 5 * STRIDE, 20, STRIDE),
    ]


def test_no_io_crosses_the_end_of_a_file(tmp_path):
    """Neighbouring ids in different files are in different I/Os."""
    with tiers(tmp_path, max_file_size_bytes=3 * STRIDE) as (arena, files):
        found = extents(arena, files, READ, range(1, 6), range(5))
    assert found == [(0, STRIDE, 0, 2 * STRIDE), (1, 0, 2, 3 * STRIDE)]


def test_neighbours_of_a_stripe_are_one_io(tmp_path):
    """Over two directories, ids two apart are neighbours in a file and form one I/O."""
    with tiers(tmp_path / "a", tmp_path / "b") as (arena, files):
        found = extents(arena, files, READ, [0, 2, 4, 1, 3], range(5))
    assert found == [(0, 0, 0, 3 * STRIDE), (1, 0, 3, 2 * STRIDE)]


def test_no_io_crosses_two_registered_slices(tmp_path, monkeypatch):
    """Memory is registered in slices, and no I/O crosses from one into another."""
    monkeypatch.setattr(disk_jobs, "SLICE_BYTES_MAX", 10 * STRIDE + 1)
    with tiers(tmp_path) as (arena, files):
        found = extents(arena, files, READ, range(8, 12), range(8, 12))
        slices = [len(piece) for piece in DiskGeometry(arena, files, 1).slices(arena)]
    assert found == [(0, 8 * STRIDE, 8, 2 * STRIDE), (0, 10 * STRIDE, 10, 2 * STRIDE)]
    assert slices == [10 * STRIDE] * 6 + [4 * STRIDE]


def test_a_block_is_one_io_up_to_8_mib(tmp_path):
    """A block larger than the largest I/O is still one I/O, up to 8 MiB."""
    ids = np.arange(2)
    with tiers(tmp_path, num_blocks=2, stride=8 << 20) as (arena, files):
        job = DiskGeometry(arena, files, 2 << 20).job(transfer(READ, ids, ids), 0)
        assert job.extents[:, 3].tolist() == [8 << 20] * 2
    with tiers(tmp_path, num_blocks=2, stride=17 << 20) as (arena, files):
        job = DiskGeometry(arena, files, 2 << 20).job(transfer(READ, ids, ids), 0)
        assert job.extents[:, 3].tolist() == [8 << 20, 8 << 20, 1 << 20] * 2
        addresses = job.extents[:, 2] - arena.address
        assert addresses.tolist() == job.extents[:, 1].tolist()
        assert addresses.tolist() == [0, 8 << 20, 16 << 20, 17 << 20, 25 << 20, 33 << 20]


@every_port
async def test_a_large_block_comes_back(make, tmp_path):
    """A block that takes several I/Os comes back equal."""
    with tiers(tmp_path, num_blocks=2, stride=9 << 20) as (arena, files):
        arena.array[0] = np.random.default_rng(1).integers(0, 256, 9 << 20, np.uint8)
        with opened(make(arena, files)) as (port, woken):
            assert await run(port, woken, transfer(WRITE, [0], [1])) == [None]
            assert await run(port, woken, transfer(READ, [1], [1])) == [None]
        assert np.array_equal(arena.array[0], arena.array[1])


async def test_a_small_ring_takes_any_number(tmp_path):
    """More I/Os than the ring has entries wait in the port, and all of them end."""
    shuffled = np.random.default_rng(2).permutation(BLOCKS)
    with tiers(tmp_path) as (arena, files):
        arena.array[:] = np.arange(BLOCKS, dtype=np.uint8)[:, None]
        port = uring_port(arena, files, RingOptions(entries=2))
        with opened(port) as (port, woken):
            halves = [shuffled[:32], shuffled[32:]]
            writes = [transfer(WRITE, ids, ids[::-1], op_id) for op_id, ids in enumerate(halves)]
            assert await run(port, woken, *writes) == [None, None]
            arena.array[:] = 0
            reads = [transfer(READ, ids[::-1], ids, op_id) for op_id, ids in enumerate(halves)]
            assert await run(port, woken, *reads) == [None, None]
        assert np.array_equal(arena.array[:, -1], np.arange(BLOCKS))


@every_port
async def test_a_file_that_ended_is_a_short_transfer(make, tmp_path):
    """A read past the end of a truncated file reports how much it read; other reads succeed."""
    with tiers(tmp_path) as (arena, files), opened(make(arena, files)) as (port, woken):
        os.truncate(files.paths[0], 10 * STRIDE)
        errors = await run(
            port,
            woken,
            transfer(READ, [8, 9, 10, 11], [0, 1, 2, 3], op_id=0),
            transfer(READ, [9], [8], op_id=1),
            transfer(READ, [30, 40, 50], [20, 22, 24], op_id=2),
        )
    short, fine, nothing = errors
    assert isinstance(short, ShortTransferError)
    assert (short.path, short.wanted_bytes, short.moved_bytes) == (
        files.paths[0],
        4 * STRIDE,
        2 * STRIDE,
    )
    assert fine is None
    assert isinstance(nothing, ShortTransferError)
    assert nothing.moved_bytes == 0


@every_port
@pytest.mark.parametrize(
    ("route", "stand_in", "flags", "number"),
    [
        (WRITE, "/dev/full", os.O_RDWR, errno.ENOSPC),
        (READ, None, os.O_WRONLY, errno.EBADF),
        (WRITE, None, os.O_RDONLY, errno.EBADF),
    ],
    ids=["full", "unreadable", "unwritable"],
)
async def test_every_errno_is_told(make, tmp_path, route, stand_in, flags, number):
    """A file's refusal is a StorageError with path, offset and errno; the port goes on."""
    with tiers(tmp_path / "a", tmp_path / "b") as (arena, files):
        broken = os.open(stand_in or files.paths[1], flags)
        os.dup2(broken, files.fds[1], inheritable=False)
        os.close(broken)
        with opened(make(arena, files)) as (port, woken):
            ids = np.arange(3, 19)
            errors = await run(
                port, woken, transfer(route, ids, ids, 7), transfer(route, [4], [4], 8)
            )
        assert errors[1] is None
        assert isinstance(errors[0], StorageError)
        assert (errors[0].path, errors[0].errno) == (files.paths[1], number)
        assert (errors[0].offset_bytes % STRIDE, errors[0].op_id) == (0, 7)


async def test_a_failed_transfer_drops_what_the_kernel_never_got(tmp_path):
    """A failed transfer drops the I/Os that found no room in the ring; the next one succeeds."""
    with tiers(tmp_path) as (arena, files):
        port = uring_port(arena, files, RingOptions(entries=1))
        with opened(port) as (port, woken):
            os.truncate(files.paths[0], 0)
            reads = transfer(READ, range(0, BLOCKS, 2), range(BLOCKS // 2), op_id=0)
            writes = transfer(WRITE, [0], [0], op_id=1)
            first, second = await run(port, woken, reads, writes)
        assert isinstance(first, ShortTransferError)
        assert second is None


class RefusingRing:
    """A ring that refuses one call with an errno, and forwards the others."""

    def __init__(self, refused, number, *arguments):
        if refused == "Ring":
            raise OSError(number, os.strerror(number))
        self._ring = Ring(*arguments)
        self._refused, self._number = refused, number

    def __getattr__(self, name):
        return getattr(self._ring, name)

    def lend(self, buffers, register):
        """Lend buffers, unless told to refuse to register them."""
        if register and self._refused == "register":
            raise OSError(self._number, os.strerror(self._number))
        self._ring.lend(buffers, register)

    def register_files(self, fds):
        """Register files, unless told to refuse."""
        if self._refused == "register_files":
            raise OSError(self._number, os.strerror(self._number))
        self._ring.register_files(fds)

    def submit(self, op_id, write, extents):
        """Submit extents, unless told to refuse."""
        if self._refused == "submit":
            raise OSError(self._number, os.strerror(self._number))
        return self._ring.submit(op_id, write, extents)


@pytest.fixture
def refuse(monkeypatch):
    """Return a function that makes new rings refuse one call."""

    def install(call, number):
        monkeypatch.setattr("flexkv.io.ssd.uring.Ring", partial(RefusingRing, call, number))

    return install


async def test_without_memlock_it_runs_unregistered(tmp_path, refuse):
    """If the kernel refuses to register the memory, the port works without, and has the reason."""
    refuse("register", errno.ENOMEM)
    with tiers(tmp_path) as (arena, files):
        port = uring_port(arena, files, RingOptions(16))
        with opened(port) as (port, woken):
            assert not port.io.registered
            assert "Cannot allocate memory" in port.io.why
            assert await run(port, woken, transfer(WRITE, [1], [2])) == [None]


async def test_memory_is_registered_where_it_may(tmp_path):
    """A port on this machine has registered its memory, or has the reason for a refusal."""
    with tiers(tmp_path) as (arena, files):
        port = uring_port(arena, files, RingOptions(16))
        with opened(port):
            assert port.io.registered != bool(port.io.why)


async def test_a_ring_that_refuses_work_fails_the_transfer(tmp_path, refuse):
    """An error of io_uring itself fails the transfer, and is not raised by submit."""
    refuse("submit", errno.EBUSY)
    with tiers(tmp_path) as (arena, files):
        port = uring_port(arena, files, RingOptions(16))
        with opened(port) as (port, woken):
            (error,) = await run(port, woken, transfer(WRITE, [1, 5], [2, 9]))
    assert isinstance(error, StorageError)
    assert (error.errno, error.offset_bytes) == (errno.EBUSY, 2 * STRIDE)


async def choose(arena, files, entries=16):
    """Return the name of the adapter that `open_disk` chooses, and the one event that it logs."""
    with capture_logs() as logs, opened(open_disk(arena, files, RingOptions(entries))) as (port, _):
        pass
    (event,) = logs
    assert event["event"] == "disk_adapter"
    return port.adapter, event


async def test_io_uring_is_chosen_where_it_is_there(tmp_path):
    """With O_DIRECT and io_uring, the io_uring adapter is chosen, and the log says so."""
    with tiers(tmp_path) as (arena, files):
        kind, event = await choose(arena, files)
    assert (kind, event["adapter"]) == ("io_uring", "io_uring")


async def test_no_entries_means_threads(tmp_path):
    """`iouring_entries` of 0 turns io_uring off."""
    with tiers(tmp_path) as (arena, files):
        kind, event = await choose(arena, files, entries=0)
    assert (kind, event["reason"]) == ("threads", "iouring_entries is 0")


@pytest.mark.parametrize("call", ["Ring", "register_files"])
async def test_a_kernel_without_io_uring_means_threads(tmp_path, refuse, call):
    """If the kernel refuses io_uring, threads are used, the log says why, nothing stays open."""
    with tiers(tmp_path) as (arena, files):
        before = os.listdir("/proc/self/fd")
        refuse(call, errno.EPERM)
        kind, event = await choose(arena, files)
        assert os.listdir("/proc/self/fd") == before
    assert kind == "threads"
    assert event["adapter"] == "threads"
    assert event["reason"] == "io_uring refused (Operation not permitted)"


async def test_buffered_files_mean_threads(tmp_path):
    """Without O_DIRECT, threads are used, for the reason that the files give."""
    with tiers(tmp_path, stride=1000) as (arena, files):
        kind, event = await choose(arena, files)
        with opened(open_disk(arena, files, RingOptions(16))) as (port, woken):
            arena.array[3] = 9
            assert await run(port, woken, transfer(WRITE, [3], [5])) == [None]
            assert await run(port, woken, transfer(READ, [5], [4])) == [None]
        assert (arena.array[4] == 9).all()
    assert kind == "threads"
    assert "not aligned" in event["reason"]


def test_a_ring_may_have_any_descriptor():
    """io_uring works in a process with thousands of open files."""

    class Silent:
        """A ring with a high descriptor whose end comes only at the second reap."""

        def __init__(self, fd):
            self._fd = fd
            self._ends = iter([[], [(1, 0)]])

        def nop(self, name, count):
            pass

        def fileno(self):
            return self._fd

        def reap(self):
            return next(self._ends)

    event = os.eventfd(1)
    high = fcntl.fcntl(event, fcntl.F_DUPFD_CLOEXEC, 1024)
    try:
        try_nothing(Silent(high))
    finally:
        os.close(event)
        os.close(high)


@every_port
async def test_a_refused_sync_is_told(make, tmp_path, monkeypatch):
    """A failed sync is raised to the caller as a StorageError."""

    def refuse_sync(fd):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with tiers(tmp_path) as (arena, files), opened(make(arena, files)) as (port, _):
        monkeypatch.setattr(os, "fdatasync", refuse_sync)
        with pytest.raises(StorageError, match="EIO"):
            await port.sync()


@every_port
async def test_an_idle_port_wakes_nobody(make, tmp_path):
    """An end that is reaped before its eventfd is written does not leave the fd readable."""
    with tiers(tmp_path) as (arena, files), opened(make(arena, files)) as (port, woken):
        for turn in range(200):
            ids = np.arange(4) * 7 + turn % 8
            assert await run(port, woken, transfer(WRITE, ids, ids), transfer(READ, ids, ids, 2))
            woken.clear()
        await asyncio.sleep(0.01)
        port.reap()
        await asyncio.sleep(0.01)
        woken.clear()
        await asyncio.sleep(0.01)
        assert not woken.is_set()


def test_runs_of_large_blocks_keep_their_tails(tmp_path):
    """Blocks too large for one I/O are cut singly and lose no byte, whatever the largest I/O."""
    with tiers(tmp_path, num_blocks=4, stride=10 << 20) as (arena, files):
        job = DiskGeometry(arena, files, 32 << 20).job(transfer(WRITE, range(3), range(3)), 0)
    assert int(job.extents[:, 3].sum()) == 30 << 20


def test_threads_that_cannot_start_refuse_the_port(tmp_path, monkeypatch):
    """If a thread of the port cannot start, the others end and opening fails."""
    start, started = threading.Thread.start, []

    def refuse(thread):
        started.append(thread)
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        start(thread)

    with tiers(tmp_path) as (arena, files):
        monkeypatch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(OSError, match="can't start"):
            thread_port(arena, files)
        monkeypatch.undo()
    assert not started[0].is_alive()


def test_an_interrupted_close_waits_for_its_threads(tmp_path, monkeypatch):
    """A close that ctrl-C interrupts still waits for its threads, which may be writing."""
    with tiers(tmp_path) as (arena, files):
        port, shutdowns = thread_port(arena, files), []
        shut = port.io._threads.shutdown

        def interrupted():
            shutdowns.append(None)
            if len(shutdowns) == 1:
                raise KeyboardInterrupt
            shut()

        monkeypatch.setattr(port.io._threads, "shutdown", interrupted)
        with pytest.raises(KeyboardInterrupt):
            port.close()
        assert len(shutdowns) == 2
        port.close()
