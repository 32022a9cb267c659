"""SSD reads and writes against fio on the same file, small reads behind bulk, gets beside writes.

Limit: fio with the same block size and depth, O_DIRECT, io_uring, registered buffers, huge-page
memory where fio can get it; and a bare ring over as much memory as the engine uses. A block has
2 MiB. The files are new, and O_DIRECT bypasses the page cache, so every read is cold.
"""

from __future__ import annotations

import asyncio
import shutil
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path

from benchmarks.disk_limits import BLOCK_BYTES, BareRing, Fio, huge_pages
from benchmarks.harness import Figures, Options, median_ratio, percentile
from benchmarks.rigs import LARGE, cache_of, kv_caches, prompt, slots_of
from benchmarks.slow_disk import slow_disk
from flexkv.common.config import MB, CacheConfig
from flexkv.kvmanager import KVManager
from tests.system.mounted import missing

TIER_BULKS, FILLED_BULKS, FIRST_ROUNDS = 12, 5, 3
"""In bulk prompts, the size of the SSD tier and what `fill` writes; rounds of first writes."""
SLOW_RATE = 0.2e9
ALLOWED_MS = 2.0
"""A read behind bulk may take this much longer than twice its time alone."""


def measure(options: Options) -> Figures:
    """Return the figures of the case; without fio, a line says what was not measured."""
    bulk = 32 if options.quick else 256
    with tempfile.TemporaryDirectory(prefix=".flexkv-bench-", dir=options.directory) as directory:
        return asyncio.run(_measure(Path(directory), bulk, options.repeats))


async def _measure(directory: Path, bulk: int, repeats: int) -> Figures:
    cache = _cache(directory, bulk)
    async with KVManager(LARGE, cache) as manager:
        manager.register_kv_caches(kv_caches(LARGE, bulk))
        rig = _Rig(manager, cache, directory, bulk)
        await rig.fill()
        figures: Figures = {}
        if shutil.which("fio") is None:
            figures["against fio"] = "not measured: fio is not installed"
        else:
            figures |= await rig.reads_against_limits(repeats)
        figures |= await rig.small_behind_bulk(repeats)
        # Writes come last: they evict from the SSD tier what the reads need.
        if shutil.which("fio") is not None:
            figures |= await rig.writes_against_limits(repeats)
        figures |= await rig.gets_beside_writes(repeats)
    return figures | await _on_a_slow_disk(directory, bulk // 4, repeats)


def _cache(directory: Path, bulk: int) -> CacheConfig:
    """Return a configuration for bulk requests of `bulk` blocks."""
    return cache_of(
        2 * bulk + 8,
        directory,
        num_ssd_blocks=TIER_BULKS * bulk,
        write_behind_max_gb=bulk * BLOCK_BYTES / 2**30,
    )


async def _on_a_slow_disk(directory: Path, bulk: int, repeats: int) -> Figures:
    """Time small reads behind bulk on a disk that reads at `SLOW_RATE`."""
    name = f"at {SLOW_RATE / 1e9} GB/s: "
    if why := missing():
        return {name.rstrip(": "): f"not measured: {why}"}
    with slow_disk(directory, SLOW_RATE) as slow:
        cache = _cache(slow, bulk)
        async with KVManager(LARGE, cache) as manager:
            manager.register_kv_caches(kv_caches(LARGE, bulk))
            rig = _Rig(manager, cache, slow, bulk)
            await rig.fill()
            figures = await rig.small_behind_bulk(repeats)
    return {name + figure: value for figure, value in figures.items()}


class _Rig:
    """A filled SSD tier, and prompts whose blocks are on it."""

    def __init__(self, manager: KVManager, cache: CacheConfig, directory: Path, bulk: int) -> None:
        self.manager, self.bulk = manager, bulk
        self.file = max(directory.glob("blocks-*"), key=lambda path: path.stat().st_size)
        self.slots = slots_of(range(bulk))
        self.singles = 2 * bulk
        self._read_depth = int(cache.disk_read_window_mb * MB) // BLOCK_BYTES
        self._write_depth = int(cache.disk_write_window_mb * MB) // BLOCK_BYTES
        self._next_bulk, self._next_new, self._next_single = 0, 0, 0

    async def fill(self) -> None:
        """Write the single blocks and three bulk prompts; the last two stay in host memory."""
        for number in range(self.singles):
            await self.manager.put(prompt(1000 + number, 1), slots_of([number % self.bulk]))
            if number % 32 == 31:
                await self.manager.flush()
        for number in range(3):
            await self.manager.put(prompt(number, self.bulk), self.slots)
            await self.manager.flush()

    async def read_bulk(self) -> float:
        """Prefetch the bulk prompt that was used longest ago, and return the GB/s."""
        tokens = prompt(self._next_bulk % 3, self.bulk)
        self._next_bulk += 1
        before, begin = self._moved("disk→host"), time.perf_counter()
        await self.manager.prefetch(tokens)
        took_s = time.perf_counter() - begin
        moved = self._moved("disk→host") - before
        assert moved >= 0.7 * self.bulk * BLOCK_BYTES, "the blocks were not cold"
        return moved / took_s / 1e9

    async def put_bulk(self) -> None:
        """Put a new prompt, and leave its write-behind under way."""
        self._next_new += 1
        await self.manager.put(prompt(5000 + self._next_new, self.bulk), self.slots)

    async def write_bulk(self) -> float:
        """Return the GB/s of the write-behind of a prompt that was just put.

        Bytes in flight when the clock starts do not count.
        """
        begin = time.perf_counter()
        under_way = self.manager.statistics().queues["disk"].outbound_bytes_in_flight
        before = self._moved("host→disk") + under_way
        await self.manager.flush()
        took_s = time.perf_counter() - begin
        return (self._moved("host→disk") - before) / took_s / 1e9

    def _moved(self, route: str) -> int:
        counted = self.manager.statistics().routes.get(route)
        return counted.bytes if counted else 0

    async def reads_against_limits(self, repeats: int) -> Figures:
        """Compare bulk reads in turn with fio and the bare ring; the first round warms up."""
        reads, cpu, fios, rings, few = [], [], [], [], []
        with huge_pages(64) as huge, ExitStack() as stack:
            fio, ring = Fio(self.file, self.bulk, huge), BareRing(self.file, self.bulk)
            stack.callback(ring.close)
            for round_number in range(repeats + 1):
                if round_number % 2:
                    reads.append(await self._timed(self.read_bulk, cpu))
                fios.append(fio.read(self._read_depth))
                rings.append(ring.read(self._read_depth))
                few.append(ring.read(self._read_depth, self._read_depth))
                if not round_number % 2:
                    reads.append(await self._timed(self.read_bulk, cpu))
        return {
            "fio's memory": "huge pages" if huge else "ordinary pages",
            "read / fio": median_ratio(reads[1:], fios[1:]),
            "read / bare ring": median_ratio(reads[1:], rings[1:]),
            "bare ring read / fio": median_ratio(rings[1:], fios[1:]),
            "bare ring read into as few buffers as fio / fio": median_ratio(few[1:], fios[1:]),
            "read, GB/s": statistics.median(reads[1:]),
            "fio read, GB/s": statistics.median(fios[1:]),
            "read, share of a core": statistics.median(cpu[1:]),
        }

    async def writes_against_limits(self, repeats: int) -> Figures:
        """Compare the write-behind of bulk puts in alternation with fio's writes.

        The first rounds write to blocks that were only preallocated, the others to written
        blocks; the first of the others warms up.
        """
        writes, cpu, fios = [], [], []
        firsts, fio_firsts = [], []
        with huge_pages(64) as huge, ExitStack() as stack:
            fio = Fio(self.file, self.bulk, huge)
            stack.callback(fio.close)
            for _ in range(FIRST_ROUNDS):
                await self.put_bulk()
                firsts.append(await self.write_bulk())
                fio_firsts.append(fio.write_first(self._write_depth))
            for _ in range(TIER_BULKS - FILLED_BULKS - FIRST_ROUNDS):
                await self.put_bulk()
                await self.manager.flush()
            for round_number in range(repeats + 1):
                if round_number % 2:
                    await self.put_bulk()
                    writes.append(await self._timed(self.write_bulk, cpu))
                fios.append(fio.write(self._write_depth))
                if not round_number % 2:
                    await self.put_bulk()
                    writes.append(await self._timed(self.write_bulk, cpu))
        return {
            "first write / fio's first write": median_ratio(firsts, fio_firsts),
            "write / fio": median_ratio(writes[1:], fios[1:]),
            "write, GB/s": statistics.median(writes[1:]),
            "fio write, GB/s": statistics.median(fios[1:]),
            "write, share of a core": statistics.median(cpu[1:]),
        }

    async def _timed(self, work: Callable[[], Awaitable[float]], cpu: list[float]) -> float:
        cpu_before, begin = time.process_time(), time.perf_counter()
        rate = await work()
        cpu.append((time.process_time() - cpu_before) / (time.perf_counter() - begin))
        return rate

    async def small_behind_bulk(self, repeats: int) -> Figures:
        """Time single blocks that are read one after the other while a bulk prefetch runs."""
        alone, beside = [], []
        latencies: list[float] = []
        idle: list[float] = []
        for round_number in range(repeats + 1):  # the first warms up
            idle += [await self._read_single_ms() for _ in range(8)]
            rate = await self.read_bulk()
            both = await self._bulk_beside_singles(latencies)
            if round_number:
                alone.append(rate)
                beside.append(both)
            else:
                latencies.clear()
        single_ms = statistics.median(idle)
        return {
            "2 MiB read alone, p50 ms": single_ms,
            "2 MiB read behind bulk, p99 / (2 x alone + 2 ms)": percentile(latencies, 99)
            / (2 * single_ms + ALLOWED_MS),
            "2 MiB read behind bulk, p50 ms": percentile(latencies, 50),
            "2 MiB read behind bulk, p99 ms": percentile(latencies, 99),
            "2 MiB reads behind bulk, samples": float(len(latencies)),
            "all reads beside small ones / bulk alone": median_ratio(
                [bulk + small for bulk, small in beside], alone
            ),
            "bulk's own part / bulk alone": median_ratio([bulk for bulk, _ in beside], alone),
        }

    async def _bulk_beside_singles(self, latencies: list[float]) -> tuple[float, float]:
        """Return the GB/s of a bulk prefetch and of the single blocks that are read beside it."""
        begin, before = time.perf_counter(), self._moved("disk→host")
        singles = 0
        async with asyncio.TaskGroup() as group:
            bulk = group.create_task(self.manager.prefetch(prompt(self._next_bulk % 3, self.bulk)))
            await asyncio.sleep(0.005)
            while not bulk.done():
                took_ms = await self._read_single_ms()
                if not bulk.done():
                    latencies.append(took_ms)
                    singles += 1
        took_s = time.perf_counter() - begin
        self._next_bulk += 1
        moved = self._moved("disk→host") - before
        small = singles * BLOCK_BYTES
        return (moved - small) / took_s / 1e9, small / took_s / 1e9

    async def _read_single_ms(self) -> float:
        """Read the single block that was used longest ago, and return the milliseconds."""
        tokens = prompt(1000 + self._next_single % self.singles, 1)
        self._next_single += 1
        begin = time.perf_counter()
        response = await self.manager.prefetch(tokens)
        took_ms = (time.perf_counter() - begin) * 1e3
        assert response.return_mask.all(), "a single block is not on disk any more"
        return took_ms

    async def gets_beside_writes(self, repeats: int) -> Figures:
        """Time host-hit gets of 8 blocks: idle, and during the write-behind of a put."""
        hit, slots = prompt(9000, 8), slots_of(range(8))
        await self.manager.put(hit, slots)
        await self.manager.flush()
        idle, beside = [], []
        for _ in range(repeats * 2):
            idle += [await self._get_ms(hit, slots) for _ in range(50)]
            await self.put_bulk()
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
