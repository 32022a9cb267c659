"""Finds the gaps of a file, ranges without space on the disk, and allocates space for them.

Space that a file has is not allocated again: XFS, for one, needs as much free space for bytes that
are allocated already as it needed the first time. The extent map (FIEMAP) shows what is allocated,
written or not. File systems without one are asked for holes; all beyond the file's end is a gap.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable, Iterator
from errno import EIO
from pathlib import Path
from typing import NamedTuple

from flexkv.io.memory.host_memory import headroom

STEP_BYTES = 64 << 20
"""Bytes allocated between two calls of `pause`. Without preallocation they are really written."""

_FIEMAP = 0xC020660B  # _IOWR('f', 11, struct fiemap)
_FIEMAP_HEAD = struct.Struct("=QQIIII")  # start, length, flags, mapped, room for, reserved
_FIEMAP_EXTENT = struct.Struct("=QQQ2QI3I")  # logical, physical, length, reserved, flags, reserved
_FIEMAP_LAST = 1
_EXTENTS = 512

_IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs"}
_STAT_BLOCK_BYTES = 512


class Gap(NamedTuple):
    """A range of a file that has no space on the disk."""

    start: int
    length: int


class Room(NamedTuple):
    """How many bytes a file system has free, and what limits them."""

    free_bytes: int
    limited_by: str


def gaps(fd: int, size: int) -> list[Gap]:
    """Return the gaps of a file that is to have `size` bytes."""
    status = os.fstat(fd)
    within = min(status.st_size, size)
    try:
        found = list(_complement(_mapped(fd, size), size))
    except OSError:
        is_full = status.st_blocks * _STAT_BLOCK_BYTES >= within
        found = [] if is_full else list(_holes(fd, within))
        if within < size:
            found.append(Gap(within, size - within))
    return found


def allocate(fd: int, found: list[Gap], pause: Callable[[], None]) -> None:
    """Allocate space for gaps of a file, growing it if needed; call `pause` between steps.

    Raises:
        OSError: there is no space, or the file system refused. What was allocated stays so.
    """
    for gap in found:
        for start in range(gap.start, gap.start + gap.length, STEP_BYTES):
            pause()
            os.posix_fallocate(fd, start, min(STEP_BYTES, gap.start + gap.length - start))


def lacking_bytes(status: os.stat_result, size: int, found: list[Gap]) -> int:
    """Return how many more bytes of space a file needs to have `size` bytes.

    Args:
        status: the file's status.
        size: the size that it is to have.
        found: its gaps; some file systems report as holes what was allocated but never written.
    """
    lacking = sum(gap.length for gap in found)
    if status.st_size > size:
        return lacking
    return min(lacking, max(0, size - status.st_blocks * _STAT_BLOCK_BYTES))


def allocated_beyond(status: os.stat_result, size: int) -> int:
    """Return roughly how many bytes of space a file frees when it is cut to `size` bytes."""
    if status.st_size <= size:
        return 0
    return min(status.st_blocks * _STAT_BLOCK_BYTES, status.st_size - size)


def room(fd: int, reserved_bytes: int = 0) -> Room | None:
    """Return the free space of a file system; None if it does not report any.

    Args:
        fd: a file or directory on it.
        reserved_bytes: memory to leave to others, if the file system is in memory.
    """
    filesystem = os.fstatvfs(fd)
    says = filesystem.f_blocks > 0
    found = Room(filesystem.f_bavail * filesystem.f_frsize, "the file system") if says else None
    if kind_of_file_system(os.fstat(fd).st_dev) in _IN_MEMORY:
        available_bytes, limited_by = headroom()
        memory = Room(max(0, available_bytes - reserved_bytes), limited_by)
        return memory if found is None else min(found, memory)
    return found


def kind_of_file_system(device: int) -> str:
    """Return the name of a file system's type; empty if the kernel does not report it."""
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    for line in mounts:
        fields = line.split()
        if fields[2] == number:
            return fields[fields.index("-") + 1]
    return ""


def _mapped(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the allocated ranges of a file, as start and end, in order.

    Raises:
        OSError: the file system has no extent map, or one that makes no progress.
    """
    start = 0
    while start < size:
        head = _FIEMAP_HEAD.pack(start, size - start, 0, 0, _EXTENTS, 0)
        buffer = bytearray(head + bytes(_EXTENTS * _FIEMAP_EXTENT.size))
        fcntl.ioctl(fd, _FIEMAP, buffer)
        count = _FIEMAP_HEAD.unpack_from(buffer)[3]
        if count == 0:
            return
        last, begun = 0, start
        for number in range(count):
            at = _FIEMAP_HEAD.size + number * _FIEMAP_EXTENT.size
            logical, _, length, _, _, last, *_ = _FIEMAP_EXTENT.unpack_from(buffer, at)
            yield logical, logical + length
            start = logical + length
        if last & _FIEMAP_LAST:
            return
        if start <= begun:
            raise OSError(EIO, "its extent map makes no progress")


def _complement(ranges: Iterator[tuple[int, int]], size: int) -> Iterator[Gap]:
    at = 0
    for start, end in ranges:
        if at < min(start, size):
            yield Gap(at, min(start, size) - at)
        at = max(at, end)
    if at < size:
        yield Gap(at, size - at)


def _holes(fd: int, size: int) -> Iterator[Gap]:
    """Yield the holes that the file system reports; none if it cannot report any."""
    at = 0
    try:
        while at < size:
            start = os.lseek(fd, at, os.SEEK_HOLE)
            if start >= size:
                return
            try:
                at = min(os.lseek(fd, start, os.SEEK_DATA), size)
            except OSError:  # no data follows
                at = size
            yield Gap(start, at - start)
    except OSError:  # this file system does not report holes
        return
