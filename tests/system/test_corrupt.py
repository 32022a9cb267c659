"""Tests that each corrupt block of a read is counted, and dropped for good."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from flexkv.common.request import KVResponse, KVResponseStatus, Operation
from flexkv.common.terms import BLOCK_KEY_BYTES, Tier
from flexkv.engine.engine import Engine
from flexkv.kvmanager import KVManager
from tests.system.conftest import MODEL, PER_BLOCK, bytes_of, cache_config, kv_caches, slots_of
from tests.system.test_degraded import disk_of
from tests.system.test_keeping import A, on_engine, put

BLOCKS = 16
STRIDE = 4096
PROMPT = np.arange(BLOCKS * PER_BLOCK)


def damage(folder: Path, rows: set[int]) -> None:
    """Change a byte in each of these rows of the SSD tier."""
    with (folder / "blocks-0000.flexkv").open("r+b") as file:
        for row in rows:
            file.seek(row * STRIDE + 11)
            byte = file.read(1)
            file.seek(row * STRIDE + 11)
            file.write(bytes([byte[0] ^ 0x10]))


class Life:
    """One life of an SSD tier: a manager with caches that hold the prompt's bytes."""

    def __init__(self, folder: Path) -> None:
        self.manager = KVManager(MODEL, cache_config(folder))
        self.caches = kv_caches()

    async def __aenter__(self) -> Life:
        await self.manager.__aenter__()
        self.manager.register_kv_caches(self.caches)
        return self

    async def __aexit__(self, *failure: Any) -> None:
        await self.manager.__aexit__(*failure)

    async def put(self, blocks: int = BLOCKS) -> None:
        """Store this many blocks of the prompt, in every tier."""
        await self.manager.put(PROMPT[: blocks * PER_BLOCK], slots_of(range(blocks)))
        await self.manager.flush()

    async def get(self) -> int:
        """Get the prompt; return how many blocks came, and check their bytes."""
        target = range(2 * BLOCKS, 3 * BLOCKS)
        response: KVResponse = await self.manager.get(PROMPT, slots_of(target))
        assert response.status in (KVResponseStatus.SUCCESS, KVResponseStatus.NOTFOUND)
        came = int(response.return_mask.sum()) // PER_BLOCK
        found = bytes_of(self.caches, target[:came])
        assert np.array_equal(found, bytes_of(self.caches, range(came)))
        return came

    @property
    def corrupt(self) -> int:
        """Return how many corrupt blocks were found."""
        return self.manager.statistics().corrupt_blocks


@pytest.mark.parametrize("piece_blocks", [1, 3, BLOCKS])
@pytest.mark.parametrize("seed", range(6))
async def test_every_corrupt_block_of_a_read_is_counted_and_dropped_for_good(
    seed: int, piece_blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics and log count every corrupt block of a read, and no later life finds any of them.

    They may be in one piece of the read or in several. The blocks before them come back.
    """
    monkeypatch.setattr("flexkv.tiers.limits.DISK_READ_PIECE_BYTES", piece_blocks * STRIDE)
    monkeypatch.setattr("flexkv.actors.pace.FIRST_PIECES", BLOCKS)  # all are in flight at once
    random = np.random.default_rng(seed)
    bad = set(random.permutation(BLOCKS)[: random.integers(2, 8)].tolist())
    async with Life(tmp_path) as life:
        await life.put()
    damage(tmp_path, bad)
    async with Life(tmp_path) as life:
        with capture_logs() as logs:
            assert await life.get() == min(bad)
        assert life.corrupt == len(bad)
        told = [entry["blocks"] for entry in logs if entry["event"] == "corrupt_block"]
        assert told == [len(bad)]
        # All blocks behind the first corrupt one are gone; those before the last one are put again.
        again = max(bad)
        await life.put(again)
    async with Life(tmp_path) as life:
        assert life.manager.match(PROMPT).tokens == again * PER_BLOCK
        assert (await life.get(), life.corrupt) == (again, 0)
        await life.put()
    async with Life(tmp_path) as life:
        assert (await life.get(), life.corrupt) == (BLOCKS, 0)


def test_what_a_cancelled_read_finds_corrupt_is_dropped_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The part of a cancelled read that is in flight is finished, and checked like any other."""
    monkeypatch.setattr("flexkv.tiers.limits.DISK_READ_PIECE_BYTES", BLOCK_KEY_BYTES)

    async def work(engine: Engine) -> None:
        await put(engine, A)
        engine.residency.clear(Tier.HOST)
        disk = disk_of(engine)
        disk._store ^= 1
        request = engine.requests.intake(Operation.PREFETCH, A)
        read = asyncio.create_task(engine.requests.perform(request))
        while not disk.in_flight:  # noqa: ASYNC110 -- on a virtual clock
            await asyncio.sleep(0)
        assert disk.in_flight == 2
        read.cancel()
        with pytest.raises(asyncio.CancelledError):
            await read
        await engine.scheduler.wait_idle()
        assert engine.statistics().corrupt_blocks == 2
        assert engine.match(A).tokens == 0

    on_engine(work, disk=8, disk_read_window_mb=2 * BLOCK_KEY_BYTES / 2**20)
