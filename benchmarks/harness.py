"""Measuring for all cases: contestants alternate, every other round is reversed, medians count."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from flexkv.common.errors import BackendUnavailableError, DeviceError
from flexkv.io.cuda.driver import BoundDriver

Figures = dict[str, float | str]


class Options(NamedTuple):
    """How the cases are to be run."""

    repeats: int
    """Counted rounds."""
    quick: bool
    """Small sizes, to check that a case runs; its figures mean nothing then."""
    directory: Path
    """Where files may be created: on the disk to measure."""


def alternate(contestants: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Run each contestant `repeats` times, and return the seconds that it reports for each run.

    Every other round runs backwards, so that no contestant always follows the same one. The first
    round warms up and is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for round_number in range(repeats + 1):
        names = list(contestants)
        for name in names if round_number % 2 else reversed(names):
            took_s = contestants[name]()
            if round_number:
                seconds[name].append(took_s)
    return seconds


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Return the median of the ratios of neighbouring runs."""
    return statistics.median(n / d for n, d in zip(numerators, denominators, strict=True))


def seconds_of(work: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def percentile(values: list[float], percent: float) -> float:
    """Return a percentile by the nearest rank."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def machine(directory: Path) -> dict[str, Any]:
    """Return the facts about this machine that figures depend on; to be read before measuring."""
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "gpu": _gpu(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average_before": os.getloadavg()[0],
        "filesystem": _told("stat", "--file-system", "--format=%T", str(directory)),
        "commit": _told("git", "describe", "--always", "--dirty"),
        "date": time.strftime("%Y-%m-%d"),
    }


def _gpu() -> str:
    try:
        driver = BoundDriver(0)
    except (BackendUnavailableError, DeviceError):
        return "none"
    driver.close()
    return driver.named


def _told(*command: str) -> str:
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    return told.stdout.strip() or "unknown"


def save(
    path: Path, results: dict[str, Figures], command: str, machine_facts: dict[str, Any]
) -> None:
    """Write results, the command that made them, and the machine that they were made on."""
    content = {"command": command, "machine": machine_facts, "results": results}
    path.write_text(json.dumps(content, indent=2) + "\n")
