"""The checked disk port, which has old blocks forgotten before it writes over them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import pytest

from flexkv.common.errors import InvariantError
from flexkv.common.terms import BlockIds, Route, Tier, Transfer
from flexkv.io.checksums.checked import CheckedDiskPort
from flexkv.io.ports import Completion
from flexkv.testing.fakes import FakeChecksummer, FakePort
from flexkv.testing.faults import FaultPlan
from flexkv.testing.virtual_time import run_virtual

BLOCKS, BLOCK_BYTES = 8, 16
IDS = np.arange(4)
WRITE = Transfer(1, 1, Route(Tier.HOST, Tier.DISK), IDS, IDS + 2)


class Bench:
    """A port whose writes wait until their disk blocks are reported as forgotten."""

    def __init__(self) -> None:
        self.store = np.zeros((BLOCKS, BLOCK_BYTES), np.uint8)
        host = np.ones((BLOCKS, BLOCK_BYTES), np.uint8)
        faults = FaultPlan(1)
        inner, checksummer = (
            FakePort(self.store, host, faults, BLOCK_BYTES),
            FakeChecksummer(host, faults),
        )
        self.port = CheckedDiskPort(inner, checksummer, BLOCKS, lambda at: ("fake", at))
        self.port.forget = self._forget
        self.port.connect(self._wake)
        self.asked: list[BlockIds] = []
        self.forgotten: list[Callable[[], None]] = []
        self.woken = asyncio.Event()

    def _wake(self) -> None:
        self.woken.set()

    def _forget(self, disk_ids: BlockIds, then: Callable[[], None]) -> bool:
        self.asked.append(disk_ids)
        self.forgotten.append(then)
        return False


def test_nothing_is_written_before_what_was_there_is_forgotten() -> None:
    """A write begins only after the blocks in its places are reported as forgotten."""

    async def run() -> None:
        bench = Bench()
        bench.port.submit(WRITE)
        await asyncio.sleep(10.0)  # in virtual time
        assert bench.port.reap() == []
        assert not bench.store.any()
        (asked,) = bench.asked
        assert asked.tolist() == [2, 3, 4, 5]
        bench.forgotten[0]()
        ended = []
        while not ended:
            await bench.woken.wait()
            bench.woken.clear()
            ended = bench.port.reap()
        assert ended == [Completion(1, None)]
        assert bench.store[2:6].all()
        bench.port.close()

    run_virtual(run())


def test_closing_while_a_write_waits_to_begin_is_our_mistake() -> None:
    """Closing while a write waits to begin raises: its end would never be reported."""

    async def run() -> None:
        bench = Bench()
        bench.port.submit(WRITE)
        with pytest.raises(InvariantError, match="1 transfers unreaped"):
            bench.port.close()

    run_virtual(run())
