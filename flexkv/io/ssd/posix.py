"""The disk port with threads and preadv/pwritev, for when io_uring or O_DIRECT is refused."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from errno import EIO

from flexkv.common.errors import ClosedError, InvariantError
from flexkv.common.terms import Transfer
from flexkv.io.memory.arena import Arena
from flexkv.io.ports import Completion
from flexkv.io.ssd.disk_jobs import DiskGeometry, DiskJob
from flexkv.io.ssd.files import DIRECT_ALIGNMENT_BYTES, StripedFiles
from flexkv.process import forks
from flexkv.process.workers import Workers


class ThreadDiskPort:
    """A durable transfer port between the arena and the SSD files, by blocking calls in threads.

    As with io_uring, an eventfd announces what has ended, and `reap` takes all of it at once.
    """

    arrived_bytes = 0

    def __init__(
        self,
        arena: Arena,
        files: StripedFiles,
        threads: int = 4,
        io_bytes_max: int = 2 << 20,
    ) -> None:
        """Start the threads; the port owns neither `arena` nor `files`.

        Raises:
            OSError: the threads could not be started.
        """
        self._files = files
        self._geometry = DiskGeometry(arena, files, io_bytes_max)
        self._memory = arena.buffer
        self._memory_address = arena.address
        self._jobs: dict[int, DiskJob] = {}
        self._moved: deque[tuple[int, int]] = deque()
        self._ended: list[Completion] = []
        self._next_name = 0
        # A thread of its own, so that a sync that hangs delays no other I/O.
        self._syncing = Workers(1, "flexkv-fdatasync")
        try:
            self._threads = Workers(threads, "flexkv-disk")
        except OSError:
            self._syncing.shutdown()
            raise
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        forks.on_fork(self._let_go_in_child)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    @property
    def block_bytes(self) -> int:
        """Return the bytes moved for one block."""
        return self._geometry.block_bytes

    def connect(self, wake: Callable[[], None]) -> None:
        """Attach to the running loop, which calls `wake` when `reap` has something to return."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._event_fd, wake)

    def submit(self, transfer: Transfer) -> None:
        """Start one transfer.

        Raises:
            ClosedError: after `close`.
            InvariantError: an id is out of range, or the id lists differ in length.
        """
        if self._closed:
            raise ClosedError("the thread disk port is closed")
        job = self._geometry.job(transfer, self._next_name)
        if not job.remaining:
            self._ended.append(job.completion)
            return
        job.taken = job.remaining
        self._next_name += job.remaining
        for name in range(job.base, self._next_name):
            self._jobs[name] = job
            self._threads.submit(self._carry_out, name, job)

    def _carry_out(self, name: int, job: DiskJob) -> None:
        """Do one I/O in a worker thread, and announce its end."""
        file_index, offset, address, wanted = job.extent(name)
        start = address - self._memory_address
        memory = self._memory[start : start + wanted]
        call = os.pwritev if job.write else os.preadv
        moved = 0
        try:
            while moved < wanted:
                count = call(self._files.fds[file_index], [memory[moved:]], offset + moved)
                moved += count
                # The file has ended; O_DIRECT from an unaligned end would fail with EINVAL.
                if count == 0 or (self._files.direct and moved % DIRECT_ALIGNMENT_BYTES):
                    break
        except OSError as error:
            moved = -(error.errno or EIO)
        finally:
            self._moved.append((name, moved))
            os.eventfd_write(self._event_fd, 1)

    def reap(self) -> list[Completion]:
        """Return every transfer that ended since the last call, each exactly once."""
        # Even without jobs: an end may have been reaped before its eventfd was written.
        with suppress(BlockingIOError):
            if not self._closed:
                os.eventfd_read(self._event_fd)
        while self._moved:
            name, moved = self._moved.popleft()
            job = self._jobs.pop(name)
            path = self._files.paths[job.extent(name).file_index]
            if job.end_one(name, moved, path):
                self._ended.append(job.completion)
        ended, self._ended = self._ended, []
        return ended

    async def sync(self) -> None:
        """Return once every write that was reaped is on stable storage.

        Cancellation: the call ends at once, the sync itself goes on in its thread.

        Raises:
            StorageError: the device reported an error.
            ClosedError: after `close`.
        """
        if self._closed:
            raise ClosedError("the thread disk port is closed")
        await asyncio.get_running_loop().run_in_executor(self._syncing, self._files.sync)

    def _let_go_in_child(self) -> None:
        if not self._closed:
            forks.replace(self._event_fd)

    def _join(self) -> None:
        """Wait for all I/O, even if interrupted, because it uses the files until then."""
        try:
            self._threads.shutdown()
        except BaseException:
            self._join()
            raise

    def close(self) -> None:
        """Detach from the loop, join all threads but that of `sync`, close the eventfd. Idempotent.

        Raises:
            InvariantError: transfers were in flight; their I/O is done, but was not reported.
        """
        if self._closed:
            return
        self._closed = True
        if self._loop is not None:
            self._loop.remove_reader(self._event_fd)
        self._syncing.shutdown(wait=False, cancel_futures=True)  # a sync may never end
        self._join()
        os.close(self._event_fd)
        if unreaped := len(self._jobs) + len(self._ended):
            raise InvariantError(f"thread disk port closed with {unreaped} I/Os unreaped")
