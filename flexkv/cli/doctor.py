"""`flexkv doctor`: checks of what this machine offers, what is used, and what would help."""

from __future__ import annotations

import json
import os
import resource
import shutil
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flexkv import _ext
from flexkv.cli.doctor_model import kv_groups
from flexkv.cli.doctor_peers import peers
from flexkv.cli.doctor_tiers import Finding, host_tier, remote_tier, ssd_tier
from flexkv.common.config import GB, CacheConfig, ModelConfig
from flexkv.common.errors import ConfigError
from flexkv.io.memory.host_memory import headroom
from flexkv.io.ssd.files import StripedFiles
from flexkv.io.ssd.open import distinct
from flexkv.io.ssd.uring import try_nothing
from flexkv.settings import load_file, load_settings

PROBE_BYTES = 256 << 20
_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def doctor(
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Directory that the SSD tier would use.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="JSON file of a model: report how much of each place its blocks waste."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check what this machine offers, what will be used, and what would help.

    The exit status is 1 if a configured tier cannot be used.
    """
    cache = load_settings().cache_config
    of_model = [] if model is None else _kv_groups(model, cache)
    if directory is not None:
        cache = CacheConfig(ssd_cache_dir=directory, num_ssd_blocks=1)
    looked_at = distinct(cache.ssd_cache_dir)[0] if cache.enable_ssd else Path()
    looks: list[Callable[[], Finding]] = [
        _simd, _uring, lambda: _direct(looked_at), _thp, _hugetlb, _memlock, _memory,
        lambda: _disk(looked_at), _cuda, _bandwidth,
    ]  # fmt: skip
    findings = [look() for look in looks]
    findings += host_tier(cache)
    if cache.enable_ssd:
        findings += ssd_tier(cache)
    findings += remote_tier(cache)
    findings += peers(cache)
    findings += of_model
    if as_json:
        typer.echo(json.dumps({f.name: f._asdict() for f in findings}, indent=2))
    else:
        _show(findings)
    if any(finding.fatal for finding in findings):
        raise typer.Exit(1)


def _kv_groups(model: Path, cache: CacheConfig) -> list[Finding]:
    """Return the findings about a model.

    Raises:
        ConfigError: the file cannot be read, or a key of the model is wrong.
    """
    return list(kv_groups(ModelConfig(**load_file(model, "model")), cache.tokens_per_block))


def _show(findings: list[Finding]) -> None:
    table = Table("what", "found", "", "what would help", title="FlexKV doctor")
    for finding in findings:
        mark = "[green]good" if finding.good else "[yellow]could be better"
        mark = "[red]cannot be used" if finding.fatal else mark
        table.add_row(escape(finding.name), escape(finding.found), mark, escape(finding.advice))
    Console().print(table)


def _simd() -> Finding:
    simd = str(_ext.features()["simd"])
    return Finding(
        "copy kernel", simd, simd != "none", "" if simd != "none" else "memcpy is used instead"
    )


def _uring() -> Finding:
    try:
        ring = _ext.Ring(8)
        try:
            try_nothing(ring)
        finally:
            ring.close()
    except OSError as error:
        advice = (
            "threads are used instead; set sysctl kernel.io_uring_disabled=0, or use a newer kernel"
        )
        return Finding("io_uring", f"refused: {error.strerror}", False, advice)
    return Finding("io_uring", "works", True)


def _direct(directory: Path) -> Finding:
    probe = directory / ".flexkv-doctor"
    try:
        files = StripedFiles.open([probe], 1, 4096)
    except ConfigError as error:
        return Finding("O_DIRECT", str(error), False, "choose another directory with --dir")
    else:
        direct, why = files.direct, files.why
        files.close()
    finally:
        shutil.rmtree(probe, ignore_errors=True)
    if direct:
        return Finding("O_DIRECT", f"works in {directory.resolve()}", True)
    return Finding(
        "O_DIRECT", why, False, "buffered I/O is used instead; ext4 and XFS have O_DIRECT"
    )


def _thp() -> Finding:
    mode = _THP.read_text().strip() if _THP.exists() else "not supported"
    good = "[never]" not in mode and _THP.exists()
    advice = "" if good else f"echo madvise > {_THP} makes disk reads up to twice as fast"
    return Finding("transparent huge pages", mode, good, advice)


def _hugetlb() -> Finding:
    pages = {
        line.split(":")[0]: int(line.split()[1])
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("HugePages_")
    }
    found = f"{pages.get('HugePages_Free', 0)} of {pages.get('HugePages_Total', 0)} pages free"
    return Finding("reserved huge pages", found, True, "not needed if transparent huge pages work")


def _memlock() -> Finding:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    free = limit == resource.RLIM_INFINITY or os.geteuid() == 0
    found = "unlimited" if free else f"{limit >> 10} KiB"
    return Finding(
        "memlock", found, free, "" if free else "ulimit -l unlimited allows registered I/O"
    )


def _memory() -> Finding:
    available, by = headroom()
    found = f"{available / GB:.1f} GB for the host tier ({by})"
    return Finding("memory", found, available > GB)


def _disk(directory: Path) -> Finding:
    there = next(each for each in (directory, *directory.parents) if each.exists())
    try:
        free = psutil.disk_usage(str(there)).free
    except OSError as error:
        return Finding("disk", f"cannot be read ({error.strerror})", False, "mount it again")
    good = free > GB
    advice = "" if good else "free some space, or choose another directory with --dir"
    return Finding("disk", f"{free / GB:.1f} GB free", good, advice)


def _cuda() -> Finding:
    there = Path("/dev/nvidiactl").exists()
    found = "a GPU is present" if there else "no GPU"
    advice = "" if there else "not needed for KV caches in CPU memory"
    return Finding("CUDA", found, True, advice)


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
    return PROBE_BYTES / min(timeit.repeat(copy, number=1, repeat=5)) / 1e9
