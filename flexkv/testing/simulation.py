"""The real engine, scheduler and actors on a virtual clock, over fake ports, from one seed.

A simulated inference engine owns device slots. It puts prompts, gets them back, prefetches,
resets, and gives up at random moments. The oracles:

- every block that a response claims has exactly the bytes that belong to its key;
- device slots that were given back are never written again, and what was read from them after
  they were given back is never served;
- every request ends, and at the end nothing is left: no claim, no pin, no transfer.

`simulate(seed)` replays a failure.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack, suppress
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexkv.backend import Device, Progress
from flexkv.common.config import CacheConfig, ModelConfig
from flexkv.common.errors import TransferError
from flexkv.common.request import KVResponse, KVResponseStatus, Operation, Request
from flexkv.common.terms import BLOCK_KEY_BYTES, Tier
from flexkv.engine import Engine
from flexkv.index.eviction import POLICIES
from flexkv.index.keys import block_keys
from flexkv.io.checked import CheckedDiskPort
from flexkv.io.ports import DurablePort
from flexkv.ledger import Ledger
from flexkv.scrub import Scrubber
from flexkv.testing.fakes import FakePort, FakeSummer
from flexkv.testing.faults import FaultPlan
from flexkv.testing.virtual_time import run_virtual

TOKENS_PER_BLOCK = 2
MODEL = ModelConfig(num_layers=1, num_kv_heads=1, head_size=4, dtype="int8")
"""Its blocks have 16 bytes: as many as a key, which is what a block should hold."""

GARBAGE = 0xEE


class FakeBackend:
    """Host memory, disk and device as plain arrays behind fake ports."""

    def __init__(self, host_blocks: int, disk_blocks: int, faults: FaultPlan) -> None:
        self.host = "fake"
        self.disk: DurablePort | None = None
        self.disk_blocks = disk_blocks
        self.ledger: Ledger | None = None
        self.scrubber: Scrubber | None = None
        self._faults = faults
        self._sums: NDArray[np.uint64] | None = None
        self._memory = np.zeros((host_blocks, BLOCK_KEY_BYTES), np.uint8)
        self._store = np.zeros((disk_blocks, BLOCK_KEY_BYTES), np.uint8)

    def open(self, undo: ExitStack, progress: Progress | None) -> None:
        """Open the disk port."""
        if len(self._store):
            port = FakePort(self._store, self._memory, self._faults, BLOCK_KEY_BYTES, flips=True)
            summer = FakeSummer(self._memory)
            self._sums = summer.sums
            self.disk = CheckedDiskPort(
                port, summer, self.disk_blocks, lambda block: ("fake", block)
            )
            undo.callback(self.disk.close)

    def device(self, kv_caches: Any, layout: str | None) -> Device:
        """Open a port to the one array of `kv_caches`, uint8[blocks, 16]."""
        (store,) = kv_caches
        port = FakePort(store, self._memory, self._faults, BLOCK_KEY_BYTES, sums=self._sums)
        return Device(port, len(store), "fake")


class Simulation:
    """One seeded run of a simulated inference engine against the real one."""

    def __init__(self, seed: int) -> None:
        self.random = random = Random(seed)
        faults = FaultPlan(
            random.randrange(1 << 30),
            random.choice([0.0, 0.02, 0.2]),
            0.0001,
            0.01,
            flip_probability=random.choice([0.0, 0.05]),
            hang_probability=random.choice([0.0, 0.0, 0.05]),
        )
        host_blocks, disk_blocks = random.randint(4, 24), random.choice([0, 8, 48])
        cache = CacheConfig(
            tokens_per_block=TOKENS_PER_BLOCK,
            num_cpu_blocks=host_blocks,
            num_ssd_blocks=disk_blocks,
            ssd_cache_dir="unused",
            evict_ratio=random.choice([0.0, 0.05, 0.3]),
            evict_start_threshold=random.choice([1.0, 1.0, 0.7]),
            eviction_policy=random.choice(list(POLICIES)),
            requests_max=random.choice([1, 3, 64]),
            io_deadline_s=random.choice([0.02, 0.2, 10.0]),
            chunk_mb=random.choice([1, 4]) * 4096 / 2**20,
            device_window_mb=4 * BLOCK_KEY_BYTES / 2**20,
            disk_read_window_mb=4 * BLOCK_KEY_BYTES / 2**20,
            disk_write_window_mb=2 * BLOCK_KEY_BYTES / 2**20,
        )
        self.capacity = {Tier.HOST: host_blocks, Tier.DISK: disk_blocks}
        backend = FakeBackend(host_blocks, disk_blocks, faults)
        self.engine = Engine(MODEL, cache, backend)
        self.device = np.full((64, BLOCK_KEY_BYTES), GARBAGE, np.uint8)
        self.free_slots = list(range(64))
        self.prompts = [self._prompt() for _ in range(random.randint(1, 6))]
        self.moved_blocks = 0

    def _prompt(self) -> list[int]:
        """Give a prompt that shares a prefix with others: few tokens, few first choices."""
        random = self.random
        return [0] * random.randint(0, 8) + [
            random.randint(0, 1) for _ in range(random.randint(0, 30))
        ]

    async def run(self) -> None:
        """Run every request to its end, close, and check that nothing is left."""
        engine = self.engine
        await engine.open()
        engine.register_kv_caches([self.device])
        async with asyncio.TaskGroup() as group:
            for _ in range(self.random.randint(5, 30)):
                group.create_task(self._request(self.random.uniform(0.0, 0.1)))
        if self.random.random() < 0.5:
            await self._flush()
        engine.residency.validate()
        await engine.close()
        assert np.all(self.device == GARBAGE), "a device slot was written after it was given back"

    async def _flush(self) -> None:
        with suppress(TransferError):  # injected: a write or the sync failed
            await self.engine.flush()

    async def _request(self, start_s: float) -> None:
        await asyncio.sleep(start_s)
        random, engine = self.random, self.engine
        self._disturb()
        prompt = random.choice(self.prompts)
        operation = random.choice([Operation.GET, Operation.GET, Operation.PUT, Operation.PREFETCH])
        mask = np.ones(len(prompt), np.bool_)
        mask[: random.choice([0, 0, random.randint(0, len(prompt))])] = False
        request = engine.intake(
            operation, prompt, mask if operation != Operation.PREFETCH else None
        )
        give_up_s = random.choice([None, random.uniform(0.0, 0.03)])
        if operation is Operation.PREFETCH:
            await self._perform(request, give_up_s)
            return
        blocks = request.span.last_block - request.span.first_block
        if blocks > len(self.free_slots):
            return
        slots = [self.free_slots.pop() for _ in range(blocks)]
        await self._with_slots(request, slots, give_up_s)
        self.device[slots] = GARBAGE
        self.free_slots.extend(slots)

    def _disturb(self) -> None:
        """Now and then clear, resize, bound or pin, whatever is under way."""
        random, engine = self.random, self.engine
        chance = random.random()
        if chance < 0.03:
            engine.clear(random.choice([None, *engine.residency.tiers]))
        elif chance < 0.06:
            tier = random.choice(engine.residency.tiers)
            engine.resize(tier, random.randint(1, self.capacity[tier]))
        elif chance < 0.12:
            prompt = random.choice([None, random.choice(self.prompts)])
            engine.pin(prompt, None, random.uniform(0.001, 0.05), random.choice("ab"))
        elif chance < 0.13:
            blocks = random.choice([None, random.randint(0, 30)])
            engine.set_quota(None, random.choice(engine.residency.tiers), blocks)
        elif chance < 0.15:
            engine.pins.unpin_owner(random.choice("ab"))

    async def _with_slots(
        self, request: Request, slots: list[int], give_up_s: float | None
    ) -> None:
        first = request.span.first_block
        contents = [np.frombuffer(key, np.uint8) for key in block_keys(request.keys)[first:]]
        if request.operation is Operation.PUT:
            for slot, content in zip(slots, contents, strict=True):
                self.device[slot] = content
        ready = self.engine.with_slots(request, self._slot_mapping(request, slots))
        assert ready is not None
        response = await self._perform(ready, give_up_s)
        if response is None or request.operation is not Operation.GET:
            return
        moved = response.return_mask.reshape(-1)[: request.span.last_block * TOKENS_PER_BLOCK]
        for position, (slot, content) in enumerate(zip(slots, contents, strict=True)):
            if moved[(first + position) * TOKENS_PER_BLOCK]:
                self.moved_blocks += 1
                assert np.array_equal(self.device[slot], content), "wrong bytes"

    @staticmethod
    def _slot_mapping(request: Request, slots: list[int]) -> NDArray[np.int64]:
        """Give slots for the selected tokens; those outside whole blocks get any legal one."""
        span = request.span
        mapping = np.zeros(span.last_token - span.first_token, np.int64)
        skip = span.first_block * TOKENS_PER_BLOCK - span.first_token
        for number, slot in enumerate(slots):
            begin = skip + number * TOKENS_PER_BLOCK
            first = slot * TOKENS_PER_BLOCK
            mapping[begin : begin + TOKENS_PER_BLOCK] = range(first, first + TOKENS_PER_BLOCK)
        return mapping

    async def _perform(self, request: Request, give_up_s: float | None) -> KVResponse | None:
        try:
            async with asyncio.timeout(give_up_s):
                response = (await self.engine.perform(request)).response
        except TimeoutError:
            return None
        assert response is not None
        assert response.status is not KVResponseStatus.CANCELLED
        return response


def simulate(seed: int) -> int:
    """Run one simulation, and give the number of blocks that gets brought back.

    Raises:
        AssertionError: an oracle failed; the message names the seed.
    """
    simulation = Simulation(seed)
    try:
        run_virtual(simulation.run())
    except BaseException as error:
        error.add_note(f"replay with: flexkv.testing.simulation.simulate({seed})")
        raise
    return simulation.moved_blocks
