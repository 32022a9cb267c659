"""Checksums of several KV groups on SSD: over the bytes of each group's blocks, and no others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flexkv.io.ssd.journal import groups_of
from flexkv.io.ssd.offline import OfflineSsd
from flexkv.kvmanager import KVManager
from tests.system.groups import MODEL, PER_BLOCK, cache_config
from tests.system.test_kv_groups import PROMPT, GroupRig
from tests.system.test_warm import until_scrubbed

FILE = "blocks-0000.flexkv"
SIZES = [space.block_bytes for space in MODEL.spaces(PER_BLOCK)]
STRIDE = MODEL.spaces(PER_BLOCK)[0].stride_bytes


async def stored(directory: Path) -> dict[int, list[int]]:
    """Store a prompt on SSD, and return the rows of each group's blocks."""
    async with KVManager(MODEL, cache_config(directory)) as manager:
        await GroupRig(manager).put(PROMPT)
        await manager.flush()
    with OfflineSsd(directory) as tier:
        assert tier.superblock.block_bytes == tuple(SIZES)
        rows, groups = tier.live.rows, groups_of(tier.live.blocks)
        return {group: sorted(rows[groups == group].tolist()) for group in range(len(SIZES))}


def flip(directory: Path, row: int, at: int) -> None:
    """Change one byte of a row's place."""
    with (directory / FILE).open("r+b") as file:
        file.seek(row * STRIDE + at)
        byte = file.read(1)
        file.seek(row * STRIDE + at)
        file.write(bytes([byte[0] ^ 1]))


def bad_rows(directory: Path) -> list[int]:
    """Return the rows that a check of the stopped tier finds corrupt."""
    with OfflineSsd(directory) as tier:
        return [row for checked in tier.verify() for row in checked.bad.tolist()]


async def test_a_stopped_tier_is_checked_by_group(tmp_path: Path) -> None:
    """A changed byte of any group's block is found; one behind a block is not."""
    rows = await stored(tmp_path)
    assert {group: len(each) for group, each in rows.items()} == {0: 10, 1: 10, 2: 10, 3: 5}
    assert bad_rows(tmp_path) == []
    for group, size in enumerate(SIZES):
        flip(tmp_path, rows[group][0], size)
        flip(tmp_path, rows[group][1], STRIDE - 1)
    assert bad_rows(tmp_path) == []
    for group, size in enumerate(SIZES):
        flip(tmp_path, rows[group][0], 0)
        flip(tmp_path, rows[group][2], size - 1)
    assert sorted(bad_rows(tmp_path)) == sorted(
        row for of_group in rows.values() for row in (of_group[0], of_group[2])
    )


@pytest.mark.parametrize("group", range(4))
async def test_the_scrubber_checks_by_group(tmp_path: Path, group: int) -> None:
    """In idle time, the last byte of a group's block is read and compared; the rest is not."""
    rows = await stored(tmp_path)
    for each, size in enumerate(SIZES):
        flip(tmp_path, rows[each][0], size)
    flip(tmp_path, rows[group][-1], SIZES[group] - 1)
    async with KVManager(MODEL, cache_config(tmp_path, ssd_scrub_mb_per_s=4000)) as manager:
        await until_scrubbed(manager, 80)
        assert manager.statistics().corrupt_blocks == 1
        kept = np.array(manager.statistics().tiers["disk"].group_blocks)
    lost = np.array([10, 10, 10, 5]) - kept
    assert lost[group] >= 1
    assert group == 0 or lost.sum() == 1, "a leaf has nothing behind it"
