"""The worker's side: lends the KV tensors, and reports what the scheduler's side found out."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from flexkv.common.errors import ClosedError
from flexkv.integration.vllm.metadata import StepMetadata
from flexkv.integration.vllm.setup import Setup
from flexkv.server.agent import Agent


class WorkerSide:
    """One rank of an engine."""

    def __init__(self, setup: Setup, tp_rank: int) -> None:
        self._setup, self._tp_rank = setup, tp_rank
        self._agent = self._new_agent()
        self._lent: Mapping[str, Any] = {}

    def _new_agent(self) -> Agent:
        setup = self._setup
        address = setup.settings.server_recv_port
        return Agent(address, setup.model, setup.cache, setup.instance, self._tp_rank)

    def register_kv_caches(self, kv_caches: Mapping[str, Any]) -> None:
        """Lend the KV tensors, by layer.

        Raises:
            ConfigError: they do not fit the model.
        """
        self._lent = kv_caches
        self._agent.start(kv_caches)

    def suspend(self) -> None:
        """Take the KV tensors back for a while: their memory may go. Idempotent."""
        self._agent.close()

    def resume(self) -> None:
        """Lend them again."""
        self._agent.close()
        self._agent = self._new_agent()
        self._agent.start(self._lent)

    def wait_for_save(self, step: StepMetadata) -> None:
        """Tell that the step's forward has written what its puts read, and is done. Does not wait.

        vLLM calls this when the forward has raised, too: then nothing may be read.
        """
        if sys.exc_info()[0] is None:
            with suppress(ClosedError):  # it sleeps: its requests have ended
                self._agent.ready([*step.loads, *step.puts])

    def get_finished(self, step: StepMetadata) -> tuple[set[str] | None, set[str] | None]:
        """Give the requests that are done with sending, and with receiving."""
        with suppress(ClosedError):  # then no copy is left
            self._agent.settle(step.settle)
        return step.sent or None, step.received or None

    def close(self) -> None:
        """Finish copies under way, and take the KV tensors back."""
        self._agent.close()
