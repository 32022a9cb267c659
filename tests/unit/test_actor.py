"""What a transfer actor reports of its transfers, over a fake port on a virtual clock."""

from __future__ import annotations

import asyncio

import numpy as np

from flexkv.actors.actor import TransferActor, Window
from flexkv.common.terms import Route, Tier, Transfer
from flexkv.io.ports import Completion
from flexkv.testing.fakes import FakePort
from flexkv.testing.faults import FaultPlan
from flexkv.testing.virtual_time import run_virtual

BLOCK_BYTES, BLOCKS = 8, 64
READ = Route(Tier.DISK, Tier.HOST)


class Bench:
    """An actor whose window is one block, with the end time of each transfer."""

    def __init__(self) -> None:
        store = np.zeros((BLOCKS, BLOCK_BYTES), np.uint8)
        port = FakePort(store, store.copy(), FaultPlan(1, 0.0, 0.5, 1.0), BLOCK_BYTES)
        window = Window(BLOCK_BYTES, BLOCK_BYTES)
        self.actor = TransferActor(Tier.DISK, port, (window, window), 8)
        self.ended: dict[int, float] = {}
        self._ended = asyncio.Event()

    def _report(self, ends: list[Completion]) -> None:
        for op_id, error, *_ in ends:
            assert error is None
            self.ended[op_id] = asyncio.get_running_loop().time()
        if self.actor.is_idle():
            self._ended.set()

    async def run(self, *block_counts: int) -> None:
        """Post a transfer of each size, each with its own owner, and wait until all have ended."""
        self.actor.attach(self._report)
        for op_id, count in enumerate(block_counts):
            ids = np.arange(count)
            self.actor.post(Transfer(op_id, op_id, READ, ids, ids))
        task = asyncio.create_task(self.actor.run())
        await self._ended.wait()
        task.cancel()
        self.actor.close()


def test_a_transfer_has_begun_when_its_first_piece_has() -> None:
    """A transfer begins with its first piece; the begin is reported once, if begins are noted."""

    async def run() -> None:
        bench = Bench()
        bench.actor.note_begins(True)
        await bench.run(3, 2)
        first, second = bench.actor.take_begun(0), bench.actor.take_begun(1)
        assert first == 0.0
        assert second is not None
        assert 0.5 <= second <= 1.0, "the turn after the first piece"
        assert bench.ended[1] > second + 1.0
        assert bench.actor.take_begun(0) is None
        bench.actor.note_begins(False)
        assert bench.actor.take_begun(1) is None

    run_virtual(run())


def test_nothing_is_noted_of_begins_unless_asked() -> None:
    """An actor that was not told to note begins reports none."""

    async def run() -> None:
        bench = Bench()
        await bench.run(3)
        assert bench.actor.take_begun(0) is None

    run_virtual(run())
