"""Clusters on a virtual clock: whatever goes wrong, hints become what the nodes have."""

from __future__ import annotations

import os

import pytest

from flexkv.cluster import follower, publisher
from flexkv.testing.cluster_simulation import ClusterSimulation, Scene
from flexkv.testing.virtual_time import run_virtual

SEEDS = int(os.environ.get("CLUSTER_SEEDS", "12"))
NODES = int(os.environ.get("CLUSTER_NODES", "60"))
FIRST = int(os.environ.get("SIMULATION_FIRST", "0"))


@pytest.mark.parametrize("seed", range(FIRST, FIRST + SEEDS))
def test_hints_become_the_truth(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """After all faults, each follower knows which nodes live, and all that they have."""
    if seed % 2:  # reach the bounds
        monkeypatch.setattr(publisher, "PENDING_MAX", 50)
        monkeypatch.setattr(follower, "KEPT_SPANS_MAX", 20)
    run_virtual(ClusterSimulation(Scene(), seed).run())


def test_large_clusters_are_no_different() -> None:
    """Some followers of many nodes know the truth after waves of deaths and partitions."""
    scene = Scene(
        nodes=NODES,
        followers=min(20, NODES // 8),
        ttl_s=6.0,
        changes_per_s=4.0 * NODES,
        seconds=30.0,
        deaths_at_once=NODES // 10,
        spans_max=100,
    )
    simulation = ClusterSimulation(scene, FIRST)
    run_virtual(simulation.run())
    assert sum(simulation.faults.values()) > 10
