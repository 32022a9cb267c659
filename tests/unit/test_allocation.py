"""Laws of allocation: only gaps are allocated, with an extent map and without one."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator
from errno import EOPNOTSUPP
from pathlib import Path

import pytest

from flexkv.io.ssd import allocation
from flexkv.io.ssd.allocation import Gap, allocate, allocated_beyond, gaps, lacking_bytes, room

KB = 1024
SIZE = 1024 * KB


@pytest.fixture(params=["map", "holes"])
def fd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[int]:
    """Yield an empty file, on a file system with an extent map or without one."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "holes":

            def refuse(*_: object) -> int:
                raise OSError(EOPNOTSUPP, os.strerror(EOPNOTSUPP))

            patch.setattr(fcntl, "ioctl", refuse)
        descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
        yield descriptor
        os.close(descriptor)


def nothing() -> None:
    """Do nothing between the steps of an allocation."""


def test_a_file_is_allocated_once(fd: int) -> None:
    """Allocated space is no gap, whether written or not, and growth adds exactly one gap."""
    assert gaps(fd, SIZE) == [Gap(0, SIZE)]
    allocate(fd, gaps(fd, SIZE), nothing)
    assert os.fstat(fd).st_size == SIZE
    assert gaps(fd, SIZE) == []
    os.pwrite(fd, b"x" * 4096, 8 * KB)
    assert gaps(fd, SIZE) == []
    assert gaps(fd, SIZE // 2) == []
    assert gaps(fd, 2 * SIZE) == [Gap(SIZE, SIZE)]
    assert lacking_bytes(os.fstat(fd), 2 * SIZE, gaps(fd, 2 * SIZE)) == SIZE
    assert allocated_beyond(os.fstat(fd), SIZE // 4) == SIZE - SIZE // 4
    assert allocated_beyond(os.fstat(fd), 2 * SIZE) == 0


def test_a_file_with_holes_gets_room_where_it_has_none(fd: int) -> None:
    """Allocating a file's holes leaves its bytes as they are."""
    os.ftruncate(fd, SIZE)
    os.pwrite(fd, b"x" * 64 * KB, 512 * KB)
    found = gaps(fd, SIZE)
    assert found == [Gap(0, 512 * KB), Gap(576 * KB, SIZE - 576 * KB)]
    allocate(fd, found, nothing)
    assert gaps(fd, SIZE) == []
    assert os.pread(fd, SIZE, 0) == bytes(512 * KB) + b"x" * 64 * KB + bytes(SIZE - 576 * KB)


def test_an_allocation_stops_between_two_steps(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An allocation can be interrupted between steps; what it has not reached is still a gap."""
    monkeypatch.setattr(allocation, "STEP_BYTES", 256 * KB)
    steps = iter([None, None, KeyboardInterrupt])

    def pause() -> None:
        if (error := next(steps)) is not None:
            raise error

    with pytest.raises(KeyboardInterrupt):
        allocate(fd, gaps(fd, SIZE), pause)
    assert gaps(fd, SIZE) == [Gap(512 * KB, SIZE - 512 * KB)]


def test_a_file_of_many_pieces_is_seen_whole(fd: int) -> None:
    """All gaps are found in a file with more extents than the kernel returns at once."""
    pieces = range(0, 2048 * 8 * KB, 8 * KB)
    os.ftruncate(fd, 2048 * 8 * KB)
    for start in pieces:
        os.pwrite(fd, b"x" * 4096, start)
    os.fsync(fd)
    assert gaps(fd, 2048 * 8 * KB) == [Gap(start + 4096, 4096) for start in pieces]


def test_an_extent_map_that_leads_nowhere_is_none(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the extent map returns only empty extents, the gaps are found as holes instead."""
    allocate(fd, gaps(fd, SIZE // 2), nothing)
    asked = iter(range(8))

    def one_empty(_: int, __: int, buffer: bytearray) -> int:
        next(asked)
        mapped_at = allocation._FIEMAP_HEAD.size - 12
        buffer[mapped_at : mapped_at + 4] = (1).to_bytes(4, sys.byteorder)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", one_empty)
    assert gaps(fd, SIZE) == [Gap(SIZE // 2, SIZE // 2)]


def test_a_file_system_that_says_nothing_has_no_bound(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics of zero mean no bound; a file system in memory is bounded by free memory."""
    free = room(fd)
    assert free is not None
    assert free.limited_by == "the file system"
    nothing_said = os.statvfs_result((4096, 4096, 0, 0, 0, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "fstatvfs", lambda _: nothing_said)
    assert room(fd) is None
    monkeypatch.setattr(allocation, "kind_of_file_system", lambda _: "ramfs")
    memory = room(fd)
    assert memory is not None
    assert memory.limited_by != "the file system"
    half = room(fd, memory.free_bytes // 2)
    assert half is not None
    assert half.free_bytes < memory.free_bytes
