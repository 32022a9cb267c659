"""Tests of restarts after `kill -9` of a real process at random moments, KILLS times."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from random import Random
from typing import IO

import pytest

from flexkv.index.keys import block_keys
from flexkv.kvmanager import KVManager
from flexkv.process.polling import is_readable
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
from tests.system.forked import Program

KILLS = int(os.environ.get("KILLS", "6"))
ROOMY, TIGHT = 20_000, 200
"""Blocks of a tier that holds all puts of one life, and of one that is overwritten all the time."""


class Life:
    """What one process reported before it was killed.

    Attributes:
        put_s: when it reported the end of each put.
        flushed: how many prompts were safe on SSD.
        resident: by prompt, how many blocks were resident after a flush.
        killed_s: when it was killed.
    """

    def __init__(
        self, directory: Path, seed: int, ssd_blocks: int, seconds: float, work: str = "write"
    ) -> None:
        self.put_s: list[float] = []
        self.flushed = 0
        self.resident: dict[int, int] = {}
        writer = Program("tests.system.crash_writer", "main", directory, seed, ssd_blocks, work)
        lines = iter(writer.stdout.readline, "")
        assert any(line == "open\n" for line in lines), "the writer did not start"
        self._read(writer.stdout, time.monotonic() + seconds)
        self.killed_s = time.monotonic()
        writer.kill()
        for line in writer.stdout:  # printed before the kill
            self._take(line)
        writer.close()

    def _read(self, lines: IO[str], until_s: float) -> None:
        while (left := until_s - time.monotonic()) > 0:
            if is_readable(lines, left):
                self._take(lines.readline())

    def _take(self, line: str) -> None:
        words = line.split()
        if words[:1] == ["put"] and len(words) == 2:
            self.put_s.append(time.monotonic())
        elif words[:1] == ["flushed"] and len(words) == 2:
            self.flushed = int(words[1])
        elif words[:1] == ["resident"] and len(words) == 3 and line.endswith("\n"):
            self.resident[int(words[1])] = int(words[2])


async def check(directory: Path, seed: int, ssd_blocks: int, life: Life) -> tuple[int, int]:
    """Get every prompt, and check its bytes.

    Return how many blocks came back of the prompts put over a second before the kill, of how many.
    """
    device = KnownDevice(MODEL, PER_BLOCK, DEVICE_BLOCKS)
    old = found = 0
    async with KVManager(MODEL, config(str(directory), ssd_blocks)) as manager:
        manager.register_kv_caches(device.kv_caches)
        for number, put_s in enumerate(life.put_s):
            tokens = prompt(seed, number)
            keys = block_keys(CHAIN.keys(tokens))
            device.clear(range(PROMPT_BLOCKS))
            response = await manager.get(tokens, slots_of(0, len(keys)))
            blocks = int(response.return_mask.sum()) // PER_BLOCK
            assert device.mismatches(range(blocks), keys[:blocks]) == 0, "wrong bytes"
            if number < life.flushed and ssd_blocks == ROOMY:
                assert blocks == len(keys), f"prompt {number} was flushed and is lost"
            if life.killed_s - put_s > 1.0:
                old, found = old + len(keys), found + blocks
        assert manager.statistics().corrupt_blocks == 0, "a torn block was believed in"
    return found, old


@pytest.mark.parametrize("ssd_blocks", [ROOMY, TIGHT])
async def test_a_killed_process_loses_nothing_that_was_flushed(
    tmp_path: Path, ssd_blocks: int
) -> None:
    """After a kill the tier opens; no byte is wrong, no flushed block is lost, few others are."""
    random = Random(ssd_blocks)
    all_found = all_old = 0
    for kill in range(KILLS // 2):
        seed = random.randrange(1 << 30)
        directory = tmp_path / f"tier-{kill // 5}"  # five lives in each directory
        seconds = 3.0 if kill % 10 == 9 else random.uniform(0.0, 0.6)
        life = Life(directory, seed, ssd_blocks, seconds)
        found, old = await check(directory, seed, ssd_blocks, life)
        all_found, all_old = all_found + found, all_old + old
    if ssd_blocks == ROOMY and all_old:
        assert all_found >= 0.99 * all_old, f"{all_found} of {all_old}"


async def test_every_block_that_is_resident_at_a_returned_flush_comes_back(tmp_path: Path) -> None:
    """Blocks resident at a flush come back, also after bursts of ten times host memory."""
    random = Random(7)
    for kill in range(max(1, KILLS // 2)):
        seed, directory = random.randrange(1 << 30), tmp_path / f"tier-{kill}"
        life = Life(directory, seed, ROOMY, random.uniform(0.1, 1.0), "write_in_bursts")
        device = KnownDevice(MODEL, PER_BLOCK, DEVICE_BLOCKS)
        async with KVManager(MODEL, config(str(directory), ROOMY, in_bursts=True)) as manager:
            manager.register_kv_caches(device.kv_caches)
            for number, resident in life.resident.items():
                tokens = prompt(seed, number)
                keys = block_keys(CHAIN.keys(tokens))
                assert resident == len(keys), "a put was not stored, or lost before the flush"
                device.clear(range(PROMPT_BLOCKS))
                response = await manager.get(tokens, slots_of(0, len(keys)))
                blocks = int(response.return_mask.sum()) // PER_BLOCK
                assert device.mismatches(range(blocks), keys[:blocks]) == 0, "wrong bytes"
                assert blocks >= resident, f"{resident - blocks} flushed blocks of {number}"
        shutil.rmtree(directory)
