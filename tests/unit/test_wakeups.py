"""A thread that asks to run soon after it wakes gets what is allowed; no other thread does."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexkv.process import wakeups
from flexkv.process.wakeups import (
    NICE,
    SLICE_NS,
    Scheduling,
    schedule,
    scheduling_of,
    wake_promptly,
)

RELEASE = tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])
NOBODY = 65534
ASKED = """
import json, os, sys, threading
from flexkv.process.wakeups import scheduling_of, wake_promptly
os.setpriority(os.PRIO_PROCESS, 0, 0)
os.setgroups([])
os.setuid(int(sys.argv[1]))
refused, values = wake_promptly(), []
look = lambda: values.extend(scheduling_of()[1:3])
look()
thread = threading.Thread(target=look)
thread.start()
thread.join()
print(json.dumps([refused, values]))
"""
has_slices = pytest.mark.skipif(
    RELEASE < (6, 12), reason="Linux before 6.12 has no slices to ask for"
)


@pytest.fixture(autouse=True)
def autogroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a file in place of the kernel's, so that the session of the tests keeps its value."""
    file = tmp_path / "autogroup"
    file.write_text("/autogroup-7 nice 0\n")
    monkeypatch.setattr(wakeups, "AUTOGROUP", file)
    return file


def in_thread(work: Callable[[], Any]) -> Any:
    """Return the result of a call in a thread of its own, whose scheduling ends with it."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    (result,) = results
    return result


def as_user(user: int) -> tuple[dict[str, str], list[int]]:
    """Return the effect of `wake_promptly` in an ordinary user's process with nice value 0.

    That is what it returns, then the nice value and slice after it, and those of another thread.
    """
    told = subprocess.run(
        [sys.executable, "-c", ASKED, str(user)], capture_output=True, text=True, check=True
    )
    refused, values = json.loads(told.stdout)
    return refused, values


@has_slices
def test_a_thread_gets_a_short_slice_that_its_own_threads_do_not_inherit() -> None:
    """The slice is the caller's alone; threads that it starts are scheduled as it was before."""

    def told() -> tuple[Scheduling, Scheduling, Scheduling]:
        before = scheduling_of()
        wake_promptly()
        return before, scheduling_of(), in_thread(scheduling_of)

    here = scheduling_of()
    before, after, inner = in_thread(told)
    assert (after.policy, after.slice_ns) == (before.policy, SLICE_NS)
    assert (inner.slice_ns, inner.nice) == (before.slice_ns, before.nice)
    assert scheduling_of() == here


@has_slices
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_without_privileges_the_slice_is_short_all_the_same() -> None:
    """A process without CAP_SYS_NICE gets the short slice, and reports what was refused."""
    refused, (nice, slice_ns, _, _) = as_user(NOBODY)
    assert (list(refused), nice, slice_ns) == (["nice"], 0, SLICE_NS)


@pytest.mark.skipif(os.geteuid() != 0, reason="a negative nice value takes CAP_SYS_NICE")
def test_with_privileges_the_nice_value_is_negative_too() -> None:
    """With CAP_SYS_NICE the thread gets a larger share of the CPU; its threads do not."""
    refused, (nice, _, inner_nice, _) = as_user(0)
    assert (refused, nice, inner_nice) == ({}, NICE, 0)


def test_a_chosen_nice_value_and_a_chosen_policy_are_kept(
    autogroup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A nice value or policy that somebody has chosen stays, and so does the session's."""
    monkeypatch.setattr(os, "getsid", lambda _: os.getpid())

    def nice() -> tuple[dict[str, str], int, int]:
        chosen = max(scheduling_of().nice, 7)
        os.setpriority(os.PRIO_PROCESS, 0, chosen)
        return wake_promptly(), scheduling_of().nice, chosen

    refused, now, chosen = in_thread(nice)
    assert refused == {"nice": f"it is {chosen}"}
    assert now == chosen

    def batch() -> tuple[dict[str, str], Scheduling, Scheduling]:
        schedule(scheduling_of()._replace(policy=os.SCHED_BATCH))
        return scheduling_of(), wake_promptly(), scheduling_of()

    before, refused, after = in_thread(batch)
    assert list(refused) == ["slice"]
    assert before == after
    assert autogroup.read_text().endswith(" nice 0\n")


@pytest.mark.parametrize(
    ("leads", "said", "then"),
    [
        (True, " nice 0\n", str(NICE)),
        (False, " nice 0\n", " nice 0\n"),
        (True, " nice 5\n", " nice 5\n"),
    ],
)
def test_a_session_of_ones_own_is_raised(
    autogroup: Path, monkeypatch: pytest.MonkeyPatch, leads: bool, said: str, then: str
) -> None:
    """The nice value of a session is set by its leader, and only if nobody has chosen one."""
    told: list[Scheduling] = []
    autogroup.write_text(said)
    monkeypatch.setattr(os, "getsid", lambda _: os.getpid() + (not leads))
    monkeypatch.setattr(wakeups, "schedule", told.append)
    monkeypatch.setattr(wakeups, "scheduling_of", lambda: Scheduling(os.SCHED_OTHER, 0))
    assert wake_promptly() == {}
    assert autogroup.read_text() == then
    assert [each.nice for each in told] == [0, NICE]


def test_a_kernel_that_refuses_everything_changes_nothing(
    autogroup: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the calls do not exist, or there are no groups by session, the refusal is reported."""
    monkeypatch.setattr(wakeups, "_NUMBERS", {})
    assert list(in_thread(wake_promptly)) == ["slice"]
    monkeypatch.undo()
    monkeypatch.setattr(wakeups, "AUTOGROUP", autogroup.parent / "none")
    monkeypatch.setattr(os, "getsid", lambda _: os.getpid())
    monkeypatch.setattr(wakeups, "schedule", lambda _: None)
    monkeypatch.setattr(wakeups, "scheduling_of", lambda: Scheduling(os.SCHED_OTHER, 0))
    assert list(wake_promptly()) == ["autogroup"]


def test_threads_that_are_gone_are_errors() -> None:
    """Asking for a thread that does not exist raises, and so does changing it."""
    gone = 2**22 + 1
    with pytest.raises(ProcessLookupError):
        scheduling_of(gone)
    with pytest.raises(ProcessLookupError):
        schedule(Scheduling(os.SCHED_OTHER, 0), gone)
