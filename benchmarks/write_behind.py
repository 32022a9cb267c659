"""Blocks owed to the SSD: whether they get there, how soon, and what their writing costs gets.

Limit: fio's writes of the same block size, O_DIRECT and depth, in the same run. The tier's files
have been written before, as fio's was. Host memory holds a tenth of what is put, and puts may queue
only a few blocks for the SSD, so nearly everything is owed.
"""

from __future__ import annotations

import asyncio
import shutil
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from benchmarks.disk_limits import BLOCK_BYTES, Fio, huge_pages, write_once
from benchmarks.harness import Figures, Options, percentile
from benchmarks.rigs import LARGE, cache_of, kv_caches, prompt, slots_of
from flexkv.common.config import MB
from flexkv.common.terms import Tier
from flexkv.kvmanager import KVManager

PUT_BLOCKS, QUEUED_BLOCKS = 16, 4
LOOKS_MAX = 100_000
RATE_SHARE = 0.8
"""The mean rate of puts, as a fraction of the rate at which fio writes."""


def measure(options: Options) -> Figures:
    """Return the figures of the case; without fio there is nothing to compare with."""
    if shutil.which("fio") is None:
        return {"against fio": "not measured: fio is not installed"}
    host_blocks = 32 if options.quick else 256
    with tempfile.TemporaryDirectory(prefix=".flexkv-bench-", dir=options.directory) as directory:
        return asyncio.run(_measure(Path(directory), host_blocks, options.repeats))


async def _measure(directory: Path, host_blocks: int, repeats: int) -> Figures:
    kept, drains, idle, beside = [], [], list[float](), list[float]()
    with huge_pages(64) as huge:
        for number in range(repeats):
            async with _manager(directory / f"{number}", host_blocks) as rig:
                write_once(rig.file)
                fio = Fio(rig.file, host_blocks // 2, huge)
                rates = [fio.write(rig.depth)]
                await rig.keep_a_hit()
                idle += await rig.gets_ms(0.3)
                kept.append(await rig.paced(RATE_SHARE * rates[0], 10 * host_blocks))
                took_s, blocks = await rig.drain()
                rates.append(fio.write(rig.depth))
                limit_s = blocks * BLOCK_BYTES / (statistics.mean(rates) * 1e9)
                drains.append(took_s / limit_s)
                beside += await rig.gets_beside_drains_ms(4)
                fio.close()
            shutil.rmtree(directory / f"{number}")
    return {
        "blocks that host memory evicted and the SSD has / evicted, least": min(kept),
        "time until nothing is owed / owed bytes at fio's rate": statistics.median(drains),
        "host-hit get, idle p99 ms": percentile(idle, 99),
        "host-hit get while owed blocks are written / idle, p99": percentile(beside, 99)
        / percentile(idle, 99),
        "host-hit gets while owed blocks are written, samples": float(len(beside)),
    }


@asynccontextmanager
async def _manager(directory: Path, host_blocks: int) -> AsyncIterator[_Rig]:
    cache = cache_of(
        host_blocks,
        directory,
        num_ssd_blocks=14 * host_blocks,
        write_behind_max_gb=QUEUED_BLOCKS * BLOCK_BYTES / 2**30,
    )
    async with KVManager(LARGE, cache) as manager:
        manager.register_kv_caches(kv_caches(LARGE, PUT_BLOCKS))
        depth = int(cache.disk_write_window_mb * MB) // BLOCK_BYTES
        yield _Rig(manager, directory / "blocks-0000.flexkv", depth, host_blocks)


class _Rig:
    """A manager with a small host tier, and prompts that were never put."""

    def __init__(self, manager: KVManager, file: Path, depth: int, host_blocks: int) -> None:
        self.manager, self.file, self.depth = manager, file, depth
        self.host_blocks, self._next = host_blocks, 0
        self._slots = slots_of(range(PUT_BLOCKS))
        self._hit = prompt(10_000, 8)

    async def put(self) -> None:
        """Put a new prompt."""
        self._next += 1
        await self.manager.put(prompt(self._next, PUT_BLOCKS), self._slots)

    async def keep_a_hit(self) -> None:
        """Put the prompt that the gets find in host memory, and pin it there."""
        await self.manager.put(self._hit, self._slots[: 8 * 16])
        await self.manager.flush()
        self.manager.pin(self._hit)

    async def paced(self, rate: float, blocks: int) -> float:
        """Put in bursts of half of host memory, at a mean rate in GB/s.

        Returns:
            The fraction of the blocks evicted from host memory that the SSD has.
        """
        burst = self.host_blocks // 2 // PUT_BLOCKS
        first, begin = self._next, time.perf_counter()
        while (put := (self._next - first) * PUT_BLOCKS) < blocks:
            due_s = put * BLOCK_BYTES / (rate * 1e9)
            await asyncio.sleep(max(0.0, begin + due_s - time.perf_counter()))
            for _ in range(burst):
                await self.put()
        evicted = self.manager.statistics().tiers["host"].evicted_blocks
        await self.manager.flush()
        self.manager.clear(Tier.HOST)
        there = sum(
            self.manager.match(prompt(number, PUT_BLOCKS)).tokens_by_tier[Tier.DISK] // 16
            for number in range(first + 1, self._next + 1)
        )
        lost = (self._next - first) * PUT_BLOCKS - there
        return 1.0 - lost / max(1, evicted)

    async def drain(self) -> tuple[float, int]:
        """Put a burst; return the seconds until nothing is owed, and the blocks that were owed."""
        for _ in range(self.host_blocks * 5 // 8 // PUT_BLOCKS):
            await self.put()
        begin, blocks = time.perf_counter(), self._owed()
        for _ in range(LOOKS_MAX):
            if not self._owed():
                return time.perf_counter() - begin, blocks
            await asyncio.sleep(0.0005)
        raise TimeoutError("owed blocks were not written")

    def _owed(self) -> int:
        behind = self.manager.statistics().write_behind["disk"]
        return behind.owed_blocks + behind.writing_blocks

    async def gets_ms(self, seconds: float) -> list[float]:
        """Repeat a get that hits host memory for `seconds`; return the milliseconds of each."""
        took, until = [], time.perf_counter() + seconds
        while time.perf_counter() < until:
            took.append(await self._get_ms())
        return took

    async def gets_beside_drains_ms(self, drains: int) -> list[float]:
        """Repeat a get that hits host memory while the owed blocks of each burst are written."""
        await self.keep_a_hit()
        took = []
        for _ in range(drains):
            for _ in range(self.host_blocks * 5 // 8 // PUT_BLOCKS):
                await self.put()
            while self._owed():
                took.append(await self._get_ms())
        return took

    async def _get_ms(self) -> float:
        begin = time.perf_counter()
        response = await self.manager.get(self._hit, self._slots[: 8 * 16])
        took_ms = (time.perf_counter() - begin) * 1e3
        assert response.return_mask.any()
        await asyncio.sleep(0.0005)
        return took_ms
