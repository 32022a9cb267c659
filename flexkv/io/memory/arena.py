"""The host tier's memory: one block-first mapping, on the largest pages available.

The kinds of memory are tried in this order. If mapping or touching one fails, the reason is kept:

    hugetlb    a memfd on hugetlb; only if huge pages are asked for
    thp        a memfd if shared, else private anonymous memory, with MADV_HUGEPAGE
    plain      the same without MADV_HUGEPAGE

Large pages matter more than any other choice here: a disk request has hundreds of segments in
4 KiB pages, and one in a huge page. All memory is touched at open, since a first touch costs
several times a copy. A cgroup may refuse a huge page only when it is touched, by a SIGBUS; so
hugetlb pages are first allocated in the file, which fails with an error instead.

Hints (`madvise`, the seal against executing) do no harm if the kernel refuses them.

Memory that other processes map is sealed (`process/memory_files.py`). Shrinking it would kill every
process that touches it, so each checks for that seal first.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from errno import EINVAL, EMFILE, ENFILE, ENOMEM, EPERM, errorcode
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flexkv import _ext
from flexkv.common.config_keys import as_gb
from flexkv.common.errors import ClosedError, ConfigError
from flexkv.common.space import GivenSize
from flexkv.io.memory.host_memory import free_huge_bytes, headroom
from flexkv.observe.logs import get_logger
from flexkv.process import forks
from flexkv.process.memory_files import memory_file

log = get_logger(__name__)

ALIGNMENT_BYTES = 2 << 20
"""The arena starts at a multiple of this, the usual size of a huge page."""
_MADV_WIPEONFORK = 18
"""The kernel's number; `mmap` has no name for it. A child finds zeros, so nothing is copied."""
TOUCH_BYTES = 16 << 20
"""Bytes touched between two calls of `progress`, which may raise to stop: about 5 ms."""

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
        address: the address of block 0.
        fd: the descriptor that other processes map; None if the memory is private.
        fd_offset_bytes: the offset of block 0 in `fd`.
        backing: its pages, "hugetlb", "thp" or "plain"; "shared" if another process opened it.
        why: what was requested, refused and obtained, in words.
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
        given: GivenSize | None = None,
    ) -> Arena:
        """Map and touch the memory of `num_blocks` blocks.

        Args:
            num_blocks: at least 1.
            block_stride_bytes: bytes from one block to the next.
            hugepage_bytes: try hugetlb pages of this size first.
            shared: whether other processes can map it.
            progress: called repeatedly with (bytes touched, total bytes), and from the start again
                for each kind of pages that is tried. It may raise to stop.
            given: the setting that an error about the size names; None: the number of blocks.

        Raises:
            ConfigError: there is too little memory, or the page size is impossible.
        """
        assert num_blocks >= 1, num_blocks
        assert block_stride_bytes >= 1, block_stride_bytes
        total_bytes = num_blocks * block_stride_bytes
        given = given or GivenSize("num_cpu_blocks", num_blocks)
        check_memory(total_bytes, hugepage_bytes, given)
        refused: list[str] = []
        failure: OSError | OverflowError = OSError(ENOMEM, os.strerror(ENOMEM))
        for kind in ("hugetlb", "thp", "plain")[hugepage_bytes is None :]:
            if kind == "thp":
                check_memory(total_bytes, None, given)
            try:
                with ExitStack() as undo:
                    mapping = _map(kind, total_bytes, hugepage_bytes, shared)
                    arena = cls(mapping, num_blocks, block_stride_bytes)
                    undo.callback(arena.close)
                    arena._touch(progress)
                    undo.pop_all()
            except (OSError, OverflowError) as error:
                failure = error
                number = error.errno if isinstance(error, OSError) else None
                refused.append(f"{kind} refused ({errorcode.get(number or 0, number)}), ")
            else:
                arena.why = "".join(refused) + arena.why
                return arena
        raise _allocation_error(given, total_bytes, failure) from failure

    @classmethod
    def attach(
        cls, fd: int, num_blocks: int, block_stride_bytes: int, fd_offset_bytes: int
    ) -> Arena:
        """Map an arena that another process opened as shared, and take ownership of `fd`.

        Raises:
            OSError: it cannot be mapped, or is not sealed against shrinking; `fd` is closed.
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
        """Return the blocks as uint8[num_blocks, stride]."""
        self._check_open()
        return self._array

    @property
    def buffer(self) -> memoryview:
        """Return all bytes of the blocks as one writable buffer."""
        self._check_open()
        return self._buffer

    def close(self) -> bool:
        """Release the memory, and return whether it is unmapped now. Idempotent.

        Views that others still hold keep it mapped until the last of them goes; then this returns
        False and logs a warning. The descriptor is closed in any case.
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
        """Release the parent's memory and descriptor in a forked child."""
        if self._memory is not None and self.fd is not None:
            forks.replace_all(self.fd)
            _ext.disown(self._memory)

    def _check_open(self) -> None:
        if self._memory is None:
            raise ClosedError("the arena is closed")

    def _touch(self, progress: Progress | None) -> None:
        """Touch all memory. Raises OSError if a page cannot be allocated."""
        total_bytes = len(self._buffer)
        for start in range(0, total_bytes, TOUCH_BYTES):
            end = min(start + TOUCH_BYTES, total_bytes)
            if self.backing == "hugetlb" and self.fd is not None:
                os.posix_fallocate(self.fd, self.fd_offset_bytes + start, end - start)
            _ext.prefault(self._buffer[start:end])
            if progress is not None:
                progress(end, total_bytes)
        if self.backing != "hugetlb":
            self._measure_pages()

    def _measure_pages(self) -> None:
        """Set `backing` and `why` to the pages that the kernel really gave."""
        huge_bytes = min(_huge_bytes(self.address), len(self._buffer))
        if huge_bytes:
            self.backing = "thp"
        self.why += f", {huge_bytes >> 20} of {len(self._buffer) >> 20} MiB in huge pages"


def _address(memory: mmap.mmap) -> int:
    return int(np.frombuffer(memory, np.uint8).__array_interface__["data"][0])


def _checked_length(fd: int, num_blocks: int, stride_bytes: int, offset_bytes: int) -> int:
    """Return how many bytes of another process's memory to map.

    Raises:
        OSError: it is not sealed against shrinking.
        ValueError: it is too small for the blocks, or the numbers are impossible.
    """
    if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise OSError(EPERM, "it is not sealed against shrinking")
    length, size = offset_bytes + num_blocks * stride_bytes, os.fstat(fd).st_size
    if min(num_blocks, stride_bytes) < 1 or offset_bytes < 0 or length > size:
        raise ValueError(f"{num_blocks} blocks of {stride_bytes} bytes exceed its {size} bytes")
    return length


def check_memory(total_bytes: int, hugepage_bytes: int | None, given: GivenSize) -> int:
    """Check that there is enough memory, before any of it is taken.

    Returns:
        How many of the bytes ordinary memory has to supply: 0 if the pool of huge pages has
        enough, else all.

    Raises:
        ConfigError: there is not enough, or the page size is impossible.
    """
    if hugepage_bytes is not None:
        if hugepage_bytes < mmap.PAGESIZE or hugepage_bytes.bit_count() != 1:
            why = f"must be a power of two, at least {mmap.PAGESIZE}"
            raise ConfigError("hugepage_size_bytes", hugepage_bytes, why)
        if total_bytes <= free_huge_bytes(hugepage_bytes):
            return 0
    available_bytes, limited_by = headroom()
    if total_bytes > available_bytes:
        needs, has = as_gb(total_bytes), as_gb(available_bytes)
        why = f"needs {needs} of memory, but {limited_by} has only {has} free: "
        raise ConfigError(*given, f"{why}set {given.key} lower")
    return total_bytes


def _allocation_error(
    given: GivenSize, total_bytes: int, error: OSError | OverflowError
) -> ConfigError:
    """Return the error for memory that cannot be obtained, with advice."""
    number = error.errno if isinstance(error, OSError) else ENOMEM
    limits = {"v": resource.RLIMIT_AS, "d": resource.RLIMIT_DATA}
    limited = [each for each, limit in limits.items() if resource.getrlimit(limit)[0] >= 0]
    help_ = f"set {given.key} lower"
    if number in (EMFILE, ENFILE):
        help_ = "raise the limit on open files (ulimit -n)"
    elif number != ENOMEM:
        help_ = "the kernel or a seccomp profile forbids this process such memory"
    elif limited:
        help_ += f", or raise this process's memory limit (ulimit -{' -'.join(limited)})"
    reason = error.strerror if isinstance(error, OSError) else str(error)
    why = f"{as_gb(total_bytes)} of memory cannot be allocated ({reason}): {help_}"
    return ConfigError(*given, why)


def _map(kind: str, total_bytes: int, hugepage_bytes: int | None, shared: bool) -> _Mapping:
    """Map memory on pages of one kind. Raises OSError or OverflowError if that is refused."""
    if kind == "hugetlb":
        assert hugepage_bytes is not None
        return _map_hugetlb(total_bytes, hugepage_bytes)
    return _map_pages(total_bytes, shared, kind == "thp")


def _map_file(length: int, flags: int = 0) -> tuple[mmap.mmap, int]:
    """Map a new file in memory, and return its descriptor, too."""
    fd = memory_file("flexkv-arena", length, flags)
    try:
        return mmap.mmap(fd, length), fd
    except (OSError, OverflowError, ValueError):
        os.close(fd)
        raise


def _map_hugetlb(total_bytes: int, hugepage_bytes: int) -> _Mapping:
    """Map and reserve memory of the hugetlb pool. Raises OSError if the pool has too little."""
    size_flag = (hugepage_bytes.bit_length() - 1) << os.MFD_HUGE_SHIFT
    # Only pages smaller than 2 MiB need extra room for the alignment.
    slack = ALIGNMENT_BYTES if hugepage_bytes < ALIGNMENT_BYTES else 0
    length = -(-(total_bytes + slack) // hugepage_bytes) * hugepage_bytes
    memory, fd = _map_file(length, os.MFD_HUGETLB | size_flag)
    return _Mapping(memory, fd, "hugetlb", f"hugetlb pages of {hugepage_bytes >> 10} KiB")


def _map_pages(total_bytes: int, shared: bool, wants_huge: bool) -> _Mapping:
    """Map ordinary memory, with or without a request for transparent huge pages."""
    length = total_bytes + ALIGNMENT_BYTES
    fd = None
    if not shared:
        memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        why = "private memory"
        # Without it, a fork makes every page copy-on-write, even under I/O that is in flight.
        hints = [("MADV_WIPEONFORK", _MADV_WIPEONFORK)]
    else:
        memory, fd = _map_file(length)
        why, hints = "shared memory", []
    if wants_huge:
        hints.append(("MADV_HUGEPAGE", mmap.MADV_HUGEPAGE))
    return _Mapping(memory, fd, "plain", why + "".join(_advised(memory, hints)))


def _advised(memory: mmap.mmap, hints: list[tuple[str, int]]) -> Iterator[str]:
    """Pass hints to the kernel, and yield what became of each, in words."""
    for name, number in hints:
        try:
            memory.madvise(number)
        except OSError as error:
            yield f", {name} refused ({error.strerror})"
        else:
            yield f" with {name}" if number == mmap.MADV_HUGEPAGE else ""


def _huge_bytes(address: int) -> int:
    """Return how many bytes of the memory area that holds `address` are in huge pages."""
    inside, huge_kib = False, 0
    try:
        areas = Path("/proc/self/smaps").read_text(errors="replace")
    except OSError:
        return 0  # unknown; the arena works all the same
    for line in areas.splitlines():
        head, _, rest = line.partition(" ")
        if not head.endswith(":"):
            low, _, high = head.partition("-")
            inside = int(low, 16) <= address < int(high, 16)
        elif inside and head in ("AnonHugePages:", "ShmemPmdMapped:"):
            huge_kib += int(rest.split()[0])
    return huge_kib << 10
