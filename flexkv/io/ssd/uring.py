"""Disk I/O by io_uring: registered files, registered memory, one eventfd.

Extents that the ring has no room for wait here, in order, and are submitted as completions are
reaped.
"""

from __future__ import annotations

import os
import time
from collections import deque
from dataclasses import dataclass
from errno import ECANCELED, EIO, ETIME

from flexkv._ext import Ring
from flexkv.io.memory.arena import Arena
from flexkv.io.ssd.disk_jobs import DiskGeometry, DiskJob
from flexkv.io.ssd.files import StripedFiles
from flexkv.io.ssd.port import DiskPort
from flexkv.process.polling import is_readable

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


def uring_port(arena: Arena, files: StripedFiles, options: RingOptions) -> DiskPort:
    """Return a disk port over io_uring; it owns neither `arena` nor `files`.

    Raises:
        OSError: the kernel refused io_uring, or an operation that the port needs.
    """
    geometry = DiskGeometry(arena, files, options.io_bytes_max)
    return DiskPort(geometry, files, UringIo(files, geometry.slices(arena), options))


class UringIo:
    """Carries out I/O through one ring.

    Attributes:
        registered: whether the arena is registered with the kernel, which saves CPU time.
        why: the reason if it is not.
    """

    name = "io_uring"

    def __init__(self, files: StripedFiles, slices: list[memoryview], options: RingOptions) -> None:
        """Set up the ring for the files and the arena, which is given in slices.

        Raises:
            OSError: the kernel refused io_uring, or an operation that is needed.
        """
        self._ring = Ring(options.entries, options.flags, files.may_block)
        try:
            try_nothing(self._ring)
            self.why = self._lend(slices, options.register)
            self.registered = not self.why
            self._ring.register_files(files.fds)
        except OSError:
            self._ring.close()
            raise
        self._waiting: deque[DiskJob] = deque()
        self._refused: list[tuple[int, int]] = []

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

    def fileno(self) -> int:
        """Return the ring's eventfd."""
        return self._ring.fileno()

    def start(self, job: DiskJob) -> None:
        """Submit a job's extents; those that the ring has no room for wait."""
        self._waiting.append(job)
        if len(self._waiting) == 1:
            self._fill()

    def reap(self) -> list[tuple[int, int]]:
        """Return what the kernel has ended."""
        return self._ring.reap()

    def go_on(self) -> list[tuple[int, int]]:
        """Submit what waits; return the extents that the kernel refused, or whose job failed."""
        self._fill()
        refused, self._refused = self._refused, []
        return refused

    def _fill(self) -> None:
        """Submit the jobs that wait, as far as the ring has room."""
        while self._waiting:
            job = self._waiting[0]
            if job.error is not None:
                self._refuse(job, ECANCELED)
            else:
                rest = job.extents[job.taken :]
                try:
                    job.taken += self._ring.submit(job.base + job.taken, job.write, rest)
                except OSError as error:
                    self._refuse(job, error.errno or EIO)
            if job.taken < len(job.extents):
                return
            self._waiting.popleft()

    def _refuse(self, job: DiskJob, errno: int) -> None:
        """End the extents of a job that were not submitted; the first of them names the error."""
        end = len(job.extents)
        self._refused += [(job.base + at, -errno) for at in range(job.taken, end)]
        job.taken = end

    def let_go_in_child(self) -> None:
        """Release the child's copy of the ring; its I/O belongs to the parent."""
        self._ring.close()

    def close(self) -> None:
        """Wait for the kernel, and release the ring."""
        self._ring.close()
