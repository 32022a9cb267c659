"""The disk port: transfers between the arena and the SSD files, by whatever carries out the I/O.

    transfer ─▶ job: extents ─▶ DiskIo.start ─▶ io_uring or threads ─▶ DiskIo.reap ─▶ completion

A transfer fails if one of its extents does, but only when all extents that were started have ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Protocol

from flexkv.common.errors import ClosedError, InvariantError
from flexkv.common.terms import Transfer
from flexkv.io.ports import Completion
from flexkv.io.ssd.disk_jobs import DiskGeometry, DiskJob
from flexkv.io.ssd.files import StripedFiles
from flexkv.process import forks
from flexkv.process.workers import Workers


class DiskIo(Protocol):
    """What carries out the extents of jobs. An end is an extent's name, and bytes moved or -errno.

    Attributes:
        name: how it does that, for logs and statistics.
    """

    name: str

    def fileno(self) -> int:
        """Return a descriptor that is readable while `reap` has something to return."""
        ...

    def start(self, job: DiskJob) -> None:
        """Start the extents of a job, now or as soon as there is room."""
        ...

    def reap(self) -> Iterable[tuple[int, int]]:
        """Return the ends of extents since the last call."""
        ...

    def go_on(self) -> Iterable[tuple[int, int]]:
        """Start what had no room; return the ends of extents that are not started any more."""
        ...

    def let_go_in_child(self) -> None:
        """Release the descriptors of a forked child, whose parent goes on."""
        ...

    def close(self) -> None:
        """Wait for what was started, and release everything."""
        ...


class DiskPort:
    """A durable transfer port between the arena and the SSD files."""

    def __init__(self, geometry: DiskGeometry, files: StripedFiles, io: DiskIo) -> None:
        """Take what makes extents, the files, which stay the caller's, and what does the I/O.

        Raises:
            OSError: a thread could not be started; `io` is closed.
        """
        self._geometry, self._files, self.io = geometry, files, io
        self._jobs: dict[int, DiskJob] = {}
        self._ended: list[Completion] = []
        self._next_name = 0
        try:  # a thread of its own, so that a sync that hangs delays no other I/O
            self._syncing = Workers(1, "flexkv-fdatasync")
        except OSError:
            io.close()
            raise
        forks.on_fork(self._let_go_in_child)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = self._io_closed = False

    @property
    def adapter(self) -> str:
        """Return the name of what moves the bytes."""
        return self.io.name

    @property
    def block_bytes(self) -> int:
        """Return the bytes moved for one block."""
        return self._geometry.block_bytes

    def connect(self, wake: Callable[[], None]) -> None:
        """Attach to the running loop, which calls `wake` when `reap` has something to return."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self.io.fileno(), wake)

    def submit(self, transfer: Transfer) -> None:
        """Start one transfer.

        Raises:
            ClosedError: after `close`.
            InvariantError: an id is out of range, or the id lists differ in length.
        """
        self._check_open()
        job = self._geometry.job(transfer, self._next_name)
        if not job.remaining:
            self._ended.append(job.completion)
            return
        self._next_name += job.remaining
        self._jobs.update(dict.fromkeys(range(job.base, self._next_name), job))
        self.io.start(job)

    def reap(self) -> list[Completion]:
        """Return every transfer that ended since the last call, each exactly once."""
        # Even without jobs: an end may have been reaped before its eventfd was written.
        self._take(self.io.reap())
        self._take(self.io.go_on())
        ended, self._ended = self._ended, []
        return ended

    def _take(self, ends: Iterable[tuple[int, int]]) -> None:
        for name, moved in ends:
            job = self._jobs.pop(name)
            path = self._files.paths[job.extent(name).file_index]
            if job.end_one(name, moved, path):
                self._ended.append(job.completion)

    async def sync(self) -> None:
        """Return once every write that was reaped is on stable storage.

        Cancellation: the call ends at once, the sync itself goes on in its thread.

        Raises:
            StorageError: the device reported an error.
            ClosedError: after `close`.
        """
        self._check_open()
        await asyncio.get_running_loop().run_in_executor(self._syncing, self._files.sync)

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the disk port over {self.io.name} is closed")

    def _let_go_in_child(self) -> None:
        if not self._io_closed:
            self.io.let_go_in_child()

    def close(self) -> None:
        """Detach from the loop, wait for all I/O but a sync, and release everything. Idempotent.

        Raises:
            InvariantError: transfers were in flight; their I/O is done, but was not reported.
        """
        if self._closed:
            return
        self._closed = True
        if self._loop is not None:
            self._loop.remove_reader(self.io.fileno())
        self._syncing.shutdown(wait=False, cancel_futures=True)  # a sync may never end
        self.io.close()
        self._io_closed = True
        if unreaped := len(self._jobs) + len(self._ended):
            raise InvariantError(f"disk port closed with {unreaped} I/Os unreaped")
