"""The backend of the server's engine: host memory that agents map, and the agents' devices."""

from __future__ import annotations

from collections.abc import Sequence

from flexkv.common.config import CacheConfig, CacheSizes, ModelConfig
from flexkv.io.device.tensors import KVCaches
from flexkv.io.ports import TransferPort
from flexkv.server.fleet import FleetPort
from flexkv.tiers.backend import Device, LocalBackend


class ServerBackend(LocalBackend):
    """This machine's memory and SSD, with the devices of the agents that connect."""

    shared = True

    def __init__(self, model: ModelConfig, cache: CacheConfig, sizes: CacheSizes) -> None:
        super().__init__(model, cache, sizes)
        self.ranks = 1
        self.fleet = FleetPort(model, sizes.num_host_blocks, sizes.block_bytes)

    def device(self, kv_caches: KVCaches, layout: str | None, tp_rank: int) -> Device:
        """Return the port over all agents, which the server registers once."""
        return Device(self.fleet, self.fleet.num_blocks, "agents", ("agents", 0))

    def joined(self, devices: Sequence[Device]) -> TransferPort:
        """Return the port with the checksums that the SSD tier needs, since agents compute none."""
        return self.summed(devices[0].port)
