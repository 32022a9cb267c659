"""What the disk allows, measured two ways on the tier's own file: fio, and a bare ring.

fio is the limit that a user can check. It has only as many buffers as reads in flight, and these
stay in the processor's cache. The bare ring is the extension's ring, with no engine above it, over
as much memory as the engine uses. So the difference between fio and the ring is the cost of the
memory, and the difference between the ring and the engine is the cost of the engine.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from flexkv import _ext
from flexkv.io.memory.arena import Arena

BLOCK_BYTES = 2 << 20
HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages")


def write_once(file: Path) -> None:
    """Write a preallocated file from end to end, as the files of a tier in use have been."""
    with mmap.mmap(-1, 8 << 20) as zeros:
        fd = os.open(file, os.O_WRONLY | os.O_DIRECT)
        try:
            size = os.fstat(fd).st_size
            for at in range(0, size, len(zeros)):
                os.pwrite(fd, memoryview(zeros)[: min(len(zeros), size - at)], at)
            os.fsync(fd)
        finally:
            os.close(fd)


class Fio:
    """fio on one file, and on a scratch file beside it for writes."""

    def __init__(self, file: Path, blocks: int, huge: bool) -> None:
        self._file, self._blocks, self._huge = file, blocks, huge
        self._scratch = file.with_name("fio-writes")

    def read(self, depth: int) -> float:
        """Return the GB/s of random reads over the blocks that the engine has written."""
        return self._run("randread", self._file, depth, 4 * self._blocks)

    def write(self, depth: int) -> float:
        """Return the GB/s of synced random writes to a file that was written before."""
        return self._run("randwrite", self._scratch, depth, self._blocks)

    def write_first(self, depth: int) -> float:
        """Return the GB/s of synced random writes to a file that was only preallocated.

        The file system has to mark each extent as written, which costs a third of the rate here.
        """
        self.close()
        return self._run("randwrite", self._scratch, depth, self._blocks, is_written=False)

    def close(self) -> None:
        """Remove the scratch file."""
        self._scratch.unlink(missing_ok=True)

    def _run(
        self, pattern: str, file: Path, depth: int, span_blocks: int, is_written: bool = True
    ) -> float:
        arguments = [
            f"--filename={file}", f"--rw={pattern}", f"--bs={BLOCK_BYTES}", f"--iodepth={depth}",
            "--direct=1", f"--size={span_blocks * BLOCK_BYTES}",
            f"--io_size={self._blocks * BLOCK_BYTES}", "--randrepeat=0", "--ioengine=io_uring",
            "--fixedbufs=1", "--name=limit", "--output-format=json",
            f"--iomem={'mmaphuge' if self._huge else 'malloc'}", "--hugepage-size=2m",
            "--fallocate=posix", "--end_fsync=1", f"--overwrite={int(is_written)}",
        ]  # fmt: skip
        told = subprocess.run(["fio", *arguments], capture_output=True, text=True, check=True)
        side = "read" if pattern == "randread" else "write"
        return float(json.loads(told.stdout)["jobs"][0][side]["bw_bytes"]) / 1e9


class BareRing:
    """Random reads of a file through a bare ring, into as much memory as is read."""

    def __init__(self, file: Path, blocks: int) -> None:
        self._blocks = blocks
        self._span = min(4 * blocks, file.stat().st_size // BLOCK_BYTES)
        self._arena = Arena.open(blocks, BLOCK_BYTES)
        self._fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
        self._ring = _ext.Ring(256)
        self._ring.lend([self._arena.buffer], True)
        self._ring.register_files([self._fd])
        self._random = np.random.default_rng(0)

    def read(self, depth: int, buffers: int | None = None) -> float:
        """Return the GB/s of random 2 MiB reads into `buffers` in turn; None: one for each read."""
        ring, count = self._ring, self._blocks
        offsets = self._random.permutation(self._span)[:count] * BLOCK_BYTES
        targets = self._arena.address + np.arange(count) % (buffers or count) * BLOCK_BYTES
        zeros = np.zeros(count, np.int64)
        extents = np.stack((zeros, offsets, targets, zeros + BLOCK_BYTES), axis=1)
        begin, taken, ended = time.perf_counter(), 0, 0
        while ended < count:
            end = min(count, ended + depth)
            if taken < end:
                taken += ring.submit(taken, False, extents[taken:end])
            select.select([ring.fileno()], [], [])
            for _, moved in ring.reap():
                assert moved == BLOCK_BYTES, moved
                ended += 1
        return count * BLOCK_BYTES / (time.perf_counter() - begin) / 1e9

    def close(self) -> None:
        """Release the ring, the memory and the file."""
        self._ring.close()
        os.close(self._fd)
        self._arena.close()


@contextmanager
def huge_pages(count: int) -> Iterator[bool]:
    """Reserve huge pages for fio if permitted, yield whether it has them, and return them."""
    if os.geteuid() != 0:
        yield False
        return
    before = HUGE_PAGES.read_text()
    HUGE_PAGES.write_text(str(int(before) + count))
    try:
        yield int(HUGE_PAGES.read_text()) >= int(before) + count
    finally:
        HUGE_PAGES.write_text(before)
