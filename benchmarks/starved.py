"""How soon a server answers an engine whose processes busy-wait on every core.

Two processes spin, as vLLM's workers do with tensor parallelism, and a client asks for matches as a
scheduler does, spinning too. The figures are the share of answers within `match_wait_ms`, and the
times of all answers. Peer: the same server, scheduled as usual. With CAP_SYS_NICE, the server is
also measured with a negative nice value.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.harness import Figures, Options, percentile
from benchmarks.rigs import cache_of, prompt
from benchmarks.served import MODEL, PATIENCE_S
from flexkv.common.config import Settings
from flexkv.process.wakeups import Scheduling, schedule, scheduling_of
from flexkv.server.client import Client
from flexkv.server.launch import LaunchedServer
from flexkv.testing.agent_process import AgentProcess

SPINNERS = 2
ASK_S = 0.005
"""Time between two questions: a step of a scheduler."""
PROMPT_BLOCKS, PROMPTS = 64, 16
SPIN = """
import os, time
while True:
    until_s = time.monotonic() + 0.02
    while time.monotonic() < until_s:
        os.sched_yield()
    until_s = time.monotonic() + 0.01
    while time.monotonic() < until_s:
        pass
"""
"""A loop that yields for 20 ms, as if it waited for a message, and computes for 10 ms."""


def measure(options: Options) -> Figures:
    """Return the figures of the case."""
    round_s, repeats = (0.3, 1) if options.quick else (2.0, options.repeats)
    with tempfile.TemporaryDirectory(dir=options.directory) as name, ExitStack() as stack:
        settings = Settings(
            server_recv_port=f"ipc://{Path(name).absolute()}/socket",
            cache_config=cache_of(512),
            log_level="error",
            server_answer_ms=int(1e3 * PATIENCE_S),
        )
        server = LaunchedServer(MODEL, settings)
        stack.callback(server.close)
        agent = AgentProcess(settings, MODEL, 1, 0)
        stack.callback(agent.close)
        client = Client(settings, MODEL)
        stack.callback(client.close)
        while not client.is_ready:
            client.poll()
        arms, figures = _arms(server.pid), Figures()
        asked = _Asking(client, settings.match_wait_ms / 1e3)
        with spinning():
            for turn in range(repeats + 1):
                for arm in arms if turn % 2 else reversed(arms):
                    arms[arm]()
                    asked.ask(arm if turn else "", round_s)
    for arm in arms:
        took_s = asked.took_s[arm]
        figures[f"{arm}: answers in time"] = asked.in_time[arm] / len(took_s)
        figures[f"{arm}: p50, ms"] = 1e3 * percentile(took_s, 50)
        figures[f"{arm}: p99, ms"] = 1e3 * percentile(took_s, 99)
    return figures


def _arms(pid: int) -> dict[str, Callable[[], None]]:
    """Return functions that change how a server's loop is scheduled, by the names of the arms."""
    prompt = scheduling_of(pid)
    session = Path(f"/proc/{pid}/autogroup")

    def change(wanted: Scheduling, nice: str) -> Callable[[], None]:
        def apply() -> None:
            schedule(wanted, pid)
            if prompt.nice < 0 and session.exists():
                session.write_text(nice)

        return apply

    usual = prompt._replace(slice_ns=0, nice=max(prompt.nice, 0))
    arms = {
        "as usual": change(usual, "0"),
        "short slice": change(usual._replace(slice_ns=prompt.slice_ns), "0"),
    }
    if prompt.nice < 0:
        arms["short slice and nice value"] = change(prompt, str(prompt.nice))
    return arms


@contextmanager
def spinning() -> Iterator[None]:
    """Keep two cores busy within this context."""
    spinners = [subprocess.Popen([sys.executable, "-S", "-c", SPIN]) for _ in range(SPINNERS)]
    try:
        yield
    finally:
        for each in spinners:
            each.kill()
            each.wait()


class _Asking:
    """Asks the server, and counts for each arm the answers in time."""

    def __init__(self, client: Client, wait_s: float) -> None:
        self._client, self._wait_s = client, wait_s
        self._keys = [client.keys(prompt(number, PROMPT_BLOCKS)) for number in range(PROMPTS)]
        self.took_s: dict[str, list[float]] = {}
        self.in_time: dict[str, int] = {}

    def ask(self, arm: str, round_s: float) -> None:
        """Ask for a while, and count for an arm how many answers come in time."""
        took_s, until_s = self.took_s.setdefault(arm, []), time.monotonic() + round_s
        while time.monotonic() < until_s:
            begin_s = time.perf_counter()
            number = self._client.ask(self._keys[len(took_s) % PROMPTS])
            found = self._client.answer(number, self._wait_s)
            self.in_time[arm] = self.in_time.get(arm, 0) + (found is not None)
            while found is None:
                os.sched_yield()
                found = self._client.answer(number)
            took_s.append(time.perf_counter() - begin_s)
            next_s = time.monotonic() + ASK_S
            while time.monotonic() < next_s:
                os.sched_yield()
