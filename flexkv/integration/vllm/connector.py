"""FlexKV's own connector to vLLM, with the hooks that the built-in shim does not forward.

--kv-transfer-config '{"kv_connector": "FlexKVConnector", "kv_role": "kv_both",
                       "kv_connector_module_path": "flexkv.integration.vllm.connector"}'
"""

from __future__ import annotations

import sys
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    SupportsHMA,
)

from flexkv.integration.vllm.metadata import StepMetadata
from flexkv.integration.vllm.stats import FlexKVPromMetrics, FlexKVStats
from flexkv.integration.vllm.vllm_v1_adapter import FlexKVConnectorV1Impl
from flexkv.settings import load_settings


class FlexKVConnector(FlexKVConnectorV1Impl, KVConnectorBase_V1, SupportsHMA):
    """Keeps vLLM's KV blocks in host memory and on SSD, of all KV groups of a model."""

    has_layer_hooks = True

    def __init__(
        self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None
    ) -> None:
        """Create one role of the connector, with vLLM's arguments.

        Raises:
            ConfigError: FlexKV cannot serve such an engine, or its server cannot be launched.
        """
        KVConnectorBase_V1.__init__(
            self, vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config
        )
        FlexKVConnectorV1Impl.__init__(self, vllm_config, role, kv_cache_config)

    def bound_step(self) -> StepMetadata:
        """Return the step's metadata."""
        step = self._get_connector_metadata()
        assert isinstance(step, StepMetadata)
        return step

    @property
    def requires_kv_delivery(self) -> bool:
        """Return False: what is not stored can be computed again."""
        return False

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Return whether layers are loaded one by one: a whole CUDA graph would not wait."""
        told = extra_config.get("enable_layerwise_transfer")
        return load_settings().enable_layerwise_transfer if told is None else bool(told)

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any) -> bool:
        """Return True: from vLLM 0.33 on an engine takes its memory back, and lends it again.

        vLLM resets the caches of an engine that sleeps, FlexKV's too: its weights may change.
        """
        return True

    def unregister_kv_caches(self) -> None:
        """Return once no copy touches the KV tensors any more: the engine goes to sleep."""
        if self.worker is not None:
            self.worker.suspend()

    def restore_kv_caches(self) -> None:
        """Lend the KV tensors again: the engine is awake."""
        if self.worker is not None:
            self.worker.resume()

    # -- several KV groups ----------------------------------------------------------------------

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """Return the requests that are done with sending and receiving, and whose load failed.

        With several KV groups, a load fails as a whole: vLLM has no place for single blocks then.
        """
        sent, received = self.get_finished(finished_req_ids)
        module = sys.modules[KVConnectorBase_V1.__module__]
        return module.KVConnectorTransferResults(
            finished_sending=sent or set(),
            finished_recving=received or set(),
            failed_recving=set() if self.worker is None else set(self.bound_step().failed),
        )

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Return whether vLLM must keep the request's blocks for now, and no parameters."""
        return self.scheduler is not None and self.scheduler.request_finished(
            request, block_ids
        ), None

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:
        """Return which of vLLM's KV groups a load writes; vLLM makes the others anew."""
        groups = None if self.scheduler is None else self.scheduler.engine_groups
        return (0,) if groups is None else groups.engine_ids

    def get_external_cache_hit_sources(
        self, request: Any, num_external_tokens: int
    ) -> dict[Any, int]:
        """Return how many of a load's tokens come from host memory and from SSD."""
        unknown = self._cache_hit_source
        names = {source.value: source for source in type(unknown)}
        found: dict[str, int] = {}
        if self.scheduler is not None:
            found = self.scheduler.hit_sources(request, num_external_tokens)
        told = {names.get(tier, unknown): tokens for tier, tokens in found.items()}
        if rest := num_external_tokens - sum(told.values()):
            told[unknown] = told.get(unknown, 0) + rest
        return told

    # -- statistics, and the cache --------------------------------------------------------------

    def get_kv_connector_stats(self) -> FlexKVStats | None:
        """Return the counts since the last call; only the scheduler's side has any."""
        return None if self.scheduler is None else self.scheduler.take_stats()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> FlexKVStats:
        """Return counts that another process has sent."""
        return FlexKVStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> FlexKVPromMetrics:
        """Return the counters for vLLM's own endpoint."""
        return FlexKVPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def on_new_request(self, request: Any) -> None:
        """Ask how much of a prompt is resident; vLLM calls this from 0.32 on."""
        if self.scheduler is not None:
            self.scheduler.on_new_request(request)

    def reset_cache(self) -> bool:
        """Forget every block of every tier, of all instances; return whether that was done."""
        return self.scheduler is None or self.scheduler.reset_cache()


# `MultiConnector` finds the class that reads a child's statistics by the child's class name alone.
if FlexKVConnector.__name__ not in KVConnectorFactory._registry:
    KVConnectorFactory.register_connector(
        FlexKVConnector.__name__, __name__, FlexKVConnector.__name__
    )
