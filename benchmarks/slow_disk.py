"""A file system whose reads pass one after the other through a pipe of a given rate.

    python -m benchmarks.slow_disk MOUNTPOINT DIRECTORY BYTES_A_SECOND

It needs FUSE. A cgroup would throttle a real device, but in bursts of many milliseconds.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mfusepy

from tests.system.failing_disk import FailingDisk
from tests.system.mounted import mounted_by


class SlowDisk(FailingDisk):
    """A file system over a directory, where reads wait for their turn in the pipe."""

    def __init__(self, directory: Path, rate: float) -> None:
        super().__init__(directory, Path(os.devnull))
        self._rate, self._free_s, self._lock = rate, 0.0, threading.Lock()

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        """Read no faster than the pipe allows."""
        with self._lock:
            self._free_s = max(self._free_s, time.monotonic()) + size / self._rate
            end_s = self._free_s
        data = os.pread(fh, size, offset)
        time.sleep(max(0.0, end_s - time.monotonic()))
        return data


@contextmanager
def slow_disk(directory: Path, rate: float) -> Iterator[Path]:
    """Mount a slow file system, yield its directory, and unmount it.

    Args:
        directory: on the disk that holds the bytes.
        rate: bytes a second.

    Raises:
        RuntimeError: this process may not mount.
    """
    mounted, real = (directory.resolve() / name for name in ("slow", "real"))  # it runs in /
    real.mkdir()
    with mounted_by("benchmarks.slow_disk", mounted, real, rate):
        yield mounted


if __name__ == "__main__":
    disk = SlowDisk(Path(sys.argv[2]), float(sys.argv[3]))
    mfusepy.FUSE(disk, sys.argv[1], foreground=True, nothreads=False)
