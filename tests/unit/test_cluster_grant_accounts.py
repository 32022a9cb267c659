"""What grants count is what they hold, whatever peers do."""

from __future__ import annotations

import asyncio
from collections import Counter
from random import Random

import pytest

from flexkv.cluster.grants import (
    GrantLimits,
    Lent,
)
from flexkv.cluster.wire import PeerId
from tests.cluster_rigs import keys_of
from tests.unit.grants_rig import A, B, C, Rig, with_grants


class Walk:
    """Random peers that ask, read and leave."""

    def __init__(self, rig: Rig, random: Random) -> None:
        self.rig, self.random = rig, random
        self.prompts = [keys_of(prompt, 20) for prompt in range(5)]
        self.begun: list[Lent] = []
        self.asked: list[tuple[PeerId, int]] = []

    def store(self) -> None:
        """Put a prompt in host memory, or on disk."""
        put = self.random.choice([self.rig.owner.put, self.rig.owner.put_on_disk])
        put(self.random.choice(self.prompts), 0, self.random.randrange(20))

    def ask(self) -> None:
        """Want some blocks."""
        peer, first = self.random.choice([A, B, C]), self.random.randrange(19)
        last, group = self.random.randrange(first + 1, 21), self.random.randrange(2)
        number = self.rig.want(peer, self.random.choice(self.prompts), first, last, group)
        self.asked.append((peer, number))

    def read(self) -> None:
        """Begin to read a block."""
        if self.asked:
            peer, number = self.random.choice(self.asked)
            told = self.rig.grants.blocks(peer, number, self.random.randrange(20), 1)
            self.begun += [told] if isinstance(told, Lent) else []

    def end_read(self) -> None:
        """End a read."""
        if self.begun:
            self.begun.pop(self.random.randrange(len(self.begun))).ended()

    def release(self) -> None:
        """Release what was asked for."""
        if self.asked:
            self.rig.grants.release(*self.asked.pop(self.random.randrange(len(self.asked))))

    def leave(self) -> None:
        """End a peer's link, now and then."""
        if self.random.random() < 0.1:
            self.rig.grants.end_peer(self.random.choice([A, B, C]))


@pytest.mark.parametrize("seed", range(20))
def test_the_accounts_are_right(seed: int) -> None:
    """Whatever peers do, what is held is what the grants keep, within every bound."""
    random = Random(seed)
    limits = GrantLimits(random.choice([1, 7, 40]), 12, 5, 3, 2)

    async def work(rig: Rig) -> None:
        walk = Walk(rig, random)
        steps = [walk.store, walk.ask, walk.ask, walk.read, walk.end_read, walk.release, walk.leave]
        for _ in range(400):
            random.choice(steps)()
            await asyncio.sleep(random.expovariate(4.0) if random.random() < 0.2 else 0)
            counts = rig.grants.counts
            assert counts.pinned_blocks == len(rig.owner.holds) <= limits.pinned_blocks
            assert rig.owner.prefetching <= limits.prefetches
            of_peers = [len(of) for of in rig.grants._grants.values()]
            assert sum(of_peers) == counts.grants <= limits.grants
            assert max(of_peers, default=0) <= limits.grants_per_peer
        assert max(Counter(answer.number for answer in rig.answers).values()) == 1
        for each in walk.begun:
            each.ended()
        counts = rig.grants.counts
        assert counts.granted + counts.missed + counts.busy == len(rig.answers)

    with_grants(work, limits)
