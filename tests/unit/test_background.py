"""Threads of the remote tier yield to those that serve requests from host memory."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from flexkv.io.memory.copier import Copier
from flexkv.io.remote.open import open_store
from flexkv.io.remote.options import RemoteOptions
from flexkv.process.background import NICE_MAX, NICER_BY, in_background


def nice_values(name: str) -> set[int]:
    """Return the nice values of this process's threads whose kernel name begins so."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # another test's thread has ended just now
            if (task / "comm").read_text().startswith(name):
                found.add(os.getpriority(os.PRIO_PROCESS, int(task.name)))
    return found


def wanted() -> int:
    """Return the nice value of a background thread of this one."""
    return min(NICE_MAX, os.getpriority(os.PRIO_PROCESS, 0) + NICER_BY)


def test_threads_started_in_the_background_are_nicer() -> None:
    """What is started there is nicer by a constant; the caller stays as it was."""
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    nice: list[int] = []

    def look() -> None:
        nice.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    def start() -> threading.Thread:
        thread = threading.Thread(target=look)
        thread.start()
        return thread

    in_background(start).join()
    assert nice == [wanted()]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


def test_what_is_raised_in_the_background_is_raised() -> None:
    """An error of what is started reaches the caller, and leaves no thread."""
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        in_background(lambda: 1 // 0)
    assert threading.active_count() == before


def test_a_refused_nice_value_changes_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel refuses, the threads are started all the same."""

    def refuse(*_: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "setpriority", refuse)
    assert in_background(lambda: 5) == 5


def test_the_remote_tiers_threads_are_in_the_background(tmp_path: Path) -> None:
    """Copy threads, and those that read and write files, are nicer."""
    files = open_store(f"file://{tmp_path}/shared", {}, RemoteOptions())
    copier = Copier(2)
    try:
        assert nice_values("flexkv-copy") == {wanted()}
        nicer = [
            os.getpriority(os.PRIO_PROCESS, thread.native_id or 0)
            for thread in threading.enumerate()
            if thread.name.startswith("flexkv-remote")
        ]
        assert set(nicer) == {wanted()}
    finally:
        copier.close()
        files.close()
