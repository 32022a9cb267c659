"""The cost of surviving: checksums on and off, restart with many blocks, gets while the disk hangs.

Limits: the same engine without checksums; the same gets while nothing else runs.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.disk_limits import BLOCK_BYTES
from benchmarks.harness import Figures, Options, median_ratio, percentile
from benchmarks.rigs import LARGE, SMALL, cache_of, kv_caches, prompt, slots_of
from flexkv.common.terms import Tier
from flexkv.io.checksums.checked import CheckedDiskPort
from flexkv.io.device.cpu import CpuDevicePort
from flexkv.io.ssd import journal
from flexkv.kvmanager import KVManager
from flexkv.tiers.backend import LocalBackend

CHAIN_BLOCKS = 64


def measure(options: Options) -> Figures:
    """Return the figures of the case."""
    figures: Figures = {}
    for part in (_checksums, _restart, _hang):
        with tempfile.TemporaryDirectory(
            prefix=".flexkv-bench-", dir=options.directory
        ) as directory:
            figures |= asyncio.run(part(Path(directory), options))
    return figures


def _port_of(manager: KVManager) -> CheckedDiskPort:
    port = manager.engine._backend.tiers()[0].port
    assert isinstance(port, CheckedDiskPort)
    return port


def _unsummed_pages(manager: KVManager, caches: Any) -> Any:
    """Return the device's pages for copies that compute no checksums."""
    backend = manager.engine._backend
    assert isinstance(backend, LocalBackend)
    sums, backend.ssd.sums = backend.ssd.sums, None
    port = backend.device(caches, None, 0).port
    backend.ssd.sums = sums
    assert isinstance(port, CpuDevicePort)
    pages = port._pages
    port.close()
    return pages


@contextmanager
def _unchecked(manager: KVManager, unsummed: Any) -> Iterator[None]:
    """Bypass the checksums. Enter and leave only while nothing is in flight."""
    disk, device = _port_of(manager), manager.engine._devices._by_rank[0].port
    assert isinstance(device, CpuDevicePort)
    vars(disk).update(submit=disk._inner.submit, reap=disk._inner.reap)
    summed, device._pages = device._pages, unsummed
    try:
        yield
    finally:
        device._pages = summed
        del disk.submit, disk.reap


# -- checksums -----------------------------------------------------------------------------------


async def _checksums(directory: Path, options: Options) -> Figures:
    bulk = 16 if options.quick else 512
    cache = cache_of(
        2 * bulk + 8,
        directory,
        num_ssd_blocks=6 * bulk,
        write_behind_max_gb=bulk * BLOCK_BYTES / 2**30,
    )
    async with KVManager(LARGE, cache) as manager:
        caches = kv_caches(LARGE, bulk)
        manager.register_kv_caches(caches)
        unsummed = _unsummed_pages(manager, caches)
        slots, fresh = slots_of(range(bulk)), iter(range(5000, 9000))
        for number in range(3):
            await manager.put(prompt(number, bulk), slots)
            await manager.flush()
        turn = iter(range(1_000_000))

        async def read() -> float:
            begin = time.perf_counter()
            await manager.prefetch(prompt(next(turn) % 3, bulk))
            return time.perf_counter() - begin

        async def write() -> float:
            begin = time.perf_counter()
            await manager.put(prompt(next(fresh), bulk), slots)
            await manager.flush()
            return time.perf_counter() - begin

        async def behind() -> float:  # without the copy, which has ended when the put is answered
            await manager.put(prompt(next(fresh), bulk), slots)
            begin = time.perf_counter()
            await manager.flush()
            return time.perf_counter() - begin

        async def hit() -> float:
            begin = time.perf_counter()
            response = await manager.get(prompt(next(turn) % 3, 8), slots[: 8 * 16])
            assert response.return_mask.any()
            return time.perf_counter() - begin

        figures: Figures = {}
        works = {"read": read, "host-hit get": hit, "put and flush": write, "write-behind": behind}
        for name, work in works.items():
            figures[f"{name} rate with checksums / without"] = await _ratio(
                work,
                lambda: _unchecked(manager, unsummed),
                options.repeats * (20 if work is hit else 2),
            )
        return figures


async def _ratio(
    work: Callable[[], Awaitable[float]],
    without: Callable[[], AbstractContextManager[None]],
    repeats: int,
) -> float:
    """Return the rate with checksums over that without, in alternation; the first pair warms up."""
    checked, bare = [], []
    for number in range(repeats + 1):
        for with_sums in (True, False) if number % 2 else (False, True):
            if with_sums:
                checked.append(await work())
            else:
                with without():
                    bare.append(await work())
    return median_ratio(bare[1:], checked[1:])


# -- restart -------------------------------------------------------------------------------------


async def _restart(directory: Path, options: Options) -> Figures:
    blocks = 1 << (14 if options.quick else 20)
    cache = cache_of(256, directory, num_ssd_blocks=blocks + 2 * CHAIN_BLOCKS)
    known = prompt(1, CHAIN_BLOCKS)
    async with KVManager(SMALL, cache) as manager:
        manager.register_kv_caches(kv_caches(SMALL, CHAIN_BLOCKS))
        await manager.put(known, slots_of(range(CHAIN_BLOCKS)))
        await manager.flush()
    _fill_journal(directory, blocks)
    begin = time.perf_counter()
    async with KVManager(SMALL, cache) as manager:
        manager.register_kv_caches(kv_caches(SMALL, CHAIN_BLOCKS))
        response = await manager.get(known, slots_of(range(CHAIN_BLOCKS)))
        took_s = time.perf_counter() - begin
        assert response.return_mask.all()
        restored = manager.statistics().restored_blocks
    return {
        "restart to the first hit, s": took_s,
        "blocks restored": float(restored),
        "journal, bytes a block": (directory / journal.NAME).stat().st_size / restored,
    }


def _fill_journal(directory: Path, blocks: int) -> None:
    """Append blocks in chains to the journal, behind the first prompt's, as a long life would."""
    random = np.random.default_rng(0)
    opened = journal.Journal(directory)
    root = opened.live.blocks[opened.live.blocks[:, 32] > 0][0, 16:32]
    for at in range(0, blocks, CHAIN_BLOCKS):
        records = np.zeros((CHAIN_BLOCKS, journal.RECORD_BYTES), np.uint8)
        records[:, :16] = random.integers(0, 256, (CHAIN_BLOCKS, 16), np.uint8)
        records[1:, 16:32] = records[:-1, :16]
        records[0, 16:32], records[0, 32] = root, 1
        rows = np.arange(at, at + CHAIN_BLOCKS) + CHAIN_BLOCKS
        opened.append(journal.stored(rows, np.zeros(CHAIN_BLOCKS, np.uint64), records))
    opened.close()


# -- a disk that hangs ---------------------------------------------------------------------------


async def _hang(directory: Path, options: Options) -> Figures:
    hang_s = 1.5 if options.quick else 30.0
    cache = cache_of(64, directory, num_ssd_blocks=128, io_deadline_s=1.0)
    async with KVManager(LARGE, cache) as manager:
        manager.register_kv_caches(kv_caches(LARGE, 16))
        slots = slots_of(range(8))
        cold, hit = prompt(1, 8), prompt(2, 8)
        await manager.put(cold, slots)
        await manager.flush()
        manager.clear(Tier.HOST)
        await manager.put(hit, slots)
        await manager.flush()
        inner = _port_of(manager)._inner
        idle = await _gets_ms(manager, hit, slots, hang_s / 4)
        held: list[Any] = []
        reap = inner.reap

        def hold() -> list[Any]:
            held.extend(reap())
            return []

        vars(inner)["reap"] = hold
        asked = time.perf_counter()
        late = asyncio.ensure_future(manager.get(cold, slots_of(range(8, 16))))
        hung = await _gets_ms(manager, hit, slots, hang_s)
        assert late.done(), "a get was not answered while the disk hung"
        vars(inner)["reap"] = lambda: [held.pop() for _ in range(len(held))] + reap()
        _port_of(manager)._wake()
        back = time.perf_counter()
        async with asyncio.timeout(10):
            await _until_there(manager, cold, slots)
        return {
            "disk hung for, s": back - asked,
            "host-hit get, idle p99 ms": percentile(idle, 99),
            "host-hit get while the disk hangs / idle, p99": percentile(hung, 99)
            / percentile(idle, 99),
            "back after the disk is, s": time.perf_counter() - back,
        }


async def _until_there(manager: KVManager, tokens: Any, slots: Any) -> None:
    for _ in range(10_000):
        if (await manager.get(tokens, slots)).return_mask.any():
            return
        await asyncio.sleep(0.001)


async def _gets_ms(manager: KVManager, tokens: Any, slots: Any, seconds: float) -> list[float]:
    took, until = [], time.perf_counter() + seconds
    while (begin := time.perf_counter()) < until:
        response = await manager.get(tokens, slots)
        assert response.return_mask.all()
        took.append((time.perf_counter() - begin) * 1e3)
        await asyncio.sleep(0.001)
    return took
