"""FlexKV's own connector to vLLM, with the hooks that the built-in shim does not forward.

--kv-transfer-config '{"kv_connector": "FlexKVConnector", "kv_role": "kv_both",
                       "kv_connector_module_path": "flexkv.integration.vllm.connector"}'
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole

from flexkv.integration.vllm.metadata import StepMetadata
from flexkv.integration.vllm.vllm_v1_adapter import FlexKVConnectorV1Impl


class FlexKVConnector(FlexKVConnectorV1Impl, KVConnectorBase_V1):
    """Keeps vLLM's KV blocks in host memory and on SSD."""

    def __init__(
        self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None
    ) -> None:
        """Take what vLLM gives.

        Raises:
            ConfigError: FlexKV cannot serve such an engine, or its server cannot be launched.
        """
        KVConnectorBase_V1.__init__(
            self, vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config
        )
        FlexKVConnectorV1Impl.__init__(self, vllm_config, role)

    def bound_step(self) -> StepMetadata:
        """Give the step's metadata."""
        step = self._get_connector_metadata()
        assert isinstance(step, StepMetadata)
        return step

    @property
    def requires_kv_delivery(self) -> bool:
        """Say no: what is not stored can be computed again."""
        return False

    def reset_cache(self) -> bool:
        """Forget every block of every tier, of all instances."""
        return self.scheduler is None or self.scheduler.reset_cache()
