"""Gets that hit host memory, beside a remote tier that works flat out, hangs, and answers again.

Limit: the same gets while the remote tier is idle; a second idle slice beside each shows the noise.
Flat out, far prompts are fetched all the time, more than host memory holds, and new prompts are put
and shipped as fast as the store takes them. The stores are a directory, and a server in memory that
speaks S3. The server yields to the engine, since it would run on another machine. It hangs while
its process is stopped; fetches and ships are asked for all the same. Once it goes on, far prompts
are asked for until one arrives.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.harness import Figures, Options, percentile
from benchmarks.rigs import LARGE, PER_BLOCK, SMALL, cache_of, kv_caches, prompt, slots_of
from benchmarks.store_server import StoreServer, running
from flexkv.common.config import ModelConfig
from flexkv.common.errors import RemoteError
from flexkv.kvmanager import KVManager

HOT, HOT_BLOCKS = 4, 8
SPAN_BLOCKS = 8
FAR, FAR_BLOCKS = 24, 2 * SPAN_BLOCKS
"""Far prompts, and the blocks of one that is fetched or shipped."""
PAUSE_S = 4e-3
"""Between two gets, so that others run, too."""
HOST_BLOCKS = 352
"""Enough for what is fetched and shipped not to displace what is hot."""
WARMING = 20
"""How many gets are not counted after work beside them has begun."""
FETCHES, OWED_MAX = 3, 6 * FAR_BLOCKS
"""Prompts being fetched at once, and owed blocks above which no more prompts are put."""
PATIENCE_S = 60.0
ASK_S = 0.05


def measure(options: Options) -> Figures:
    """Return the figures of the case."""
    figures: Figures = {}
    with running(FAR * FAR_BLOCKS // SPAN_BLOCKS) as server:
        custom = {"endpoint": f"http://127.0.0.1:{server.port}", "skip_signature": True}
        store = {"remote_cache_path": "s3://bucket/kv", "remote_config_custom": custom}
        figures |= asyncio.run(_beside("S3", store, options, server))
    with tempfile.TemporaryDirectory(prefix=".flexkv-bench-", dir=options.directory) as folder:
        store = {"remote_cache_path": f"file://{Path(folder).absolute()}/shared"}
        figures |= asyncio.run(_beside("directory", store, options, None))
    return figures


class _Rig:
    """An engine with a remote tier, in which some prompts lie far and some are hot."""

    def __init__(self, manager: KVManager, model: ModelConfig, gets: int) -> None:
        self._manager, self._gets = manager, gets
        self._turn, self._hot_turn, self._fresh = 0, 0, 1000
        blocks = HOT_BLOCKS + FAR_BLOCKS
        manager.register_kv_caches(kv_caches(model, blocks))
        self._hot_slots = slots_of(range(HOT_BLOCKS))
        self._far_slots = slots_of(range(HOT_BLOCKS, blocks))

    async def fill(self) -> None:
        """Store the far prompts, then the hot ones, which stay in host memory by being used."""
        for number in range(FAR):
            await self._manager.put(prompt(number, FAR_BLOCKS), self._far_slots)
            await self.quiet()
        for number in range(HOT):
            await self._manager.put(prompt(500 + number, HOT_BLOCKS), self._hot_slots)

    async def gets_s(self, for_s: float = 0.0) -> list[float]:
        """Return how long gets from host memory take: the usual number, or for some time."""
        took_s: list[float] = []
        until_s = time.perf_counter() + for_s
        while len(took_s) < self._gets or time.perf_counter() < until_s:
            took_s.append(await self._get())
        return took_s

    async def _get(self) -> float:
        await asyncio.sleep(PAUSE_S)
        self._hot_turn += 1
        tokens = prompt(500 + self._hot_turn % HOT, HOT_BLOCKS)
        begin_s = time.perf_counter()
        response = await self._manager.get(tokens, self._hot_slots)
        took_s = time.perf_counter() - begin_s
        if response.return_mask.all():
            return took_s
        # It was displaced, as happens if blocks are small, so this was no hit.
        await self._manager.put(tokens, self._hot_slots)
        return await self._get()

    async def _fetch(self) -> None:
        """Fetch far prompts one after the other until cancelled."""
        while True:
            self._turn += 1
            await self._manager.prefetch(prompt(self._turn % FAR, FAR_BLOCKS))
            await asyncio.sleep(0)

    async def _ship(self) -> None:
        """Put new prompts until cancelled, as fast as they are shipped.

        They are put block by block, as an engine does that computes them: the copy of many at once
        would keep gets waiting, remote tier or not.
        """
        while True:
            counts = self._manager.statistics().write_behind["remote"]
            if counts.owed_blocks < OWED_MAX:
                self._fresh += 1
                tokens = prompt(self._fresh, FAR_BLOCKS)
                for end in range(PER_BLOCK, len(tokens) + 1, PER_BLOCK):
                    await self._manager.put(tokens[:end], self._far_slots[:end])
            await asyncio.sleep(0.01)

    @asynccontextmanager
    async def flat_out(self) -> AsyncIterator[None]:
        """Fetch and ship all the time meanwhile."""
        work: list[Coroutine[Any, Any, None]] = [self._fetch() for _ in range(FETCHES)]
        tasks = [asyncio.create_task(each) for each in (*work, self._ship())]
        try:
            for _ in range(WARMING):  # without gets the hot prompts would be displaced
                await self._get()
            yield
        finally:
            for task in tasks:
                task.cancel()
            for end in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(end, asyncio.CancelledError), end

    async def quiet(self) -> None:
        """Return once nothing is on its way, shipped or owed."""
        until_s = time.perf_counter() + PATIENCE_S
        while time.perf_counter() < until_s:
            with suppress(RemoteError):  # the store may just have hung, and the tier be on trial
                await self._manager.flush()
                return
            await asyncio.sleep(ASK_S)
        raise AssertionError("what is owed cannot be written")

    def moved_bytes(self) -> tuple[int, int]:
        """Return how many bytes were read from the store and written to it."""
        requests = self._manager.statistics().stores["remote"].requests
        return requests.read_bytes, requests.written_bytes

    async def until_fetched_s(self) -> float:
        """Return how long it takes until blocks of a far prompt arrive."""
        begin_s = time.perf_counter()
        while True:
            before, _ = self.moved_bytes()
            self._turn += 1
            tokens = prompt(self._turn % FAR, FAR_BLOCKS)
            response = await self._manager.prefetch(tokens)
            if response.return_mask.all() and self.moved_bytes()[0] > before:
                return time.perf_counter() - begin_s
            assert time.perf_counter() - begin_s < PATIENCE_S, "the tier does not come back"
            await asyncio.sleep(ASK_S)


async def _beside(
    name: str, store: dict[str, Any], options: Options, server: StoreServer | None
) -> Figures:
    gets, hung_s = (20, 0.5) if options.quick else (400, 60.0)
    model = SMALL if options.quick else LARGE
    cache = cache_of(HOST_BLOCKS, enable_remote=True, remote_list_per_s=4.0, **store)
    ratios: dict[str, list[float]] = {"idle again": [], "flat out": [], "hung": []}
    p99_s: dict[str, list[float]] = {"idle": []} | {each: [] for each in ratios}
    rates: list[tuple[float, float]] = []
    back_s: list[float] = []
    async with AsyncExitStack() as stack:
        manager = await stack.enter_async_context(KVManager(model, cache))
        rig = _Rig(manager, model, gets)
        await rig.fill()
        for number in range(options.repeats + 1):
            took = {"idle": await rig.gets_s(), "idle again": await rig.gets_s()}
            before, begin_s = rig.moved_bytes(), time.perf_counter()
            async with rig.flat_out():
                took["flat out"] = await rig.gets_s()
                passed_s = time.perf_counter() - begin_s
                rates.append(_rates(before, rig.moved_bytes(), passed_s))
            await rig.quiet()
            if server is not None and number == options.repeats:
                async with rig.flat_out():
                    server.hang()
                    took["hung"] = await rig.gets_s(hung_s)
                    server.answer()
                    back_s.append(await rig.until_fetched_s())
                await rig.quiet()
            if number:  # the first round warms up
                for what, seconds in took.items():
                    p99_s[what].append(percentile(seconds, 99))
                    if what in ratios:
                        ratios[what].append(p99_s[what][-1] / p99_s["idle"][-1])
    return _figures(name, ratios, p99_s, rates[1:], back_s)


def _rates(before: tuple[int, int], after: tuple[int, int], s: float) -> tuple[float, float]:
    read, written = ((now - then) / s / 1e6 for then, now in zip(before, after, strict=True))
    return read, written


def _figures(
    name: str,
    ratios: dict[str, list[float]],
    p99_s: dict[str, list[float]],
    rates: list[tuple[float, float]],
    back_s: list[float],
) -> Figures:
    bars = {"idle again": "A/A", "flat out": "bar: 2", "hung": "bar: 1.1"}
    figures: Figures = {
        f"{name}: p99 {what} / idle ({bars[what]})": statistics.median(each)
        for what, each in ratios.items()
        if each
    }
    for what, each in p99_s.items():
        if each:
            figures[f"{name}: host-hit get p99, {what}, us"] = statistics.median(each) * 1e6
    figures[f"{name}: read flat out, MB/s"] = statistics.median(read for read, _ in rates)
    figures[f"{name}: written flat out, MB/s"] = statistics.median(each for _, each in rates)
    if back_s:
        figures[f"{name}: seconds until it is used again (bar: 5)"] = statistics.median(back_s)
    return figures
