"""The cost of control on top of the copy: a get against the bare C copy; small gets; empty ops.

Floor: the bare job on the same copy threads, with a wait for its eventfd. In asyncio a loop turn
costs about 3 µs, and resolving and awaiting a future about 5 µs, so one op costs at least 10 µs.
"""

from __future__ import annotations

import asyncio
import select
import statistics
import time

import numpy as np

from benchmarks.harness import Figures, Options, median_ratio
from benchmarks.rigs import LARGE, SMALL, cache_of, kv_caches, prompt, slots_of
from flexkv import _ext
from flexkv.actors.actor import TransferActor, Window
from flexkv.actors.supervisor import Supervisor
from flexkv.common.terms import Route, Tier, Transfer
from flexkv.io.ports import Completion
from flexkv.kvmanager import KVManager
from flexkv.tiers.backend import LocalBackend


def measure(options: Options) -> Figures:
    """Return the figures of the case."""
    rounds = 20 if options.quick else 300 * options.repeats
    return {
        **asyncio.run(_large(options.repeats * 3, 8 if options.quick else 64)),
        **asyncio.run(_small(rounds)),
        **asyncio.run(_empty(rounds)),
    }


async def _large(repeats: int, blocks: int) -> Figures:
    """Time a get of 2 MiB blocks, and the same bytes as one bare job of as many threads."""
    caches = kv_caches(LARGE, 2 * blocks)
    places = np.random.default_rng(0).permutation(2 * blocks)[:blocks]
    cache = cache_of(blocks + 8, copy_threads=2)
    async with KVManager(LARGE, cache) as manager:
        manager.register_kv_caches(caches)
        await manager.put(prompt(0, blocks), slots_of(places))
        sizes = cache.sized(LARGE)
        pieces = LocalBackend(LARGE, cache, sizes).pages_of(caches, None, 0).pieces
        host = np.ones((blocks, sizes.block_stride_bytes), np.uint8)
        pages = _ext.PageMap(pieces, 2 * blocks, host, sizes.block_stride_bytes, caches)
        pool = _ext.CopyPool(2)

        async def bare() -> None:
            pool.submit(1, pages, _ext.TO_DEVICE, places, np.arange(blocks), True)
            select.select([pool.fileno()], [], [])
            pool.reap()

        async def get() -> None:
            response = await manager.get(prompt(0, blocks), slots_of(places))
            assert response.return_mask.all()

        took: dict[bool, list[float]] = {True: [], False: []}
        for round_number in range(repeats + 1):
            for is_get in (True, False) if round_number % 2 else (False, True):
                begin = time.perf_counter()
                await (get if is_get else bare)()
                if round_number:  # the first warms up
                    took[is_get].append(time.perf_counter() - begin)
        pool.close()
    return {
        "get of 64 blocks of 2 MiB / bare copy": median_ratio(took[True], took[False]),
        "get of 64 blocks, ms": statistics.median(took[True]) * 1e3,
    }


async def _small(rounds: int) -> Figures:
    """Time gets of one 4 KiB block: alone, and 64 at once."""
    async with KVManager(SMALL, cache_of(256)) as manager:
        manager.register_kv_caches(kv_caches(SMALL, 64))
        requests = [(prompt(n, 1), slots_of([n])) for n in range(64)]
        for tokens, slots in requests:
            await manager.put(tokens, slots)
        alone, together = [], []
        for _ in range(rounds):
            begin = time.perf_counter()
            await manager.get(*requests[0])
            alone.append(time.perf_counter() - begin)
        for _ in range(rounds // 10):
            begin = time.perf_counter()
            await asyncio.gather(*(manager.get(*request) for request in requests))
            together.append((time.perf_counter() - begin) / len(requests))
    return {
        "get of one 4 KiB block, alone, us": statistics.median(alone) * 1e6,
        "get of one 4 KiB block, 64 at once, us each": statistics.median(together) * 1e6,
    }


class _EmptyPort:
    """A transfer port that ends every transfer as it is submitted."""

    block_bytes = 1

    def __init__(self) -> None:
        self._ended: list[Completion] = []

    def connect(self, wake: object) -> None:
        """Do nothing: every transfer has ended when `submit` returns."""

    def submit(self, transfer: Transfer) -> None:
        """End the transfer at once."""
        self._ended.append(Completion(transfer.op_id, None))

    def reap(self) -> list[Completion]:
        """Return the transfers that ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


def _resolve(futures: list[asyncio.Future[None]]) -> None:
    for future in futures:
        future.set_result(None)


async def _empty(rounds: int) -> Figures:
    """Time empty ops through an actor, from `post` to an awaited future."""
    waiting: dict[int, asyncio.Future[None]] = {}

    def report(ends: list[Completion]) -> None:
        for end in ends:
            waiting.pop(end.op_id).set_result(None)

    window = Window(1 << 30, 1 << 20)
    actor = TransferActor(Tier.DEVICE, _EmptyPort(), (window, window), 1 << 16)
    actor.attach(report)
    supervisor = Supervisor(lambda error: [f.set_exception(error) for f in waiting.values()])
    await supervisor.start()
    supervisor.keep("empty", actor.run())
    ids, loop, op_id = np.zeros(1, np.int64), asyncio.get_running_loop(), 0
    route = Route(Tier.HOST, Tier.DEVICE)
    figures: Figures = {}
    for batch in (1, 64, 256):
        took = []
        for _ in range(rounds // batch + 20):
            transfers = [Transfer(op_id + n, 0, route, ids, ids) for n in range(batch)]
            op_id += batch
            begin = time.perf_counter()
            futures = [loop.create_future() for _ in range(batch)]
            waiting.update({t.op_id: f for t, f in zip(transfers, futures, strict=True)})
            for transfer in transfers:
                actor.post(transfer)
            for future in futures:
                await future
            took.append((time.perf_counter() - begin) / batch)
        floor = []
        for _ in range(rounds // batch + 20):
            begin = time.perf_counter()
            futures = [loop.create_future() for _ in range(batch)]
            loop.call_soon(_resolve, futures)
            for future in futures:
                await future
            floor.append((time.perf_counter() - begin) / batch)
        name = "alone" if batch == 1 else f"in batches of {batch}"
        figures[f"empty op through an actor, {name}, us each"] = statistics.median(took) * 1e6
        figures[f"of which the awaited future alone, {name}, us"] = statistics.median(floor) * 1e6
    await supervisor.stop()
    return figures
