"""Laws of the fake port beyond the contract: its faults, and that a seed repeats them."""

import asyncio

import numpy as np
import pytest

from flexkv.common.errors import InvariantError, StorageError, TransferError
from flexkv.common.terms import Route, Tier, Transfer
from flexkv.io.ports import Completion
from flexkv.testing.fakes import FakePort
from flexkv.testing.faults import FaultPlan

BLOCKS, BLOCK_BYTES = 16, 8
PATIENCE_S = 20.0


def write(op_id, blocks=BLOCKS):
    """Return a transfer of the first blocks from host to disk."""
    ids = np.arange(blocks)
    return Transfer(
        op_id=op_id, owner=1, route=Route(Tier.HOST, Tier.DISK), source_ids=ids, target_ids=ids
    )


class Bench:
    """A fake port between two arrays, connected to the running loop."""

    def __init__(self, seed, failure_probability=0.0):
        self.store = np.zeros((BLOCKS, BLOCK_BYTES), np.uint8)
        self.host = np.full((BLOCKS, BLOCK_BYTES), 7, np.uint8)
        self.faults = FaultPlan(seed, failure_probability, delay_max_s=0.002)
        self.port = FakePort(self.store, self.host, self.faults, BLOCK_BYTES)
        self.woken = asyncio.Event()
        self.port.connect(self.woken.set)

    async def reap(self, wanted):
        """Wait for `wanted` completions, and return them in the order of their ends."""
        ended = []
        async with asyncio.timeout(PATIENCE_S):
            while len(ended) < wanted:
                await self.woken.wait()
                self.woken.clear()
                ended += self.port.reap()
        return ended


async def test_a_failure_tells_its_seed_and_moves_a_part_at_most():
    """An injected failure names the seed that replays it; it may have moved some of the blocks."""
    moved = set()
    for seed in range(30):
        bench = Bench(seed, failure_probability=1.0)
        bench.port.submit(write(3))
        ((op_id, error, _),) = await bench.reap(1)
        assert op_id == 3
        assert isinstance(error, TransferError)
        assert f"seed={seed}" in str(error)
        moved.add(int(np.count_nonzero(bench.store[:, 0])))
        bench.port.close()
    assert len(moved) > 1


async def test_a_buffer_reused_too_early_shows():
    """Bytes written to the source before its completion is reaped get into the copy."""
    spoilt = 0
    for seed in range(30):
        bench = Bench(seed)
        bench.port.submit(write(1))
        bench.host[:] = 99
        await bench.reap(1)
        spoilt += bool((bench.store == 99).any())
        bench.port.close()
    assert spoilt == 30


def test_the_same_seed_gives_the_same_plan():
    """Delays, failures, moments and orders depend only on the seed and on the calls."""

    def answers(plan):
        return [
            (plan.delay_s(), plan.fails(), plan.moment_s(1.0), plan.order(5), plan.cut(9))
            for _ in range(20)
        ]

    assert answers(FaultPlan(5, 0.5)) == answers(FaultPlan(5, 0.5))
    assert answers(FaultPlan(5, 0.5)) != answers(FaultPlan(6, 0.5))


async def test_completions_come_out_of_order():
    """Each transfer has its own delay, so transfers end in another order than they start."""
    bench = Bench(1)
    for op_id in range(20):
        bench.port.submit(write(op_id, blocks=1))
    assert bench.port.in_flight == 20
    ended = [op_id for op_id, *_ in await bench.reap(20)]
    assert sorted(ended) == list(range(20))
    assert ended != list(range(20))
    bench.port.close()


async def test_sync_fails_as_planned():
    """A planned failure of sync raises StorageError."""
    bench = Bench(1, failure_probability=1.0)
    with pytest.raises(StorageError):
        await bench.port.sync()
    bench.port.close()


async def test_a_token_in_flight_is_not_taken_again():
    """An op id that is in flight is refused, since two transfers could not be told apart."""
    bench = Bench(1)
    bench.port.submit(write(1))
    with pytest.raises(InvariantError):
        bench.port.submit(write(1))
    await bench.reap(1)
    bench.port.close()


def test_a_fake_needs_a_loop():
    """Submitting before `connect` raises, since the delays have no clock yet."""
    block = np.zeros((BLOCKS, BLOCK_BYTES), np.uint8)
    with pytest.raises(InvariantError):
        FakePort(block, block, FaultPlan(1), BLOCK_BYTES).submit(write(1))


async def test_no_end_overtakes_its_copies():
    """A completion comes after all its copies, even when all delays are zero."""
    bench = Bench(1)
    bench.faults.delay_min_s = bench.faults.delay_max_s = 0.0
    for op_id in range(BLOCKS):
        bench.store[:] = 0
        bench.port.submit(write(op_id))
        assert await bench.reap(1) == [Completion(op_id, None)]
        assert (bench.store == 7).all()
    bench.port.close()
