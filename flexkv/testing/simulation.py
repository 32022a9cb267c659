"""The real engine, scheduler and actors on a virtual clock, over fake ports, from one seed.

A simulated inference engine owns device slots. It puts prompts, gets them back, prefetches, clears
the cache, and gives up at random moments. The oracles:

- every block that a response claims has exactly the bytes that belong to its key, and so has every
  block of the other KV groups that the prefix needs; each clear changes these bytes, and nothing
  from before one is served to a request that began after it;
- once nothing fails any more, what host memory has becomes far, and all that is far is offered and
  loaded (`simulated_liveness.py`);
- what is still coming from far is not offered;
- what lies far is looked up only where the local blocks end;
- device slots that were given back are never written again, and what was read from them after
  they were given back is never served;
- no put that began before everything was cleared stores anything after it;
- after a crash before any step of the disk or a journal, with or without loss of power, what was
  flushed and not overwritten since is there; and a journal is wrong only where bits flipped, power
  was lost, or the journal could not be written;
- a flush reports how many blocks of host memory are not safe when it returns;
- every request ends, and at the end no claim, pin or transfer is left.

`simulate(seed)` replays a failure.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from random import Random

import numpy as np
from msgspec import structs

from flexkv.common.config import CacheConfig, ModelConfig
from flexkv.common.errors import ClearedError, DeadlineError, TransferError
from flexkv.common.request import KVResponse, KVResponseStatus, Operation, Request
from flexkv.common.terms import BLOCK_KEY_BYTES, Tier
from flexkv.engine.engine import Engine
from flexkv.index.eviction import POLICIES
from flexkv.index.keys import block_keys
from flexkv.testing.fake_backend import CrashState, FakeBackend, empty
from flexkv.testing.fake_far import random_far
from flexkv.testing.fakes import FakePort
from flexkv.testing.faults import FaultPlan
from flexkv.testing.simulated_contents import content_of
from flexkv.testing.simulated_crashes import Survival
from flexkv.testing.simulated_groups import (
    GROUPS_MAX,
    TOKENS_PER_BLOCK,
    LeafSlots,
    SimulatedGroups,
    random_model,
    slot_mapping,
)
from flexkv.testing.simulated_layers import LayeredRequest
from flexkv.testing.simulated_liveness import FarLiveness
from flexkv.testing.virtual_time import run_virtual
from flexkv.tiers.limits import disk_windows

GARBAGE = 0xEE

MIXES = [
    [Operation.GET, Operation.GET, Operation.PUT, Operation.PREFETCH],
    [Operation.PUT, Operation.PUT, Operation.PUT, Operation.GET],
]
"""Operations of a life; each entry is equally likely."""


class Simulation:
    """One seeded life of a simulated inference engine, up to a crash or its end."""

    def __init__(
        self, random: Random, model: ModelConfig, prompts: list[list[int]], remains: CrashState
    ) -> None:
        self.random, self.prompts = random, prompts
        self.groups = SimulatedGroups(model)
        faults = FaultPlan(
            random.randrange(1 << 30),
            random.choice([0.0, 0.0, 0.02, 0.2]),
            0.0001,
            0.01,
            flip_probability=random.choice([0.0, 0.0, 0.05]),
            hang_probability=random.choice([0.0, 0.0, 0.05]),
        )
        leaf_groups = len(self.groups.spaces)
        host_blocks = random.randint(4 + 8 * leaf_groups, 24 * (1 + leaf_groups))
        disk_blocks, slots = len(remains.store), 64 * (1 + leaf_groups)
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
            write_behind_max_gb=random.choice([-1.0, 0.0, 3 * 4096 / 2**30]),
            write_behind_wait_s=random.choice([0.0, 0.005, 1.0]),
            shutdown_flush_s=random.choice([0.0, 0.01, 1.0]),
        )
        self.capacity = {Tier.HOST: host_blocks, Tier.DISK: disk_blocks}
        self.far, ship = random_far(random, remains.generation)
        self.backend = FakeBackend(host_blocks, faults, remains, far=self.far)
        self.backend.ship = ship
        piece_bytes = random.choice([1, 2, 100]) * BLOCK_KEY_BYTES
        inbound, outbound = [
            window._replace(piece_bytes_max=piece_bytes) for window in disk_windows(cache)
        ]
        self.backend.windows = inbound, outbound
        self.engine = Engine(model, cache, self.backend)
        self.device = np.full((slots, BLOCK_KEY_BYTES), GARBAGE, np.uint8)
        self.free_slots = list(range(slots))
        self.moved_blocks = 0
        self._asleep = False
        self.operations = random.choice(MIXES)
        self.survival = Survival(random, self.engine, self.backend, remains)
        self._put_since_clear: set[bytes] | None = None
        """Keys of puts since everything was last cleared; None before the first such clear."""

    def _check_cleared(self) -> None:
        """Check that no block from before the last clear of everything is there."""
        if self._put_since_clear is None:
            return
        for prompt in self.prompts:
            keys = self.engine.requests.intake(Operation.PREFETCH, prompt).keys
            there = set(block_keys(keys)[: self.engine.residency.find(keys).chain])
            there |= {key for _, key in self.groups.there(self.engine.residency, keys)}
            far = self.far.ever_held if self.far is not None else set()
            assert there <= self._put_since_clear | far, "a cleared block came back"

    # -- a life ---------------------------------------------------------------------------------

    async def _open(self) -> None:
        """Open the engine without faults, and begin to watch what its tiers do."""
        for files in self.backend.files:
            files.faulty = False
        await self.engine.open()
        self.survival.watch()

    async def run(self) -> None:
        """Run every request to its end, close, and check that nothing is left."""
        engine, random = self.engine, self.random
        await self._open()
        self.survival.check_restored(self.prompts, self.groups)
        engine.register_kv_caches([self.device])
        kinds = (
            (self._request, random.randint(5, 30 * (1 + len(self.groups.spaces)))),
            (self._flush, random.choice([0, 1, 5])),
            (self._sleep_and_wake, random.choice([0, 0, 1, 3])),
        )
        async with asyncio.TaskGroup() as group:
            for work, count in kinds:
                for _ in range(count):
                    group.create_task(work(random.uniform(0.0, 0.1)))
        if random.random() < 0.5:
            await self._flush(0.0)
        engine.residency.validate()
        self._check_cleared()
        self.survival.check_bytes()
        if self.survival.is_trusted and not (self.far and self.far.damaged_blocks):
            assert engine.statistics().corrupt_blocks == 0, (
                "a journal names a block that is not there"
            )
        if self.far is not None and random.random() < 0.5:
            await self._check_liveness()
        await engine.close()
        assert np.all(self.device == GARBAGE), "a device slot was written after it was given back"
        assert not any(files.open_files for files in self.backend.files), "a file was left open"
        self.survival.end()

    async def _check_liveness(self) -> None:
        """Let the far tier be in order again, and check that everything goes on."""
        liveness = FarLiveness(
            self.random, self.engine, self.backend, self.survival, self.groups, self._move_all
        )
        await liveness.check(self.prompts)
        self.survival.check_bytes()

    async def _move_all(self, request: Request) -> int:
        """Perform a get or put of all blocks; return how many of the chain a get loaded."""
        slots = [self.free_slots.pop() for _ in range(request.span.last_block)]
        leaves = LeafSlots(self.groups, request)
        assert leaves.choose_all(self.free_slots), "a slot was not given back"
        moved = await self._with_slots(request, slots, leaves)
        self._give_back(slots + leaves.all_slots)
        return moved

    def _give_back(self, slots: list[int]) -> None:
        self.device[slots] = GARBAGE
        self.free_slots.extend(slots)

    async def _sleep_and_wake(self, start_s: float) -> None:
        """Suspend the device for a while, unless it is suspended already."""
        await asyncio.sleep(start_s)
        if self._asleep:
            return
        self._asleep = True
        try:
            async with asyncio.timeout(self.random.choice([None, 0.005])):
                await self.engine.devices.suspend()
        except (TimeoutError, DeadlineError):  # the device goes on
            self._asleep = False
            return
        port = self.engine.devices._by_rank[0].port
        assert isinstance(port, FakePort)
        assert not port.in_flight, "a suspended device is still in use"
        await asyncio.sleep(self.random.uniform(0.0, 0.02))
        self.engine.devices.resume([self.device], None, 0)
        self._asleep = False

    async def _flush(self, start_s: float) -> None:
        await asyncio.sleep(start_s)
        with suppress(TransferError):  # injected: a write or the sync failed
            await self.survival.flushed()

    async def _request(self, start_s: float) -> None:
        await asyncio.sleep(start_s)
        random, engine = self.random, self.engine
        self._disturb()
        prompt = random.choice(self.prompts)
        if self.far is not None:
            self.far.residency = engine.residency
            keys = engine.requests.intake(Operation.PREFETCH, prompt).keys
            self.far.live(random, keys, self.groups.leaves_of)
        operation = random.choice(self.operations)
        mask = np.ones(len(prompt), np.bool_)
        begin = random.choice([0, 0, random.randint(0, len(prompt))])
        mask[: self.groups.begin(begin) if operation is Operation.GET else begin] = False
        request = engine.requests.intake(
            operation, prompt, mask if operation != Operation.PREFETCH else None
        )
        give_up_s = random.choice([None, random.uniform(0.0, 0.03)])
        if operation is Operation.PUT and self._put_since_clear is not None:
            self._put_since_clear |= self.groups.keys_of(request.keys)
        if operation is Operation.PREFETCH:
            await self._perform(self._behind_a_match(request), give_up_s)
            return
        if self.groups.spaces:
            request = self._to_a_boundary(request)
        blocks = request.span.last_block - request.span.first_block
        if blocks > len(self.free_slots):
            return
        slots = [self.free_slots.pop() for _ in range(blocks)]
        leaves = LeafSlots(self.groups, request)
        is_put = operation is Operation.PUT
        if leaves.choose(random, request.span.last_block, is_put, self.free_slots):
            by_layer = bool(slots) and not self.groups.spaces and random.random() < 0.3
            await self._with_slots(request, slots, leaves, give_up_s, by_layer)
        self._give_back(slots + leaves.all_slots)

    def _behind_a_match(self, request: Request) -> Request:
        """Return a prefetch, at times narrowed to what an engine would fetch behind a match.

        What the match offers must not be on its way from far.
        """
        if self.far is None:
            return request
        here, far, *_ = self.engine.requests.find_apart(request.keys)
        claims = self.engine.residency.claims
        for pending in (here.pending, *[leaves.pending for leaves in here.leaves]):
            if pending is not None:
                sources = claims.sources(Tier.HOST, pending.block_ids)
                assert self.far.tier not in sources, "what is coming from far was offered"
        if self.random.random() < 0.5:
            return request
        last = min(here.last + sum(far.values()), request.span.last_block)
        return request.narrowed(here.last, max(here.last, last))

    def _to_a_boundary(self, request: Request) -> Request:
        """Return a get narrowed, mostly, to a prefix that is here, or far; a put as it is."""
        first, last = request.span.first_block, request.span.last_block
        if request.operation is Operation.PUT or self.random.random() < 0.1:
            return request
        found = self.engine.find(request.keys, first)
        if self.far is not None and self.random.random() < 0.5:
            found = self.engine.planner.peek(structs.replace(request, device_ids=None))
        return request.narrowed(first, max(first, min(found.last, last)))

    def _disturb(self) -> None:
        """Now and then clear, resize, set a quota, pin or unpin, whatever is under way."""
        random, engine = self.random, self.engine
        chance = random.random()
        if chance < 0.03:
            tier = random.choice([None, *engine.residency.tiers])
            self.survival.about_to_clear(tier is None)
            engine.retention.clear(tier)
            if tier is None:
                self._put_since_clear = set()
        elif chance < 0.06:
            tier = random.choice(engine.residency.tiers)
            engine.retention.resize(tier, random.randint(1, self.capacity[tier]))
        elif chance < 0.12:
            prompt = random.choice([None, random.choice(self.prompts)])
            engine.retention.pin(prompt, None, random.uniform(0.001, 0.05), random.choice("ab"))
        elif chance < 0.13:
            blocks = random.choice([None, random.randint(0, 30)])
            engine.retention.set_quota(None, random.choice(engine.residency.tiers), blocks)
        elif chance < 0.15:
            engine.retention.pins.unpin_owner(random.choice("ab"))

    async def _with_slots(
        self,
        request: Request,
        slots: list[int],
        leaves: LeafSlots,
        give_up_s: float | None = None,
        by_layer: bool = False,
    ) -> int:
        """Perform a get or put with slots; return how many blocks of the chain a get loaded."""
        first, keys = request.span.first_block, block_keys(request.keys)
        generation, oldest = self.survival.generation, self.survival.oldest
        if is_put := request.operation is Operation.PUT:
            for slot, key in zip(slots, keys[first:], strict=True):
                self.device[slot] = content_of(key, generation)
            for slot, content in leaves.contents(generation):
                self.device[slot] = content
        mapping = slot_mapping(request, slots)
        ready = self.engine.requests.with_slots(
            request, [mapping, *leaves.mappings()] if self.groups.spaces else mapping
        )
        if ready is None:
            assert self._asleep, "the engine does not know a registered device"
            return 0
        if by_layer:
            response = await self._layer_by_layer(ready, slots, give_up_s)
        else:
            response = await self._perform(ready, give_up_s)
        if response is None or is_put:
            return 0
        is_right = partial(self.survival.is_right, oldest=oldest)
        moved = response.return_mask.reshape(-1)[: request.span.last_block * TOKENS_PER_BLOCK]
        for position, (slot, key) in enumerate(zip(slots, keys[first:], strict=True), first):
            if moved[position * TOKENS_PER_BLOCK]:
                assert is_right(key, self.device[slot]), "wrong bytes"
        count = int(np.count_nonzero(moved)) // TOKENS_PER_BLOCK
        if count:
            leaves.check(self.device, first + count, is_right)
        self.moved_blocks += count
        return count

    async def _layer_by_layer(
        self, request: Request, slots: list[int], give_up_s: float | None
    ) -> KVResponse | None:
        """Perform a put whose layers are written one by one, or check a get's as they come."""
        layered = LayeredRequest(self.random, self.engine, request, self.device)
        contents = self.device[slots]
        if is_put := request.operation is Operation.PUT:
            self.device[slots] = GARBAGE
            give_up_s = give_up_s or 1.0  # the layers may stop in the middle
        follow = layered.write(slots, contents) if is_put else layered.look(slots)
        async with asyncio.TaskGroup() as group:
            follower = group.create_task(follow)
            watched = structs.replace(request, watch=layered.progress)
            response = await self._perform(watched, give_up_s)
            layered.progress.end()
            if is_put:
                follower.cancel()
        if response is not None and not is_put:
            layered.check(response, slots)
        return response

    async def _perform(self, request: Request, give_up_s: float | None) -> KVResponse | None:
        try:
            async with asyncio.timeout(give_up_s):
                response = (await self.engine.requests.perform(request)).response
        except TimeoutError:
            return None
        assert response is not None
        if response.status is KVResponseStatus.CANCELLED:
            assert isinstance(response.error, ClearedError)
            assert request.generation < self.engine.clears.generation, "nothing was cleared"
        return response


def _prompt(random: Random) -> list[int]:
    """Return a prompt that is likely to share a prefix with others: zeros, then zeros and ones."""
    return [0] * random.randint(0, 8) + [random.randint(0, 1) for _ in range(random.randint(0, 30))]


def _resized(remains: CrashState, disk_blocks: int) -> CrashState:
    store = np.zeros((disk_blocks, BLOCK_KEY_BYTES), np.uint8)
    kept = min(disk_blocks, len(remains.store))
    store[:kept] = remains.store[:kept]
    return remains._replace(store=store)


def simulate(seed: int) -> int:
    """Run one simulation, and return the number of blocks that gets loaded.

    An SSD tier with journals goes through several lives. Each begins with what the crash or the end
    of the one before left.

    Raises:
        AssertionError: an oracle failed; the message names the seed.
    """
    random = Random(seed)
    model = random_model(random, random.choice([0] * 4 + [*range(1, GROUPS_MAX + 1)]))
    counts = [1, 2, 4] if model.layer_groups else [1, 3, 6, 20]  # leaves make hits rarer
    prompts = [_prompt(random) for _ in range(random.choice(counts))]
    remains = empty(random.choice([0, 8, 24, 48, 96]), random.choice([0, 1, 1, 2, 3]))
    moved_blocks = 0
    try:
        for _ in range(random.choice([1, 2, 4])):
            simulation = Simulation(random, model, prompts, remains)
            run_virtual(simulation.run())
            moved_blocks += simulation.moved_blocks
            if simulation.survival.remains is None or not simulation.survival.remains.journals:
                break
            remains = simulation.survival.remains
            if random.random() < 0.3:
                remains = _resized(remains, random.choice([8, 20, 48]))
    except BaseException as error:
        error.add_note(f"replay with: flexkv.testing.simulation.simulate({seed})")
        raise
    return moved_blocks
