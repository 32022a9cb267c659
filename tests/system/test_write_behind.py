"""Tests that blocks owed to the SSD are written, waited for in bounds, or counted as given up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from errno import EIO
from typing import Any

import numpy as np
import pytest

from flexkv.common.errors import DeadlineError, StorageError, TransferError
from flexkv.common.request import KVResponse, KVResponseStatus, Operation
from flexkv.common.terms import Tier
from flexkv.engine.engine import Engine
from flexkv.index.owed import EVICTED, FAILED, NOT_WORTH_IT
from flexkv.io.ports import Completion
from flexkv.testing.fakes import FakePort
from flexkv.testing.faults import FaultPlan
from flexkv.testing.simulated_groups import TOKENS_PER_BLOCK
from tests.system.test_degraded import disk_of
from tests.system.test_keeping import on_engine, perform

BLOCKS = 4
QUICK = FaultPlan(1, 0.0, 0.0001, 0.001)
SLOW = FaultPlan(1, 0.0, 0.5, 0.5)
QUEUED_GB = 2 * 4096 / 2**30
"""Puts may queue two blocks for the SSD; further ones are owed."""


def prompt(number: int, blocks: int = BLOCKS) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return a prompt that shares nothing with others."""
    return np.arange(blocks * TOKENS_PER_BLOCK) + 1000 * number


async def put(engine: Engine, number: int, blocks: int = BLOCKS) -> KVResponse:
    """Put a prompt, without waiting for its write-behind."""
    return await perform(engine, Operation.PUT, prompt(number, blocks))


def failing(disk: FakePort) -> Callable[[], list[Completion]]:
    """Make every transfer of a disk fail; return the original `reap`."""
    reap = disk.reap

    def failed() -> list[Completion]:
        return [Completion(op_id, StorageError("planted", 0, EIO)) for op_id, *_ in reap()]

    vars(disk)["reap"] = failed
    return reap


def on_disk(engine: Engine, *numbers: int) -> list[int]:
    """Clear host memory; return how many leading blocks of each prompt are on SSD."""
    engine.retention.clear(Tier.HOST)
    tokens = [engine.match(prompt(number)).tokens_by_tier[Tier.DISK] for number in numbers]
    return [count // TOKENS_PER_BLOCK for count in tokens]


def test_a_burst_far_above_what_may_be_queued_is_written() -> None:
    """After a burst of twenty times the queue a flush brings every block to the SSD."""

    async def work(engine: Engine) -> None:
        for number in range(10):
            await put(engine, number)
        assert (await engine.flush()).lacking_blocks == {}
        behind = engine.statistics().write_behind["disk"]
        assert (behind.owed_blocks, behind.writing_blocks, behind.given_up_blocks) == (0, 0, {})
        assert on_disk(engine, *range(10)) == [BLOCKS] * 10

    on_engine(work, host=12, disk=64, write_behind_max_gb=QUEUED_GB)


def test_what_is_owed_is_written_by_itself() -> None:
    """Owed blocks are written without a flush and without further requests."""

    async def work(engine: Engine) -> None:
        for number in range(5):
            await put(engine, number)
        await asyncio.sleep(1.0)  # virtual
        assert engine.statistics().write_behind["disk"].owed_blocks == 0
        assert on_disk(engine, *range(5)) == [BLOCKS] * 5

    on_engine(work, host=24, disk=64, write_behind_max_gb=0.0)


def test_a_burst_waits_for_a_bounded_time_and_no_longer() -> None:
    """On a slow disk a burst waits only so long; then blocks evicted unwritten are counted."""

    async def work(engine: Engine) -> None:
        loop = asyncio.get_running_loop()
        disk_of(engine)._faults = SLOW
        waits = []
        for number in range(40):
            begin_s = loop.time()
            assert (await put(engine, number)).status is KVResponseStatus.SUCCESS
            waits.append(loop.time() - begin_s)
        assert 1.9 < sum(waits) < 2.5, "the burst waited for more than it may, or for less"
        assert max(waits[-5:]) < 0.1, "a put waited though its burst had waited enough"
        disk_of(engine)._faults = QUICK
        await engine.flush()
        given_up = engine.statistics().write_behind["disk"].given_up_blocks
        written = sum(on_disk(engine, *range(40)))
        assert set(given_up) == {EVICTED}
        assert written + given_up[EVICTED] == 40 * BLOCKS, "blocks were dropped in silence"

    limits = {"write_behind_max_gb": QUEUED_GB, "disk_write_window_mb": 2 * 4096 / 2**20}
    on_engine(work, host=40, disk=256, write_behind_wait_s=2.0, **limits)


def test_a_burst_that_may_wait_loses_nothing() -> None:
    """If a burst may wait long enough, every block reaches the SSD."""

    async def work(engine: Engine) -> None:
        disk_of(engine)._faults = SLOW
        for number in range(20):
            await put(engine, number)
        await engine.flush()
        assert on_disk(engine, *range(20)) == [BLOCKS] * 20
        assert engine.statistics().requests_waiting == 0

    on_engine(work, host=12, disk=128, write_behind_max_gb=QUEUED_GB, write_behind_wait_s=600.0)


def test_a_burst_of_prompts_of_half_the_host_memory_waits_once() -> None:
    """A burst that has waited its time does not wait again when kept blocks are released."""

    async def work(engine: Engine) -> None:
        loop = asyncio.get_running_loop()
        disk_of(engine)._faults = FaultPlan(1, 0.0, 5.0, 5.0)
        begin_s = loop.time()
        for number in range(15):
            assert (await put(engine, number, 16)).status is KVResponseStatus.SUCCESS
        assert 1.9 < loop.time() - begin_s < 2.5

    limits = {"write_behind_max_gb": QUEUED_GB, "write_behind_wait_s": 2.0}
    on_engine(work, host=24, disk=1024, io_deadline_s=100.0, **limits)


def test_puts_at_once_lose_nothing_if_they_may_wait() -> None:
    """Concurrent puts lose nothing: blocks on their way to host memory count before they arrive."""

    async def work(engine: Engine) -> None:
        disk_of(engine)._faults = FaultPlan(1, 0.0, 0.02, 0.02)
        await asyncio.gather(*(put(engine, number) for number in range(60)))
        await engine.flush()
        assert engine.statistics().write_behind["disk"].given_up_blocks == {}
        assert engine._behind.coming_blocks == 0
        assert on_disk(engine, *range(60)) == [BLOCKS] * 60

    limits = {"write_behind_max_gb": QUEUED_GB, "write_behind_wait_s": 600.0}
    on_engine(work, host=40, disk=512, **limits)


def test_what_comes_to_host_memory_in_vain_is_counted_no_more() -> None:
    """Blocks that never reach host memory, by failure, cancel or clear, stop counting as coming."""

    async def work(engine: Engine) -> None:
        device = engine.devices._by_rank[0].port
        assert isinstance(device, FakePort)
        device._faults = FaultPlan(5, 0.3, 0.0001, 0.001)
        disk_of(engine)._faults = FaultPlan(1, 0.0, 0.01, 0.02)
        for number in range(60):
            putting = asyncio.ensure_future(put(engine, number))
            await asyncio.sleep(0.0001 * (number % 12))  # virtual
            if number % 3:
                putting.cancel()
            elif number % 2:
                engine.retention.clear()
            await asyncio.gather(putting, return_exceptions=True)
        await engine.flush()
        assert engine._behind.coming_blocks == 0

    on_engine(work, host=40, disk=512, write_behind_max_gb=QUEUED_GB)


def test_a_clear_does_not_hide_what_was_given_up() -> None:
    """Blocks given up by an SSD that is down are counted, even if a namespace is cleared."""

    async def work(engine: Engine) -> None:
        disk = disk_of(engine)
        reap = failing(disk)
        for number in range(13):
            await put(engine, number)
        engine.retention.clear(namespace="another")
        vars(disk)["reap"] = reap
        await asyncio.sleep(200.0)  # virtual
        given_up = engine.statistics().write_behind["disk"].given_up_blocks
        assert set(given_up) == {EVICTED}
        assert given_up[EVICTED] + engine.residency.counts(Tier.DISK).ready == 13 * BLOCKS

    on_engine(work, host=16, disk=256)


def test_a_tier_that_is_down_gets_what_it_missed() -> None:
    """Puts do not wait for a tier that is down, flush raises, and later everything is written."""

    async def work(engine: Engine) -> None:
        disk = disk_of(engine)
        reap = failing(disk)
        begin_s = asyncio.get_running_loop().time()
        for number in range(3):
            await put(engine, number)
        with pytest.raises(TransferError):
            await engine.flush()
        assert asyncio.get_running_loop().time() - begin_s < 1.0
        assert engine.statistics().tiers["disk"].writes == "down"
        vars(disk)["reap"] = reap
        await asyncio.sleep(10.0)  # virtual
        assert engine.statistics().write_behind["disk"].owed_blocks == 0
        assert (await engine.flush()).lacking_blocks == {}
        assert on_disk(engine, *range(3)) == [BLOCKS] * 3

    on_engine(work, host=32, disk=64)


def test_a_tier_that_hangs_keeps_no_host_memory() -> None:
    """Owed blocks do not hold host memory while the disk hangs; what is left is written later."""

    async def work(engine: Engine) -> None:
        disk = disk_of(engine)
        disk._faults = FaultPlan(1, 0.0, 30.0, 30.0)
        await put(engine, 0)
        await asyncio.sleep(3.0)  # virtual
        assert engine.statistics().tiers["disk"].writes == "hung"
        begin_s = asyncio.get_running_loop().time()
        for number in range(1, 9):
            assert (await put(engine, number)).status is KVResponseStatus.SUCCESS
        assert asyncio.get_running_loop().time() - begin_s < 0.5
        assert engine.statistics().write_behind["disk"].kept_blocks == 0
        with pytest.raises(DeadlineError):
            await engine.flush()
        disk._faults = QUICK
        await asyncio.sleep(60.0)  # virtual
        await engine.flush()
        assert on_disk(engine, 8) == [BLOCKS]

    on_engine(work, host=16, disk=64, io_deadline_s=1.0)


class BlamelessError(TransferError):
    """A failure that no breaker counts."""

    blames_tier = False


def test_blocks_that_can_never_be_written_are_named() -> None:
    """A flush raises once for blocks that were given up after failures, and counts them."""

    async def work(engine: Engine) -> None:
        disk: Any = disk_of(engine)
        disk._faults, reap = FaultPlan(1, 1.0, 0.0001, 0.001), disk.reap
        disk.reap = lambda: [
            end if end.error is None else Completion(end.op_id, BlamelessError(end.op_id, "", 1))
            for end in reap()
        ]
        await put(engine, 0)
        with pytest.raises(TransferError):
            await engine.flush()
        assert engine.statistics().write_behind["disk"].given_up_blocks == {FAILED: BLOCKS}
        disk._faults = QUICK
        assert (await engine.flush()).lacking_blocks == {}
        assert on_disk(engine, 0) == [BLOCKS], "a flush tries again what had failed"

    on_engine(work, host=64, disk=256)


def test_a_flush_tells_what_has_no_place_on_the_ssd() -> None:
    """A flush returns how many blocks have no place on the SSD."""

    async def work(engine: Engine) -> None:
        for number in range(3):
            await put(engine, number)
        report = await engine.flush()
        assert report.lacking_blocks == {"disk": 6}
        assert engine.residency.counts(Tier.DISK).ready == 6

    on_engine(work, host=32, disk=6)


def test_a_flush_tells_what_another_one_is_still_writing() -> None:
    """Blocks for which only a later flush found a place are not written yet for the earlier one."""

    async def work(engine: Engine) -> None:
        engine.retention.resize(Tier.DISK, 2)
        await put(engine, 0)
        disk: Any = disk_of(engine)
        sync, syncing, go_on = disk.sync, asyncio.Event(), asyncio.Event()

        async def held_up() -> None:
            syncing.set()
            await go_on.wait()

        disk.sync = held_up
        earlier = asyncio.ensure_future(engine.flush())
        await syncing.wait()
        engine.retention.resize(Tier.DISK, BLOCKS)
        disk._faults = SLOW
        later = asyncio.ensure_future(engine.flush())
        while engine.statistics().write_behind["disk"].writing_blocks < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
        disk.sync = sync
        go_on.set()
        assert (await earlier).lacking_blocks == {"disk": 2}
        assert (await later).lacking_blocks == {}

    on_engine(work, host=32, disk=BLOCKS)


def test_a_flush_writes_what_the_ssd_has_lost_meanwhile() -> None:
    """A flush writes again what the SSD lost and host memory still has."""

    async def work(engine: Engine) -> None:
        await put(engine, 0)
        await engine.flush()
        engine.retention.clear(Tier.DISK)
        begin_s = asyncio.get_running_loop().time()
        await engine.flush()
        assert asyncio.get_running_loop().time() - begin_s < 0.5, "it waited for nothing"
        assert on_disk(engine, 0) == [BLOCKS]

    on_engine(work, host=32, disk=16)


def test_what_is_put_again_is_owed_once() -> None:
    """Prompts that are put over and over while the SSD is down are owed once; new ones too."""

    async def work(engine: Engine) -> None:
        disk = disk_of(engine)
        reap = failing(disk)
        for _ in range(50):
            for number in range(4):
                await put(engine, number)
        assert engine.statistics().tiers["disk"].writes == "down"
        behind = engine.statistics().write_behind["disk"]
        assert behind.owed_blocks + behind.writing_blocks == 4 * BLOCKS
        await put(engine, 4)
        behind = engine.statistics().write_behind["disk"]
        assert behind.owed_blocks + behind.writing_blocks == 5 * BLOCKS
        vars(disk)["reap"] = reap
        await asyncio.sleep(100.0)  # virtual
        assert on_disk(engine, *range(5)) == [BLOCKS] * 5

    on_engine(work, host=64, disk=128)


def test_another_block_at_the_place_of_one_that_is_owed_is_owed_too() -> None:
    """A block that takes the place of one evicted unwritten is owed as well."""

    async def work(engine: Engine) -> None:
        disk_of(engine)._faults = FaultPlan(1, 0.0, 30.0, 30.0)
        await put(engine, 0, 1)
        await asyncio.sleep(3.0)  # virtual
        disk_of(engine)._faults = QUICK
        for number in range(1, 9):
            await put(engine, number)
        await asyncio.sleep(100.0)  # virtual
        behind = engine.statistics().write_behind["disk"]
        in_host = engine.residency.counts(Tier.HOST).ready
        assert not len(engine.residency.lacking(Tier.HOST, Tier.DISK, 0, 16))
        assert engine.residency.counts(Tier.DISK).ready == 8 * BLOCKS + 1 - sum(
            behind.given_up_blocks.values()
        )
        assert in_host == 16

    on_engine(work, host=16, disk=64, io_deadline_s=1.0)


def test_writes_leave_host_memory_for_others() -> None:
    """A write window larger than host memory on a slow disk leaves places for every put."""

    async def work(engine: Engine) -> None:
        disk_of(engine)._faults = FaultPlan(1, 0.0, 5.0, 5.0)
        for number in range(20):
            assert (await put(engine, number)).status is KVResponseStatus.SUCCESS
            assert engine.residency.counts(Tier.HOST).pinned <= 36

    limits = {"write_behind_max_gb": QUEUED_GB, "write_behind_wait_s": 2.0}
    on_engine(work, host=40, disk=256, io_deadline_s=100.0, **limits)


@pytest.mark.parametrize(("blocks", "waits"), [(10, False), (12, True)])
def test_blocks_that_are_cleared_while_they_are_written_take_their_room_once(
    blocks: int, waits: bool
) -> None:
    """Cleared blocks under write take room once: a put that fits beside them does not wait."""

    async def work(engine: Engine) -> None:
        loop = asyncio.get_running_loop()
        disk_of(engine)._faults = FaultPlan(1, 0.0, 5.0, 5.0)
        await put(engine, 0, 8)
        engine.retention.clear(Tier.HOST)
        assert engine.residency.counts(Tier.HOST).draining == 8
        begin_s = loop.time()
        await put(engine, 1, blocks)
        assert (loop.time() - begin_s > 1.0) == waits

    on_engine(work, host=24, disk=64, io_deadline_s=100.0, write_behind_wait_s=60.0)


def test_what_is_owed_is_not_written_after_it_was_cleared() -> None:
    """Owed blocks that were cleared are neither written nor counted as given up."""

    async def work(engine: Engine) -> None:
        disk_of(engine)._faults = SLOW
        for number in range(4):
            await put(engine, number)
        engine.retention.clear()
        assert engine.statistics().write_behind["disk"].owed_blocks == 0
        disk_of(engine)._faults = QUICK
        await engine.flush()
        assert engine.residency.counts(Tier.DISK).ready == 0
        assert engine.statistics().write_behind["disk"].given_up_blocks == {}

    on_engine(work, host=32, disk=64, write_behind_max_gb=QUEUED_GB)


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_closing_writes_what_is_owed_for_a_bounded_time(seconds: float) -> None:
    """A close writes what is owed for at most `shutdown_flush_s`."""
    engines = []

    async def work(engine: Engine) -> None:
        engines.append(engine)
        disk_of(engine)._faults = FaultPlan(1, 0.0, 0.05, 0.05)
        for number in range(5):
            await put(engine, number)

    on_engine(work, host=32, disk=64, write_behind_max_gb=QUEUED_GB, shutdown_flush_s=seconds)
    assert (engines[0].residency.counts(Tier.DISK).ready == 5 * BLOCKS) is (seconds > 0)


def test_a_tier_that_refuses_blocks_is_counted() -> None:
    """Blocks that an SSD under lhd refuses for more popular ones are counted."""

    async def work(engine: Engine) -> None:
        for _ in range(40):
            for number in range(4):
                await put(engine, number)
                engine.match(prompt(number))
        for number in range(100, 160):
            await put(engine, number)
        await engine.flush()
        given_up = engine.statistics().write_behind["disk"].given_up_blocks
        written = engine.statistics().routes["host→disk"].blocks
        assert given_up.get(NOT_WORTH_IT, 0) + written >= 64 * BLOCKS - 12

    on_engine(work, host=12, disk=16, eviction_policy="lhd")
