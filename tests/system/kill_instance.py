"""One instance of an engine that puts and gets and compares every byte, until it is told to end.

    python -m tests.system.kill_instance SETTINGS.json NUMBER SEED

It says "begun" when it is ready first, and at last how many gets came back right, and wrong. Blocks
that two instances store under one key have the same bytes: they hang on the prompt alone.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from pathlib import Path

import numpy as np

from flexkv.common.config import settings_of
from flexkv.common.request import Operation
from flexkv.logs import configure_logging
from tests.system.conftest import MODEL
from tests.system.serving import BLOCKS, Instance

PROMPTS = 40


def run(settings_file: Path, number: int, seed: int) -> tuple[int, int]:
    """Work until stdin ends; give the right and the wrong gets."""
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    settings = settings_of(json.loads(settings_file.read_text()))
    chance, instance = random.Random(seed), Instance(settings, MODEL, number)
    for agent, caches in zip(instance.agents, instance.caches, strict=True):
        agent.start(caches)
    right = wrong = 0
    said = False
    while not ended.is_set():
        instance.client.poll()
        if not instance.client.is_ready:
            time.sleep(0.01)
            continue
        if not said:
            sys.stdout.write("begun\n")
            sys.stdout.flush()
            said = True
        prompt, first = chance.randrange(PROMPTS), chance.randrange(0, 5) * BLOCKS
        blocks = slice(first, first + BLOCKS)
        content = np.random.default_rng(prompt).integers(0, 1 << 16, (3, 2, BLOCKS, 4, 2, 8))
        wanted = content.astype(np.uint16)
        operation = chance.choice([Operation.PUT, Operation.GET])
        for layer, values in zip(instance.caches[0], wanted, strict=True):
            layer[:, blocks].view(np.uint16)[:] = values if operation is Operation.PUT else 0
        ids = np.arange(first, first + BLOCKS)
        asked = instance.client.start(operation, instance.keys(prompt), 0, ids)
        done = instance.end_of(asked)
        if done.status == "failed":
            instance.agents[0].settle([asked])
        if operation is Operation.GET and done.status == "success":
            loaded = slice(first, first + done.moved)
            same = all(
                np.array_equal(layer[:, loaded].view(np.uint16), values[:, : done.moved])
                for layer, values in zip(instance.caches[0], wanted, strict=True)
            )
            right, wrong = right + same, wrong + (not same)
    instance.close()
    return right, wrong


if __name__ == "__main__":
    configure_logging("error")
    outcome = run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    sys.stdout.write(f"{outcome[0]} {outcome[1]}\n")
