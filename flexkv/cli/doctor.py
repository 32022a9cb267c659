"""`flexkv doctor`: what this machine offers, what will be used, and what would help."""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import psutil
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flexkv import _ext
from flexkv.common.config import GB
from flexkv.common.errors import ConfigError
from flexkv.io.files import StripedFiles
from flexkv.io.host_memory import headroom

PROBE_BYTES = 256 << 20
_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class Finding(NamedTuple):
    """One thing that was looked at."""

    name: str
    found: str
    good: bool
    advice: str = ""


def doctor(
    directory: Annotated[
        Path, typer.Option("--dir", help="Directory that the SSD tier would use.")
    ] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what this machine offers, what will be used, and what would help."""
    looks: list[Callable[[], Finding]] = [
        _simd, _uring, lambda: _direct(directory), _thp, _hugetlb, _memlock, _memory,
        lambda: _disk(directory), _cuda, _bandwidth,
    ]  # fmt: skip
    findings = [look() for look in looks]
    if as_json:
        typer.echo(json.dumps({f.name: f._asdict() for f in findings}, indent=2))
        return
    table = Table("what", "found", "", "what would help", title="FlexKV doctor")
    for finding in findings:
        mark = "[green]good" if finding.good else "[yellow]could be better"
        table.add_row(finding.name, escape(finding.found), mark, escape(finding.advice))
    Console().print(table)


def _simd() -> Finding:
    simd = str(_ext.features()["simd"])
    return Finding("copy kernel", simd, simd != "none", "" if simd != "none" else "memcpy serves")


def _uring() -> Finding:
    try:
        _ext.Ring(8).close()
    except OSError as error:
        advice = "threads serve; sysctl kernel.io_uring_disabled=0, or a newer kernel"
        return Finding("io_uring", f"refused: {error.strerror}", False, advice)
    return Finding("io_uring", "works", True)


def _direct(directory: Path) -> Finding:
    probe = directory / ".flexkv-doctor"
    try:
        files = StripedFiles.open([probe], 1, 4096)
    except ConfigError as error:
        return Finding("O_DIRECT", str(error), False, "choose another directory with --dir")
    direct, why = files.direct, files.why
    files.close()
    shutil.rmtree(probe)
    if direct:
        return Finding("O_DIRECT", f"works in {directory.resolve()}", True)
    return Finding("O_DIRECT", why, False, "buffered files serve; ext4 or XFS has O_DIRECT")


def _thp() -> Finding:
    mode = _THP.read_text().strip() if _THP.exists() else "not there"
    good = "[never]" not in mode and _THP.exists()
    advice = "" if good else f"echo madvise > {_THP}: disk reads are up to twice as fast"
    return Finding("transparent huge pages", mode, good, advice)


def _hugetlb() -> Finding:
    pages = {
        line.split(":")[0]: int(line.split()[1])
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("HugePages_")
    }
    found = f"{pages.get('HugePages_Free', 0)} of {pages.get('HugePages_Total', 0)} pages free"
    return Finding("reserved huge pages", found, True, "not needed where THP serves")


def _memlock() -> Finding:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    free = limit == resource.RLIM_INFINITY or os.geteuid() == 0
    found = "unlimited" if free else f"{limit >> 10} KiB"
    return Finding("memlock", found, free, "" if free else "ulimit -l unlimited: registered I/O")


def _memory() -> Finding:
    available, by = headroom()
    found = f"{available / GB:.1f} GB for the host tier ({by})"
    return Finding("memory", found, available > GB)


def _disk(directory: Path) -> Finding:
    free = psutil.disk_usage(str(directory)).free
    good = free > GB
    advice = "" if good else "free some space, or choose another directory with --dir"
    return Finding("disk", f"{free / GB:.1f} GB free", good, advice)


def _cuda() -> Finding:
    there = Path("/dev/nvidiactl").exists()
    found = "a GPU is there; FlexKV's part for it has run on none yet" if there else "no GPU"
    return Finding("CUDA", found, True, "KV caches in CPU memory are served")


def _bandwidth() -> Finding:
    source = np.ones(PROBE_BYTES, np.uint8)
    target = np.ones(PROBE_BYTES, np.uint8)
    threads = min(4, os.cpu_count() or 1)
    pool = _ext.CopyPool(threads)
    try:
        ours = _best_gb_per_s(lambda: pool.copy(target, source))
    finally:
        pool.close()
    numpy = _best_gb_per_s(lambda: np.copyto(target, source))
    found = f"{ours:.1f} GB/s with {threads} threads, numpy {numpy:.1f} GB/s"
    good = ours > 0.8 * numpy
    advice = "" if good else "other programs may use the CPUs: measure again while they are idle"
    return Finding("memory copy", found, good, advice)


def _best_gb_per_s(copy: Callable[[], None]) -> float:
    best_s = min(_seconds(copy) for _ in range(5))
    return PROBE_BYTES / best_s / 1e9


def _seconds(copy: Callable[[], None]) -> float:
    begin = time.perf_counter()
    copy()
    return time.perf_counter() - begin
