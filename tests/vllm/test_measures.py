"""Tests of what a connector counts and measures, and of its reports to vLLM."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.system.conftest import MODEL
from tests.system.serving import settings_in

pytest.importorskip("vllm")

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from flexkv.integration.common import costs
from flexkv.integration.vllm.scheduler import SchedulerSide
from flexkv.integration.vllm.setup import Setup
from flexkv.integration.vllm.stats import COUNTS, FlexKVPromMetrics

from .test_scheduler_side import output


def test_counts_are_told_to_prometheus_by_engine() -> None:
    """Counts reach Prometheus by engine, in the metric classes that vLLM provides."""
    registry = CollectorRegistry()

    def counter(**named: Any) -> Counter:
        return Counter(**named, registry=registry)

    config = SimpleNamespace(kv_transfer_config="the configuration")
    kinds: Any = {Gauge: None, Counter: counter, Histogram: None}
    values: dict[int, list[object]] = {0: ["tiny", "0"], 1: ["tiny", "1"]}
    metrics = FlexKVPromMetrics(config, kinds, ["model_name", "engine"], values)
    assert metrics._kv_transfer_config == "the configuration"
    assert metrics.per_engine_labelvalues == values
    metrics.observe({"hits": 2, "unknown": 1}, 1)
    metrics.observe({"hits": 3}, 1)

    def told(name: str, engine: str) -> float | None:
        labels = {"model_name": "tiny", "engine": engine}
        return registry.get_sample_value(f"flexkv_connector_{name}_total", labels)

    assert (told("hits", "0"), told("hits", "1")) == (0.0, 5.0)
    assert all(told(name, "0") == 0.0 for name in COUNTS)


def test_steps_that_prefill_tell_what_a_token_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that prefill measure a token's cost, from schedule to end, without decoded tokens."""
    now = [0.0]
    monkeypatch.setattr(costs.time, "monotonic", lambda: now[0])
    setup = Setup(MODEL, settings_in(tmp_path), 0, launches=False, tells_events=False)
    side = SchedulerSide(setup)
    assert side._costs is not None
    for _ in range(costs.FIRST):
        step = output()
        step.num_scheduled_tokens = {"a": 60, "b": 40, "c": 1}
        side.build_connector_meta(step)
        now[0] += 1.0
        side.step_ended()
    assert side._costs._token.is_known
    assert side._costs._token.seconds == pytest.approx(1 / 100)
