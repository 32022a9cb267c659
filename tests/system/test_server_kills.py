"""Any process of a server with two instances is killed at any time: the others go on, rightly.

`SERVER_KILLS=100 pytest tests/system/test_server_kills.py` does so a hundred times.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flexkv.common.config import Settings
from flexkv.server.launch import Launched, told_of

from .conftest import MODEL
from .serving import settings_in

ROOT = Path(__file__).parents[2]
ROUNDS = int(os.environ.get("SERVER_KILLS", "6"))


def begun(settings_file: Path, number: int, seed: int) -> subprocess.Popen[str]:
    """Start an instance."""
    words = [sys.executable, "-m", "tests.system.kill_instance", str(settings_file)]
    return subprocess.Popen(
        [*words, str(number), str(seed)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def outcome(instance: subprocess.Popen[str]) -> tuple[int, int]:
    """Let an instance end, and give its right and wrong gets."""
    said, _ = instance.communicate(timeout=30)
    assert instance.returncode == 0
    right, wrong = said.split()[-2:]
    return int(right), int(wrong)


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_the_others_go_on_rightly(tmp_path: Path, seed: int) -> None:
    """And nothing is left behind but what is on SSD."""
    chance = random.Random(seed)
    settings: Settings = settings_in(tmp_path, num_cpu_blocks=96).model_copy(
        update={"log_level": "critical"}
    )
    settings_file = tmp_path / "settings.json"
    settings_file.write_text(json.dumps(told_of(settings)))
    server = Launched(MODEL, settings)
    instances = [begun(settings_file, number, seed * 2 + number) for number in (0, 1)]
    for each in instances:
        assert each.stdout is not None
        assert each.stdout.readline() == "begun\n"
    time.sleep(chance.uniform(0.05, 0.5))
    victim = chance.choice(["server", "instance"])
    if victim == "server":
        os.kill(server.pid, 9)
        server.close()
        server = Launched(MODEL, settings)
    else:
        instances[0].kill()
        instances[0].communicate()
        instances[0] = begun(settings_file, 0, seed + 1000)
        assert instances[0].stdout is not None
        assert instances[0].stdout.readline() == "begun\n"
    time.sleep(chance.uniform(1.0, 1.5))
    outcomes = [outcome(each) for each in instances]
    server.close()
    assert server.exit_status == 0
    assert sum(wrong for _, wrong in outcomes) == 0
    assert all(right > 5 for right, _ in outcomes)
    assert list(tmp_path.glob("socket*")) == []
