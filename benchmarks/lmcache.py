"""LMCache's server as a peer of the `vllm` case, where the `lmcache` package is installed.

`pip install --no-deps lmcache==0.5.6 opentelemetry-exporter-prometheus` is all that it needs beside
vLLM. Its connector inside the engine cannot copy on a CPU, so the server is measured, with what was
quickest on one (of transfers by pickle, by its own shared memory and by the engine's, in chunks of
32 and 256 tokens): memory shared by name, and chunks of one block.
"""

from __future__ import annotations

import importlib.util
import os
import urllib.request
from pathlib import Path
from typing import Any, Self

from flexkv.integration.vllm.served import Program, free_port


def is_installed() -> bool:
    """Tell whether it can be measured."""
    return importlib.util.find_spec("lmcache") is not None


class LMCacheServer(Program):
    """An `lmcache server` of this machine."""

    def __init__(self, folder: Path, chunk_tokens: int, host_gb: float) -> None:
        """Take where its log goes, and its sizes. A full one drops what comes."""
        super().__init__(folder / "lmcache.log")
        self._chunk_tokens, self._host_gb = chunk_tokens, host_gb
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
        self._start(command_line, {"LMCACHE_TRACK_USAGE": "false"})
        healthy = f"http://127.0.0.1:{self._health_port}/healthcheck"
        self.wait_healthy(lambda: urllib.request.urlopen(healthy, timeout=5).close())
        return self

    @property
    def connector(self) -> dict[str, Any]:
        """Give an engine's connector to it."""
        return {
            "kv_connector": "LMCacheMPConnector",
            "kv_connector_module_path": "lmcache.integration.vllm.lmcache_mp_connector",
            "kv_connector_extra_config": {
                "lmcache.mp.host": "tcp://127.0.0.1",
                "lmcache.mp.port": self._port,
                "lmcache.mp.mp_transfer_mode": "engine_driven",
            },
        }
