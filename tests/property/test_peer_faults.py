"""Owners that fail at any byte: what is believed is right, and nothing is written afterwards."""

from __future__ import annotations

import asyncio
import random

import numpy as np
import pytest
from numpy.typing import NDArray

from flexkv.io.peer import receiver as receiving
from flexkv.io.peer.frames import HEADER_BYTES, SUM_BYTES
from flexkv.io.peer.receiver import Receiver
from flexkv.io.peer.transport import Fetched
from tests.peer_rig import (
    BLOCK_BYTES,
    BLOCKS,
    PATIENCE_S,
    FaultyOwner,
    Node,
    close,
    connected,
    fetch,
    flood,
    nodes,
    nothing,
    reset,
)

SEEDS = 100
NEVER = 1 << 62
Ends = list[Fetched | None]
Bytes = NDArray[np.uint8]


class Scene:
    """Reads of one socket, and what happens to them, made from a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        ids = rng.sample(range(BLOCKS), BLOCKS)
        self.reads, at = [], 0
        for _ in range(rng.randint(1, 3)):
            count = rng.choice((1, 2, 5, 20))
            self.reads.append((rng.randrange(BLOCKS - count), np.array(ids[at : at + count])))
            at += count
        self.sizes = [HEADER_BYTES + len(own) * (SUM_BYTES + BLOCK_BYTES) for _, own in self.reads]
        total = sum(self.sizes)
        borders = [
            sum(self.sizes[:n]) + delta for n in range(len(self.sizes)) for delta in range(60)
        ]
        anywhere = rng.choice((rng.randrange(total), rng.choice(borders)))
        what = rng.choice(("cut", "flip", "cancel", "stall", "none"))
        self.cut_at = anywhere if what in ("cut", "stall") else NEVER
        self.flip_at = anywhere if what == "flip" else NEVER
        self.fault = rng.choice((close, reset)) if what == "cut" else nothing
        self.cancelled = {rng.randrange(len(self.reads))} if what == "cancel" else set()
        self.is_stall = what == "stall"
        largest = rng.choice((50, 5000, 500_000))
        self.piece_bytes = lambda: rng.randint(1 + largest // 50, largest)

    def whole(self, number: int) -> bool:
        """Return whether nothing happens to a read, nor to those before it.

        A reset takes along what has arrived and was not received yet.
        """
        end = sum(self.sizes[: number + 1])
        return (
            not self.cancelled and self.fault is not reset and min(self.cut_at, self.flip_at) >= end
        )


async def play(scene: Scene, owner: Node, reader: Node, evil: FaultyOwner, own: Receiver) -> Ends:
    """Run the reads and the owner; return how each read has ended, None if it was cancelled."""
    async with asyncio.TaskGroup() as group:
        owning = group.create_task(evil.run(scene.cut_at, scene.flip_at, scene.fault))
        tasks = [group.create_task(fetch(reader, own, *each)) for each in scene.reads]
        if scene.is_stall:
            await evil.stalled.wait()
            scene.cancelled = {at for at, task in enumerate(tasks) if not task.done()}
        elif scene.cancelled:
            for _ in range(scene.rng.randrange(60)):
                await asyncio.sleep(0)
        for at in scene.cancelled:
            tasks[at].cancel()
        await asyncio.wait(tasks)
        own.stop()
        owning.cancel()
    return [None if task.cancelled() else task.result() for task in tasks]


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_only_right_blocks_are_believed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut, reset, flipped, stalled or cancelled anywhere: a right prefix of each read counts.

    Reads to which nothing happens bring everything. Bytes change in the blocks that were asked for
    only, and no byte lands after the answer, though the peer goes on sending.
    """
    monkeypatch.setattr(receiving, "MESSAGE_BYTES", 3 * BLOCK_BYTES)
    async with nodes() as (owner, reader):
        for seed in range(SEEDS):
            scene, before = Scene(seed), reader.arena.array.copy()
            ours, theirs = connected(kind)
            receiver = Receiver(reader.ring, reader.ring.add(ours), "owner", PATIENCE_S)
            ours.close()
            evil = FaultyOwner(owner, theirs, scene.piece_bytes)
            ended = await play(scene, owner, reader, evil, receiver)
            after = reader.arena.array.copy()
            if theirs.fileno() != -1:
                flood(theirs)
            await reader.ring.remove(receiver.index)
            theirs.close()
            assert np.array_equal(reader.arena.array, after), seed
            check(scene, owner, ended, before, after, seed)


def check(scene: Scene, owner: Node, ended: Ends, before: Bytes, after: Bytes, seed: int) -> None:
    """Check what the reads have reported against the bytes."""
    asked = np.concatenate([own for _, own in scene.reads])
    untouched = np.setdiff1d(np.arange(BLOCKS), asked)
    assert np.array_equal(after[untouched], before[untouched]), seed
    assert np.array_equal(after[:, BLOCK_BYTES:], before[:, BLOCK_BYTES:]), seed
    for number, ((first, own), end) in enumerate(zip(scene.reads, ended, strict=True)):
        if scene.whole(number):
            assert end == Fetched(len(own), None), seed
        if end is None:
            assert number in scene.cancelled, seed
            continue
        filled, error = end
        assert (filled == len(own)) == (error is None), (seed, end)
        right = owner.arena.array[first : first + filled, :BLOCK_BYTES]
        assert np.array_equal(after[own[:filled], :BLOCK_BYTES], right), seed
