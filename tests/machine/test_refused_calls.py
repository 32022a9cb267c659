"""Tests of system calls that the kernel refuses, as by seccomp: optional ones cost nothing."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
from errno import EACCES, EINVAL, ENOMEM, ENOSYS, EPERM
from pathlib import Path
from typing import Any

import pytest

from tests.machine.seccomp import (
    FALLOCATE,
    IO_URING_ENTER,
    IO_URING_REGISTER,
    IO_URING_SETUP,
    MADVISE,
    MEMFD_CREATE,
)
from tests.system.mounted import ROOT

pytestmark = pytest.mark.machine

WIPEONFORK, POPULATE_WRITE = 18, 23
PUT_GET = str(Path(__file__).with_name("put_get.py"))
# A page size of which no machine reserves pages, so that memory is never of the hugetlb pool.
NO_RESERVED_PAGES = {"hugepage_size_bytes": mmap.PAGESIZE}


def run_refused(rules: list[list[int]], **changes: Any) -> tuple[dict[str, Any], list[Any]]:
    """Run a put and a get with some calls refused; return the report and the log."""
    values = {"num_ssd_blocks": 64, **changes}
    command = [sys.executable, "-W", "ignore", "-m", "tests.machine.seccomp", json.dumps(rules)]
    done = subprocess.run(
        [*command, PUT_GET, json.dumps(values)], capture_output=True, text=True, cwd=ROOT,
        timeout=120, check=False,
    )  # fmt: skip
    if "seccomp.py" in done.stderr and "prctl" in done.stderr:
        pytest.skip("this machine has no seccomp filters")
    assert done.returncode == 0, done.stderr
    log = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    return json.loads(done.stdout), log


@pytest.mark.parametrize(
    ("call", "errno"),
    [
        (IO_URING_ENTER, EPERM),
        (IO_URING_ENTER, ENOSYS),
        (IO_URING_SETUP, EPERM),
        (IO_URING_SETUP, ENOSYS),
        (IO_URING_SETUP, ENOMEM),
        (IO_URING_REGISTER, EACCES),
    ],
)
def test_an_io_uring_that_cannot_be_used_costs_nothing_but_speed(
    tmp_path: Path, call: int, errno: int
) -> None:
    """If io_uring refuses setup, enter or register, threads do the I/O, and one line says why."""
    told, log = run_refused([[call, errno]], ssd_cache_dir=str(tmp_path))
    assert (told["tokens"], told["same"], told["flush"]) == (64, True, {})
    assert told["backing"]["disk"] == "threads"
    (line,) = [entry for entry in log if entry["event"] == "disk_adapter"]
    assert "io_uring refused" in line["reason"]


@pytest.mark.parametrize("errno", [EINVAL, EPERM, ENOSYS, EACCES])
@pytest.mark.parametrize("advice", [WIPEONFORK, POPULATE_WRITE, mmap.MADV_HUGEPAGE])
def test_hints_about_memory_that_are_refused_cost_nothing(
    tmp_path: Path, advice: int, errno: int
) -> None:
    """Whatever error madvise returns for an optional hint, memory is allocated and works."""
    rule = [MADVISE, errno, 2, advice]
    told, _ = run_refused([rule], ssd_cache_dir=str(tmp_path), **NO_RESERVED_PAGES)
    assert (told["tokens"], told["same"]) == (64, True)
    if advice == WIPEONFORK:
        assert "MADV_WIPEONFORK refused" in told["why"]


def test_no_hint_at_all_is_needed(tmp_path: Path) -> None:
    """Without madvise, memfd_create and fallocate, private memory on ordinary pages works."""
    rules = [[MADVISE, ENOSYS], [MEMFD_CREATE, ENOSYS], [FALLOCATE, ENOSYS]]
    told, _ = run_refused(rules, ssd_cache_dir=str(tmp_path))
    assert (told["tokens"], told["same"], told["backing"]["host"]) == (64, True, "plain")
