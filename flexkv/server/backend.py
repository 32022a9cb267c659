"""What the server's engine stands on: host memory that others map, and devices of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flexkv.common.config import CacheConfig, CacheSizes, ModelConfig
from flexkv.io.ports import TransferPort
from flexkv.server.fleet import FleetPort
from flexkv.tiers.backend import Device, LocalBackend


class ServerBackend(LocalBackend):
    """This machine's memory and SSD; the devices are those of the agents that connect."""

    shared = True

    def __init__(self, model: ModelConfig, cache: CacheConfig, sizes: CacheSizes) -> None:
        super().__init__(model, cache, sizes)
        self.ranks = 1
        self.fleet = FleetPort(model, sizes.num_host_blocks, sizes.block_bytes)

    def device(
        self, kv_caches: Mapping[str, Any] | Sequence[Any], layout: str | None, tp_rank: int
    ) -> Device:
        """Give the port over all agents; the server registers it once."""
        return Device(self.fleet, self.fleet.num_blocks, "agents", ("agents", 0))

    def joined(self, devices: Sequence[Device]) -> TransferPort:
        """Give the port, which keeps the sums that the SSD needs: agents have none."""
        return self.summed(devices[0].port)
