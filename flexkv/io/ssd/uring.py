"""The disk port over io_uring: registered files, registered memory, one eventfd.

What the ring has no room for waits here, in order, and goes in as completions are reaped. An
extent that failed makes its transfer fail, but only when every extent of it that the kernel holds
has come back.
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
"""How long a ring may take for its first operation, which does nothing."""


def try_nothing(ring: Ring) -> None:
    """Let a new ring do an operation that does nothing.

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
            raise OSError(ETIME, "its first operation does not end")
        is_readable(ring, left_s)
    return ended[0][1]


@dataclass(frozen=True, slots=True)
class RingOptions:
    """How the ring is set up: its entries, io_uring's setup flags, the bound of one I/O."""

    entries: int = 512
    flags: int = 0
    io_bytes_max: int = 2 << 20
    register: bool = True


class UringDiskPort:
    """A durable transfer port between the arena and the SSD files, over io_uring.

    Attributes:
        registered: whether the kernel holds the arena registered, which saves CPU.
        why: why not, when it does not.
    """

    arrived_bytes = 0

    def __init__(self, arena: Arena, files: StripedFiles, options: RingOptions) -> None:
        """Set up the ring; the port owns neither `arena` nor `files`.

        Raises:
            OSError: the kernel refused io_uring, or what this port does with it.
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
        """Name the arena to the ring; give why it is not registered, or nothing."""
        why = "registration is not asked for"
        if register:
            try:
                self._ring.lend(slices, True)
            except OSError as error:
                why = f"the kernel does not register the arena ({error.strerror}): see memlock"
            else:
                return ""
        self._ring.lend(slices, False)
        return why

    @property
    def block_bytes(self) -> int:
        """Give the bytes moved for one block."""
        return self._geometry.block_bytes

    def connect(self, wake: Callable[[], None]) -> None:
        """Attach to the running event loop; `wake` is called on it when `reap` has something."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._ring.fileno(), wake)

    def submit(self, transfer: Transfer) -> None:
        """Start one transfer, or the part of it that the ring has room for.

        Raises:
            ClosedError: after `close`.
            InvariantError: ids out of range, or of unequal length.
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
        """Hand the kernel what waits, as far as it has room."""
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
        """Forget the part of a failed job that the kernel never got."""
        for name in range(job.base + job.taken, job.base + len(job.extents)):
            del self._jobs[name]
        if job.abandon_rest():
            self._ended.append(job.completion)

    def reap(self) -> list[Completion]:
        """Give every transfer that ended since the last call, each exactly once."""
        # Jobs or none: an end may have been taken before its eventfd was written.
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

        Cancellation: the call ends at once, the kernel's sync goes on until `close`.

        Raises:
            StorageError: the device refused.
            ClosedError: after `close`.
        """
        if self._closed:
            raise ClosedError("the io_uring disk port is closed")
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._syncing, self._files.sync)

    def _let_go_in_child(self) -> None:
        """Release this process's side of the ring: its I/O is the parent's."""
        self._ring.close()

    def close(self) -> None:
        """Detach from the loop, wait for the kernel and release the ring. Idempotent.

        Raises:
            InvariantError: transfers were in flight; the kernel is done with them, nobody was told.
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
