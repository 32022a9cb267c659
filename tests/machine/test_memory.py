"""Tests of host memory that the machine, a cgroup or a limit refuses, at each step."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.machine.volumes import MB
from tests.system.mounted import ROOT

pytestmark = pytest.mark.machine

POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
OVERCOMMIT = POOL.with_name("nr_overcommit_hugepages")
PUT_GET = str(Path(__file__).with_name("put_get.py"))
HOST_BLOCKS = 16 * MB // 4096


def put_get(before: Callable[[], None], **changes: Any) -> dict[str, Any]:
    """Run a put and a get in a new process, which calls `before` first; return its report."""
    values = {"num_cpu_blocks": HOST_BLOCKS, **changes}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", PUT_GET, json.dumps(values)], cwd=ROOT, check=False,
        capture_output=True, text=True, timeout=120, preexec_fn=before,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.fixture
def pool() -> Iterator[None]:
    """Reserve 32 huge pages, and give them back afterwards."""
    before = POOL.read_text()
    try:
        POOL.write_text("32")
    except OSError as error:
        pytest.skip(f"this process may not reserve huge pages: {error}")
    try:
        if int(POOL.read_text()) < 32:
            pytest.skip("this machine has no memory for huge pages")
        yield
    finally:
        POOL.write_text(before)


def mounted_at(controller: str) -> Path:
    """Return where a controller's cgroups are mounted; skip the test if the machine lacks it."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        kind, options = fields[fields.index("-") + 1], fields[-1].split(",")
        root = Path(fields[4])
        if kind == "cgroup" and controller in options:
            return root
        if kind == "cgroup2" and controller in (root / "cgroup.controllers").read_text().split():
            with suppress(OSError):
                (root / "cgroup.subtree_control").write_text(f"+{controller}")
                return root
    pytest.skip(f"this machine has no cgroup controller {controller}")


@pytest.fixture
def no_huge_pages() -> Iterator[Path]:
    """Yield a cgroup that allows no huge pages of 2 MiB."""
    group = mounted_at("hugetlb") / f"flexkv-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made: {error}")
    try:
        for name in ("hugetlb.2MB.max", "hugetlb.2MB.limit_in_bytes"):
            if (group / name).exists():
                (group / name).write_text("0")
        yield group
    finally:
        group.rmdir()


def join(group: Path) -> Callable[[], None]:
    """Return a function that moves the calling process into a cgroup."""
    return lambda: (group / "cgroup.procs").write_text(str(os.getpid())) and None


@pytest.mark.usefixtures("pool")
def test_huge_pages_are_used_where_they_may_be() -> None:
    """Host memory uses the pool's huge pages if nothing forbids it."""
    told = put_get(lambda: None)
    assert (told["tokens"], told["same"], told["backing"]["host"]) == (64, True, "hugetlb")


@pytest.mark.usefixtures("pool")
def test_huge_pages_that_a_cgroup_refuses_fall_back(no_huge_pages: Path) -> None:
    """If a cgroup forbids touching huge pages, ordinary memory is used, and the reason is kept."""
    told = put_get(join(no_huge_pages))
    assert (told["tokens"], told["same"]) == (64, True)
    assert told["backing"]["host"] in ("thp", "plain")
    assert told["why"].startswith("hugetlb refused (E")


@pytest.mark.usefixtures("pool")
def test_a_pool_that_is_too_small_falls_back() -> None:
    """If the pool is too small, the whole host tier uses other pages."""
    told = put_get(lambda: None, num_cpu_blocks=128 * MB // 4096)
    assert (told["tokens"], told["backing"]["host"] in ("thp", "plain")) == (64, True)


def test_a_limit_of_address_space_is_named() -> None:
    """The error for too little address space names the key that was given and says what helps."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))

    told = put_get(limit, num_cpu_blocks=None, cpu_cache_gb=4)
    assert told["error"].startswith("ConfigError: cpu_cache_gb=4: ")
    assert "set cpu_cache_gb lower, or raise this process's memory limit" in told["error"]


@pytest.mark.parametrize("hugepages", [True, False])
def test_a_size_beyond_the_machine_is_named_by_its_key(tmp_path: Path, hugepages: bool) -> None:
    """A size beyond the machine is refused by the key that gave it, in GB or in blocks."""
    named = {
        "cpu_cache_gb=1000: needs": {"num_cpu_blocks": None, "cpu_cache_gb": 10**3},
        "num_cpu_blocks=1000000000: needs": {"num_cpu_blocks": 10**9},
        "ssd_cache_gb=1000: needs": {"ssd_cache_gb": 10**3, "ssd_cache_dir": str(tmp_path)},
    }
    for words, values in named.items():
        told = put_get(lambda: None, use_hugepage_cpu_buffer=hugepages, **values)
        assert told["error"].startswith(f"ConfigError: {words}"), told


def test_a_tier_of_more_blocks_than_can_be_accounted_for_is_named(tmp_path: Path) -> None:
    """The error for a tier whose index exceeds the memory names the key, even for sparse files."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))

    values = {"num_ssd_blocks": 10**9, "ssd_cache_dir": str(tmp_path), "ssd_preallocate": False}
    told = put_get(limit, **values)
    why = "there is not enough memory"
    assert told["error"].startswith(f"ConfigError: num_ssd_blocks=1000000000: {why}")
