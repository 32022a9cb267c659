"""A server and an instance whose gets are timed, for the cases about its neighbours.

The time is what a scheduler sees: from the start of a get of a resident prompt to its end.
"""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType

import numpy as np

from benchmarks.rigs import cache_of, prompt
from flexkv.common.config import ModelConfig, Settings
from flexkv.common.request import Operation
from flexkv.server.client import Client
from flexkv.server.launch import LaunchedServer
from flexkv.server.wire import Done
from flexkv.testing.agent_process import AgentProcess

MODEL = ModelConfig(num_layers=8, num_kv_heads=8, head_size=128, dtype="float16")
"""A block of 16 tokens has 512 KiB."""
DEVICE_BLOCKS = 64
GET_BLOCKS = 8
PATIENCE_S = 60.0
LOOK_S = 2e-5


class Served:
    """A server and one well-behaved instance. A context manager."""

    def __init__(self, directory: Path, host_blocks: int, model: ModelConfig = MODEL) -> None:
        cache = cache_of(host_blocks)
        self.model = model
        self.settings = Settings(
            server_recv_port=f"ipc://{directory}/socket",
            cache_config=cache,
            server_answer_ms=int(1e3 * PATIENCE_S),  # a slow server is not a lost one
        )
        self.server = LaunchedServer(model, self.settings)
        self._agents = [AgentProcess(self.settings, model, DEVICE_BLOCKS, 0)]
        self.client = self.client_of(0)
        self._keys = [self.client.keys(prompt(number, GET_BLOCKS)) for number in range(8)]
        for keys in self._keys:
            assert self.ended(self.client, Operation.PUT, keys).moved == GET_BLOCKS

    def agent_of(self, number: int) -> AgentProcess:
        """Start and return the agent of another instance."""
        self._agents.append(AgentProcess(self.settings, self.model, DEVICE_BLOCKS, number))
        return self._agents[-1]

    def client_of(self, number: int) -> Client:
        """Return the client of an instance once it is ready; start its agent before."""
        client, until_s = Client(self.settings, self.model, number), time.monotonic() + PATIENCE_S
        while not client.is_ready and time.monotonic() < until_s:
            client.poll()
        assert client.is_ready
        return client

    @staticmethod
    def ended(client: Client, operation: Operation, keys: bytes) -> Done:
        """Run a request to its end, and return that; retry a put that found no room."""
        ids = np.arange(len(keys) // 16 - 1)
        while True:
            number = client.start(operation, keys, 0, ids)
            until_s = time.monotonic() + PATIENCE_S
            while (done := next((d for d in client.poll() if d.number == number), None)) is None:
                assert time.monotonic() < until_s
                time.sleep(LOOK_S)  # a loop that never sleeps would take a CPU from the others
            if done.status != "unready":
                return done

    def gets_s(self, count: int) -> list[float]:
        """Return the seconds of each of `count` gets; put evicted prompts again, untimed."""
        took_s: list[float] = []
        number = 0
        while len(took_s) < count:
            keys = self._keys[number % len(self._keys)]
            number += 1
            begin_s = time.perf_counter()
            done = self.ended(self.client, Operation.GET, keys)
            if done.moved == GET_BLOCKS:
                took_s.append(time.perf_counter() - begin_s)
            else:
                self.ended(self.client, Operation.PUT, keys)
        return took_s

    def __enter__(self) -> Served:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.client.close()
        for agent in self._agents:
            agent.close()
        self.server.close()
