"""What the metrics, the statistics and `flexkv top` tell of the remote tier."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from typer.testing import CliRunner

from flexkv.cli.main import commands
from flexkv.cli.top import scrape
from flexkv.common.terms import Tier
from flexkv.engine.statistics import Statistics
from flexkv.io.remote.counts import RemoteCounts
from flexkv.kvmanager import KVManager
from flexkv.metrics import MetricsServer
from flexkv.tiers.parts import StoreStatistics
from flexkv.tiers.remote_gc.collector import CollectionCounts
from flexkv.tiers.remote_gc.removal import RemovalCounts
from flexkv.tiers.remote_gc.touches import TouchCounts

from .caches import MODEL, cache_config, kv_caches

STORE = StoreStatistics(
    where="somewhere",
    is_joined=True,
    generation=21,
    known_spans=22,
    lost_spans=23,
    listed_rounds=24,
    requests=RemoteCounts(
        requests={"get": 1, "put": 2, "list": 3}, failures={"get": 4}, retries={"put": 5},
        read_bytes=6, written_bytes=7, hedges=8, hedges_won=9, busy=10, missing=11, existing=12,
        wrong=13, deleted=14, gets_limit=15, puts_limit=16,
    ),
    collection=CollectionCounts(True, 31, 32.5, RemovalCounts(33, 34, 35, 36, 37, 38, 39)),
    touches=TouchCounts(40, 41, 42, 43),
)  # fmt: skip
"""A store in which no two numbers are equal."""


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[KVManager]:
    """Yield a manager with a remote tier in a directory."""
    remote = {"enable_remote": True, "remote_cache_path": f"file://{tmp_path}/shared"}
    made = KVManager(MODEL, cache_config(tmp_path / "disk", num_ssd_blocks=0, **remote))
    made.start()
    made.register_kv_caches(kv_caches())
    yield made
    made.shutdown()


@pytest.fixture
def served(
    manager: KVManager, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, dict[str, StoreStatistics]]]:
    """Yield the address of the metrics, and the stores that the statistics tell of."""
    stores = {"remote": STORE}
    real = manager.engine.statistics

    def told() -> Statistics:
        return structs.replace(real(), stores=dict(stores))

    monkeypatch.setattr(manager.engine, "statistics", told)
    with MetricsServer(manager, 0) as server:
        yield server.url, stores


def shown(url: str) -> str:
    """Return what `flexkv stats` prints on a wide terminal."""
    told = CliRunner().invoke(commands, ["stats", "--url", url], env={"COLUMNS": "150"})
    assert told.exit_code == 0, told.output
    return told.output


def test_every_number_of_a_store_is_a_metric(served: Any) -> None:
    """Each number that the statistics have of a store is in one sample, by tier and by kind."""
    samples = scrape(served[0])
    of_store = {name.removeprefix("flexkv_store_"): of for name, of in samples.items()}
    told = {name: of["remote",] for name, of in of_store.items() if ("remote",) in of}
    assert {name: value for name, value in told.items() if not name.startswith("flexkv")} == {
        "hedges_total": 8, "hedges_won_total": 9, "busy_total": 10, "missing_spans_total": 11,
        "existing_spans_total": 12, "wrong_answers_total": 13, "deleted_spans_total": 14,
        "joined": 1, "generation": 21, "known_spans": 22, "lost_spans_total": 23,
        "listed_rounds_total": 24, "horizon_seconds": 32.5, "refused": 0,
    }  # fmt: skip
    for name, wanted in (
        ("requests", {"get": 1, "put": 2, "list": 3}),
        ("failures", {"get": 4}),
        ("retries", {"put": 5}),
    ):
        counts = of_store[f"{name}_total"]
        kinds = {"get", "put", "head", "list", "delete", "touch"}
        assert counts == {(kind, "remote"): wanted.get(kind, 0) for kind in kinds}
    outcomes = "expired", "evicted", "garbage", "leftovers", "spared", "gone", "failed"
    collected = {(name, "remote"): 33 + number for number, name in enumerate(outcomes)}
    assert of_store["collected_spans_total"] == collected
    looked_at = "touched", "young", "skipped", "failed"
    touched = {(name, "remote"): 40 + number for number, name in enumerate(looked_at)}
    assert of_store["touched_spans_total"] == touched
    both = ("inbound", "remote"), ("outbound", "remote")
    assert of_store["bytes_total"] == dict(zip(both, (6, 7), strict=True))
    assert of_store["limit_spans"] == dict(zip(both, (15, 16), strict=True))


def test_a_store_is_watched_in_the_terminal(served: Any) -> None:
    """`stats` and `top` show a store: whether it is in use, what it knows, its requests."""
    url, stores = served
    (line,) = [each for each in shown(url).splitlines() if "joined" in each]
    cells = [cell.strip() for cell in line.strip("│ ").split("│")]
    assert cells == ["remote", "joined", "0", "0 in, 0 out", "22", "1", "2", "3", "4"]
    stores["remote"] = structs.replace(STORE, refused="s3://bucket: delete failed: status 403")
    assert "collection refused" in shown(url)
    stores["remote"] = structs.replace(STORE, is_joined=False)
    assert "not joined" in shown(url)
    options = ["top", "--url", url, "--interval", "0.1", "--count", "1"]
    assert "not joined" in CliRunner().invoke(commands, options, env={"COLUMNS": "150"}).output
    stores.clear()
    assert "known spans" not in shown(url)


def test_a_store_whose_breaker_is_open_is_shown_as_down(manager: KVManager) -> None:
    """The directions of a tier that are not used are named, in the terminal and as a metric."""
    with MetricsServer(manager, 0) as server:
        assert "down" not in shown(server.url)
        manager.on_loop(lambda: manager.engine._scheduler.watch.lose(Tier.REMOTE, "a test"))
        assert scrape(server.url)["flexkv_tier_up"]["writes", "remote"] == 0
        assert "down" in shown(server.url)


def test_a_far_tier_has_no_blocks(manager: KVManager) -> None:
    """A store's spans are no blocks of the engine: it has no size, and is told in spans."""
    with MetricsServer(manager, 0) as server:
        samples, now = scrape(server.url), manager.statistics()
    for name in ("flexkv_tier_capacity_blocks", "flexkv_evicted_blocks_total"):
        assert set(samples[name]) == {("host",)}
    assert {tier for _, tier in samples["flexkv_tier_blocks"]} == {"host"}
    assert {tier for _, tier in samples["flexkv_tier_up"]} == {"host", "remote"}
    assert "remote 0 spans known" in repr(now)
    assert "0 of 0" not in repr(now)
