"""Which CPUs a thread may run on."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

NODES = Path("/sys/devices/system/node")


def widen_affinity() -> set[int]:
    """Allow the calling thread, and threads it starts, on every CPU of its NUMA nodes.

    An engine pins each of its threads to one CPU, and threads that they start would share it.
    Return the CPUs that the calling thread may run on now.
    """
    own = os.sched_getaffinity(0)
    wanted = set(own)
    for path in NODES.glob("node[0-9]*/cpulist"):
        with suppress(OSError, ValueError):
            cpus = _parsed(path.read_text())
            if cpus & own:
                wanted |= cpus
    with suppress(OSError):  # a container may allow none of them: nothing changes then
        os.sched_setaffinity(0, wanted)
    return os.sched_getaffinity(0)


def _parsed(text: str) -> set[int]:
    """Return the CPUs of a list such as "0-3,8"."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus
