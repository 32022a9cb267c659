"""The disk port over io_uring: registered files, registered memory, one eventfd.

Extents that the ring has no room for wait here, in order, and are submitted as completions are
reaped. A transfer fails if one of its extents does, but only when all of its extents that the
kernel holds have ended.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from errno import ETIME

from flexkv._ext import Ring
from flexkv.common.errors import ClosedError, InvariantError, StorageError
from flexkv.common.terms import Transfer
from flexkv.io.memory.arena import Arena
from flexkv.io.ports import Completion
from flexkv.io.ssd.disk_jobs import DiskGeometry, DiskJob
from flexkv.io.ssd.files import StripedFiles
from flexkv.process import forks
from flexkv.process.polling import is_readable
from flexkv.process.workers import Workers

TRIAL_S = 2.0
"""How long a new ring may take for its first operation, which does nothing."""


def try_nothing(ring: Ring) -> None:
    """Check that a new ring works, by an operation that does nothing.

    A seccomp profile may let a process set up a ring, but not submit any work.

    Raises:
        OSError: the ring cannot be used.
    """
    ring.nop(0, 1)
    if (result := _first_end(ring)) < 0:
        raise OSError(-result, os.strerror(-result))


def _first_end(ring: Ring) -> int:
    """Return the result of a ring's only operation. Raises OSError if it takes too long."""
    until_s = time.monotonic() + TRIAL_S
    while not (ended := ring.reap()):
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            raise OSError(ETIME, f"its first operation did not end within {TRIAL_S} s")
        is_readable(ring, left_s)
    return ended[0][1]


@dataclass(frozen=True, slots=True)
class RingOptions:
    """How the ring is set up.

    Attributes:
        entries: the size of the ring; 0: do not use io_uring.
        flags: io_uring's setup flags.
        io_bytes_max: the largest size of one I/O of several blocks.
        register: whether to register the arena with the kernel.
    """

    entries: int = 512
    flags: int = 0
    io_bytes_max: int = 2 << 20
    register: bool = True


class UringDiskPort:
    """A durable transfer port between the arena and the SSD files, over io_uring.

    Attributes:
        registered: whether the arena is registered with the kernel, which saves CPU time.
        why: the reason if it is not.
    """

    arrived_bytes = 0

    def __init__(self, arena: Arena, files: StripedFiles, options: RingOptions) -> None:
        """Set up the ring; the port owns neither `arena` nor `files`.

        Raises:
            OSError: the kernel refused io_uring, or an operation that this port needs.
        """
        self._files = files
        self._geometry = DiskGeometry(arena, files, options.io_bytes_max)
        self._ring = Ring(options.entries, options.flags, files.may_block)
        try:
            try_nothing(self._ring)
            self.why = self._lend(self._geometry.slices(arena), options.register)
            self.registered = not self.why
            self._ring.register_files(files.fds)
        except OSError:
            self._ring.close()
            raise
        self._jobs: dict[int, DiskJob] = {}
        self._waiting: deque[DiskJob] = deque()
        self._ended: list[Completion] = []
        self._next_name = 0
        self._syncing = Workers(1, "flexkv-fdatasync")
        forks.on_fork(self._let_go_in_child)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    def _lend(self, slices: list[memoryview], register: bool) -> str:
        """Lend the arena to the ring; return why it is not registered, or an empty string."""
        why = "registration is turned off"
        if register:
            try:
                self._ring.lend(slices, True)
            except OSError as error:
                why = f"the kernel refused to register the arena ({error.strerror}): see ulimit -l"
            else:
                return ""
        self._ring.lend(slices, False)
        return why

    @property
    def block_bytes(self) -> int:
        """Return the bytes moved for one block."""
        return self._geometry.block_bytes

    def connect(self, wake: Callable[[], None]) -> None:
        """Attach to the running loop, which calls `wake` when `reap` has something to return."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._ring.fileno(), wake)

    def submit(self, transfer: Transfer) -> None:
        """Start one transfer; the part of it that the ring has no room for waits.

        Raises:
            ClosedError: after `close`.
            InvariantError: an id is out of range, or the id lists differ in length.
        """
        if self._closed:
            raise ClosedError("the io_uring disk port is closed")
        job = self._geometry.job(transfer, self._next_name)
        if not job.remaining:
            self._ended.append(job.completion)
            return
        self._next_name += job.remaining
        self._jobs.update(dict.fromkeys(range(job.base, self._next_name), job))
        self._waiting.append(job)
        if len(self._waiting) == 1:
            self._fill_ring()

    def _fill_ring(self) -> None:
        """Submit the jobs that wait, as far as the ring has room."""
        while self._waiting:
            job = self._waiting[0]
            if job.error is None:
                rest = job.extents[job.taken :]
                try:
                    job.taken += self._ring.submit(job.base + job.taken, job.write, rest)
                except OSError as error:
                    path = self._files.paths[int(rest[0, 0])]
                    job.error = StorageError(path, int(rest[0, 1]), error.errno or 0, job.op_id)
            if job.error is not None:
                self._abandon_rest(job)
            elif job.taken < len(job.extents):
                return
            self._waiting.popleft()

    def _abandon_rest(self, job: DiskJob) -> None:
        """Drop the extents of a failed job that were never submitted."""
        for name in range(job.base + job.taken, job.base + len(job.extents)):
            del self._jobs[name]
        if job.abandon_rest():
            self._ended.append(job.completion)

    def reap(self) -> list[Completion]:
        """Return every transfer that ended since the last call, each exactly once."""
        # Even without jobs: an end may have been reaped before its eventfd was written.
        for name, moved in self._ring.reap():
            job = self._jobs.pop(name)
            path = self._files.paths[job.extent(name).file_index]
            if job.end_one(name, moved, path):
                self._ended.append(job.completion)
        self._fill_ring()
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
            raise ClosedError("the io_uring disk port is closed")
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._syncing, self._files.sync)

    def _let_go_in_child(self) -> None:
        """Release the child's copy of the ring; its I/O belongs to the parent."""
        self._ring.close()

    def close(self) -> None:
        """Detach from the loop, wait for the kernel and release the ring. Idempotent.

        Raises:
            InvariantError: transfers were in flight; their I/O is done, but was not reported.
        """
        if self._closed:
            return
        self._closed = True
        if self._loop is not None:
            self._loop.remove_reader(self._ring.fileno())
        self._ring.close()
        self._syncing.shutdown(wait=False, cancel_futures=True)  # a sync may never end
        if unreaped := len(self._jobs) + len(self._ended):
            raise InvariantError(f"io_uring disk port closed with {unreaped} I/Os unreaped")
