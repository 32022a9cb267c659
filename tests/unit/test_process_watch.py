"""Laws of watching a process for its end."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys

import pytest

from flexkv.server.launch import ProcessHandle

PATIENCE_S = 20.0


def check_that_the_end_is_seen(process: subprocess.Popen[bytes], watch: ProcessHandle) -> None:
    """End a process by closing its stdin, check that the watch sees it, and close the watch."""
    assert not watch.has_ended
    assert not watch.wait(0.0)
    process.communicate()
    assert watch.wait(PATIENCE_S)
    assert watch.has_ended
    watch.close()


def test_the_end_of_a_process_is_seen_with_any_descriptor() -> None:
    """The end of a process is seen even if our own process has thousands of open files."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    low = os.pidfd_open(process.pid)
    watch = ProcessHandle(process.pid, fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 1024))
    os.close(low)
    check_that_the_end_is_seen(process, watch)


@pytest.mark.parametrize("has_pidfds", [True, False])
def test_the_end_of_a_process_is_seen_by_its_number(
    monkeypatch: pytest.MonkeyPatch, has_pidfds: bool
) -> None:
    """The end of a process is seen by its pid, with or without pidfds; no descriptor is left."""
    before = len(os.listdir("/proc/self/fd"))
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    if not has_pidfds:
        monkeypatch.delattr(os, "pidfd_open")
    watch = ProcessHandle(process.pid)
    assert (watch.fd >= 0) == has_pidfds
    check_that_the_end_is_seen(process, watch)
    assert len(os.listdir("/proc/self/fd")) == before


def test_descriptor_0_may_be_a_watched_process() -> None:
    """A pidfd with the number 0, which a daemon without stdin gets, is used and closed."""
    before = len(os.listdir("/proc/self/fd"))
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    stdin, watched = os.dup(0), os.pidfd_open(process.pid)
    os.dup2(watched, 0)
    try:
        watch = ProcessHandle(process.pid, 0)
        assert watch.fd == 0
        check_that_the_end_is_seen(process, watch)
    finally:
        os.dup2(stdin, 0)
        os.close(stdin)
        os.close(watched)
    assert len(os.listdir("/proc/self/fd")) == before
