"""Threads that yield to all others of this process.

Copying and checksumming for the remote tier can keep every CPU busy. Requests that need only host
memory must not wait for that, so these threads get a CPU only if no other thread wants it, or a
small share beside those that do. The kernel gives a thread the nice value of the thread that starts
it. So whatever starts threads is called in a thread whose nice value was raised before. Threads
that move bytes from a network are not among them: beside an engine that uses every CPU, fetches
would take far longer.

Source: sched(7), "The nice value"; setpriority(2).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from flexkv.process import wakeups
from flexkv.process.workers import Workers

T = TypeVar("T")

NICER_BY, NICE_MAX = 10, 19
"""A thread that is nicer by 10 gets about a tenth of the CPU time beside one that is not."""


def in_background(make: Callable[[], T]) -> T:
    """Return what `make` returns; the threads that it starts yield to all others.

    If the kernel refuses the nice value, they compete as all others do.

    Raises:
        OSError: a thread cannot be started. What `make` raises is raised, too.
    """

    def run() -> T:
        with suppress(OSError):
            own = threading.get_native_id()
            nice = os.getpriority(os.PRIO_PROCESS, own)
            os.setpriority(os.PRIO_PROCESS, own, min(NICE_MAX, nice + NICER_BY))
        return make()

    starter = Workers(1, "flexkv-start")
    try:
        return starter.submit(run).result()
    finally:
        starter.shutdown()


def yield_to_all() -> None:
    """Have the calling thread, and all threads that it starts, yield to all other processes.

    The process must lead a session of its own: nice values count only within a session where the
    kernel groups tasks by session. If the kernel refuses, the process competes as others do.
    """
    with suppress(OSError):
        os.nice(NICER_BY)
    with suppress(OSError):
        wakeups.AUTOGROUP.write_text(str(NICER_BY))
