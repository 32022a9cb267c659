"""SSD reads and writes against fio on the same file, small reads behind bulk, gets beside writes.

Limit: fio with the same block size and depth, O_DIRECT, io_uring, registered buffers, huge-page
memory where fio can have it. Blocks have 2 MiB; the files are made fresh, and O_DIRECT keeps the
page cache out, so every read is cold.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.harness import Figures, median_ratio, percentile
from benchmarks.rigs import LARGE, PER_BLOCK, cache_of, kv_caches, prompt, slots_of
from flexkv.kvmanager import KVManager

BLOCK_BYTES = 2 << 20
READ_DEPTH, WRITE_DEPTH = 6, 16
HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages")


def measure(repeats: int, quick: bool) -> Figures:
    """Give the figures of the case; what needs fio is left out, by name, where it is missing."""
    bulk = 32 if quick else 512
    with tempfile.TemporaryDirectory(prefix=".flexkv-bench-", dir=".") as directory:
        return asyncio.run(_measure(Path(directory), bulk, 2 if quick else max(5, repeats)))


async def _measure(directory: Path, bulk: int, repeats: int) -> Figures:
    singles = bulk
    host_blocks = 2 * bulk + 8
    cache = cache_of(
        host_blocks,
        directory,
        num_ssd_blocks=12 * bulk,
        write_behind_max_gb=bulk * BLOCK_BYTES / 2**30,
    )
    async with KVManager(LARGE, cache) as manager:
        manager.register_kv_caches(kv_caches(LARGE, bulk))
        rig = _Rig(manager, directory, bulk, singles)
        await rig.fill()
        with _huge_pages(64) as huge:
            figures = await rig.against_fio(repeats, huge)
        figures |= await rig.small_behind_bulk(repeats)
        figures |= await rig.gets_beside_writes(repeats)
        return figures


class _Rig:
    """A filled SSD tier, and prompts whose blocks are on it."""

    def __init__(self, manager: KVManager, directory: Path, bulk: int, singles: int) -> None:
        self.manager, self.bulk = manager, bulk
        self.file = max(directory.glob("blocks-*"), key=lambda path: path.stat().st_size)
        self.slots = slots_of(range(bulk))
        self.singles = iter(prompt(1000 + number, 1) for number in range(singles))
        self._singles = singles
        self._next_bulk, self._next_new = 0, 0

    async def fill(self) -> None:
        """Write the single blocks and three bulk prompts; the last two are in host memory then."""
        for number in range(self._singles):
            await self.manager.put(prompt(1000 + number, 1), slots_of([number % self.bulk]))
            if number % 32 == 31:
                await self.manager.flush()
        for number in range(3):
            await self.manager.put(prompt(number, self.bulk), self.slots)
            await self.manager.flush()

    async def read_bulk(self) -> float:
        """Prefetch the bulk prompt that was used longest ago; gives GB/s."""
        tokens = prompt(self._next_bulk % 3, self.bulk)
        self._next_bulk += 1
        begin = time.perf_counter()
        response = await self.manager.prefetch(tokens)
        took_s = time.perf_counter() - begin
        moved = int(response.return_mask.sum()) // PER_BLOCK * BLOCK_BYTES
        assert moved >= 0.7 * self.bulk * BLOCK_BYTES, "the blocks were not cold"
        return moved / took_s / 1e9

    async def write_bulk(self) -> float:
        """Put a new prompt, and give the GB/s of the write-behind that goes on after it."""
        self._next_new += 1
        await self.manager.put(prompt(5000 + self._next_new, self.bulk), self.slots)
        before = self._moved("host→disk")
        begin = time.perf_counter()
        await self.manager.flush()
        took_s = time.perf_counter() - begin
        return (self._moved("host→disk") - before) / took_s / 1e9

    def _moved(self, route: str) -> int:
        counted = self.manager.statistics().routes.get(route)
        return counted.bytes if counted else 0

    async def against_fio(self, repeats: int, huge: bool) -> Figures:
        """Reads and writes in alternation with fio's."""
        if shutil.which("fio") is None:
            return {"against fio": "not measured: fio is not installed"}
        reads, fio_reads, cpu = [], [], []
        for _ in range(repeats + 1):
            fio_reads.append(self._fio("randread", huge))
            cpu_before, begin = time.process_time(), time.perf_counter()
            reads.append(await self.read_bulk())
            took_s = time.perf_counter() - begin
            cpu.append((time.process_time() - cpu_before) / took_s)
        writes, fio_writes = [], []
        scratch = self.file.with_name("fio-writes")
        for _ in range(repeats + 1):
            fio_writes.append(self._fio("randwrite", huge, scratch))
            writes.append(await self.write_bulk())
        scratch.unlink()
        await self.fill_again()
        return {
            "fio's memory": "huge pages" if huge else "ordinary pages",
            "read / fio": median_ratio(reads[1:], fio_reads[1:]),
            "read, GB/s": statistics.median(reads[1:]),
            "fio read, GB/s": statistics.median(fio_reads[1:]),
            "read, share of a core": statistics.median(cpu[1:]),
            "write / fio": median_ratio(writes[1:], fio_writes[1:]),
            "write, GB/s": statistics.median(writes[1:]),
            "fio write, GB/s": statistics.median(fio_writes[1:]),
        }

    async def fill_again(self) -> None:
        """Put the bulk prompts back, which new ones may have pushed out of the SSD tier."""
        for number in range(3):
            await self.manager.put(prompt(number, self.bulk), self.slots)
            await self.manager.flush()
        self._next_bulk = 0

    def _fio(self, pattern: str, huge: bool, path: Path | None = None) -> float:
        """Give fio's GB/s on the tier's file (reads), or on one of its own (writes)."""
        # The span of the blocks that the engine reads: reading less would be served by more cache.
        span = (4 if path is None else 1) * self.bulk * BLOCK_BYTES
        arguments = [
            f"--filename={path or self.file}", f"--rw={pattern}", f"--bs={BLOCK_BYTES}",
            f"--iodepth={READ_DEPTH if path is None else WRITE_DEPTH}", "--direct=1",
            f"--size={span}", f"--io_size={self.bulk * BLOCK_BYTES}", "--randrepeat=0",
            "--ioengine=io_uring", "--fixedbufs=1", "--name=limit", "--output-format=json",
            f"--iomem={'mmaphuge' if huge else 'malloc'}", "--hugepage-size=2m",
            "--fallocate=posix", "--end_fsync=1", "--overwrite=1",
        ]  # fmt: skip
        told = subprocess.run(["fio", *arguments], capture_output=True, text=True, check=True)
        side = "read" if pattern == "randread" else "write"
        return float(json.loads(told.stdout)["jobs"][0][side]["bw_bytes"]) / 1e9

    async def small_behind_bulk(self, repeats: int) -> Figures:
        """Single blocks read one after the other while a bulk prefetch runs."""
        alone = [await self.read_bulk() for _ in range(repeats)]
        latencies, beside = [], []
        for _ in range(repeats):
            async with asyncio.TaskGroup() as group:
                bulk = group.create_task(self.read_bulk())
                await asyncio.sleep(0.005)
                while not bulk.done() and (tokens := next(self.singles, None)) is not None:
                    begin = time.perf_counter()
                    await self.manager.prefetch(tokens)
                    if not bulk.done():
                        latencies.append((time.perf_counter() - begin) * 1e3)
            beside.append(bulk.result())
        return {
            "2 MiB read behind bulk, p50 ms": percentile(latencies, 50),
            "2 MiB read behind bulk, p99 ms": percentile(latencies, 99),
            "2 MiB reads behind bulk, samples": float(len(latencies)),
            "bulk with small reads / bulk alone": statistics.median(beside)
            / statistics.median(alone),
        }

    async def gets_beside_writes(self, repeats: int) -> Figures:
        """Host-hit gets of 8 blocks: idle, and while the write-behind of a put goes on."""
        hit, slots = prompt(9000, 8), slots_of(range(8))
        await self.manager.put(hit, slots)
        await self.manager.flush()
        beside = []
        idle = [await self._get_ms(hit, slots) for _ in range(repeats * 100)]
        for _ in range(repeats * 2):
            self._next_new += 1
            await self.manager.put(prompt(5000 + self._next_new, self.bulk), self.slots)
            async with asyncio.TaskGroup() as group:
                writing = group.create_task(self.manager.flush())
                while not writing.done():
                    beside.append(await self._get_ms(hit, slots))
        return {
            "host-hit get, idle p99 ms": percentile(idle, 99),
            "host-hit get beside write-behind, p99 ms": percentile(beside, 99),
            "host-hit get beside write-behind / idle, p99": percentile(beside, 99)
            / percentile(idle, 99),
            "host-hit gets beside write-behind, samples": float(len(beside)),
        }

    async def _get_ms(self, tokens: object, slots: object) -> float:
        begin = time.perf_counter()
        response = await self.manager.get(tokens, slots)
        assert response.return_mask.all()
        return (time.perf_counter() - begin) * 1e3


@contextmanager
def _huge_pages(count: int) -> Iterator[bool]:
    """Reserve huge pages for fio where that is permitted, and give them back."""
    if os.geteuid() != 0:
        yield False
        return
    before = HUGE_PAGES.read_text()
    HUGE_PAGES.write_text(str(int(before) + count))
    try:
        yield int(HUGE_PAGES.read_text()) >= int(before) + count
    finally:
        HUGE_PAGES.write_text(before)
