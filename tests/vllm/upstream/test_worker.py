"""Scenarios of the worker's hooks: what the shim calls, and the order of vLLM's runner.

After `test_flexkv_connector`, `test_kv_connector_lifecycle` and `test_output_aggregator`.
"""

from __future__ import annotations

import inspect
from typing import Any
from unittest.mock import MagicMock, create_autospec

import pytest
import torch
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.flexkv_connector import FlexKVConnectorV1
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

from flexkv.integration.vllm import vllm_v1_adapter
from flexkv.integration.vllm.connector import FlexKVConnector
from flexkv.integration.vllm.vllm_v1_adapter import FlexKVConnectorV1Impl
from tests.v1.kv_connector.unit.test_flexkv_connector import TestFlexKVConnectorDelegation

from .stand import PER_BLOCK, Stand


class TestDelegation(TestFlexKVConnectorDelegation):
    """vLLM's own tests of the shim's calls, over a mock with the signatures of our class."""

    @pytest.fixture
    def connector_and_impl(self, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
        """Return the shim, and the mock to which it delegates."""
        impl = create_autospec(FlexKVConnectorV1Impl, instance=True)
        made = create_autospec(FlexKVConnectorV1Impl, return_value=impl)
        monkeypatch.setattr(vllm_v1_adapter, "FlexKVConnectorV1Impl", made)
        config = MagicMock()
        connector = FlexKVConnectorV1(config, KVConnectorRole.WORKER, MagicMock())
        made.assert_called_once_with(config, KVConnectorRole.WORKER)
        return connector, impl


def public(kind: type) -> dict[str, Any]:
    """Return the public members of a class."""
    return {name: value for name, value in inspect.getmembers(kind) if not name.startswith("_")}


def test_the_shim_hands_on_nothing_that_is_not_here() -> None:
    """The shim has no public method that our class lacks."""
    own = {name for name in vars(FlexKVConnectorV1) if not name.startswith("_")}
    assert len(own) >= 15
    assert own <= set(public(FlexKVConnectorV1Impl))


def test_our_connector_can_be_called_as_the_base_is() -> None:
    """Each hook that our connector overrides takes the base's arguments by position and by name."""
    base, ours = public(KVConnectorBase_V1), public(FlexKVConnector)
    overridden = [name for name in base if ours[name] is not base[name]]
    assert len(overridden) >= 15
    for name in overridden:
        if not inspect.isfunction(base[name]):
            continue
        wanted = list(inspect.signature(base[name]).parameters.values())
        places = [p for p in wanted if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        inspect.signature(ours[name]).bind(*[None] * len(places))
        names = {p.name for p in places}
        inspect.signature(ours[name]).bind(**dict.fromkeys(names))


def test_a_steps_metadata_are_gone_after_it(stand: Stand, monkeypatch: Any) -> None:
    """Each hook is called once a step, with a forward or without; then the metadata are cleared."""
    calls: list[str] = []
    for name in ("bind_connector_metadata", "wait_for_save", "get_finished",
                 "get_block_ids_with_load_errors", "clear_connector_metadata"):  # fmt: skip
        hook = getattr(stand.worker, name)

        def noted(*args: Any, name: str = name, hook: Any = hook) -> Any:
            calls.append(name)
            return hook(*args)

        monkeypatch.setattr(stand.worker, name, noted)
    stand.step()
    first, calls[:] = list(calls), []
    assert len(set(first)) == len(first) == 5
    assert first[-1] == "clear_connector_metadata"
    assert not stand.worker.has_connector_metadata()
    stand.add(1, PER_BLOCK)
    stand.step()
    assert calls == first
    assert not stand.worker.has_connector_metadata()
    stand.run()
    stand.check_empty()


def test_hooks_of_layers_do_nothing(stand: Stand) -> None:
    """Hooks of layers do nothing, whatever a runner passes."""
    worker = stand.worker
    worker.start_load_kv(MagicMock(), scheduler_output=None, request_ids=[])
    worker.wait_for_layer_load("layer.0")
    worker.save_kv_layer("layer.0", torch.zeros(4, 4), MagicMock(), layer=0)


def told_by(*ranks: KVConnectorOutput) -> list[ModelRunnerOutput]:
    """Return what the runners of some ranks would return."""
    return [ModelRunnerOutput([], {}, kv_connector_output=told) for told in ranks]


def test_ranks_tell_the_same_in_the_same_step(stand: Stand) -> None:
    """A report that all ranks make in one step counts at once; failed blocks are any rank's."""
    count = stand.scheduler.connector.get_finished_count()
    aggregator = KVOutputAggregator.from_connector(stand.scheduler.connector, 2)
    assert count is None
    tokens = 2 * PER_BLOCK + 1
    stand.store(1, tokens)
    stand.copies.loads_fail = lambda blocks: True
    stand.add(1, tokens, max_tokens=20)
    step = stand.until(lambda: (s := stand.step()).told.invalid_block_ids and s)
    both = aggregator.aggregate(told_by(step.told, step.told)).kv_connector_output
    assert both.finished_recving == {"id-1"}
    assert both.invalid_block_ids == step.told.invalid_block_ids
    assert len(both.invalid_block_ids) == 2
    stand.run()


def test_vllm_keeps_one_group_of_blocks_behind_the_shim(stand: Stand, connector: str) -> None:
    """Only our own connector supports several KV groups; behind the shim vLLM keeps one."""
    is_own = connector == "own"
    assert KVConnectorFactory.supports_hma_config(stand.config.kv_transfer_config) is is_own
    assert stand.config.scheduler_config.disable_hybrid_kv_cache_manager is not is_own
