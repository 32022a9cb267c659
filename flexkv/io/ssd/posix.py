"""Disk I/O by threads with preadv/pwritev, for when io_uring or O_DIRECT is refused."""

from __future__ import annotations

import os
from collections import deque
from contextlib import suppress
from errno import EIO

from flexkv.io.memory.arena import Arena
from flexkv.io.ssd.disk_jobs import DiskGeometry, DiskJob
from flexkv.io.ssd.files import DIRECT_ALIGNMENT_BYTES, StripedFiles
from flexkv.io.ssd.port import DiskPort
from flexkv.process import forks
from flexkv.process.workers import Workers


def thread_port(
    arena: Arena, files: StripedFiles, threads: int = 4, io_bytes_max: int = 2 << 20
) -> DiskPort:
    """Return a disk port over threads; it owns neither `arena` nor `files`.

    Raises:
        OSError: the threads could not be started.
    """
    geometry = DiskGeometry(arena, files, io_bytes_max)
    return DiskPort(geometry, files, ThreadIo(arena, files, threads))


class ThreadIo:
    """Carries out I/O by blocking calls in threads.

    As with io_uring, an eventfd announces what has ended, and `reap` takes all of it at once.
    """

    name = "threads"

    def __init__(self, arena: Arena, files: StripedFiles, threads: int) -> None:
        """Start the threads.

        Raises:
            OSError: there are no descriptors left, or the threads could not be started.
        """
        self._files = files
        self._memory, self._memory_address = arena.buffer, arena.address
        self._ends: deque[tuple[int, int]] = deque()
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            self._threads = Workers(threads, "flexkv-disk")
        except OSError:
            os.close(self._event_fd)
            raise
        self._closed = False

    def fileno(self) -> int:
        """Return the eventfd."""
        return self._event_fd

    def start(self, job: DiskJob) -> None:
        """Give each extent to the threads."""
        job.taken = len(job.extents)
        for name in range(job.base, job.base + job.taken):
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
            self._ends.append((name, moved))
            os.eventfd_write(self._event_fd, 1)

    def reap(self) -> list[tuple[int, int]]:
        """Return what the threads have ended."""
        with suppress(BlockingIOError):
            if not self._closed:
                os.eventfd_read(self._event_fd)
        ended = []
        while self._ends:
            ended.append(self._ends.popleft())
        return ended

    def go_on(self) -> tuple[tuple[int, int], ...]:
        """Return nothing: the threads have taken everything."""
        return ()

    def let_go_in_child(self) -> None:
        """Replace the child's copy of the eventfd."""
        forks.replace(self._event_fd)

    def _join(self) -> None:
        """Wait for all I/O, even if interrupted, because it uses the files until then."""
        try:
            self._threads.shutdown()
        except BaseException:
            self._join()
            raise

    def close(self) -> None:
        """Join all threads, and close the eventfd."""
        self._join()
        self._closed = True
        os.close(self._event_fd)
