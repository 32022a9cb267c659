"""How much memory this process may still take: what the machine has, and what its cgroups allow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import psutil

HUGE_PAGES = Path("/sys/kernel/mm/hugepages")
CGROUP_ROOT = Path("/sys/fs/cgroup")
CGROUP_OF_SELF = Path("/proc/self/cgroup")


class Headroom(NamedTuple):
    """How much memory is still available, and what limits it."""

    available_bytes: int
    limited_by: str


class _CgroupFiles(NamedTuple):
    """The file names of one cgroup version."""

    limit: str
    usage: str
    reclaimable: str


_V1 = _CgroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _CgroupFiles("memory.max", "memory.current", "inactive_file")


def headroom() -> Headroom:
    """Return how much memory this process can still take."""
    machine = Headroom(int(psutil.virtual_memory().available), "the machine")
    return min([machine, *_cgroup_headrooms()])


def free_huge_bytes(page_bytes: int) -> int:
    """Return the free bytes in the pool of huge pages of one size; 0 if there is no pool."""
    pool = HUGE_PAGES / f"hugepages-{page_bytes >> 10}kB"
    try:
        free = int((pool / "free_hugepages").read_text())
        reserved = int((pool / "resv_hugepages").read_text())
    except (OSError, ValueError):
        return 0
    return max(0, free - reserved) * page_bytes


def _cgroup_headrooms() -> Iterator[Headroom]:
    """Yield what each cgroup that holds this process still allows, if it has a limit."""
    try:
        lines = CGROUP_OF_SELF.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, files = CGROUP_ROOT, _V2
        elif "memory" in controllers.split(","):
            root, files = CGROUP_ROOT / "memory", _V1
        else:
            continue
        relative = PurePosixPath(path.lstrip("/"))
        # In a container the path may name directories that only the host sees. They are skipped;
        # the root of the mount is the container's own cgroup.
        for level in (relative, *relative.parents):
            found = _cgroup_headroom(root / level, files)
            if found is not None:
                yield found


def _cgroup_headroom(directory: Path, files: _CgroupFiles) -> Headroom | None:
    try:
        limit = (directory / files.limit).read_text().strip()
        usage = int((directory / files.usage).read_text())
        stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if limit == "max":
        return None
    reclaimable = int(stat.get(files.reclaimable, 0))
    return Headroom(max(0, int(limit) - usage + reclaimable), f"cgroup {directory}")
