"""The port to other nodes while everything fails by seed: what is said to be there is right.

A seed replays: `SIMULATION_FIRST=17 PEER_SEEDS=1` runs seed 17 alone.
"""

from __future__ import annotations

import asyncio
import os
from random import Random

import numpy as np
import pytest
from numpy.typing import NDArray

from flexkv.common.errors import ClosedError, PeerError
from flexkv.io.peer import port as port_module
from flexkv.io.peer.port import Allowed, Wish
from flexkv.io.ports import Completion
from tests.cluster_rigs import open_descriptors
from tests.peer_port_rig import BEHIND, HOLDER, Reader, reading
from tests.peer_rig import BLOCK_BYTES, BLOCKS, NUMBER

SEEDS = int(os.environ.get("PEER_SEEDS", "24"))
FIRST = int(os.environ.get("SIMULATION_FIRST", "0"))


class Chaos:
    """What goes wrong, from a seed."""

    def __init__(self, seed: int, own: Reader) -> None:
        self.random, self.own = Random(seed), own
        self.evil = self.random.choice((0.0, 0.3, 0.7))
        own.holders.answer, own.holders.on_connect = self.answer, self.connect
        edges = sorted(self.random.sample(range(BLOCKS + 1), 2 * self.random.randint(1, 3)))
        self.reads = list(zip(edges[::2], edges[1::2], strict=True))
        self.wrong = {at for at in range(BLOCKS) if self.random.random() < self.evil / 20}

    def answer(self, wish: Wish) -> Allowed:
        """Grant all, something, or nothing, or fail."""
        wanted = wish.last - wish.first
        if self.random.random() >= self.evil:
            return Allowed(NUMBER, wanted, False)
        some = self.random.randint(0, wanted)
        no, closing = PeerError("it", "asking", "no"), ClosedError("closing")
        later = PeerError("it", "asking", "later", is_busy=True)
        outcome = self.random.choice((None, no, closing, later))
        if outcome is not None:
            raise outcome
        return Allowed(NUMBER, some, self.random.random() < 0.5)

    def connect(self) -> None:
        """Let a connection be made, or not."""
        if self.random.random() < self.evil / 2:
            own = PeerError("it", "connecting", "no", is_own=True)
            raise self.random.choice(
                (PeerError("it", "connecting", "no"), own, OSError(24, "EMFILE"))
            )

    async def strike(self) -> None:
        """Break connections, clear or stop, until cancelled."""
        while True:
            for _ in range(self.random.randint(1, 30)):
                await asyncio.sleep(0)
            what, sockets = self.random.random(), self.own.holders.sockets
            if what < 0.4 * self.evil and sockets:
                self.own.holders.owner.ring.stop(self.random.choice(sockets))
            elif what < 0.45 * self.evil:
                self.own.port._transport.stop(HOLDER)
            elif what < 0.5 * self.evil:
                await self.own.port._transport.forget(HOLDER)
            elif what < 0.52 * self.evil:
                self.own.port.cleared()
            elif what < 0.53 * self.evil:
                self.own.port.stop()
            await asyncio.sleep(0.001)


async def play(seed: int) -> None:
    """Read while things go wrong, and compare every byte."""
    before = open_descriptors()
    async with reading(patience_s=0.1) as own:
        chaos = Chaos(seed, own)
        own.holders.owner.host.sums[list(chaos.wrong)] ^= 1
        expected = own.node.arena.array.copy()
        for first, last in chaos.reads:
            own.submit(first, last - first)
        async with asyncio.TaskGroup() as group:
            striking = group.create_task(chaos.strike())
            ends = [await own.completion() for _ in chaos.reads]
            striking.cancel()
        assert sorted(end.op_id for end in ends) == [n + 1 for n in range(len(ends))]
        for end in ends:
            check(chaos, end, expected)
        assert np.array_equal(own.node.arena.array, expected), "nothing else is written"
    assert open_descriptors() == before


def check(chaos: Chaos, end: Completion, expected: NDArray[np.uint8]) -> None:
    """Check how a transfer has ended, and add what it may have written to what is expected."""
    node, owner = chaos.own.node, chaos.own.holders.owner
    first, last = chaos.reads[end.op_id - 1]
    assert (end.error is None) == (end.filled == last - first)
    sent = np.arange(first, first + end.filled)
    places = (sent + BEHIND) % BLOCKS
    assert chaos.wrong.isdisjoint(sent.tolist())
    assert node.blocks(places) == owner.blocks(sent)
    assert node.host.sums[places].tolist() == owner.host.sums[sent].tolist()
    targets = (np.arange(first, last) + BEHIND) % BLOCKS
    expected[targets, :BLOCK_BYTES] = node.arena.array[targets, :BLOCK_BYTES]


@pytest.mark.parametrize("seed", range(FIRST, FIRST + SEEDS))
async def test_what_arrived_is_right_whatever_fails(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every transfer ends once; its leading blocks have the owner's bytes; nothing is left."""
    monkeypatch.setattr(port_module, "READ_BYTES", 3 * BLOCK_BYTES)
    monkeypatch.setattr(port_module, "BUSY_S", 0.001)
    await play(seed)
