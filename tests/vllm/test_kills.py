"""Tests that kill any process of two real engines and their server at any time; the others go on.

`VLLM_KILLS=100 pytest tests/vllm/test_kills.py` runs a hundred rounds. What survives stays up
over the rounds; only the victim starts again.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from .conftest import External, planned
from .conversations import Sizes, asked_in
from .fork import Forked
from .kill_engine import Answered, Asked, engine

ROUNDS = int(os.environ.get("VLLM_KILLS", "2"))
SEED = int(os.environ.get("VLLM_KILLS_SEED", "0"))
VICTIMS = ("server", "scheduler", "worker", "engine")
WITHIN_S = 60.0
KILL_S = 2.0
"""The longest time between the question to the engines and the kill."""


def eventually(what: Callable[[], Any]) -> Any:
    """Call a function until its result is true, and return that."""
    until_s = time.monotonic() + WITHIN_S
    while not (found := what()):
        assert time.monotonic() < until_s, "it did not come about"
        time.sleep(0.02)
    return found


def processes_of(session: int) -> list[int]:
    """Return the processes of a session; zombies count as gone."""
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if process.info["status"] != psutil.STATUS_ZOMBIE and os.getsid(process.pid) == session:
                found.append(process.pid)
        except ProcessLookupError:
            continue
    return found


class Rig:
    """A server and two engines, with functions to kill and restart them."""

    def __init__(self, model: str, model_file: Path, folder: Path) -> None:
        self._model, self._model_file, self.folder = model, model_file, folder
        cache = {"tokens_per_block": 32}
        self.settings = planned(model, folder, {"cache": cache})["settings"]
        self.sessions: list[int] = []
        """The sessions of all engines that were ever started."""
        self.fronts: dict[int, int] = {}
        """The first process of each running engine."""
        self.server = self.start_server()
        self.engines = [self._start_engine(number) for number in (0, 1)]

    def start_server(self) -> External:
        """Start a server, and wait until it answers."""
        server = External(self._model_file, self.settings)
        server.status()
        return server

    def _start_engine(self, number: int) -> Forked:
        environment = {
            "FLEXKV_CONFIG_PATH": str(self.folder / "server.json"),
            "FLEXKV_SERVER_LAUNCH_MODE": "external",
            "FLEXKV_INSTANCE_ID": str(number),
            "VLLM_RPC_BASE_PATH": str(self.folder),
        }
        log = self.folder / f"engine-{number}.log"
        started = Forked(log, engine, self._model, environment)
        self.sessions.append(started.pid)
        self.fronts[number] = started.pid
        return started

    def kill(self, victim: str, number: int) -> None:
        """Kill the server, an engine's process, or all processes of an engine."""
        if victim == "server":
            self.server.kill()
        elif victim == "engine":
            self.engines[number].kill()
        else:
            scheduler = child_of(psutil.Process(self.fronts[number]))
            (scheduler if victim == "scheduler" else child_of(scheduler)).kill()

    def restart(self, victim: str, number: int) -> None:
        """Restart the victim, once all processes of it that have FlexKV are gone.

        vLLM's front process may wait for ever for a scheduler that was killed.
        """
        if victim == "server":
            self.server = self.start_server()
        else:
            front = self.fronts[number]
            eventually(lambda: set(processes_of(front)) <= {front})
            self.engines[number].kill()
            eventually(lambda: not processes_of(front))
            self.engines[number] = self._start_engine(number)
            assert self.engines[number].told() == "begun"
        self.wait_ready()

    def wait_ready(self) -> None:
        """Wait until the server has both engines, which connect when they are asked something."""

        def both() -> bool:
            for each in self.engines:
                each.ask(Asked([[5] * 40], "", 1))
            for each in self.engines:
                each.told()
            instances = self.server.status()["instances"].values()
            return len(instances) == 2 and all(each["ready"] for each in instances)

        eventually(both)

    def wait_idle(self) -> None:
        """Wait until the server has no claims and no runs."""

        def idle() -> bool:
            statistics = self.server.status()["statistics"]
            return (statistics["claims"], statistics["runs_in_flight"]) == (0, 0)

        eventually(idle)


def child_of(process: psutil.Process) -> psutil.Process:
    """Return the child process that a process of vLLM has started."""
    (child,) = [
        each for each in process.children() if "resource_tracker" not in " ".join(each.cmdline())
    ]
    return child


@pytest.fixture(scope="module")
def rig(model: str, model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """Yield a rig that stays up over all rounds."""
    rig = Rig(model, model_file, tmp_path_factory.mktemp("kills"))
    try:
        for each in rig.engines:
            assert each.told() == "begun"
        rig.wait_ready()
        yield rig
    finally:
        for each in rig.engines:
            each.kill()
        rig.server.kill()


def told_rightly(answered: Answered, expected: dict[str, Any]) -> bool:
    """Return whether the answers are those of an engine without a connector."""
    return answered.answers == [answer for turn in expected["answers"] for answer in turn]


@pytest.mark.parametrize("seed", range(SEED, SEED + ROUNDS))
def test_the_others_go_on_rightly(rig: Rig, expected: dict[str, Any], seed: int) -> None:
    """After a kill all answers stay right, and later rounds load what earlier ones stored."""
    chance = random.Random(seed)
    victim, number = chance.choice(VICTIMS), chance.randrange(2)
    prompts = asked_in(Sizes(), expected["answers"])
    asked = Asked(prompts, str(seed // 2), Sizes.answer_tokens)
    for each in rig.engines:
        each.ask(asked)
    time.sleep(chance.uniform(0, KILL_S))
    rig.kill(victim, number)
    for each in rig.engines if victim == "server" else [rig.engines[1 - number]]:
        answered = each.told()
        assert told_rightly(answered, expected)
        assert answered.freed
    rig.restart(victim, number)
    rig.engines[number].ask(asked)
    answered = rig.engines[number].told()
    assert told_rightly(answered, expected)
    assert answered.freed
    if victim != "server":  # on a busy machine late answers are misses
        assert sum(hit > 0 for hit in answered.cached) > len(prompts) // 2
    rig.wait_idle()


def test_nothing_is_left(rig: Rig) -> None:
    """No process, socket or shared memory is left, and the SSD store opens warm."""
    for each in rig.engines:
        each.kill()
    for session in rig.sessions:
        eventually(lambda session=session: not processes_of(session))
    eventually(lambda: not rig.server.status()["instances"])
    assert rig.server.end() == 0
    assert list(rig.folder.glob("socket*")) == []
    assert [path for path in Path("/dev/shm").iterdir() if "flexkv" in path.name] == []
    server = rig.start_server()
    assert server.status()["statistics"]["restored_blocks"] > 100
    assert server.end() == 0
