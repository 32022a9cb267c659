"""The host tier's memory: one block-first mapping, on the largest pages that can be had.

    huge pages asked for    memfd on hugetlb          ─┐ refused: the next, with the reason kept
    shared                  memfd                      ├ + MADV_HUGEPAGE; plain pages if refused
    not shared              private anonymous memory  ─┘

Large pages matter more than any other choice here: a disk request in 4 KiB pages is hundreds of
segments, one in a huge page is one. All memory is touched at open, since a first touch costs
several times a copy.

Memory that other processes map is sealed: nobody can grow it, remove the seals, or shrink it, which
would kill every process that touches it by SIGBUS. Whoever maps it checks the seals first.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable
from contextlib import ExitStack
from errno import EINVAL, EPERM, errorcode
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flexkv import _ext, forks
from flexkv.common.errors import ClosedError, ConfigError
from flexkv.io.host_memory import headroom
from flexkv.logs import get_logger

log = get_logger(__name__)

ALIGNMENT_BYTES = 2 << 20
"""The arena starts on such a boundary: the usual huge page."""
_MEMFD = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_MADV_WIPEONFORK = 18
"""The kernel's number; `mmap` has no name for it. A child finds zeros, and copies nothing."""
TOUCH_BYTES = 1 << 30
"""Memory touched between two calls of `progress`."""

Progress = Callable[[int, int], None]


class _Mapping(NamedTuple):
    memory: mmap.mmap
    fd: int | None
    backing: str
    why: str


class Arena:
    """Host memory for blocks: uint8[num_blocks, stride], 2 MiB aligned, touched.

    Attributes:
        num_blocks: blocks that it holds.
        block_stride_bytes: bytes from one block to the next.
        address: of block 0.
        fd: names the memory to other processes; None when it is private.
        fd_offset_bytes: where block 0 is in `fd`.
        backing: "hugetlb", "thp" or "plain": the pages that it got.
        why: what was asked for, refused and got, in words.
    """

    def __init__(
        self,
        mapping: _Mapping,
        num_blocks: int,
        block_stride_bytes: int,
        fd_offset_bytes: int | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_stride_bytes = block_stride_bytes
        self.fd = mapping.fd
        self.backing, self.why = mapping.backing, mapping.why
        start = _address(mapping.memory)
        self.fd_offset_bytes = (
            -start % ALIGNMENT_BYTES if fd_offset_bytes is None else fd_offset_bytes
        )
        self.address = start + self.fd_offset_bytes
        end = self.fd_offset_bytes + num_blocks * block_stride_bytes
        self._memory: mmap.mmap | None = mapping.memory
        self._buffer = memoryview(mapping.memory)[self.fd_offset_bytes : end]
        self._array = np.frombuffer(self._buffer, np.uint8).reshape(num_blocks, block_stride_bytes)
        forks.on_fork(self._let_go_in_child)

    @classmethod
    def open(
        cls,
        num_blocks: int,
        block_stride_bytes: int,
        hugepage_bytes: int | None = None,
        shared: bool = False,
        progress: Progress | None = None,
    ) -> Arena:
        """Map and touch the memory of `num_blocks` blocks.

        Args:
            num_blocks: at least 1.
            block_stride_bytes: bytes from one block to the next.
            hugepage_bytes: ask for hugetlb pages of this size first.
            shared: other processes shall be able to map it.
            progress: called with (touched bytes, all bytes) after each GiB.

        Raises:
            ConfigError: more than there is, or a page size that cannot be.
        """
        assert num_blocks >= 1, num_blocks
        assert block_stride_bytes >= 1, block_stride_bytes
        total_bytes = num_blocks * block_stride_bytes
        mapping, refused = None, ""
        if hugepage_bytes is not None:
            if hugepage_bytes < mmap.PAGESIZE or hugepage_bytes.bit_count() != 1:
                raise ConfigError("hugepage_size_bytes", hugepage_bytes, "not a size of huge pages")
            try:
                mapping = _map_hugetlb(total_bytes, hugepage_bytes)
            except OSError as error:
                refused = f"hugetlb refused ({errorcode.get(error.errno or 0, error.errno)}), "
        if mapping is None:
            _check_headroom(num_blocks, total_bytes)
            mapping = _map_pages(num_blocks, total_bytes, shared)
        arena = cls(mapping, num_blocks, block_stride_bytes)
        with ExitStack() as undo:
            undo.callback(arena.close)
            arena._touch(progress)
            if arena.backing != "hugetlb":
                arena._measure_pages()
            undo.pop_all()
        arena.why = refused + arena.why
        return arena

    @classmethod
    def attach(
        cls, fd: int, num_blocks: int, block_stride_bytes: int, fd_offset_bytes: int
    ) -> Arena:
        """Map an arena that another process has opened to be shared; `fd` becomes the arena's.

        Raises:
            OSError: it cannot be mapped, or could be made smaller while it is.
        """
        try:
            length = _checked_length(fd, num_blocks, block_stride_bytes, fd_offset_bytes)
            memory = mmap.mmap(fd, length)
        except (OSError, ValueError, OverflowError) as error:
            os.close(fd)
            raise OSError(EINVAL, f"the arena cannot be mapped: {error}") from error
        mapping = _Mapping(memory, fd, "shared", "opened by another process")
        return cls(mapping, num_blocks, block_stride_bytes, fd_offset_bytes)

    @property
    def array(self) -> NDArray[np.uint8]:
        """Give the blocks as uint8[num_blocks, stride]."""
        self._check_open()
        return self._array

    @property
    def buffer(self) -> memoryview:
        """Give all bytes of the blocks as one writable buffer."""
        self._check_open()
        return self._buffer

    def close(self) -> bool:
        """Give the memory back, and tell whether it is gone now. Idempotent.

        Views that others still hold keep it mapped until the last of them goes: then the answer
        is False, and the log says so. The descriptor is closed in any case.
        """
        if self._memory is None:
            return True
        memory, self._memory = self._memory, None
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
        del self._array
        try:
            self._buffer.release()
            memory.close()
        except BufferError as error:
            log.warning("arena_still_viewed", address=hex(self.address), reason=str(error))
            del self._buffer
            return False
        return True

    def _let_go_in_child(self) -> None:
        """Keep neither the parent's memory nor its descriptor alive."""
        if self._memory is not None and self.fd is not None:
            forks.replace_all(self.fd)
            _ext.disown(self._memory)

    def _check_open(self) -> None:
        if self._memory is None:
            raise ClosedError("the arena is closed")

    def _touch(self, progress: Progress | None) -> None:
        total_bytes = len(self._buffer)
        for start in range(0, total_bytes, TOUCH_BYTES):
            end = min(start + TOUCH_BYTES, total_bytes)
            _ext.prefault(self._buffer[start:end])
            if progress is not None:
                progress(end, total_bytes)

    def _measure_pages(self) -> None:
        """Replace what was asked of the kernel by what it did."""
        huge_bytes = min(_huge_bytes(self.address), len(self._buffer))
        if huge_bytes:
            self.backing = "thp"
        self.why += f", {huge_bytes >> 20} of {len(self._buffer) >> 20} MiB in huge pages"


def _address(memory: mmap.mmap) -> int:
    return int(np.frombuffer(memory, np.uint8).__array_interface__["data"][0])


def _checked_length(fd: int, num_blocks: int, stride_bytes: int, offset_bytes: int) -> int:
    """Return how many bytes of another process's memory to map.

    Raises:
        OSError: it is not sealed memory.
        ValueError: it is smaller than it is said to be.
    """
    if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise OSError(EPERM, "it is not sealed against shrinking")
    length, size = offset_bytes + num_blocks * stride_bytes, os.fstat(fd).st_size
    if min(num_blocks, stride_bytes) < 1 or offset_bytes < 0 or length > size:
        raise ValueError(f"{num_blocks} blocks of {stride_bytes} bytes are not in its {size} bytes")
    return length


def _seal(fd: int) -> None:
    """Fix the size of memory for ever; its bytes may still be written."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)


def _map_hugetlb(total_bytes: int, hugepage_bytes: int) -> _Mapping:
    """Map memory of the hugetlb pool, all of it reserved. Raises OSError when it has too little."""
    size_flag = (hugepage_bytes.bit_length() - 1) << os.MFD_HUGE_SHIFT
    fd = os.memfd_create("flexkv-arena", _MEMFD | os.MFD_HUGETLB | size_flag)
    # Only pages below 2 MiB need room to align.
    slack = ALIGNMENT_BYTES if hugepage_bytes < ALIGNMENT_BYTES else 0
    length = -(-(total_bytes + slack) // hugepage_bytes) * hugepage_bytes
    try:
        os.ftruncate(fd, length)
        _seal(fd)
        memory = mmap.mmap(fd, length)
    except (OSError, OverflowError):
        os.close(fd)
        raise
    return _Mapping(memory, fd, "hugetlb", f"hugetlb pages of {hugepage_bytes >> 10} KiB")


def _map_pages(num_blocks: int, total_bytes: int, shared: bool) -> _Mapping:
    """Map ordinary memory, with the wish for transparent huge pages."""
    length = total_bytes + ALIGNMENT_BYTES
    fd = os.memfd_create("flexkv-arena", _MEMFD) if shared else None
    try:
        if fd is None:
            memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            # A fork would make every page copy-on-write under I/O that is in flight.
            memory.madvise(_MADV_WIPEONFORK)
        else:
            os.ftruncate(fd, length)
            _seal(fd)
            memory = mmap.mmap(fd, length)
    except OSError as error:
        if fd is not None:
            os.close(fd)
        why = f"{total_bytes} bytes cannot be mapped ({error.strerror}): or set cpu_cache_gb lower"
        raise ConfigError("num_cpu_blocks", num_blocks, why) from error
    kind = "private memory" if fd is None else "shared memory"
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        return _Mapping(memory, fd, "plain", f"{kind}, MADV_HUGEPAGE refused ({error.strerror})")
    return _Mapping(memory, fd, "plain", f"{kind} with MADV_HUGEPAGE")


def _check_headroom(num_blocks: int, total_bytes: int) -> None:
    available_bytes, limited_by = headroom()
    if total_bytes > available_bytes:
        raise ConfigError(
            "num_cpu_blocks",
            num_blocks,
            f"needs {total_bytes} bytes of memory, {limited_by} has {available_bytes}: "
            "lower num_cpu_blocks or cpu_cache_gb",
        )


def _huge_bytes(address: int) -> int:
    """Give the bytes in huge pages of the memory area that holds `address`."""
    inside, huge_kib = False, 0
    try:
        areas = Path("/proc/self/smaps").read_text(errors="replace")
    except OSError:
        return 0  # not told: the arena works all the same
    for line in areas.splitlines():
        head, _, rest = line.partition(" ")
        if not head.endswith(":"):
            low, _, high = head.partition("-")
            inside = int(low, 16) <= address < int(high, 16)
        elif inside and head in ("AnonHugePages:", "ShmemPmdMapped:"):
            huge_kib += int(rest.split()[0])
    return huge_kib << 10
