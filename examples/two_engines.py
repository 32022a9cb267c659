"""Two engines at one FlexKV server: the second loads what the first stored.

    python examples/two_engines.py               # files in ./flexkv-server; or name a directory

The server is a process of its own, as `flexkv serve model.json` is. Each engine has a client in its
scheduler and an agent in each of its workers; here both engines are in this process.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from run_server import MODEL, folder_of, settings_in

from flexkv.common.request import Operation
from flexkv.server.agent import Agent
from flexkv.server.client import Client

DEVICE_BLOCKS, PROMPT_BLOCKS = 128, 32


class Engine:
    """An engine with a worker for each rank; the workers' KV caches are random at first."""

    def __init__(self, folder: Path, number: int) -> None:
        settings = settings_in(folder)
        cache, address = settings.cache_config, settings.server_recv_port
        heads = MODEL.num_kv_heads // MODEL.tp_size
        shape = (2, DEVICE_BLOCKS, cache.tokens_per_block, heads, MODEL.head_size)
        random = np.random.default_rng(number)
        self.caches = [
            [random.random(shape, np.float32).astype(np.float16) for _ in range(MODEL.num_layers)]
            for _ in range(MODEL.tp_size)
        ]
        self.agents = [Agent(address, MODEL, cache, number, rank) for rank in range(MODEL.tp_size)]
        for agent, layers in zip(self.agents, self.caches, strict=True):
            agent.start(layers)
        self.client = Client(settings, MODEL, number)
        while not self.client.is_ready:  # the server is starting, or the agents are
            self.client.poll()
            time.sleep(0.01)

    def run(self, operation: Operation, keys: bytes, first_block: int) -> str:
        """Run a request, and return how it ended. An engine would do other work meanwhile."""
        ids = np.arange(first_block, first_block + PROMPT_BLOCKS)
        number = self.client.start(operation, keys, 0, ids)
        while True:
            for done in self.client.poll():
                if done.number == number:
                    return f"{done.status}, {done.moved} blocks"
            time.sleep(0.0002)

    def close(self) -> None:
        """Disconnect the client and the agents."""
        self.client.close()
        for agent in self.agents:
            agent.close()


def main(folder: Path) -> bool:
    """Run the example; return whether the second engine has the bytes of the first."""
    server = subprocess.Popen([sys.executable, Path(__file__).with_name("run_server.py"), folder])
    try:
        one, other = Engine(folder, 0), Engine(folder, 1)
        prompt = np.arange(PROMPT_BLOCKS * 16)
        keys = one.client.keys(prompt)  # the same in every process
        print("first engine, put:", one.run(Operation.PUT, keys, 0))
        print("second engine, match:", other.client.match(keys).by_tier)
        print("second engine, get:", other.run(Operation.GET, keys, 64))
        blocks = slice(64, 64 + PROMPT_BLOCKS)
        equal = all(
            np.array_equal(theirs[:, blocks], ours[:, :PROMPT_BLOCKS])
            for rank in range(MODEL.tp_size)
            for ours, theirs in zip(one.caches[rank], other.caches[rank], strict=True)
        )
        print("every byte is there" if equal else "BYTES DIFFER")
        one.close()
        other.close()
        return equal
    finally:
        server.terminate()  # it writes what is not yet on SSD, and ends
        server.wait()


if __name__ == "__main__":
    sys.exit(0 if main(folder_of(sys.argv)) else 1)
