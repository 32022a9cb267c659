"""What vLLM carries from the scheduler's connector to the workers' connectors in each step."""

from __future__ import annotations

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from flexkv.integration.common.transfers import StepTransfers


class StepMetadata(StepTransfers, KVConnectorMetadata):
    """What workers do and report in one step; its request ids are vLLM's."""
