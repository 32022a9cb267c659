"""The agent of one rank in a process of its own, so that it can be stopped by a signal.

    python -m tests.system.agent_alone SETTINGS.json NUMBER

It says "begun" once it lends its device, and ends with its stdin.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from flexkv.common.config import Settings, settings_of
from flexkv.logs import configure_logging
from flexkv.server.agent import Agent
from flexkv.server.launch import told_of
from tests.system.conftest import MODEL, kv_caches


class AgentProcess:
    """An agent whose process the test owns."""

    def __init__(self, settings: Settings, number: int, folder: Path) -> None:
        told = folder / f"agent-{number}.json"
        told.write_text(json.dumps(told_of(settings)))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.system.agent_alone", str(told), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "begun\n"

    def signal(self, number: int) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def close(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.communicate()


def run(settings_file: Path, number: int) -> None:
    """Lend a device until stdin ends."""
    settings = settings_of(json.loads(settings_file.read_text()))
    agent = Agent(settings.server_recv_port, MODEL, settings.cache_config, number, 0)
    agent.start(kv_caches(number))
    sys.stdout.write("begun\n")
    sys.stdout.flush()
    sys.stdin.read()
    agent.close()


if __name__ == "__main__":
    configure_logging("error")
    run(Path(sys.argv[1]), int(sys.argv[2]))
