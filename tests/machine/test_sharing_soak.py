"""Engines on several machines read from each other under faults by seed: no byte is ever wrong.

`SHARING_ROUNDS=100 SHARING_SEED=7 pytest tests/machine/test_sharing_soak.py` runs a hundred rounds.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flexkv.testing.namespaces import drop_from, lose_from, reset_from
from tests.machine.bed import DEADLINE_S, Bed, check_machine
from tests.machine.sharing_node import AREAS, BLOCKS, PROMPT_BYTES

pytestmark = pytest.mark.machine

NODES, PROMPTS = 3, 12
"""Twice as many prompts as a node has room for."""
ROUNDS = int(os.environ.get("SHARING_ROUNDS", "8"))
SEED = int(os.environ.get("SHARING_SEED", "1"))
DESCRIPTORS_MORE = 40
"""How many more descriptors a node may have than at the start: its connections to others."""


class Soak:
    """One bed and the faults of one seed.

    Attributes:
        gets: how many were compared.
        far_blocks: how many blocks nodes have read from each other, in lives that were not killed.
    """

    def __init__(self, bed: Bed, seed: int) -> None:
        self.bed, self._random = bed, random.Random(seed)
        self.gets = self.far_blocks = self.faults = 0
        self._stopped: set[int] = set()

    def round(self, number: int) -> None:
        """Put and get on every node while something fails; then repair it."""
        nodes, chance = self.bed.nodes, self._random
        first = [self._begin(node, 0) for node in range(NODES)]
        if number % 2:
            target = number // 2 % (NODES + 1)
            self.bed.redis.kill() if target == NODES else nodes[target].kill()
            self.faults += 1
        else:
            for _ in range(chance.randrange(1, 3)):
                chance.choice(FAULTS)(self)
                self.faults += 1
        half = AREAS // 2
        second = [
            self._begin(node, half) if nodes[node].is_running else [] for node in range(NODES)
        ]
        if self._stopped:  # what they do not answer meanwhile, they answer when they go on
            self._collect([first, second], set(range(NODES)) - self._stopped)
        for node in self._stopped:
            nodes[node].signal(signal.SIGCONT)
        self._collect([first, second], set(range(NODES)))
        self._stopped.clear()
        self._repair()
        for node in nodes:
            node.is_free()

    def _begin(self, node: int, area: int) -> list[int]:
        """Put a prompt, and begin to get others, in half of the areas from one on."""
        chance, at = self._random, self.bed.nodes[node]
        numbers = [at.begin("put", seed=chance.randrange(PROMPTS), area=area)]
        if chance.random() < 0.6:
            numbers.append(at.begin("clear"))
        areas = range(area + 1, area + AREAS // 2)
        return numbers + [at.begin("get", seed=chance.randrange(PROMPTS), area=n) for n in areas]

    def _collect(self, begun: list[list[list[int]]], nodes: set[int]) -> None:
        """Check all answers of some nodes."""
        for numbers in begun:
            for node in nodes:
                while numbers[node] and self.bed.nodes[node].is_running:
                    answer = self.bed.nodes[node].answer(numbers[node].pop(0))
                    assert "error" not in answer, answer
                    if "right" in answer:
                        assert answer["right"], answer
                        assert answer["took_s"] <= DEADLINE_S + 1 or node in self._stopped, answer
                        self.gets += 1

    def _repair(self) -> None:
        self.bed.network.heal()
        if not self.bed.redis.is_running:
            self.bed.redis.start()
        for number, node in enumerate(self.bed.nodes):
            if not node.is_running:
                self.bed.start_again(number)

    # -- faults ---------------------------------------------------------------------------------

    def stop(self) -> None:
        """Stop a node until the others have answered."""
        node = self._random.randrange(NODES)
        self.bed.nodes[node].signal(signal.SIGSTOP)
        self._stopped.add(node)

    def cut(self) -> None:
        """Let nothing from one node arrive at another one any more, from some byte on."""
        source, target = self._pair()
        self.bed.hosts[target].suffers(drop_from(self.bed.hosts[source].address, self._bytes()))

    def part(self) -> None:
        """Let nothing pass between two nodes."""
        source, target = self._pair()
        self.bed.hosts[target].suffers(drop_from(self.bed.hosts[source].address))
        self.bed.hosts[source].suffers(drop_from(self.bed.hosts[target].address))

    def reset(self) -> None:
        """Reset the connections between two nodes from some byte on."""
        source, target = self._pair()
        self.bed.hosts[target].suffers(reset_from(self.bed.hosts[source].address, self._bytes()))

    def lose(self) -> None:
        """Lose some of what two nodes send each other."""
        source, target = self._pair()
        percent = self._random.randrange(1, 30)
        self.bed.hosts[target].suffers(lose_from(self.bed.hosts[source].address, percent))

    def flap(self) -> None:
        """Pull a node's cable, and plug it in again or not."""
        host = self._random.choice(self.bed.hosts)
        host.link(False)
        host.link(self._random.random() < 0.5)

    def lose_redis(self) -> None:
        """Let nothing arrive at the Redis."""
        self.bed.redis_host.suffers(*(drop_from(host.address) for host in self.bed.hosts))

    def flush_redis(self) -> None:
        """Let the Redis forget everything."""
        self.bed.redis_says("FLUSHALL")

    def _pair(self) -> list[int]:
        return self._random.sample(range(NODES), 2)

    def _bytes(self) -> int:
        return self._random.randrange(1, 2 * PROMPT_BYTES)


FAULTS: list[Callable[[Soak], None]] = [
    Soak.stop, Soak.cut, Soak.cut, Soak.part, Soak.reset, Soak.reset, Soak.lose, Soak.flap,
    Soak.lose_redis, Soak.flush_redis,
]  # fmt: skip


def test_no_byte_is_wrong_and_nothing_is_left(tmp_path: Path) -> None:
    """Under any faults gets end in time with right bytes; then nothing is held, and nodes close.

    Every second round kills a process, each in turn.
    """
    check_machine()
    sys.stdout.write(f"seed {SEED}\n")
    with Bed(tmp_path, NODES) as bed:
        before = [node.is_free()["descriptors"] for node in bed.nodes]
        soak = Soak(bed, SEED)
        for number in range(ROUNDS):
            soak.round(number)
        for node, descriptors in zip(bed.nodes, before, strict=True):
            facts = node.is_free()
            soak.far_blocks += facts["read"]
            assert facts["descriptors"] <= descriptors + DESCRIPTORS_MORE
        bed.nodes[0].do("put", seed=PROMPTS)
        for node in bed.nodes[1:]:
            node.until("get", lambda got: got["blocks"] == BLOCKS, seed=PROMPTS)
        sys.stdout.write(f"{soak.faults} faults, {soak.gets} gets, {soak.far_blocks} blocks read\n")
        assert all(node.end() == 0 for node in bed.nodes)
