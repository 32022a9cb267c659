"""The agent of one rank in a process of its own, so that a signal can stop it.

    python -m flexkv.testing.agent_process < what to lend, as one line of JSON

It prints "begun" once the agent has started, and ends when stdin does.
"""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np

from flexkv.common.config import ModelConfig, Settings, settings_of
from flexkv.observe.logs import configure_logging
from flexkv.server.agent import Agent
from flexkv.server.launch import told_of


class AgentProcess:
    """An agent that lends CPU memory of random bytes, in a process that the caller may signal."""

    def __init__(self, settings: Settings, model: ModelConfig, blocks: int, number: int) -> None:
        """Start the process; return once its agent connects as instance `number`."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "flexkv.testing.agent_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        told = {
            "settings": told_of(settings),
            "model": told_of(model),
            "blocks": blocks,
            "number": number,
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(told) + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "begun\n"

    def signal(self, number: int) -> None:
        """Send the process a signal."""
        self._process.send_signal(number)

    def close(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.communicate()


def lend_until_eof() -> None:
    """Lend the device that stdin describes, until stdin ends."""
    told = json.loads(sys.stdin.readline())
    settings, model = settings_of(told["settings"]), ModelConfig(**told["model"])
    cache, number = settings.cache_config, told["number"]
    shape = (2, told["blocks"], cache.tokens_per_block, model.num_kv_heads, model.head_size)
    chance = np.random.default_rng(number)
    agent = Agent(settings.server_recv_port, model, cache, number, 0)
    agent.start(
        [
            chance.integers(0, 1 << 15, shape, np.uint16).view(np.float16)
            for _ in range(model.num_layers)
        ]
    )
    sys.stdout.write("begun\n")
    sys.stdout.flush()
    sys.stdin.read()
    agent.close()


if __name__ == "__main__":
    configure_logging("error")
    lend_until_eof()
