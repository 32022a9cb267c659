"""The backend of the server's engine: host memory that agents map, and the agents' devices."""

from __future__ import annotations

from flexkv.common.config import CacheConfig, CacheSizes
from flexkv.io.device.tensors import KVCaches
from flexkv.server.fleet import FleetPort
from flexkv.tiers.backend import Device, LocalBackend


class ServerBackend(LocalBackend):
    """This machine's memory and SSD, with the devices of the agents that connect."""

    shared = True

    def __init__(self, cache: CacheConfig, sizes: CacheSizes) -> None:
        super().__init__(cache, sizes)
        self.ranks = 1
        self.fleet = FleetPort(sizes.spaces, sizes.num_host_blocks)

    def device(self, kv_caches: KVCaches, layout: str | None, tp_rank: int) -> Device:
        """Return the port over all agents, which the server registers once."""
        return Device(self.fleet, "agents", ("agents", 0))
