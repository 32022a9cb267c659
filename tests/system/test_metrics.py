"""Tests of the metrics endpoint, read by Prometheus' own parser and compared with a trace."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import urllib.request
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from flexkv.cli.main import commands
from flexkv.common.config import ModelConfig, Settings
from flexkv.common.errors import ConfigError
from flexkv.common.terms import Tier
from flexkv.kvmanager import KVManager
from flexkv.metrics import HISTOGRAMS, Metrics, MetricsServer
from flexkv.trace.load import load

from .conftest import MODEL, PER_BLOCK, cache_config, kv_caches, slots_of

ROOT = Path(__file__).parents[2]
Samples = dict[str, dict[tuple[tuple[str, str], ...], float]]


def scraped(url: str) -> Samples:
    """Return every sample by its name and labels, as Prometheus' own parser reads them."""
    with urllib.request.urlopen(url, timeout=5) as answer:
        text = answer.read().decode()
    samples: Samples = defaultdict(dict)
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            labels = dict(sample.labels)
            assert (labels.pop("engine"), labels.pop("instance")) == ("metrics", "3")
            samples[sample.name][tuple(sorted(labels.items()))] = sample.value
    return samples


def prompt(number: int, blocks: int = 8) -> Any:
    """Return a prompt that shares nothing with others."""
    return np.arange(blocks * PER_BLOCK) + number * 100_000


def worked(manager: KVManager, rounds: int = 12) -> None:
    """Put prompts, and get some from host memory, from SSD and in vain."""
    for number in range(rounds):
        manager.wait(manager.put_async(prompt(number), slots_of(range(8))), completely=True)
    for number in (0, rounds - 1, 999):
        manager.wait(manager.get_async(prompt(number), slots_of(range(20, 28))))


@pytest.fixture
def manager(tmp_path: Path) -> Any:
    """Yield a manager in the threaded form."""
    made = KVManager(MODEL, cache_config(tmp_path))
    made.start()
    made.register_kv_caches(kv_caches())
    yield made
    made.shutdown()


def test_metrics_agree_with_the_trace(manager: KVManager, tmp_path: Path) -> None:
    """Sum and count of every histogram agree with the trace, even with concurrent readers."""
    stop, seen = threading.Event(), []
    with MetricsServer(manager, 0, name="metrics", instance=3) as server:

        def read() -> None:
            while not stop.is_set():
                seen.append(scraped(server.url)["flexkv_up"][()])

        reader = threading.Thread(target=read)
        reader.start()
        with manager.trace(tmp_path / "trace"):
            worked(manager)
        stop.set()
        reader.join()
        samples = scraped(server.url)
    assert set(seen) == {1.0}
    trace = load(tmp_path / "trace")
    expected: dict[str, dict[str, list[int]]] = {name: defaultdict(list) for name in HISTOGRAMS}
    for request in trace.requests:
        took_ns = request.ended_ns - request.arrived_ns
        expected["flexkv_request_seconds"][request.kind].append(took_ns)
    for op in trace.ops:
        if op.outcome != "recalled":
            waited_ns = op.begun_ns - op.issued_ns
            expected["flexkv_transfer_queue_seconds"][op.route].append(waited_ns)
            expected["flexkv_transfer_seconds"][op.route].append(op.ended_ns - op.begun_ns)
    for name, by_label in expected.items():
        (label,) = HISTOGRAMS[name][1]
        assert by_label
        for value, times_ns in by_label.items():
            labels = ((label, value),)
            assert samples[f"{name}_count"][labels] == len(times_ns)
            assert samples[f"{name}_sum"][labels] == pytest.approx(sum(times_ns) / 1e9)
            bucket = samples[f"{name}_bucket"][(*labels, ("le", "0.01"))] if label < "le" else None
            if bucket is not None:
                assert bucket == sum(ns <= 10_000_000 for ns in times_ns)


def test_counters_and_gauges_are_what_the_statistics_say(manager: KVManager) -> None:
    """Counters and gauges equal the statistics: hits, misses, bytes by route, tiers' blocks."""
    with MetricsServer(manager, 0, name="metrics", instance=3) as server:
        worked(manager)
        samples, now = scraped(server.url), manager.statistics()
    for tier, facts in now.tiers.items():
        of_tier = (("tier", tier),)
        assert samples["flexkv_tier_capacity_blocks"][of_tier] == facts.capacity_blocks
        assert samples["flexkv_evicted_blocks_total"][of_tier] == facts.evicted_blocks
        assert samples["flexkv_tier_blocks"][(("state", "ready"), *of_tier)] == facts.ready_blocks
        assert samples["flexkv_hit_blocks_total"][of_tier] == now.hit_blocks[tier]
        assert samples["flexkv_tier_up"][(("direction", "reads"), *of_tier)] == 1
    assert now.hit_blocks["disk"] > 0
    for route, moved in now.routes.items():
        assert samples["flexkv_transfer_bytes_total"][(("route", route),)] == moved.bytes
    hits = sum(samples["flexkv_hit_blocks_total"].values())
    missed = samples["flexkv_missed_blocks_total"][(("reason", "not_stored"),)]
    assert (hits + missed, missed) == (samples["flexkv_asked_blocks_total"][()], 8)
    gets = samples["flexkv_requests_total"]
    assert gets[(("operation", "get"), ("status", "success"))] == 2
    assert gets[(("operation", "get"), ("status", "notfound"))] == 1


def test_a_port_that_is_taken_is_named(manager: KVManager) -> None:
    """A port that is taken raises an error that names it; after the close nothing is recorded."""
    with MetricsServer(manager, 0, name="metrics", instance=3) as server:
        port = int(server.url.split(":")[2].split("/")[0])
        with pytest.raises(ConfigError, match=f"py_metrics_port={port}: cannot listen"):
            MetricsServer(manager, port=port)
        assert manager.engine.tracing.is_on
    assert not manager.engine.tracing.is_on


async def test_an_engine_on_the_callers_loop_is_read_too(tmp_path: Path) -> None:
    """Metrics of an engine on the caller's loop can be read, also after its close."""
    async with KVManager(MODEL, cache_config(tmp_path)) as manager:
        manager.register_kv_caches(kv_caches())
        server = MetricsServer(manager, 0, name="metrics", instance=3)
        await manager.put(prompt(1), slots_of(range(8)))
        samples = await asyncio.to_thread(scraped, server.url)
        put = (("operation", "put"), ("status", "success"))
        assert samples["flexkv_requests_total"][put] == 1
        metrics = server.metrics
        await asyncio.to_thread(server._server.shutdown)
        server._server.server_close()
    assert [family.name for family in metrics.collect()] == ["flexkv_up"]


def test_the_dashboard_asks_for_what_there_is(tmp_path: Path) -> None:
    """Every name and label that the dashboard uses is exposed, and no two panels overlap."""
    remote = {"enable_remote": True, "remote_cache_path": f"file://{tmp_path}/shared"}
    mooncake = tmp_path / "mooncake.json"
    mooncake.write_text(json.dumps({"engine_ip": "127.0.0.1", "protocol": "tcp"}))
    peers = {
        "enable_p2p_cpu": True, "mooncake_config_path": str(mooncake),
        "redis_port": 1,  # nothing listens there
    }  # fmt: skip
    manager = KVManager(MODEL, cache_config(tmp_path / "disk", **remote, **peers))
    manager.start()
    manager.register_kv_caches(kv_caches())
    with MetricsServer(manager, 0, name="metrics", instance=3) as server:
        worked(manager)
        samples = scraped(server.url)
    manager.shutdown()
    dashboard = json.loads((ROOT / "docs/grafana-dashboard.json").read_text())
    panels = dashboard["panels"]
    asked = set()
    for panel in panels:
        for target in panel["targets"]:
            names = re.findall(r"flexkv_\w+", target["expr"])
            assert names
            for name in names:
                assert name in samples or name == "flexkv_missed_blocks_total", name
                asked.add(name)
            labels = {label for name in names for key in samples[name] for label, _ in key}
            for group in re.findall(r"by \(([^)]*)\)", target["expr"]):
                assert set(group.split(", ")) <= labels, target["expr"]
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels]
    assert len(set(places)) == len(places)
    told = {name for name in samples if not name.endswith(("_created", "_sum", "_count"))}
    assert {"flexkv_request_seconds_bucket", "flexkv_tier_up"} <= asked <= told


def test_names_follow_the_convention(manager: KVManager) -> None:
    """Names have one prefix and base units."""
    with MetricsServer(manager, 0, name="metrics", instance=3) as server:
        worked(manager, 2)
        names = set(scraped(server.url))
    assert all(re.fullmatch(r"flexkv_[a-z_]+", name) for name in names)
    assert not [name for name in names if re.search(r"_(ms|us|mb|gb)(_|$)", name)]
    assert {Tier.HOST.label, Tier.DISK.label} <= set(manager.statistics().tiers)


def test_a_running_engine_is_watched_in_the_terminal(manager: KVManager) -> None:
    """`stats` and `top` show a running engine as JSON, tables and rates, and name a missing one."""
    run = CliRunner().invoke
    with MetricsServer(manager, 0, name="metrics", instance=3) as server:
        worked(manager)
        told = json.loads(run(commands, ["stats", "--json", "--url", server.url]).output)
        assert told["flexkv_tier_capacity_blocks"]["host"] == 32
        assert told["flexkv_requests_total"]["get,success"] == 2
        table = run(commands, ["stats", "--url", server.url]).output
        assert re.search(r"host .* of 32", table)
        assert "disk→host" in table
        options = ["--interval", "0.1", "--count", "2"]
        rates = run(commands, ["top", "--url", server.url, *options])
        assert rates.exit_code == 0
        assert "/s" in rates.output
    gone = run(commands, ["top", "--url", server.url])
    assert isinstance(gone.exception, ConfigError)
    assert "there are no metrics" in str(gone.exception)


@pytest.mark.parametrize("host", ["0.0.0.0", "::1", "localhost"])
def test_metrics_are_served_where_the_user_says(manager: KVManager, host: str) -> None:
    """Metrics are served at the host that the user gives, by default only on this machine."""
    with MetricsServer(manager, 0, host, name="metrics", instance=3) as server:
        assert scraped(server.url)["flexkv_up"][()] == 1
    assert Settings().metrics_host == "127.0.0.1"


@pytest.mark.parametrize("host", ["not a host", "256.1.1.1", "h" * 300, "\u00e9" * 70, "192.0.2.1"])
def test_a_host_that_is_none_of_this_machine_is_named(manager: KVManager, host: str) -> None:
    """A host that is no address, or none of this machine, is refused by name."""
    with pytest.raises(ConfigError, match=r"metrics_host=|cannot listen on 192\.0\.2\.1"):
        MetricsServer(manager, 0, host)
    assert not manager.engine.tracing.is_on


def test_several_engines_share_a_registry(manager: KVManager, tmp_path: Path) -> None:
    """Labels tell the engines of a registry apart: name, by default the model's, and instance."""
    named = ModelConfig(**{**MODEL.model_dump(), "model_id": "llama"})
    other = KVManager(named, cache_config(tmp_path / "other"))
    other.start()
    labels = set()
    for metrics in (Metrics(manager, "a", 0), Metrics(manager, "a", 1), Metrics(other)):
        labels |= {
            (sample.labels["engine"], sample.labels["instance"])
            for family in metrics.collect()
            for sample in family.samples
        }
        metrics.close()
    assert labels == {("a", "0"), ("a", "1"), ("llama", "0")}
    other.shutdown()


def test_no_proxy_stands_between_a_command_and_its_engine(
    manager: KVManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands ignore the environment's proxies."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "")
    with MetricsServer(manager, 0, name="metrics", instance=3) as server:
        for command in (
            ["stats"],
            ["stats", "--json"],
            ["top", "--interval", "0.1", "--count", "1"],
        ):
            told = CliRunner().invoke(commands, [*command, "--url", server.url])
            assert told.exit_code == 0, told.output
