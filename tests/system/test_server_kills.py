"""Tests that kill a process of a server with two instances at any moment; the others go on.

`SERVER_KILLS=100 pytest tests/system/test_server_kills.py` runs a hundred rounds.
"""

from __future__ import annotations

import json
import os
import random
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from flexkv.common.config import Settings
from flexkv.server.launch import told_of

from .forked import Program, forked_server
from .serving import settings_in

ROUNDS = int(os.environ.get("SERVER_KILLS", "6"))


def await_right(instances: list[Program], gets: int) -> None:
    """Wait until each instance has got this many more prompts with the right bytes."""
    for each in instances:
        each.say(gets)
    for each in instances:
        assert each.hear() == "right"


def outcome(ended: Program) -> tuple[int, int]:
    """End an instance, and return its numbers of right and of wrong gets."""
    ended.stdin.close()
    right, wrong = ended.hear().split()
    assert ended.wait(30) == 0
    return int(right), int(wrong)


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_the_others_go_on_rightly(tmp_path: Path, seed: int) -> None:
    """After a kill no get has a wrong byte, the rest goes on, and only the SSD files are left."""
    chance = random.Random(seed)
    settings: Settings = settings_in(tmp_path, num_cpu_blocks=96).model_copy(
        update={"log_level": "critical"}
    )
    settings_file = tmp_path / "settings.json"
    settings_file.write_text(json.dumps(told_of(settings)))
    with ExitStack() as opened:

        def begun(number: int, seed: int) -> Program:
            made = opened.enter_context(
                closing(Program("tests.system.kill_instance", "main", settings_file, number, seed))
            )
            assert made.hear() == "begun"
            return made

        server = forked_server(settings)
        instances = [begun(number, seed * 2 + number) for number in (0, 1)]
        await_right(instances, chance.randrange(1, 100))
        if chance.choice(["server", "instance"]) == "server":
            os.kill(server.pid, 9)
            server.close()
            server = forked_server(settings)
        else:
            instances[0].kill()
            instances[0] = begun(0, seed + 1000)
        await_right(instances, 6)
        wrong = sum(outcome(each)[1] for each in instances)
        server.close()
    assert server.exit_status == 0
    assert wrong == 0
    assert list(tmp_path.glob("socket*")) == []
