"""Laws of the arena: aligned, touched, bounded by the memory available, and gone when closed."""

import fcntl
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from structlog.testing import capture_logs

from flexkv.common.errors import ClosedError, ConfigError
from flexkv.io.memory import arena as arena_module
from flexkv.io.memory import host_memory
from flexkv.io.memory.arena import ALIGNMENT_BYTES, Arena
from flexkv.process.memory_files import memory_file

MIB = 1 << 20
NO_SUCH_PAGES_BYTES = 1 << 34
"""Huge pages of 16 GiB, which no machine of ours has."""


@pytest.fixture
def arena():
    """Yield a small private arena."""
    arena = Arena.open(8, MIB)
    yield arena
    arena.close()


def is_mapped(address):
    """Return whether some mapping of this process contains `address`."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, _, high = line.split()[0].partition("-")
        if int(low, 16) <= address < int(high, 16):
            return True
    return False


@pytest.mark.parametrize("shared", [False, True])
def test_blocks_are_one_aligned_array(shared):
    """Array, buffer and address refer to the same zeroed bytes, on a 2 MiB boundary."""
    arena = Arena.open(3, 3 * MIB, shared=shared)
    assert arena.array.shape == (3, 3 * MIB)
    assert len(arena.buffer) == 9 * MIB
    assert arena.address % ALIGNMENT_BYTES == 0
    assert arena.array.__array_interface__["data"][0] == arena.address
    assert not arena.array.any()
    arena.array[2, 5] = 7
    assert arena.buffer[6 * MIB + 5] == 7
    assert arena.close()


def test_a_shared_arena_is_the_same_memory_for_another(monkeypatch):
    """A mapping of the arena's descriptor at its offset has the bytes of the blocks."""
    arena = Arena.open(2, MIB, shared=True)
    with mmap.mmap(arena.fd, arena.fd_offset_bytes + 2 * MIB) as other:
        arena.array[1, 3] = 42
        assert other[arena.fd_offset_bytes + MIB + 3] == 42
    assert arena.close()


HOSTILE = """
import fcntl, mmap, os, sys
fd, size = int(sys.argv[1]), int(sys.argv[2])
again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
for each in (fd, again):
    for attack in (
        lambda: os.ftruncate(each, 0),
        lambda: os.ftruncate(each, size - mmap.PAGESIZE),
        lambda: os.ftruncate(each, size + mmap.PAGESIZE),
        lambda: os.posix_fallocate(each, 0, size + mmap.PAGESIZE),
        lambda: fcntl.fcntl(each, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
        lambda: os.open(f"/proc/self/fd/{each}", os.O_RDWR | os.O_TRUNC),
    ):
        try:
            attack()
        except OSError:
            continue
        print("an attack succeeded")
assert os.fstat(fd).st_size == size
with mmap.mmap(fd, size) as memory:
    memory[-1] = 77  # as an agent writes
print("done")
"""


@pytest.mark.parametrize("hugepage_bytes", [None, 2 * MIB])
def test_nobody_changes_the_size_of_a_shared_arena(hugepage_bytes: int | None) -> None:
    """A process that maps a shared arena can write to it, but cannot shrink, grow or seal it."""
    arena = Arena.open(2, MIB, hugepage_bytes=hugepage_bytes, shared=True)
    if hugepage_bytes is not None and arena.backing != "hugetlb":
        # The pool is empty, but even an unmapped file of such pages can be sealed.
        fd = memory_file("huge", 2 * MIB, os.MFD_HUGETLB)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
        os.close(fd)
    assert arena.fd is not None
    size = os.fstat(arena.fd).st_size
    command = [sys.executable, "-c", HOSTILE, str(arena.fd), str(size)]
    told = subprocess.run(
        command, pass_fds=[arena.fd], capture_output=True, text=True, check=True, timeout=60
    )
    assert told.stdout.split("\n") == ["done", ""]
    with mmap.mmap(arena.fd, size) as memory:
        assert memory[-1] == 77
    arena.array[:] = 1  # no page of it was cut off
    assert arena.close()


def test_another_process_maps_a_shared_arena() -> None:
    """An arena attached by descriptor, offset and size shares its bytes with the first one."""
    arena = Arena.open(2, MIB, shared=True)
    assert arena.fd is not None
    other = Arena.attach(os.dup(arena.fd), 2, MIB, arena.fd_offset_bytes)
    other.array[1, 3] = 42
    assert arena.array[1, 3] == 42
    assert other.close()
    assert arena.close()


def unsealed(seals: int | None) -> int:
    """Return a memfd of 4 MiB with these seals; None means that it does not allow sealing."""
    fd = os.memfd_create("other", 0 if seals is None else os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4 * MIB)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


@pytest.mark.parametrize("seals", [None, 0, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SEAL])
def test_memory_that_could_shrink_is_not_mapped(seals: int | None) -> None:
    """Memory that could shrink is not mapped, since a hostile server could kill us by SIGBUS."""
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="not sealed against shrinking"):
        Arena.attach(unsealed(seals), 2, MIB, 0)
    assert os.listdir("/proc/self/fd") == before


def test_a_file_is_no_arena(tmp_path: Path) -> None:
    """A file is not mapped, since anyone who has it open can truncate it."""
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * MIB))
    before = os.listdir("/proc/self/fd")
    for flags in (os.O_RDWR, os.O_RDONLY):
        with pytest.raises(OSError, match="cannot be mapped"):
            Arena.attach(os.open(path, flags), 2, MIB, 0)
    with pytest.raises(OSError, match="cannot be mapped"):
        Arena.attach(os.open(tmp_path, os.O_RDONLY), 2, MIB, 0)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    ("blocks", "stride", "offset"),
    [
        (5, MIB, 0), (4, MIB, 1), (2, MIB, 3 * MIB), (0, MIB, 0), (2, 0, 0), (-1, -MIB, 0),
        (2, MIB, -MIB), (1 << 62, 1 << 62, 0), (1, MIB, 1 << 63),
    ],
)  # fmt: skip
def test_blocks_that_are_not_in_the_memory_are_not_mapped(
    blocks: int, stride: int, offset: int
) -> None:
    """Blocks outside the memory are not mapped, whatever size the other process claims."""
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="cannot be mapped"):
        Arena.attach(unsealed(fcntl.F_SEAL_SHRINK), blocks, stride, offset)
    assert os.listdir("/proc/self/fd") == before


def test_a_private_arena_has_no_descriptor(arena):
    """A private arena has no descriptor that another process could map."""
    assert arena.fd is None


def test_it_says_what_pages_it_got(arena):
    """`backing` names the kind of pages that the kernel gave; `why` says how much of it is huge."""
    assert arena.backing in ("thp", "plain")
    assert "private memory" in arena.why
    assert "of 8 MiB in huge pages" in arena.why


@pytest.mark.parametrize("shared", [False, True])
def test_huge_pages_that_are_not_there_fall_to_the_next(shared):
    """When hugetlb is refused, the arena uses ordinary memory and keeps the reason."""
    arena = Arena.open(2, MIB, hugepage_bytes=NO_SUCH_PAGES_BYTES, shared=shared)
    assert arena.backing in ("thp", "plain")
    assert arena.why.startswith("hugetlb refused (E")
    assert (arena.fd is not None) == shared
    arena.close()


def test_hugetlb_is_used_or_its_refusal_reported():
    """Huge pages of the usual size back the arena, or their refusal is reported."""
    arena = Arena.open(2, MIB, hugepage_bytes=2 * MIB)
    assert arena.backing == "hugetlb" or arena.why.startswith("hugetlb refused (E")
    arena.array[:] = 1
    assert arena.close()


@pytest.mark.parametrize("size", [0, 3 * MIB, 512])
def test_sizes_that_no_huge_page_has_are_refused(size):
    """A huge page size that is no power of two, or smaller than a page, is refused."""
    with pytest.raises(ConfigError, match="hugepage_size_bytes"):
        Arena.open(2, MIB, hugepage_bytes=size)


def test_touching_reports_progress(monkeypatch):
    """Progress is reported after each slice, as bytes done and bytes in all."""
    monkeypatch.setattr(arena_module, "TOUCH_BYTES", 3 * MIB)
    seen = []
    Arena.open(8, MIB, progress=lambda *step: seen.append(step)).close()
    assert seen == [(done * MIB, 8 * MIB) for done in (3, 6, 8)]


def test_more_than_the_machine_has_is_refused():
    """The error names the field, its value and the memory that is needed."""
    with pytest.raises(ConfigError, match="set num_cpu_blocks lower") as caught:
        Arena.open(1 << 30, MIB)
    assert (caught.value.field, caught.value.value) == ("num_cpu_blocks", 1 << 30)
    assert "needs 1,048,576.00 GB of memory" in str(caught.value)


@pytest.mark.parametrize(
    ("line", "files"),
    [
        (
            "0::/jobs/mine",
            {
                "jobs/mine/memory.max": "max",
                "jobs/mine/memory.current": "0",
                "jobs/mine/memory.stat": "anon 0",
                "jobs/memory.max": str(8 * MIB),
                "jobs/memory.current": str(6 * MIB),
                "jobs/memory.stat": f"anon 5\ninactive_file {MIB}",
            },
        ),
        (
            "4:cpu,memory:/seen/from/outside",
            {
                "memory/memory.limit_in_bytes": str(8 * MIB),
                "memory/memory.usage_in_bytes": str(6 * MIB),
                "memory/memory.stat": f"total_inactive_file {MIB}",
            },
        ),
    ],
    ids=["v2", "v1"],
)
def test_more_than_the_cgroup_allows_is_refused(monkeypatch, tmp_path, line, files):
    """The limits of all enclosing cgroups (v1 or v2) apply; reclaimable memory counts as free."""
    (tmp_path / "self").write_text(f"{line}\n7:pids:/\n")
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    monkeypatch.setattr(host_memory, "CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(host_memory, "CGROUP_OF_SELF", tmp_path / "self")
    Arena.open(3, MIB).close()
    with pytest.raises(ConfigError, match=r"cgroup .* has only 3\.00 MB free:"):
        Arena.open(4, MIB)


def test_without_cgroups_the_machine_is_the_limit(monkeypatch, tmp_path):
    """On a system without cgroups, only the machine's memory is the limit."""
    monkeypatch.setattr(host_memory, "CGROUP_OF_SELF", tmp_path / "missing")
    assert host_memory.headroom().limited_by == "the machine"


@pytest.mark.parametrize("shared", [False, True])
def test_close_gives_memory_and_descriptors_back(shared):
    """After close nothing is mapped, no descriptor is open, and closing again does nothing."""
    before = os.listdir("/proc/self/fd")
    arena = Arena.open(2, MIB, shared=shared)
    address = arena.address
    assert is_mapped(address)
    assert arena.close()
    assert not is_mapped(address)
    assert os.listdir("/proc/self/fd") == before
    assert arena.close()
    with pytest.raises(ClosedError):
        _ = arena.array
    with pytest.raises(ClosedError):
        _ = arena.buffer


@pytest.mark.parametrize("shared", [False, True])
def test_views_that_are_left_keep_the_memory(shared):
    """Views that outlive close keep the memory until the last one goes, and a log line says so."""
    before = os.listdir("/proc/self/fd")
    arena = Arena.open(2, MIB, shared=shared)
    address = arena.address
    view, piece = arena.array[1], arena.buffer[:10]
    with capture_logs() as logs:
        assert not arena.close()
    assert [entry["event"] for entry in logs] == ["arena_still_viewed"]
    view[:] = np.uint8(9)
    assert is_mapped(address)
    del view, piece
    assert not is_mapped(address)
    assert os.listdir("/proc/self/fd") == before


def test_a_failing_progress_leaves_nothing():
    """When the caller's progress callback raises, the memory is released."""
    before = os.listdir("/proc/self/fd")

    def fail(done_bytes, total_bytes):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Arena.open(2, MIB, shared=True, progress=fail)
    assert os.listdir("/proc/self/fd") == before


def test_a_forked_child_keeps_its_own_memory() -> None:
    """A forked child that drops the arena unmaps none of its own memory."""
    code = """
import gc, mmap, os
from flexkv.io.memory.arena import Arena
arena = Arena.open(64, 1 << 20)
child = os.fork()
if child == 0:
    own = [mmap.mmap(-1, 64 << 20) for _ in range(8)]
    for map in own:
        map[0] = map[-1] = 7
    del arena
    gc.collect()
    os._exit(sum(map[0] + map[-1] for map in own) - 8 * 14)
assert os.waitpid(child, 0)[1] == 0
arena.close()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
