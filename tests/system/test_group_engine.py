"""Tests of loads and puts of an engine whose KV groups share one pool of device blocks."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from flexkv.server.operator import command

from .forked import forked_server
from .group_engine import GroupEngine
from .group_serving import GROUP_MODEL
from .serving import PER_BLOCK, eventually, settings_in

SEEDS = int(os.environ.get("GROUP_ENGINE_SEEDS", "2"))
PROMPTS, STEPS_MAX = 60, 20_000


def prompts_of(engine: GroupEngine, chance: random.Random) -> list[bytes]:
    """Return the keys of prompts, most of which share a prefix with another."""
    known, prompts = list[NDArray[np.int64]](), list[bytes]()
    for number in range(PROMPTS):
        tokens = np.arange(chance.randint(2, 24) * PER_BLOCK) + 1000 * number
        if known and chance.random() < 0.7:
            shared = chance.choice(known)[: chance.randint(1, 20) * PER_BLOCK]
            tokens[: len(shared)] = shared[: len(tokens)]
        known.append(tokens)
        prompts.append(engine.keys(tokens))
    return prompts


@pytest.mark.parametrize("killed", [False, True], ids=["", "killed"])
@pytest.mark.parametrize("seed", range(SEEDS))
def test_an_engine_with_little_memory_computes_on_right_bytes(
    tmp_path: Path, seed: int, killed: bool
) -> None:
    """Each load brings the right bytes of each group, while blocks change hands in every step.

    The server may be killed in between. GROUP_ENGINE_SEEDS chooses how many seeds are run.
    """
    settings = settings_in(tmp_path, num_cpu_blocks=192, num_ssd_blocks=512)
    server = forked_server(settings, GROUP_MODEL)
    engine, chance = GroupEngine(settings, 90, seed), random.Random(seed)
    try:
        waiting, steps = prompts_of(engine, chance), 0
        while waiting or not engine.is_idle:
            if waiting and len(engine.requests) < 4 and chance.random() < 0.3:
                engine.arrive(waiting.pop())
            if killed and len(waiting) == PROMPTS // 2:
                killed = False
                os.kill(server.pid, signal.SIGKILL)
                server.close()
                server = forked_server(settings, GROUP_MODEL)
                engine.wait_ready()
            engine.step()
            steps += 1
            assert steps < STEPS_MAX, engine.counts
        assert engine.wrong == []
        assert engine.counts["loaded"] > 0
        assert engine.counts["preempted"] > 0

        def is_free() -> bool:
            host = command(settings.server_recv_port, "status")["statistics"]["tiers"]["host"]
            return not (host["pinned_blocks"] or host["reserved_blocks"])

        eventually(is_free)
    finally:
        engine.close()
        server.close()
    assert server.exit_status == 0
