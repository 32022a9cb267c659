"""Tests that the benchmarks run. Their figures come from `make bench`."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import lmcache
from benchmarks.__main__ import CASES
from benchmarks.harness import Options, machine, percentile, save

from .forked import servers_are_forked


@pytest.mark.parametrize("case", CASES)
def test_a_case_runs_and_gives_figures(case: str, tmp_path: Path) -> None:
    """Every case ends at its small sizes; each figure is a number of at least 0, or a reason."""
    with servers_are_forked():
        figures = import_module(f"benchmarks.{case}").measure(Options(1, True, tmp_path))
    assert figures
    assert [name for name, value in figures.items() if not isinstance(value, str | float)] == []
    assert [name for name, value in figures.items() if isinstance(value, float) and value < 0] == []
    assert list(tmp_path.iterdir()) == []


def test_results_are_kept_with_the_machine_they_were_made_on(tmp_path: Path) -> None:
    """A results file names the command, the commit and the machine."""
    file = tmp_path / "results.json"
    save(file, {"case": {"figure": 1.0}}, "python -m benchmarks case", machine(tmp_path))
    kept = json.loads(file.read_text())
    assert kept["results"] == {"case": {"figure": 1.0}}
    assert {"cpu", "commit", "filesystem", "load_average_before"} <= kept["machine"].keys()


def test_percentiles_are_by_nearest_rank() -> None:
    """Of four values the 50th percentile is the second smallest, and the 99th the largest."""
    assert [percentile([4.0, 1.0, 3.0, 2.0], percent) for percent in (50, 99, 1)] == [2.0, 4.0, 1.0]


def test_a_peer_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer lists each missing package by the name under which it is installed."""
    there = {"lmcache"}

    def find(name: str) -> object:
        if "." in name and name not in there:
            raise ModuleNotFoundError(name.partition(".")[0])
        return object() if name in there else None

    monkeypatch.setattr("importlib.util.find_spec", find)
    assert lmcache.missing() == [
        "aiofiles",
        "opentelemetry-exporter-prometheus",
        "sortedcontainers",
    ]
    there |= set(lmcache.NEEDED)
    assert lmcache.missing() == []
