"""Tests of the SSD tier on a real file system that fails and hangs: errors come from the kernel."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flexkv.common.errors import DeadlineError, StorageError
from flexkv.common.terms import Tier
from flexkv.io.ssd.files import StripedFiles
from flexkv.kvmanager import KVManager
from tests.system.conftest import MODEL, PER_BLOCK, bytes_of, cache_config, kv_caches, slots_of
from tests.system.mounted import Disk, mounted_disk

PROMPT = np.arange(8 * PER_BLOCK)
PATIENCE_S = 20.0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Mount a disk that fails on demand."""
    with mounted_disk(tmp_path) as disk:
        yield disk


async def until_got(manager: KVManager, blocks: range) -> None:
    """Get the prompt until all of its blocks come."""
    async with asyncio.timeout(PATIENCE_S):
        while not (await manager.get(PROMPT, slots_of(blocks))).return_mask.all():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_reads_that_fail_are_misses_and_the_tier_comes_back(disk: Disk) -> None:
    """After EIO from reads, gets are misses and reads are down; later the right bytes come back."""
    async with KVManager(MODEL, cache_config(disk.mounted)) as manager:
        caches = kv_caches()
        manager.register_kv_caches(caches)
        for number in range(4):
            await manager.put(PROMPT + 1000 * number, slots_of(range(8)))
            await manager.flush()
        manager.clear(Tier.HOST)
        disk.suffers_from("read")
        for number in range(1, 4):  # a different prompt each time, since failed blocks are dropped
            response = await manager.get(PROMPT + 1000 * number, slots_of(range(8, 16)))
            assert not response.return_mask.any()
        assert manager.statistics().tiers["disk"].reads == "down"
        disk.suffers_from("")
        await until_got(manager, range(16, 24))
        assert np.array_equal(bytes_of(caches, range(16, 24)), bytes_of(caches, range(8)))


async def test_writes_that_fail_are_told_by_flush_and_served_from_host(disk: Disk) -> None:
    """After EIO from writes, flush raises, and host memory still serves the blocks."""
    async with KVManager(MODEL, cache_config(disk.mounted)) as manager:
        caches = kv_caches()
        manager.register_kv_caches(caches)
        disk.suffers_from("write sync")
        await manager.put(PROMPT, slots_of(range(8)))
        with pytest.raises(StorageError, match="EIO"):
            await manager.flush()
        assert (await manager.get(PROMPT, slots_of(range(8, 16)))).return_mask.all()
        assert np.array_equal(bytes_of(caches, range(8, 16)), bytes_of(caches, range(8)))
        disk.suffers_from("")


async def test_a_disk_that_hangs_in_the_kernel_costs_its_own_blocks_only(disk: Disk) -> None:
    """A get from a hung disk fails at the deadline, host hits go on, and the tier comes back."""
    cache = cache_config(disk.mounted, io_deadline_s=0.3)
    other = PROMPT + 1000
    async with KVManager(MODEL, cache) as manager:
        caches = kv_caches()
        manager.register_kv_caches(caches)
        await manager.put(PROMPT, slots_of(range(8)))
        await manager.flush()
        manager.clear(Tier.HOST)
        await manager.put(other, slots_of(range(8)))
        await manager.flush()
        disk.suffers_from("hang")
        begin = time.monotonic()
        response = await manager.get(PROMPT, slots_of(range(8, 16)))
        assert not response.return_mask.any()
        assert isinstance(response.error, DeadlineError)
        assert time.monotonic() - begin < 5
        assert manager.statistics().tiers["disk"].reads == "hung"
        assert (await manager.get(other, slots_of(range(24, 32)))).return_mask.all()
        disk.suffers_from("")
        await until_got(manager, range(16, 24))
        assert np.array_equal(bytes_of(caches, range(16, 24)), bytes_of(caches, range(8)))


def test_only_files_in_user_space_may_hold_up_who_submits(disk: Disk, tmp_path: Path) -> None:
    """Only files of user-space file systems may block the submitter: kernel threads do the I/O."""
    for folder, may_block in ((disk.mounted / "kv", True), (tmp_path / "kv", False)):
        files = StripedFiles.open([folder], 4, 4096)
        assert files.may_block == may_block
        files.close()


async def test_a_sync_that_failed_is_not_believed_the_next_time(disk: Disk) -> None:
    """After EIO from fsync, the next good flush writes again all that may have been lost."""
    async with KVManager(MODEL, cache_config(disk.mounted)) as manager:
        manager.register_kv_caches(kv_caches())
        await manager.put(PROMPT, slots_of(range(8)))
        await manager.flush()
        written = manager.statistics().routes["host→disk"].blocks
        await manager.put(PROMPT + 1000, slots_of(range(8)))
        disk.suffers_from("sync")
        for _ in range(2):
            with pytest.raises(StorageError, match="EIO"):
                await manager.flush()
        assert manager.match(PROMPT).tokens_by_tier[Tier.HOST] == len(PROMPT)
        disk.suffers_from("")
        assert (await manager.flush()).lacking_blocks == {}
        assert manager.statistics().routes["host→disk"].blocks >= written + 16, "believed"
        manager.clear(Tier.HOST)
        assert manager.match(PROMPT + 1000).tokens_by_tier[Tier.DISK] == len(PROMPT)
    async with KVManager(MODEL, cache_config(disk.mounted)) as manager:
        assert manager.match(PROMPT + 1000).tokens == manager.match(PROMPT).tokens == len(PROMPT)
