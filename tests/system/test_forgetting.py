"""Tests that an engine keeps nothing of requests that are over, and fails loudly if it does."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter, deque
from collections.abc import Iterator
from random import Random
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import pytest

from flexkv.common.config import CacheConfig
from flexkv.common.errors import InternalError, InvariantError, TransferError
from flexkv.common.terms import BLOCK_KEY_BYTES
from flexkv.front.layerwise import LayerwisePut
from flexkv.index.claims import Claim
from flexkv.kvmanager import KVManager
from flexkv.observe.records import Record
from flexkv.testing.fake_backend import FakeBackend, empty
from flexkv.testing.faults import FaultPlan
from flexkv.testing.simulated_groups import MODEL, TOKENS_PER_BLOCK
from flexkv.testing.virtual_time import run_virtual

CONTAINERS = (dict, list, set, deque)
CACHES = {"Tracer._plans"}
"""Caches, which have bounds of their own."""
BLOCKS_MAX = 16
HOST_BLOCKS, DISK_BLOCKS = 24, 48


def containers(root: object) -> Iterator[tuple[str, int]]:
    """Yield the owner and the size of each dict, list, set or deque of FlexKV's objects."""
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [("root", root)]
    while waiting:
        name, each = waiting.pop()
        if id(each) in seen or isinstance(each, type | ModuleType | FunctionType | MethodType):
            continue
        seen.add(id(each))
        kind = type(each)
        if isinstance(each, CONTAINERS):
            yield name, len(each)
        if isinstance(each, (*CONTAINERS, tuple)):
            values = [*each.keys(), *each.values()] if isinstance(each, dict) else list(each)
            waiting += [(name, value) for value in values]
        elif kind.__module__.startswith("flexkv.") and ".testing." not in kind.__module__:
            slots = [slot for base in kind.__mro__ for slot in getattr(base, "__slots__", ())]
            owned = {slot: getattr(each, slot) for slot in slots if hasattr(each, slot)}
            owned |= getattr(each, "__dict__", {})
            waiting += [(f"{kind.__name__}.{slot}", value) for slot, value in owned.items()]


class Deaf:
    """A sink of trace records that keeps none."""

    def record(self, record: Record) -> None:
        """Drop a record."""


class Bench:
    """A manager with a persistent SSD tier, over fakes that fail now and then."""

    def __init__(self, failure_probability: float) -> None:
        self.random = Random(1)
        cache = CacheConfig(
            tokens_per_block=TOKENS_PER_BLOCK, num_cpu_blocks=HOST_BLOCKS, evict_ratio=0.0,
            num_ssd_blocks=DISK_BLOCKS, ssd_cache_dir="unused", requests_max=8,
            device_window_mb=4 * BLOCK_KEY_BYTES / 2**20, chunk_mb=4096 / 2**20,
            io_deadline_s=0.01,
        )  # fmt: skip
        hangs = failure_probability / 5
        faults = FaultPlan(1, failure_probability, 0.0001, 0.002, hang_probability=hangs)
        self.backend = FakeBackend(HOST_BLOCKS, faults, empty(DISK_BLOCKS, journals=2))
        self.manager = KVManager(MODEL, cache, backend=self.backend)
        for files in self.backend.files:  # no faults until the tier is open
            files.faulty = False

    async def ask(self) -> None:
        """Make a random request about one of few prompts, and perhaps cancel it."""
        random, manager = self.random, self.manager
        await asyncio.sleep(random.uniform(0.0, 0.05))
        first = random.choice([0, 1000, 2000])
        tokens = list(range(first, first + TOKENS_PER_BLOCK * random.randint(1, BLOCKS_MAX)))
        slots = np.arange(len(tokens))
        verb = random.choice(["get", "put", "prefetch", "match", "layers", "pin"])
        if verb == "match":
            await self._by_task_id(tokens, slots)
        elif verb == "pin":
            pinned = manager.pin(tokens[:4], ttl_s=random.uniform(0.001, 0.02), owner="a")
            if random.random() < 0.3:
                manager.unpin(pinned)
        else:
            try:
                async with asyncio.timeout(random.choice([None, random.uniform(0.0, 0.01)])):
                    if verb == "layers":
                        await self._by_layers(tokens, slots)
                    else:
                        arguments = (tokens,) if verb == "prefetch" else (tokens, slots)
                        await getattr(manager, verb)(*arguments)
            except TimeoutError:
                return

    async def _by_task_id(self, tokens: list[int], slots: Any) -> None:
        manager, random = self.manager, self.random
        match = random.choice([manager.get_match, manager.put_match])
        task, mask = match(tokens)
        if random.random() < 0.7:
            manager.launch(task, slots[mask])
        if random.random() < 0.7:
            manager.cancel(task)
        while task not in manager.try_wait(task):
            await asyncio.sleep(0.01)  # virtual
            if random.random() < 0.3:
                manager.cancel(task)

    async def _by_layers(self, tokens: list[int], slots: Any) -> None:
        manager = self.manager
        move = self.random.choice([manager.get_layerwise, manager.put_layerwise])(tokens, slots)
        if isinstance(move, LayerwisePut):
            move.layer_written(MODEL.num_layers - 1)
        await move

    async def work(self, requests: int) -> Counter[str]:
        """Make many requests, wait until all are over, and return the containers' sizes then."""
        async with asyncio.TaskGroup() as group:
            for _ in range(requests):
                group.create_task(self.ask())
        for _ in range(3):  # each failure is reported once
            try:
                await self.manager.flush()
            except TransferError:
                continue
        await asyncio.sleep(100.0)  # virtual: pins expire, and tiers that were down are tried again
        gc.collect()
        found: Counter[str] = Counter()
        for name, size in containers(self.manager):
            found[name] += size if name not in CACHES else 0
        return found


@pytest.mark.parametrize("is_traced", [False, True])
@pytest.mark.parametrize("failure_probability", [0.0, 0.1])
def test_an_idle_engine_holds_no_more_after_many_requests_than_after_few(
    failure_probability: float, is_traced: bool
) -> None:
    """No container of the engine grows with the number of requests, however they end."""

    async def run() -> None:
        bench = Bench(failure_probability)
        async with bench.manager as manager:
            manager.register_kv_caches([np.zeros((BLOCKS_MAX, BLOCK_KEY_BYTES), np.uint8)])
            if is_traced:
                manager.engine.tracing.tell(Deaf())
            before = await bench.work(100)
            for _ in range(3):
                after = await bench.work(200)
                grown = {n: (before[n], size) for n, size in after.items() if size > before[n]}
                assert not grown
            assert manager.statistics().claims == 0

    run_virtual(run())


def test_a_run_that_ends_and_leaves_a_claim_ends_the_engine() -> None:
    """A run that ends and leaves a claim ends the engine, as its blocks could never be evicted.

    All callers get the error, and the engine takes no more requests.
    """

    async def run() -> None:
        bench = Bench(0.0)
        await bench.manager.__aenter__()
        engine = bench.manager.engine
        bench.manager.register_kv_caches([np.zeros((BLOCKS_MAX, BLOCK_KEY_BYTES), np.uint8)])
        tokens = list(range(4 * TOKENS_PER_BLOCK))
        put = asyncio.create_task(bench.manager.put(tokens, np.arange(len(tokens))))
        await asyncio.sleep(0)
        (flight,) = engine.scheduler.under_way()
        engine.residency.claims.open(-1, Claim(flight.plan.run_id, None, None))
        waits = asyncio.create_task(flight.wait_ended())
        assert (await put).return_mask.all()
        await waits
        with pytest.raises(InternalError, match="ended, but has open claims"):
            await bench.manager.get(tokens, np.arange(len(tokens)))
        assert not engine.is_open
        await engine.close()

    run_virtual(run())


def test_failures_that_nobody_asks_for_are_kept_up_to_a_bound() -> None:
    """Failures of writes are kept up to a bound until a flush, which reports one of them."""

    async def run() -> None:
        broken, sound = FaultPlan(1, 1.0, 0.0001, 0.0002), FaultPlan(1, 0.0, 0.0001, 0.0002)
        backend = FakeBackend(HOST_BLOCKS, broken, empty(DISK_BLOCKS), device_faults=sound)
        cache = CacheConfig(
            tokens_per_block=TOKENS_PER_BLOCK, num_cpu_blocks=HOST_BLOCKS, evict_ratio=0.0,
            num_ssd_blocks=DISK_BLOCKS, ssd_cache_dir="unused",
        )  # fmt: skip
        async with KVManager(MODEL, cache, backend=backend) as manager:
            manager.register_kv_caches([np.zeros((BLOCKS_MAX, BLOCK_KEY_BYTES), np.uint8)])
            sizes = []
            for _ in range(4):
                for number in range(200):
                    await manager.put([number % 50, 2], [0, 1])
                    await asyncio.sleep(1.0)  # virtual
                sizes.append(sum(size for _, size in containers(manager)))
            assert sizes[0] == sizes[-1]
            with pytest.raises(TransferError):
                await manager.flush()

    run_virtual(run())


def test_the_first_failure_is_what_everybody_is_told() -> None:
    """Every caller gets the engine's first failure; it is reported once, and later ones are not."""

    async def run() -> None:
        bench = Bench(0.0)
        async with bench.manager as manager:
            told: list[str] = []
            manager.engine.on_failure = lambda: told.append("failed")

            async def fail(why: str) -> None:
                raise InvariantError(why)

            for why in ("the first", "the second"):
                manager.engine.supervisor.spawn(why, fail(why))
            await asyncio.sleep(0.01)
            for _ in range(2):
                with pytest.raises(InternalError, match="the first"):
                    await manager.prefetch([1, 2])
            assert told == ["failed"]

    run_virtual(run())


def test_closing_gives_up_hardware_that_keeps_its_buffers() -> None:
    """After about a minute a close stops waiting for hardware, and says what is still in flight."""

    async def run() -> None:
        bench = Bench(0.0)
        manager = await bench.manager.__aenter__()
        manager.register_kv_caches([np.zeros((BLOCKS_MAX, BLOCK_KEY_BYTES), np.uint8)])
        assert bench.backend.port is not None
        bench.backend.port._faults = FaultPlan(1, 0.0, 1000.0, 1000.0)
        await manager.put([1, 2, 3, 4], np.arange(4))
        began_s = asyncio.get_running_loop().time()
        with pytest.raises(InternalError, match=r"still in flight after .*'disk': [1-9]"):
            await manager.__aexit__(None, None, None)
        assert asyncio.get_running_loop().time() - began_s < 100.0

    run_virtual(run())
