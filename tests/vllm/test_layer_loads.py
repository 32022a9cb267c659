"""What the worker's side does with loads by layer, over an agent that the test speaks for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from flexkv.common.errors import DeviceError
from flexkv.integration.vllm import vllm_v1_adapter, worker
from flexkv.integration.vllm.connector import FlexKVConnector
from flexkv.integration.vllm.layer_loads import WorkerLayerLoads
from flexkv.integration.vllm.metadata import StepMetadata
from flexkv.integration.vllm.vllm_v1_adapter import FlexKVConnectorV1Impl
from flexkv.integration.vllm.worker import STEPS_BEHIND, WorkerSide

from .test_scheduler_faults import Agent, ran

NAMES = ("first", "second", "third")
STEP = StepMetadata(layer_loads={7: [10, 11, 12], 8: [20]})


class LayeredAgent(Agent):
    """An agent whose gets end as the test says."""

    def __init__(self, *_: Any) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self.raises: Exception | None = None
        self.moved = {7: 3, 8: 1}

    def ready(self, numbers: list[int], to_device: bool = False) -> None:
        """Record the call."""
        super().ready(numbers, to_device)
        self.calls.append(("ready", tuple(numbers)))

    def wait_for_layer(self, numbers: list[int], layer: int, timeout: float, stream: Any) -> bool:
        """Record the call."""
        assert (timeout, stream) == (10.0, None)
        self.calls.append((tuple(numbers), layer))
        if self.raises is not None:
            raise self.raises
        return True

    def wait_for_end(self, number: int, timeout: float) -> int:
        """Return how many blocks a get has moved, if it ends in time."""
        if number not in self.moved:
            raise TimeoutError
        return self.moved[number]


def loads_of(agent: LayeredAgent, gates_loads: bool = False) -> WorkerLayerLoads:
    """Return the loads by layer of a worker with three layers."""
    cache = SimpleNamespace(io_deadline_s=10.0)
    setup: Any = SimpleNamespace(gates_loads=gates_loads, cache=cache)
    return WorkerLayerLoads(setup, agent, dict.fromkeys(NAMES))  # type: ignore[arg-type]


@pytest.mark.parametrize("gates_loads", [False, True])
def test_a_forward_waits_for_each_layer_of_its_loads(gates_loads: bool) -> None:
    """A step with loads waits for each layer by its number; a step without loads waits for none."""
    agent = LayeredAgent()
    loads = loads_of(agent, gates_loads)
    loads.wait("first")
    loads.begin(STEP)
    for name in NAMES:
        loads.wait(name)
    loads.end(STEP)
    gate = [("ready", (7, 8))] if gates_loads else []
    assert agent.calls == gate + [((7, 8), layer) for layer in range(3)]
    assert (loads.failed_blocks, agent.settled) == (set(), [])
    loads.begin(StepMetadata())
    loads.wait("first")
    assert len(agent.calls) == len(gate) + 3 + gates_loads


def test_blocks_that_were_not_loaded_are_reported_when_no_copy_is_left() -> None:
    """What a load lacks is reported in the same step, after its copies, and in no later one."""
    agent = LayeredAgent()
    agent.moved[7] = 1
    loads = loads_of(agent)
    loads.begin(STEP)
    loads.end(STEP)
    assert (loads.failed_blocks, agent.settled) == ({11, 12}, [7])
    del agent.moved[8]
    loads.begin(STEP)
    loads.end(STEP)
    assert (loads.failed_blocks, agent.settled) == ({11, 12, 20}, [7, 7, 8])
    loads.begin(StepMetadata())
    assert loads.failed_blocks == set()


@pytest.mark.parametrize("error", [TimeoutError("late"), DeviceError("cuStreamWaitEvent", 700)])
def test_what_was_not_waited_for_is_not_believed(error: Exception) -> None:
    """If a wait fails, all blocks of the step's loads are reported, though they may come later."""
    agent = LayeredAgent()
    agent.raises = error
    loads = loads_of(agent)
    loads.begin(STEP)
    for name in NAMES:
        loads.wait(name)
    assert len(agent.calls) == 1
    loads.end(STEP)
    assert (loads.failed_blocks, agent.settled) == ({10, 11, 12, 20}, [7, 8])


def test_puts_begin_two_steps_later_so_that_those_of_failed_loads_can_be_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A put of a step is reported only when the scheduler knows that its loads have not failed."""
    monkeypatch.setattr(worker, "Agent", LayeredAgent)
    settings = SimpleNamespace(server_recv_port="ipc:///nowhere")
    setup: Any = SimpleNamespace(
        groups=None, settings=settings, model=None, cache=None, instance=0, loads_by_layer=True
    )
    side: Any = WorkerSide(setup, 0)
    ran(side, StepMetadata(puts=[1, 2]), drafts=False)
    ran(side, StepMetadata(puts=[3], dropped={1}), drafts=False)
    assert side._agent.told == []
    for _ in range(STEPS_BEHIND + 1):
        ran(side, StepMetadata(), drafts=False)
    assert side._agent.told == [2, 3]


@pytest.mark.parametrize("is_own", [False, True], ids=["shim", "own"])
def test_only_a_connector_with_hooks_for_layers_loads_by_layer(
    configured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_own: bool
) -> None:
    """The shim ignores the setting, since a whole CUDA graph would not wait under it."""
    monkeypatch.setattr(worker, "Agent", LayeredAgent)
    monkeypatch.setattr(vllm_v1_adapter, "_tp_rank", lambda: 0)
    monkeypatch.setenv("FLEXKV_SERVER_RECV_PORT", f"ipc://{tmp_path}/socket")
    assert not FlexKVConnector.requires_piecewise_for_cudagraph({})
    monkeypatch.setenv("FLEXKV_ENABLE_LAYERWISE_TRANSFER", "1")
    assert FlexKVConnector.requires_piecewise_for_cudagraph({})
    assert not FlexKVConnector.requires_piecewise_for_cudagraph(
        {"enable_layerwise_transfer": False}
    )
    made: FlexKVConnectorV1Impl
    if is_own:
        made = FlexKVConnector(configured, KVConnectorRole.WORKER)
    else:
        made = FlexKVConnectorV1Impl(configured, KVConnectorRole.WORKER)
    assert made.worker is not None
    assert made.worker.setup.loads_by_layer == is_own
    made.shutdown()
