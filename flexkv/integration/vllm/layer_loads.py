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
from typing import Any

from flexkv.common.errors import ClosedError, DeviceError
from flexkv.integration.vllm.metadata import StepMetadata
from flexkv.integration.vllm.setup import Setup
from flexkv.observe.logs import get_logger
from flexkv.server.agent import Agent

log = get_logger(__name__)


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
