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

NODES = 3
ROUNDS = int(os.environ.get("SHARING_ROUNDS", "8"))
SEED = int(os.environ.get("SHARING_SEED", "1"))
DESCRIPTORS_MORE = 40
"""How many more descriptors a node may have than at the start: its connections to others."""


class Soak:
    """One bed and the faults of one seed.

    Attributes:
        gets: how many were compared.
        faults: how many there were.
        far_blocks: how many blocks nodes have read from each other, without those of killed nodes.
    """

    def __init__(self, bed: Bed, seed: int) -> None:
        self.bed, self._random = bed, random.Random(seed)
        self.gets = self.far_blocks = self.faults = 0
        self._stopped: set[int] = set()
        self._is_slow = False
        self._prompts: list[int] = []
        self._read = [0] * NODES

    def round(self, number: int) -> None:
        """Put and get on every node while something fails; then repair it."""
        nodes, chance = self.bed.nodes, self._random
        self._share(number)
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
        self._is_slow = False
        self._repair()
        for number, node in enumerate(nodes):
            read = node.is_free()["read"]
            self.far_blocks += read - self._read[number]
            self._read[number] = read

    def _share(self, number: int) -> None:
        """Put a new prompt on each node, and wait until the others know of it."""
        self._prompts = [number * NODES + node for node in range(NODES)]
        for node, seed in zip(self.bed.nodes, self._prompts, strict=True):
            assert node.do("put", seed=seed) == {"status": "success"}
        for own, node in enumerate(self.bed.nodes):
            for seed in set(self._prompts) - {self._prompts[own]}:
                node.until("known", lambda known: known["own"] + known["far"] == BLOCKS, seed=seed)

    def _begin(self, node: int, area: int) -> list[int]:
        """Begin to get new and old prompts, and to put one, in half of the areas from one on."""
        chance, at = self._random, self.bed.nodes[node]
        numbers = []
        for each in range(area, area + AREAS // 2 - 1):
            seed = chance.choice([*self._prompts, *self._prompts, chance.randrange(NODES * ROUNDS)])
            numbers.append(at.begin("get", seed=seed, area=each))
        again = chance.choice(self._prompts)
        numbers.append(at.begin("put", seed=again, area=area + AREAS // 2 - 1))
        return [*numbers, at.begin("clear")] if chance.random() < 0.3 else numbers

    def _collect(self, begun: list[list[list[int]]], nodes: set[int]) -> None:
        """Check all answers of some nodes."""
        for numbers in begun:
            for node in nodes:
                while numbers[node] and self.bed.nodes[node].is_running:
                    answer = self.bed.nodes[node].answer(numbers[node].pop(0))
                    assert "error" not in answer, answer
                    if "right" in answer:
                        assert answer["right"], answer
                        is_late = answer["took_s"] > DEADLINE_S + 1
                        assert not is_late or self._is_slow or node in self._stopped, answer
                        self.gets += 1

    def _repair(self) -> None:
        self.bed.network.heal()
        if not self.bed.redis.is_running:
            self.bed.redis.start()
        for number, node in enumerate(self.bed.nodes):
            if not node.is_running:
                self.bed.start_again(number)
                self._read[number] = 0

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
        """Lose some of what two nodes send each other: reads may take long while bytes move."""
        self._is_slow = True
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
            assert facts["descriptors"] <= descriptors + DESCRIPTORS_MORE
        soak.round(ROUNDS)
        sys.stdout.write(f"{soak.faults} faults, {soak.gets} gets, {soak.far_blocks} blocks read\n")
        assert all(node.end() == 0 for node in bed.nodes)
