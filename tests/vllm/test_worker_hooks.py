"""What vLLM's calls of the connector in a worker come to, over an agent that takes notes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from flexkv.integration.vllm import vllm_v1_adapter, worker
from flexkv.integration.vllm.metadata import StepMetadata
from flexkv.integration.vllm.vllm_v1_adapter import FlexKVConnectorV1Impl

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
