"""Threads that a pinned thread starts may run on all CPUs of their NUMA node."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from flexkv.process import cpus


def test_a_thread_gets_the_cpus_of_its_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread gets the CPUs of its own node only; where no node is known, nothing changes."""
    everywhere = os.sched_getaffinity(0)
    if len(everywhere) < 2:
        pytest.skip("there is one CPU only")
    first, *rest = sorted(everywhere)
    monkeypatch.setattr(cpus, "NODES", tmp_path)
    seen: list[set[int]] = []

    def pinned() -> None:
        os.sched_setaffinity(0, {first})
        seen.append(cpus.widen_affinity())
        (tmp_path / "node0").mkdir()
        (tmp_path / "node0/cpulist").write_text(f"{first},{rest[0]}\n")
        (tmp_path / "node1").mkdir()
        (tmp_path / "node1/cpulist").write_text("900-907")
        seen.append(cpus.widen_affinity())

    thread = threading.Thread(target=pinned)
    thread.start()
    thread.join()
    assert seen == [{first}, {first, rest[0]}]
    assert os.sched_getaffinity(0) == everywhere
