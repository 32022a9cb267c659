"""Loads in a step: its forward waits for one layer after another, not for whole requests.

    scheduler   a match whose blocks are all in host memory ─▶ get by layer, in the step itself
    worker      start_load_kv ─▶ wait_for_layer_load, for each layer ─▶ the end: which blocks failed

vLLM learns in the same step which blocks were not loaded. By then the step has computed with them,
so no put may read what it has written before the scheduler knows: puts start two steps later, as
beside other connectors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from flexkv.common.errors import ClosedError, DeviceError
from flexkv.common.terms import Tier
from flexkv.integration.vllm.metadata import StepMetadata
from flexkv.integration.vllm.request_state import Load, RequestState, ids_of
from flexkv.integration.vllm.setup import Setup
from flexkv.observe.logs import get_logger
from flexkv.server.agent import Agent
from flexkv.server.client import Client
from flexkv.server.wire import Done

log = get_logger(__name__)


class LayerLoad(NamedTuple):
    """A load by layer under way."""

    state: RequestState
    load: Load


class ScheduledLayerLoads:
    """The scheduler's side: which loads go by layer, and those under way."""

    def __init__(self, setup: Setup, client: Client) -> None:
        self._setup, self._client = setup, client
        self._under_way: dict[int, LayerLoad] = {}

    def suits(self, state: RequestState) -> bool:
        """Return whether what was found for a request can be loaded in the step.

        It has to be in host memory: a step should not wait for the SSD, or for room. While puts of
        the request are under way, it loads nothing.
        """
        found = state.found
        if not self._setup.loads_by_layer or found is None or state.puts:
            return False
        return found.by_tier.get(Tier.HOST.label, 0) >= found.blocks - state.local_blocks

    def begin(self, state: RequestState, step: StepMetadata) -> None:
        """Begin a request's load, whose blocks no put may read any more.

        The request runs in the step as if its blocks were there.
        """
        load, state.load, gated = state.load, None, self._setup.gates_loads
        assert load is not None
        ids = ids_of(load.block_ids)
        number = self._client.get(load.keys, load.first, ids, load.held, gated, by_layer=True)
        self._under_way[number] = LayerLoad(state, load)
        step.layer_loads[number] = load.block_ids
        if not load.first:
            state.stored_blocks = len(load.block_ids)

    def take(self, done: Done) -> LayerLoad | None:
        """Return the load that `done` is the end of; None if it is the end of another request."""
        ended = self._under_way.pop(done.number, None)
        if ended is not None and done.moved < len(ended.load.block_ids):
            # They are computed anew, not as the server has them: none of them counts as stored.
            ended.state.stored_blocks = min(ended.state.stored_blocks, ended.load.first)
        return ended


class WorkerLayerLoads:
    """The worker's side: the waits of one rank's forward.

    Attributes:
        failed_blocks: the device blocks that the last step should have loaded, and has not.
    """

    def __init__(self, setup: Setup, agent: Agent, lent: Mapping[str, Any]) -> None:
        self._setup, self._agent = setup, agent
        self._layer_of = {name: layer for layer, name in enumerate(lent)}
        self._is_cuda = any(getattr(tensor, "is_cuda", False) for tensor in lent.values())
        self._waiting: list[int] = []
        """The loads of the step under way that have not failed so far."""
        self.failed_blocks: set[int] = set()

    def begin(self, step: StepMetadata) -> None:
        """Begin a step; its loads wait for earlier steps, whose work may still use the blocks."""
        self.failed_blocks = set()
        self._waiting = list(step.layer_loads)
        if self._setup.gates_loads:
            with contextlib.suppress(ClosedError):  # the engine sleeps, so its requests have ended
                self._agent.ready(self._waiting, to_device=True)

    def wait(self, layer_name: str) -> None:
        """Wait until a layer of every load is there; on CUDA only the stream waits."""
        if not self._waiting:
            return
        layer, stream = self._layer_of[layer_name], _stream() if self._is_cuda else None
        try:
            self._agent.wait_for_layer(self._waiting, layer, self._patience_s, stream)
        except (DeviceError, TimeoutError) as error:
            log.warning("layer_not_loaded", layer=layer_name, reason=str(error))
            self._waiting = []  # `end` reports all of their blocks

    @property
    def _patience_s(self) -> float:
        return self._setup.cache.io_deadline_s

    def end(self, step: StepMetadata) -> None:
        """End a step: find out what was loaded, once no copy touches the blocks any more."""
        for number, block_ids in step.layer_loads.items():
            moved = 0
            if number in self._waiting:
                with contextlib.suppress(TimeoutError):
                    moved = self._agent.wait_for_end(number, self._patience_s)
            if moved < len(block_ids):
                self.failed_blocks.update(block_ids[moved:])
                with contextlib.suppress(ClosedError):  # closed, so no copy is left
                    self._agent.settle([number])
        self._waiting = []


def _stream() -> int:
    import torch

    return int(torch.cuda.current_stream().cuda_stream)
