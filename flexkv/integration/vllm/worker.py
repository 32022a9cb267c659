"""The worker's side: lends the KV tensors, and passes on what the scheduler's side reports."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from flexkv.common.errors import ClosedError
from flexkv.integration.vllm.layer_loads import WorkerLayerLoads
from flexkv.integration.vllm.metadata import StepMetadata
from flexkv.integration.vllm.setup import Setup
from flexkv.integration.vllm.tensors import tensors_of
from flexkv.server.agent import Agent

STEPS_BEHIND = 2
"""How many steps later the scheduler knows a step's outcome, even if it is asynchronous."""


class WorkerSide:
    """The connector of one rank's worker."""

    def __init__(self, setup: Setup, tp_rank: int) -> None:
        self.setup, self._tp_rank = setup, tp_rank
        self._agent = self._new_agent()
        self._lent: Mapping[str, Any] = {}
        self.layer_loads = WorkerLayerLoads(setup, self._agent, {})
        self.beside_others = False
        """Whether the engine has other connectors, too."""
        self._written: list[int] = []
        self._unread = deque[list[int]]()

    def _new_agent(self) -> Agent:
        setup = self.setup
        address = setup.settings.server_recv_port
        return Agent(address, setup.model, setup.cache, setup.instance, self._tp_rank)

    def register_kv_caches(self, kv_caches: Mapping[str, Any]) -> None:
        """Lend the KV tensors, by layer.

        Raises:
            ConfigError: they do not fit the model.
        """
        self._agent.close()
        self._agent, self._lent = self._new_agent(), kv_caches
        setup = self.setup
        tokens = setup.cache.tokens_per_block
        kv_caches = tensors_of(kv_caches, setup.model, tokens, setup.groups)
        self.layer_loads = WorkerLayerLoads(self.setup, self._agent, kv_caches)
        self._agent.start(kv_caches)

    def suspend(self) -> None:
        """Stop lending the KV tensors for a while: their memory may be freed. Idempotent."""
        self._written.clear()
        self._unread.clear()
        self._agent.close()

    def resume(self) -> None:
        """Lend the KV tensors again, if any were lent."""
        if self._lent:
            self.register_kv_caches(self._lent)

    def wait_for_save(self, step: StepMetadata) -> None:
        """Record that the step's forward is done and has written what its puts read.

        vLLM also calls this when the forward has raised: then nothing may be read. It calls this
        before `get_finished`, or after it if drafts are made, and a step without a forward may come
        between them. So nothing that was written earlier is forgotten here.
        """
        if sys.exc_info()[0] is None:
            self._ready(step.loads, to_device=True)
            if self._may_be_wrong:
                self._written += step.puts
            else:
                self._ready(step.puts)

    @property
    def _may_be_wrong(self) -> bool:
        """Return whether a step may have computed with blocks that were not loaded.

        Where loads fail as a whole, vLLM allows no such loads.
        """
        groups = self.setup.groups
        if groups is not None and groups.fail_whole:
            return False
        return self.beside_others or self.setup.loads_by_layer

    def get_finished(self, step: StepMetadata) -> tuple[set[str] | None, set[str] | None]:
        """Return the requests that are done with sending, and with receiving.

        A load of another connector, or a load by layer, may fail, and the scheduler learns that
        only at the end of the step. So puts start two steps later then, or never if dropped.
        """
        self.layer_loads.end(step)
        written, self._written = self._written, []
        self._unread.append(written)
        for puts in self._unread:
            puts[:] = [number for number in puts if number not in step.dropped]
        while len(self._unread) > STEPS_BEHIND:
            self._ready(self._unread.popleft())
        with suppress(ClosedError):  # closed, so no copy is left
            self._agent.settle(step.settle)
        return step.sent or None, step.received or None

    def _ready(self, numbers: list[int], to_device: bool = False) -> None:
        """Report that what these requests wait for is done, or queued. Does not wait."""
        with suppress(ClosedError):  # the engine sleeps, so its requests have ended
            self._agent.ready(numbers, to_device)

    def close(self) -> None:
        """Finish the copies under way, and stop lending the KV tensors."""
        self._agent.close()
