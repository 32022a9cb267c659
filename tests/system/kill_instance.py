"""One instance of an engine that puts and gets and compares every byte, until its stdin ends.

    python -m tests.system.kill_instance SETTINGS.json NUMBER SEED

It prints "begun" when it is ready for the first time. For each number on stdin it prints "right"
once that many more gets were right. When stdin has ended, it prints how many gets were right and
how many wrong. The bytes of a block depend on its prompt alone, so instances store the same ones.
"""

from __future__ import annotations

import json
import math
import random
import sys
import threading
import time
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from flexkv.common.config import settings_of
from flexkv.common.request import Operation
from flexkv.observe.logs import configure_logging
from tests.system.caches import MODEL
from tests.system.serving import BLOCKS, Instance

PROMPTS = 40


def say(*words: object) -> None:
    """Print a line for the test."""
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


class Asked:
    """The numbers of right gets that the test waits for, read from stdin."""

    def __init__(self) -> None:
        self.to_end = threading.Event()
        self._goals, self._goal = SimpleQueue[int](), math.inf
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in sys.stdin:
            self._goals.put(int(line))
        self.to_end.set()

    def look(self, right: int) -> None:
        """Print "right" if there have been as many right gets as the test waits for."""
        if right >= self._goal:
            say("right")
            self._goal = math.inf
        if self._goal == math.inf and not self._goals.empty():
            self._goal = right + self._goals.get()


def run(settings_file: Path, number: int, seed: int) -> tuple[int, int]:
    """Put and get until stdin ends; return the numbers of right and of wrong gets."""
    test = Asked()
    settings = settings_of(json.loads(settings_file.read_text()))
    chance, instance = random.Random(seed), Instance(settings, MODEL, number)
    for agent, caches in zip(instance.agents, instance.caches, strict=True):
        agent.start(caches)
    right = wrong = 0
    said = False
    while not test.to_end.is_set():
        instance.client.poll()
        if not instance.client.is_ready:
            time.sleep(0.01)
            continue
        if not said:
            say("begun")
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
        test.look(right)
    instance.close()
    return right, wrong


def main() -> None:
    """Run an instance."""
    configure_logging("error")
    say(*run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))


if __name__ == "__main__":
    main()
