"""What the metrics and `flexkv top` tell of the nodes that share blocks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from typer.testing import CliRunner

from flexkv.cli.cluster import _facts
from flexkv.cli.main import commands
from flexkv.cli.top import scrape
from flexkv.cluster.grants import GrantCounts
from flexkv.cluster.plane import ClusterState, NodeState
from flexkv.engine.statistics import Statistics
from flexkv.io.peer.mooncake import MooncakeCounts
from flexkv.io.peer.port import PeerReads
from flexkv.kvmanager import KVManager
from flexkv.metrics import MetricsServer
from flexkv.tiers.parts import ClusterStatistics

from .caches import MODEL, cache_config, kv_caches

NODES = tuple(
    NodeState(str(n), str(n), f"node-{n}", "zone", n, 100 + n, 0.5 * n, n == 3) for n in range(1, 4)
)
CLUSTER = ClusterStatistics(
    address="here",
    shared_generation=11,
    state=ClusterState(
        store="redis somewhere", is_store_up=True, store_error="", is_registered=True, id="0",
        life="0", zone="zone", generation=11, published_seq=12, pending_spans=13, gaps=14,
        entries=15, entries_per_s=16.0, malformed_entries=17, snapshots=18, log_bytes=19,
        nodes=NODES,
    ),
    grants=GrantCounts(
        grants=21, pinned_blocks=22, granted=23, missed=24, busy=25, prefetched=26, expired=27,
        reads=28,
    ),
    connections=31,
    lent_bytes=32_000_000,
    down=("node-2",),
    read={"node-1": PeerReads(1, 2, 3, 4, 5, 6)},
    read_in_all=PeerReads(41, 42_000_000, 43, 44, 45, 46),
    mooncake=MooncakeCounts("there", 51, 52, 53, 54, 55, 56, 57_000_000),
)  # fmt: skip
"""A cluster in which no two numbers are equal."""


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[Any]]]:
    """Yield the address of the metrics, and the cluster that the statistics tell of, in a list."""
    manager = KVManager(MODEL, cache_config(tmp_path))
    manager.start()
    manager.register_kv_caches(kv_caches())
    told: list[Any] = [CLUSTER]
    real = manager.engine.statistics

    def statistics() -> Statistics:
        return structs.replace(real(), cluster=told[0])

    monkeypatch.setattr(manager.engine, "statistics", statistics)
    with MetricsServer(manager, 0) as server:
        yield server.url, told
    manager.shutdown()


def run(*words: str) -> str:
    """Return what a command prints on a wide terminal."""
    told = CliRunner().invoke(commands, list(words), env={"COLUMNS": "150"})
    assert told.exit_code == 0, told.output
    return told.output


def test_every_number_of_a_cluster_is_a_metric(served: tuple[str, list[Any]]) -> None:
    """Each number that the statistics have of the cluster is in one sample; none names a node."""
    samples = scrape(served[0])
    found = {
        name.removeprefix("flexkv_cluster_"): of.get((), of)
        for name, of in samples.items()
        if name.startswith(("flexkv_cluster_", "flexkv_peer_", "flexkv_mooncake_"))
        and not name.endswith("_created")
    }
    assert found == {
        "peers": {("up",): 2, ("down",): 1}, "peers_behind": 1, "stale_seconds": 1.5,
        "known_spans": 306, "generation": 11, "apart": 0, "redis_up": 1, "registered": 1,
        "log_bytes": 19, "log_entries_total": 15, "malformed_entries_total": 17,
        "snapshots_total": 18, "untold_spans": 13, "untold_gaps_total": 14, "connections": 31,
        "grants": 21, "granted_blocks": 22,
        "wants_total": {("granted",): 23, ("missed",): 24, ("busy",): 25},
        "prefetched_wants_total": 26, "expired_grants_total": 27, "lent_bytes_total": 32_000_000,
        "flexkv_peer_read_blocks_total": 41, "flexkv_peer_read_bytes_total": 42_000_000,
        "flexkv_peer_failures_total": {
            ("failed",): 43, ("busy",): 44, ("missing",): 45, ("wrong",): 46,
        },
        "flexkv_mooncake_up": 1, "flexkv_mooncake_starts_total": 51,
        "flexkv_mooncake_reads_total": 52, "flexkv_mooncake_read_blocks_total": 53,
        "flexkv_mooncake_failed_reads_total": 54, "flexkv_mooncake_fallbacks_total": 55,
        "flexkv_mooncake_spoiled_bytes": 57_000_000,
    }  # fmt: skip


def test_the_status_of_a_cluster_says_what_mooncake_does() -> None:
    """One line has all its numbers; a node without Mooncake has no such line."""
    assert _facts(CLUSTER)["Mooncake"] == (
        "at there, started 51 times; 52 reads, 54 failed, 53 blocks; 55 reads over TCP instead; "
        "57.0 MB in 56 slots spoiled"
    )
    assert CLUSTER.mooncake is not None
    away = structs.replace(CLUSTER.mooncake, endpoint="")
    assert "does not run" in _facts(structs.replace(CLUSTER, mooncake=away))["Mooncake"]
    assert "Mooncake" not in _facts(structs.replace(CLUSTER, mooncake=None))


def test_an_engine_of_mooncake_that_does_not_run_is_seen(served: tuple[str, list[Any]]) -> None:
    """Its metrics go on with 0 for up; a node without Mooncake has none of them."""
    url, told = served
    assert CLUSTER.mooncake is not None
    away = structs.replace(CLUSTER.mooncake, endpoint="")
    told[0] = structs.replace(CLUSTER, mooncake=away)
    samples = scrape(url)
    assert samples["flexkv_mooncake_up"][()] == 0
    assert samples["flexkv_mooncake_reads_total"][()] == 52
    for without in (structs.replace(CLUSTER, mooncake=None), None):
        told[0] = without
        assert not [name for name in scrape(url) if name.startswith("flexkv_mooncake_")]


def test_the_peers_are_watched_in_the_terminal(served: tuple[str, list[Any]]) -> None:
    """`stats` and `top` show the peers in one line, and what is wrong with them."""
    url, told = served
    (line,) = [each for each in run("stats", "--url", url).splitlines() if "2 and 1 down" in each]
    cells = [cell.strip() for cell in line.strip("│ ").split("│")]
    assert cells == ["2 and 1 down", "yes", "up", "306", "42", "32", "23", "44", "134"]
    told[0] = structs.replace(CLUSTER, shared_generation=None)
    assert scrape(url)["flexkv_cluster_apart"][()] == 1
    assert "apart" in run("top", "--url", url, "--interval", "0.1", "--count", "1")
    told[0] = None
    assert "shares" not in run("stats", "--url", url)
    assert not [name for name in scrape(url) if name == "flexkv_cluster_generation"]
