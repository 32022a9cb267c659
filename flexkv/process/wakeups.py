"""How soon a thread runs after it wakes, beside threads that keep every CPU busy.

Engines busy-wait: with tensor parallelism each of vLLM's workers takes a CPU while it waits for
the others. On a machine with no CPU to spare, a server that wakes for a question then waits until
one of them has used up its time slice, some milliseconds, and the engine has gone on by then.

- A thread that has asked for a short slice preempts one with a longer slice as soon as it wakes,
  unless it has had more than its share of the CPU. Linux 6.12 and later grant this to everybody;
  earlier kernels ignore it.
- A negative nice value makes the share larger, and on earlier kernels the wait shorter. It needs
  CAP_SYS_NICE.
- Where the kernel groups tasks by session (autogroup), nice values count only within a session,
  and the session has one of its own. A container's cgroup, if it has the CPU controller, replaces
  these groups.

A real-time policy is not used: such a thread would wake on the CPU where it ran last, even if
another CPU is idle, and so displace a worker that others wait for.

Source: sched(7); `sched_setattr(2)`; kernel/sched/syscalls.c, `__setparam_fair`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from pathlib import Path
from typing import NamedTuple

SLICE_NS = 100_000
"""The shortest slice that Linux grants. A thread that has more to do may use several in a row."""
NICE = -10
AUTOGROUP = Path("/proc/self/autogroup")

_ATTRIBUTES = struct.Struct("=IIQiIQQQ")
"""`struct sched_attr` as of its first version."""
_NUMBERS = {"x86_64": (314, 315), "aarch64": (274, 275), "riscv64": (274, 275)}
"""The numbers of `sched_setattr` and `sched_getattr`, by machine."""
_RESET_ON_FORK = 1


class Scheduling(NamedTuple):
    """How the kernel schedules a thread."""

    policy: int
    nice: int
    slice_ns: int = 0
    """0 is the kernel's default. Kernels before 6.12 always report 0."""
    is_inherited: bool = True
    """Whether threads and processes that the thread starts are scheduled alike."""


def scheduling_of(thread_id: int = 0) -> Scheduling:
    """Return how a thread is scheduled; 0 is the calling thread.

    Raises:
        OSError: there is no such thread, or the kernel does not report it.
    """
    told = ctypes.create_string_buffer(_ATTRIBUTES.size)
    _call(1, thread_id, told, _ATTRIBUTES.size, 0)
    _, policy, flags, nice, _, slice_ns, _, _ = _ATTRIBUTES.unpack(told.raw)
    return Scheduling(policy, nice, slice_ns, not flags & _RESET_ON_FORK)


def schedule(wanted: Scheduling, thread_id: int = 0) -> None:
    """Change how a thread is scheduled; 0 is the calling thread. Not for real-time policies.

    Raises:
        OSError: there is no such thread, it may not be scheduled so, or the kernel cannot do it.
    """
    flags = 0 if wanted.is_inherited else _RESET_ON_FORK
    told = _ATTRIBUTES.pack(
        _ATTRIBUTES.size, wanted.policy, flags, wanted.nice, 0, wanted.slice_ns, 0, 0
    )
    _call(0, thread_id, ctypes.create_string_buffer(told, len(told)), 0)


def wake_promptly() -> dict[str, str]:
    """Make the calling thread run as soon after it wakes as this process is allowed to ask for.

    Threads that it starts later are scheduled as usual, unless its nice value was negative already:
    then they inherit all that it has. A nice value or a policy that somebody has chosen for the
    thread stays. Nothing is raised: what is refused stays as it was.

    Returns:
        What was not changed ("slice", "nice" or "autogroup"), with the reason.
    """
    refused: dict[str, str] = {}
    try:
        now = scheduling_of()
        if now.policy != os.SCHED_OTHER:
            return {"slice": f"the scheduling policy is {now.policy}"}
        # A child of a thread with a negative nice value would lose it.
        prompt = now._replace(slice_ns=SLICE_NS, is_inherited=now.nice < 0)
        schedule(prompt)
    except OSError as error:
        return {"slice": str(error)}
    if now.nice:
        return {"nice": f"it is {now.nice}"}
    try:
        schedule(prompt._replace(nice=NICE))
    except OSError as error:
        refused["nice"] = str(error)
    try:
        _raise_session()
    except OSError as error:
        refused["autogroup"] = str(error)
    return refused


def _raise_session() -> None:
    """Set the session's nice value to `NICE`, if this process leads it and nobody has set one.

    Raises:
        OSError: the kernel groups no tasks by session, or this process may not do it.
    """
    if os.getsid(0) == os.getpid() and AUTOGROUP.read_text().endswith(" nice 0\n"):
        AUTOGROUP.write_text(str(NICE))


def _call(which: int, *arguments: object) -> None:
    """Make a system call: 0 is `sched_setattr`, 1 is `sched_getattr`.

    Raises:
        OSError: the kernel refuses it, or its number is not known here.
    """
    numbers = _NUMBERS.get(platform.machine())
    if numbers is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if ctypes.CDLL(None, use_errno=True).syscall(numbers[which], *arguments) < 0:
        raise OSError(number := ctypes.get_errno(), os.strerror(number))
