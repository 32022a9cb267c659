"""Tests that I/O failures count against a tier, but cancelled reads and corrupt blocks do not."""

from __future__ import annotations

import asyncio
from errno import EIO

import numpy as np
import pytest

from flexkv.common.errors import StorageError
from flexkv.common.request import KVResponseStatus
from flexkv.common.terms import BLOCK_KEY_BYTES
from flexkv.engine.engine import Engine
from flexkv.testing.faults import FaultPlan
from tests.system.test_degraded import A, disk_of, fail_with, get, on_disk_only
from tests.system.test_keeping import on_engine, put

PROMPTS = [A + 100 * number for number in range(8)]


def health(engine: Engine) -> tuple[str, str]:
    """Return the health of reads and writes of the disk."""
    disk = engine.statistics().tiers["disk"]
    return disk.reads, disk.writes


def test_a_read_that_was_given_up_says_nothing_of_the_disk() -> None:
    """A recalled read between failed ones counts neither way: three failures still are in a row."""

    async def work(engine: Engine) -> None:
        await on_disk_only(engine, *PROMPTS)
        fail_with(engine, EIO)
        for tokens in PROMPTS[:2]:
            assert (await get(engine, tokens))[0] is KVResponseStatus.FAILED
        disk_of(engine)._faults = FaultPlan(1, 0.0, 0.5, 0.5)
        fails, waits = (asyncio.ensure_future(get(engine, tokens)) for tokens in PROMPTS[2:4])
        await asyncio.sleep(0.1)
        waits.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waits
        assert health(engine) == ("up", "up")
        assert (await fails)[0] is KVResponseStatus.FAILED
        assert health(engine) == ("down", "up")

    window_mb = 4 * BLOCK_KEY_BYTES / 2**20
    on_engine(work, host=32, disk=64, disk_read_window_mb=window_mb)


def test_blocks_that_are_corrupt_do_not_take_the_disk_away() -> None:
    """Corrupt blocks do not take the disk down: other reads are served from it."""

    async def work(engine: Engine) -> None:
        await on_disk_only(engine, *PROMPTS)
        store = disk_of(engine)._store
        right = store.copy()
        store ^= 1
        for tokens in PROMPTS[:5]:
            assert (await get(engine, tokens))[0] is KVResponseStatus.NOTFOUND
        store[:] = right
        assert health(engine) == ("up", "up")
        assert await get(engine, PROMPTS[5]) == (KVResponseStatus.SUCCESS, 4)

    on_engine(work, host=32, disk=64)


def test_reads_that_work_again_do_not_vouch_for_writes() -> None:
    """When both directions were down, reads that work again do not bring writes back."""

    async def work(engine: Engine) -> None:
        await on_disk_only(engine, *PROMPTS[:5])
        repair = fail_with(engine, EIO)
        for number, tokens in enumerate(PROMPTS[:3]):
            assert (await get(engine, tokens))[0] is KVResponseStatus.FAILED
            with pytest.raises(StorageError):
                await put(engine, tokens + 5000 + 100 * number)
        assert health(engine) == ("down", "down")
        await asyncio.sleep(1.1)
        with pytest.raises(StorageError):  # the trial write, which doubles the pause
            await put(engine, PROMPTS[6])
        repair()
        assert await get(engine, PROMPTS[3]) == (KVResponseStatus.SUCCESS, 4)
        assert health(engine) == ("up", "down")
        written = engine.statistics().routes["host→disk"].ops
        with pytest.raises(StorageError):
            await put(engine, PROMPTS[7])
        assert engine.statistics().routes["host→disk"].ops == written
        assert await get(engine, PROMPTS[4]) == (KVResponseStatus.SUCCESS, 4)
        await asyncio.sleep(2.1)
        await put(engine, np.append(PROMPTS[7], [1, 2]))
        assert health(engine) == ("up", "up")

    on_engine(work, host=48, disk=64)
