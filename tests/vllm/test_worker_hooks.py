"""What vLLM's calls of the connector in a worker come to, over an agent that takes notes."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from flexkv.integration.vllm import vllm_v1_adapter, worker
from flexkv.integration.vllm.connector import FlexKVConnector
from flexkv.integration.vllm.groups import groups_of
from flexkv.integration.vllm.metadata import StepMetadata
from flexkv.integration.vllm.vllm_v1_adapter import FlexKVConnectorV1Impl

from .caches import engine, full, group, window
from .test_scheduler_faults import Agent


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Agent:
    """Return the agent that the worker's side makes."""
    made = Agent()
    monkeypatch.setattr(worker, "Agent", lambda *_: made)
    return made


@pytest.fixture
def connector(
    configured: Any, agent: Agent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> FlexKVConnectorV1Impl:
    """Return the connector of a worker, as vLLM's shim makes it."""
    monkeypatch.setattr(vllm_v1_adapter, "_tp_rank", lambda: 0)
    monkeypatch.setenv("FLEXKV_SERVER_RECV_PORT", f"ipc://{tmp_path}/socket")
    return FlexKVConnectorV1Impl(configured, KVConnectorRole.WORKER)


@pytest.mark.parametrize("is_alone", [True, False], ids=["alone", "beside_others"])
def test_a_step_is_told_to_the_server_and_to_vllm(
    connector: FlexKVConnectorV1Impl, agent: Agent, is_alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is told of the step's puts, loads and failures, and vLLM of what has ended."""
    step = StepMetadata(
        puts=[1], loads=[2], settle=[3], received={"a"}, sent={"b"}, failed_blocks={4}
    )
    bound = step if is_alone else SimpleNamespace(metadata=(object(), step))
    group = SimpleNamespace(_get_connector_metadata=lambda: bound)
    monkeypatch.setattr(vllm_v1_adapter, "get_kv_transfer_group", lambda: group)
    connector.wait_for_save()
    assert (sorted(agent.told), agent.told_to_device, agent.settled) == ([1, 2], [2], [])
    assert connector.get_block_ids_with_load_errors() == {4}
    assert connector.get_finished(set()) == ({"b"}, {"a"})
    assert (sorted(agent.told), agent.settled) == ([1, 2], [3])
    connector.shutdown()
    assert agent.closed == 1


def test_requests_whose_load_failed_are_reported_with_those_received(
    agent: Agent, configured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an engine with several KV groups, vLLM learns requests, and no blocks."""
    monkeypatch.setattr(vllm_v1_adapter, "_tp_rank", lambda: 0)
    monkeypatch.setenv("FLEXKV_SERVER_RECV_PORT", f"ipc://{tmp_path}/socket")
    caches = SimpleNamespace(kv_cache_groups=[group(full(), "f"), group(window(), "w")])
    connector = FlexKVConnector(configured, KVConnectorRole.WORKER, caches)
    connector.bind_connector_metadata(
        StepMetadata(received={"a", "b"}, failed={"b"}, sent={"c"}, puts=[1])
    )
    connector.wait_for_save()
    assert agent.told == [1]
    told = connector.get_transfer_results(set())
    assert (told.finished_recving, told.failed_recving, told.finished_sending) == (
        {"a", "b"}, {"b"}, {"c"}
    )  # fmt: skip
    assert connector.get_block_ids_with_load_errors() == set()
    connector.shutdown()


class Side:
    """A scheduler's side that answers as the test says."""

    def __init__(self, by_tier: dict[str, int], caches: Any) -> None:
        self.hit_sources = lambda request, tokens: by_tier
        self.engine_groups = groups_of(caches, engine())


def test_vllm_learns_where_hits_come_from_and_which_groups_are_loaded(
    configured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Host memory and SSD have names of vLLM's; what is left over has none."""
    caches = SimpleNamespace(kv_cache_groups=[group(window(), "w"), group(full(), "f")])
    made = Side({"host": 64, "disk": 32, "peer": 8}, caches)
    monkeypatch.setattr(vllm_v1_adapter, "SchedulerSide", lambda _: made)
    connector = FlexKVConnector(configured, KVConnectorRole.SCHEDULER, caches)
    sources = connector.get_external_cache_hit_sources(None, 112)
    assert {source.value: tokens for source, tokens in sources.items()} == {
        "host": 64, "disk": 32, "external_unspecified": 16
    }  # fmt: skip
    assert connector.get_loaded_kv_cache_group_ids(None) == (0, 1)
    assert connector.supports_divergent_local_hybrid_hits is False


@pytest.mark.parametrize(("policy", "warnings"), [("fail", 1), ("recompute", 0)])
def test_a_policy_that_fails_requests_is_warned_of_once(
    configured: Any, policy: str, warnings: int, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """vLLM's default ends a request with an error for one block that cannot be loaded."""
    config = copy.deepcopy(configured)
    config.kv_transfer_config.kv_load_failure_policy = policy
    monkeypatch.setattr(vllm_v1_adapter, "SchedulerSide", lambda _: SimpleNamespace())
    FlexKVConnectorV1Impl(config, KVConnectorRole.SCHEDULER)
    told = [line for line in capfd.readouterr().err.splitlines() if "may_fail_requests" in line]
    assert len(told) == warnings
    assert all("recompute" in line for line in told)
