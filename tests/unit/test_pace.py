"""A window that follows its disk: short queues at any speed, and no bandwidth lost to that.

The disk is simulated on a virtual clock. All I/Os pass one pipe in order, each has a latency on
top, and a single stream may be slower than the pipe.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from flexkv.actors.actor import TransferActor, Window
from flexkv.actors.pace import PERIOD_S
from flexkv.common.terms import Route, Tier, Transfer
from flexkv.io.ports import Completion
from flexkv.testing.virtual_time import run_virtual

MIB = 1 << 20
READ, WRITE = Route(Tier.DISK, Tier.HOST), Route(Tier.HOST, Tier.DISK)
BULK_BYTES, BULK_BLOCKS_MIN, CHUNK_BYTES = 256 * MIB, 256, 16 * MIB
LOOP_TURN_S = 50e-6
UNPACED = Window(1 << 40, 2 * MIB)
PACED = Window(32 * MIB, 2 * MIB, is_paced=True)


@dataclass
class Disk:
    """A transfer port to a simulated disk."""

    rate: float
    """Bytes per second of all I/Os together."""
    latency_s: float = 1e-4
    stream_rate: float = float("inf")
    """Bytes per second of one I/O."""
    jitter: float = 0.0
    """The largest random addition to an I/O's time, as a fraction of it."""
    latencies_s: Callable[[random.Random], float] | None = None
    """Draws the latency of each I/O, if it varies."""
    block_bytes: int = 2 * MIB

    def __post_init__(self) -> None:
        self._ended: list[Completion] = []
        self._free_s = 0.0
        self._random = random.Random(7)
        self.in_flight_bytes = self.in_flight_bytes_max = 0

    def connect(self, wake: Callable[[], None]) -> None:
        """Attach to the running loop."""
        self._wake = wake

    def submit(self, transfer: Transfer) -> None:
        """Start one transfer."""
        loop, nbytes = asyncio.get_running_loop(), transfer.block_count * self.block_bytes
        self.in_flight_bytes += nbytes
        self.in_flight_bytes_max = max(self.in_flight_bytes_max, self.in_flight_bytes)
        more = 1 + self.jitter * self._random.random()
        self._free_s = max(self._free_s, loop.time()) + more * nbytes / self.rate
        latency_s = self.latencies_s(self._random) if self.latencies_s else self.latency_s
        alone_s = latency_s + nbytes / min(self.rate, self.stream_rate)
        end_s = max(self._free_s + latency_s, loop.time() + more * alone_s)
        loop.call_at(end_s + LOOP_TURN_S, self._end, transfer.op_id, nbytes)

    def _end(self, op_id: int, nbytes: int) -> None:
        self.in_flight_bytes -= nbytes
        self._ended.append(Completion(op_id, None))
        self._wake()

    def reap(self) -> list[Completion]:
        """Return the transfers that have ended."""
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """Release nothing."""


class Bench:
    """An actor over a simulated disk, with transfers that can be awaited."""

    def __init__(self, disk: Disk, window: Window) -> None:
        self.actor = TransferActor(Tier.DISK, disk, (window, window), 1 << 16)
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._tokens = itertools.count()
        self.actor.attach(self._report)
        self._task = asyncio.create_task(self.actor.run())
        self.block_bytes = disk.block_bytes
        self.bulk_blocks = max(BULK_BLOCKS_MIN, BULK_BYTES // disk.block_bytes)
        self._chunk_blocks = CHUNK_BYTES // disk.block_bytes

    def _report(self, ends: list[Completion]) -> None:
        for op_id, error, *_ in ends:
            assert error is None
            self._waiting.pop(op_id).set_result(None)

    async def move(self, route: Route, blocks: int) -> float:
        """Move blocks as one request, in chunks; return the seconds that it took."""
        loop, owner, ends = asyncio.get_running_loop(), next(self._tokens), []
        begin_s = loop.time()
        for chunk in range(0, blocks, self._chunk_blocks):
            ids, op_id = np.arange(min(self._chunk_blocks, blocks - chunk)), next(self._tokens)
            self._waiting[op_id] = loop.create_future()
            ends.append(self._waiting[op_id])
            self.actor.post(Transfer(op_id, owner, route, ids, ids))
        await asyncio.gather(*ends)
        return loop.time() - begin_s

    async def singles_beside(self, route: Route, requests: int) -> tuple[list[float], float]:
        """Return the times of single reads beside bulk requests, and the total rate."""
        loop, begin_s, times = asyncio.get_running_loop(), asyncio.get_running_loop().time(), []
        bulks = [asyncio.create_task(self.move(route, self.bulk_blocks)) for _ in range(requests)]
        await asyncio.sleep(0.01)
        while not all(bulk.done() for bulk in bulks):
            times.append(await self.move(READ, 1))
        blocks = requests * self.bulk_blocks + len(times)
        return times, blocks * self.block_bytes / (loop.time() - begin_s)

    def close(self) -> None:
        """Stop the actor."""
        self._task.cancel()
        self.actor.close()


async def measured(disk: Disk, window: Window, route: Route, requests: int) -> tuple[float, ...]:
    """Return a single read's time alone, its p99 beside bulk, and the rates of bulk and of all."""
    bench = Bench(disk, window)
    alone_s = max([await bench.move(READ, 1) for _ in range(16)])
    await bench.move(route, bench.bulk_blocks)  # lets the window measure the disk
    bulk_bytes = bench.bulk_blocks * disk.block_bytes
    bulk_rate = bulk_bytes / await bench.move(route, bench.bulk_blocks)
    times, rate = await bench.singles_beside(route, requests)
    bench.close()
    return alone_s, float(np.percentile(times, 99)), bulk_rate, rate


DISKS: list[dict[str, Any]] = [
    {"rate": 0.05e9},
    {"rate": 0.2e9},
    {"rate": 0.2e9, "latency_s": 5e-3, "stream_rate": 0.05e9},
    {"rate": 2.1e9, "latency_s": 2e-4, "stream_rate": 1.4e9},
    {"rate": 2.1e9, "latency_s": 3e-3},
    {"rate": 10e9, "stream_rate": 3e9},
    {"rate": 10e9, "latency_s": 1e-3},
    {"rate": 2.1e9, "block_bytes": 64 << 10},
    {"rate": 0.2e9, "block_bytes": 256 << 10},
    {"rate": 2.1e9, "latency_s": 3e-4, "block_bytes": 4 * MIB},
    {"rate": 5e9, "block_bytes": 16 * MIB},
]


@pytest.mark.parametrize(("route", "requests"), [(READ, 1), (READ, 4), (WRITE, 1)])
@pytest.mark.parametrize("disk", DISKS, ids=str)
def test_a_read_waits_little_and_bulk_loses_nothing(
    disk: dict[str, Any], route: Route, requests: int
) -> None:
    """A read behind bulk takes at most twice its own time plus 2 ms; bulk keeps its rate."""

    def run(window: Window) -> tuple[float, ...]:
        return run_virtual(measured(Disk(**disk, jitter=0.2), window, route, requests))

    alone_s, p99_s, bulk_rate, rate = run(PACED)
    _, _, unpaced_rate, _ = run(UNPACED)
    assert p99_s <= 2 * alone_s + 2e-3
    assert bulk_rate >= 0.95 * unpaced_rate
    assert rate >= 0.95 * unpaced_rate


@pytest.mark.parametrize(("rate", "later"), [(2e9, 0.2e9), (0.2e9, 2e9), (10e9, 0.1e9)])
def test_the_window_follows_a_disk_whose_rate_changes(rate: float, later: float) -> None:
    """After one bulk request at a new rate, reads wait little and bulk keeps its rate."""

    async def run() -> tuple[float, ...]:
        disk = Disk(rate)
        bench = Bench(disk, PACED)
        await bench.move(READ, bench.bulk_blocks)
        disk.rate = later
        await bench.move(READ, bench.bulk_blocks)
        alone_s = await bench.move(READ, 1)
        times, all_rate = await bench.singles_beside(READ, 1)
        bench.close()
        return alone_s, float(np.percentile(times, 99)), all_rate

    alone_s, p99_s, all_rate = run_virtual(run())
    assert p99_s <= 2 * alone_s + 2e-3
    assert all_rate >= 0.95 * later


VARYING: dict[str, Callable[[random.Random], float]] = {
    "uniform": lambda draw: draw.uniform(0.5e-3, 2e-3),
    "lognormal": lambda draw: 1e-3 * draw.lognormvariate(0, 0.8),
    "some from a cache": lambda draw: 0.2e-3 if draw.random() < 0.1 else 2e-3,
    "few from a cache": lambda draw: 0.1e-3 if draw.random() < 0.01 else draw.uniform(1.5e-3, 3e-3),
}


@pytest.mark.parametrize("block_bytes", [256 << 10, 2 * MIB])
@pytest.mark.parametrize("latencies", VARYING.values(), ids=VARYING)
def test_latencies_that_vary_cost_little_bandwidth(
    latencies: Callable[[random.Random], float], block_bytes: int
) -> None:
    """A disk that is sometimes quick is not taken for one that is always quick."""

    async def run(window: Window) -> float:
        bench = Bench(Disk(2e9, block_bytes=block_bytes, latencies_s=latencies), window)
        for _ in range(8):
            await bench.move(READ, bench.bulk_blocks)
        rate = bench.bulk_blocks * block_bytes / await bench.move(READ, bench.bulk_blocks)
        bench.close()
        return rate

    assert run_virtual(run(PACED)) >= 0.75 * run_virtual(run(UNPACED))


def test_a_search_for_a_larger_window_is_seldom() -> None:
    """On a busy slow disk, the search for a larger window rarely lengthens the queue."""

    async def run() -> tuple[float, float]:
        disk = Disk(0.2e9)
        bench, loop = Bench(disk, PACED), asyncio.get_running_loop()
        await bench.move(READ, bench.bulk_blocks)
        bulk, times = asyncio.create_task(bench.move(READ, 20 * bench.bulk_blocks)), []
        while not bulk.done():
            times.append(await bench.move(READ, 1))
        bench.close()
        return float(np.percentile(times, 99)), loop.time()

    p99_s, took_s = run_virtual(run())
    assert took_s > 3 * PERIOD_S
    assert p99_s <= 2 * 10.64e-3 + 2e-3


def test_bytes_in_flight_have_a_bound() -> None:
    """At any latency, no more bytes than the configured window are in flight."""
    disk = Disk(10e9, latency_s=50e-3)

    async def run() -> None:
        bench = Bench(disk, PACED)
        for _ in range(3):
            await bench.move(READ, bench.bulk_blocks)
        assert bench.actor.window_bytes(inbound=True) == PACED.bytes_max
        assert bench.actor.window_bytes(inbound=False) < PACED.bytes_max
        bench.close()

    run_virtual(run())
    assert PACED.bytes_max / 2 < disk.in_flight_bytes_max <= PACED.bytes_max
