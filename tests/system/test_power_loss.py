"""Tests of power loss at any moment: any subset of the unflushed sectors is lost."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from random import Random

import numpy as np
import pytest

from flexkv.common.terms import Tier
from flexkv.index.keys import block_keys
from flexkv.kvmanager import KVManager
from flexkv.testing.known_bytes import KnownDevice
from tests.system.crash_writer import (
    CHAIN,
    DEVICE_BLOCKS,
    MODEL,
    PER_BLOCK,
    PROMPT_BLOCKS,
    config,
    prompt,
    slots_of,
)

POWER_LOSSES = int(os.environ.get("POWER_LOSSES", "20"))
SECTOR = 512


def lose(before: Path, after: Path, lost: Path, random: Random) -> None:
    """Mix two states of a directory: each sector that differs is the old one or the new one."""
    lost.mkdir()
    kept = random.choice([0.0, 0.5, 0.9, 1.0])
    for file in after.iterdir():
        new = bytearray(file.read_bytes())
        old_file = before / file.name
        old = old_file.read_bytes() if old_file.exists() else b""
        if file.name == "journal.flexkv" and random.random() < 0.5:
            new = new[: random.randint(min(len(old), len(new)), len(new))]
        old = old.ljust(len(new), b"\0")
        for at in range(0, len(new), SECTOR):
            sector = slice(at, at + SECTOR)
            if new[sector] != old[sector] and random.random() >= kept:
                new[sector] = old[sector][: len(new[sector])]
        (lost / file.name).write_bytes(new)


async def live(
    directory: Path, states: Path, random: Random, ssd_blocks: int
) -> tuple[int, set[bytes]]:
    """Put prompts, flush, put more, and lose power at a random point.

    Returns:
        The prompts' seed times 1000 plus their count, and the keys that must have survived.
    """
    device = KnownDevice(MODEL, PER_BLOCK, DEVICE_BLOCKS)
    seed = random.randrange(1 << 30)
    number, flushes = 0, random.randint(1, 3)
    async with KVManager(MODEL, config(str(directory), ssd_blocks)) as manager:
        manager.register_kv_caches(device.kv_caches)

        async def put_some() -> None:
            nonlocal number
            for _ in range(random.randint(1, 6)):
                tokens = prompt(seed, number)
                keys = block_keys(CHAIN.keys(tokens))
                device.fill(range(len(keys)), keys)
                await manager.put(tokens, slots_of(0, len(keys)))
                number += 1

        for _ in range(flushes):
            await put_some()
            await manager.flush()
        shutil.copytree(directory, states / "flushed")
        flushed = on_disk(manager)
        await put_some()
        shutil.copytree(directory, states / "lost in")
        still_there = on_disk(manager)
    lose(states / "flushed", states / "lost in", states / "after", random)
    return seed * 1000 + number, {key for key, _ in flushed & still_there}


def on_disk(manager: KVManager) -> set[tuple[bytes, int]]:
    """Return the keys and rows of the blocks that are READY in the SSD tier."""
    residency = manager.engine.residency
    capacity = residency.counts(Tier.DISK).capacity
    exported = residency.export(Tier.DISK, np.arange(capacity))
    return {(record[:16].tobytes(), n) for n, record in enumerate(exported) if record.any()}


def reachable(keys: list[bytes], there: set[bytes]) -> list[bytes]:
    """Return the leading keys that are present: no block without its parent can be found."""
    count = next((n for n, key in enumerate(keys) if key not in there), len(keys))
    return keys[:count]


@pytest.mark.parametrize("seed", range(POWER_LOSSES))
async def test_a_loss_of_power_costs_what_was_not_flushed(tmp_path: Path, seed: int) -> None:
    """After a loss of power no byte is wrong, and no flushed block is lost unless overwritten."""
    random = Random(seed)
    ssd_blocks = random.choice([40, 100, 2000])
    (tmp_path / "tier").mkdir()
    written, must_be = await live(tmp_path / "tier", tmp_path, random, ssd_blocks)
    put_seed, count = divmod(written, 1000)
    device = KnownDevice(MODEL, PER_BLOCK, DEVICE_BLOCKS)
    async with KVManager(MODEL, config(str(tmp_path / "after"), ssd_blocks)) as manager:
        manager.register_kv_caches(device.kv_caches)
        for number in range(count):
            tokens = prompt(put_seed, number)
            keys = block_keys(CHAIN.keys(tokens))
            device.clear(range(PROMPT_BLOCKS))
            response = await manager.get(tokens, slots_of(0, len(keys)))
            blocks = int(response.return_mask.sum()) // PER_BLOCK
            assert device.mismatches(range(blocks), keys[:blocks]) == 0, "wrong bytes"
            wanted = reachable(keys, must_be)
            assert blocks >= len(wanted), f"{len(wanted) - blocks} flushed blocks are lost"
