"""The worker's side: lends the KV tensors, and reports what the scheduler's side found out."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from flexkv.integration.vllm.metadata import StepMetadata
from flexkv.integration.vllm.setup import Setup
from flexkv.server.agent import Agent


class WorkerSide:
    """One rank of an engine."""

    def __init__(self, setup: Setup, tp_rank: int) -> None:
        self._agent = Agent(
            setup.settings.server_recv_port, setup.model, setup.cache, setup.instance, tp_rank
        )

    def register_kv_caches(self, kv_caches: Mapping[str, Any]) -> None:
        """Lend the KV tensors, by layer.

        Raises:
            ConfigError: they do not fit the model.
        """
        self._agent.start(kv_caches)

    def wait_for_save(self, step: StepMetadata) -> None:
        """Tell that the step's forward has written what its puts read, and is done. Does not wait.

        vLLM calls this when the forward has raised, too: then nothing may be read.
        """
        if sys.exc_info()[0] is None:
            self._agent.ready([*step.loads, *step.puts])

    def get_finished(self, step: StepMetadata) -> tuple[set[str] | None, set[str] | None]:
        """Give the requests that are done with sending, and with receiving."""
        if step.settle:
            self._agent.settle(step.settle)
        return step.sent or None, step.received or None

    def close(self) -> None:
        """Finish copies under way, and take the KV tensors back."""
        self._agent.close()
