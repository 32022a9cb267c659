"""LMCache's server as a peer of the `vllm` case, where its packages are installed.

    pip install --no-deps lmcache==0.5.6 sortedcontainers aiofiles \\
        'opentelemetry-exporter-prometheus<=0.61b0'

in an environment with vLLM, which has everything else that the server and the connector import.
`--no-deps` is needed because LMCache requires CUDA packages, and versions that conflict with those
of vLLM. Its connector inside the engine cannot copy on a CPU, so its server is measured, with the
fastest settings found on a CPU: memory shared by name, and chunks of one block. The others tried
were transfers by pickle and by shared memory of its own, and chunks of 32 and 256 tokens.
"""

from __future__ import annotations

import importlib.util
import json
import os
import urllib.request
from pathlib import Path
from typing import Any, Self

from flexkv.testing.vllm_serve import Program, free_port

NEEDED = {
    "aiofiles": "aiofiles",
    "lmcache": "lmcache",
    "opentelemetry.exporter.prometheus": "opentelemetry-exporter-prometheus",
    "sortedcontainers": "sortedcontainers",
}
"""What has to be installed beside vLLM: each module, and the package that has it."""


def missing() -> list[str]:
    """Return the packages that have to be installed before LMCache can be measured."""
    return [package for module, package in NEEDED.items() if not _is_there(module)]


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package that contains it is missing
        return False


class LMCacheServer(Program):
    """An `lmcache server` on this machine."""

    def __init__(
        self, folder: Path, chunk_tokens: int, host_gb: float, store: Path | None = None
    ) -> None:
        """Take the folder of its log, and its sizes. A full server drops new blocks.

        Args:
            folder: exists.
            chunk_tokens: tokens of a chunk.
            host_gb: size of its host memory.
            store: a directory that it shares with other servers; None: it has host memory only.
        """
        super().__init__(folder / "lmcache.log")
        self._chunk_tokens, self._host_gb, self._store = chunk_tokens, host_gb, store
        self._port, self._health_port = free_port(), free_port()

    def __enter__(self) -> Self:
        command_line = [
            "lmcache", "server",
            "--host", "127.0.0.1", "--port", str(self._port),
            "--http-host", "127.0.0.1", "--http-port", str(self._health_port),
            "--l1-size-gb", str(self._host_gb), "--eviction-policy", "LRU",
            "--chunk-size", str(self._chunk_tokens), "--shm-name", f"flexkv-peer-{os.getpid()}",
            "--supported-transfer-mode", "engine_driven",
        ]  # fmt: skip
        if self._store is not None:
            adapter = {"type": "fs", "base_path": str(self._store)}
            command_line += ["--l2-adapter", json.dumps(adapter)]
        # Other servers find a chunk by the same hash.
        self._start(command_line, {"LMCACHE_TRACK_USAGE": "false", "PYTHONHASHSEED": "0"})
        healthy = f"http://127.0.0.1:{self._health_port}/healthcheck"
        self.wait_healthy(lambda: urllib.request.urlopen(healthy, timeout=5).close())
        return self

    @property
    def connector(self) -> dict[str, Any]:
        """Return the configuration of an engine's connector to this server."""
        return {
            "kv_connector": "LMCacheMPConnector",
            "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector",
            "kv_connector_extra_config": {
                "lmcache.mp.host": "tcp://127.0.0.1",
                "lmcache.mp.port": self._port,
                "lmcache.mp.mp_transfer_mode": "engine_driven",
            },
        }
