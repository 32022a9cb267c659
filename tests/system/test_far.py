"""What lies far: blocks that others hold, which a load fetches where its local blocks end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from flexkv.actors.actor import Window
from flexkv.common.config import CacheConfig
from flexkv.common.errors import (
    CapacityError,
    CorruptBlockError,
    MissingBlockError,
    TransferError,
)
from flexkv.common.request import KVResponse, KVResponseStatus, Operation, Request
from flexkv.common.terms import BLOCK_KEY_BYTES, BlockKey, Tier, Transfer
from flexkv.engine.engine import Engine
from flexkv.graph.explain import explain
from flexkv.index.keys import block_keys
from flexkv.io.ports import Completion
from flexkv.testing.fake_backend import FakeBackend, empty
from flexkv.testing.fake_far import FakeFar, FarPort
from flexkv.testing.faults import FaultPlan
from flexkv.testing.simulated_groups import MODEL, TOKENS_PER_BLOCK
from flexkv.testing.virtual_time import run_virtual

BLOCKS = 8
SUCCESS, NOTFOUND = KVResponseStatus.SUCCESS, KVResponseStatus.NOTFOUND


class Bench:
    """An engine with a far tier that is addressed by content; the content of a block is its key."""

    def __init__(self, host: int = 32, disk: int = 0, chunk_blocks: int = 64) -> None:
        cache = CacheConfig(
            tokens_per_block=TOKENS_PER_BLOCK, num_cpu_blocks=host, num_ssd_blocks=disk,
            ssd_cache_dir="unused", evict_ratio=0.0, chunk_mb=chunk_blocks * 4096 / 2**20,
        )  # fmt: skip
        self.far = FakeFar()
        faults = FaultPlan(1, 0.0, 0.001, 0.01)
        self.backend = FakeBackend(host, faults, empty(disk, 0), far=self.far)
        piece_of_two = Window(4 * BLOCK_KEY_BYTES, 2 * BLOCK_KEY_BYTES)
        self.backend.windows = piece_of_two, piece_of_two
        self.engine = Engine(MODEL, cache, self.backend)
        self.device = np.zeros((2 * BLOCKS, BLOCK_KEY_BYTES), np.uint8)

    @property
    def port(self) -> FarPort:
        """Return the port to the far tier."""
        assert self.backend.far_port is not None
        return self.backend.far_port

    def keys(self, number: int = 0) -> list[BlockKey]:
        """Return the keys of a prompt's blocks."""
        return block_keys(self.request(number).keys)

    def request(self, number: int = 0) -> Request:
        """Return a prefetch of a whole prompt, which is not performed."""
        return self.engine.requests.intake(Operation.PREFETCH, _tokens(number, BLOCKS))

    async def perform(
        self, operation: Operation, blocks: int = BLOCKS, number: int = 0, first: int = 0
    ) -> KVResponse:
        """Perform an operation on blocks `first` to `blocks` of a prompt; check what a get loads.

        Two gets at a time use different halves of the device.
        """
        mask = np.arange(blocks * TOKENS_PER_BLOCK) >= first * TOKENS_PER_BLOCK
        is_prefetch = operation is Operation.PREFETCH
        tokens = _tokens(number, blocks)
        request = self.engine.requests.intake(operation, tokens, None if is_prefetch else mask)
        begin = BLOCKS * (request.request_id % 2)
        slots = np.arange(begin * TOKENS_PER_BLOCK, (begin + blocks - first) * TOKENS_PER_BLOCK)
        ready = request if is_prefetch else self.engine.requests.with_slots(request, slots)
        assert ready is not None
        right = np.array([np.frombuffer(key, np.uint8) for key in block_keys(request.keys)[first:]])
        mine = slice(begin, begin + blocks - first)
        self.device[mine] = right if operation is Operation.PUT else 0
        response = (await self.engine.requests.perform(ready)).response
        assert response is not None
        count = loaded(response)
        if operation is Operation.GET:
            assert np.array_equal(self.device[mine][:count], right[:count])
        return response

    def fetched(self, number: int = 0) -> list[int]:
        """Return how often each block of a prompt has been fetched."""
        return [self.port.fetched.get(key, 0) for key in self.keys(number)]


def _tokens(number: int, blocks: int) -> list[int]:
    return list(range(1000 * number, 1000 * number + blocks * TOKENS_PER_BLOCK))


def loaded(response: KVResponse) -> int:
    """Return how many blocks a response claims."""
    return int(np.count_nonzero(response.return_mask)) // TOKENS_PER_BLOCK


def on_bench(work: Callable[[Bench], Awaitable[None]], **sizes: int) -> None:
    """Run something on an open engine, and close it, which checks that nothing is left."""

    async def run() -> None:
        bench = Bench(**sizes)
        await bench.engine.open()
        bench.engine.register_kv_caches([bench.device])
        await work(bench)
        await bench.engine.close()

    run_virtual(run())


def test_a_get_loads_what_is_here_and_what_lies_far_behind_it() -> None:
    """Three blocks are here, five lie far: eight are loaded, and all are here afterwards."""

    async def work(bench: Bench) -> None:
        await bench.perform(Operation.PUT, 3)
        bench.far.hold(bench.keys())
        found = bench.engine.match(_tokens(0, BLOCKS))
        assert (found.tokens, bench.far.looks) == (3 * TOKENS_PER_BLOCK, [3])
        assert sum(found.far_tokens_by_tier.values()) == 5 * TOKENS_PER_BLOCK
        first = await bench.perform(Operation.GET)
        assert (first.status, loaded(first), first.error) == (SUCCESS, 8, None)
        assert bench.far.looks == [3, 3]
        assert bench.engine.match(_tokens(0, BLOCKS)).tokens == 8 * TOKENS_PER_BLOCK
        second = await bench.perform(Operation.GET)
        assert (second.status, loaded(second)) == (SUCCESS, 8)
        assert bench.far.looks == [3, 3], "what is here needs no look"
        assert bench.fetched() == [0, 0, 0, 1, 1, 1, 1, 1]
        told = bench.engine.statistics()
        assert told.hit_blocks == {"host": 3 + 8, "remote": 5}
        assert told.routes["remote→host"].blocks == 5
        assert (told.tiers["remote"].backing, told.tiers["remote"].reads) == ("FarPort", "up")
        assert told.queues["remote"].waiting_ops == 0

    on_bench(work)


def test_a_prefetch_brings_far_blocks_into_host_memory() -> None:
    """A prefetch needs no device, and begins where nothing at all is here."""

    async def work(bench: Bench) -> None:
        bench.far.hold(bench.keys()[:5])
        response = await bench.perform(Operation.PREFETCH)
        assert (response.status, loaded(response)) == (SUCCESS, 5)
        assert bench.engine.match(_tokens(0, BLOCKS)).tokens_by_tier == {Tier.HOST: 10}
        assert "host→device" not in bench.engine.statistics().routes

    on_bench(work)


def test_blocks_of_three_tiers_are_loaded_by_one_get() -> None:
    """Host memory has one block, the disk two more, and the rest lies far, in small chunks."""

    async def work(bench: Bench) -> None:
        await bench.perform(Operation.PUT, 3)
        await bench.engine.flush()
        bench.engine.residency.clear(Tier.HOST)
        await bench.perform(Operation.PREFETCH, 1)
        bench.far.hold(bench.keys())
        assert loaded(await bench.perform(Operation.GET)) == 8
        told = bench.engine.statistics()
        assert told.hit_blocks == {"host": 1, "disk": 2, "remote": 5}
        assert told.routes["remote→host"].ops > 1
        await bench.engine.flush()
        bench.engine.residency.clear(Tier.HOST)
        assert loaded(await bench.perform(Operation.GET)) == 8, "the disk was not given them"
        assert sum(bench.fetched()) == 5

    on_bench(work, disk=16, chunk_blocks=1)


@pytest.mark.parametrize("here", [0, 3])
def test_a_wrong_hint_costs_a_fetch_and_no_more(here: int) -> None:
    """What is not far after all is a miss: no tier is blamed, and it is not asked for again."""

    async def work(bench: Bench) -> None:
        if here:
            await bench.perform(Operation.PUT, here)
        bench.far.hinted.update(bench.keys())
        for _ in range(5):
            response = await bench.perform(Operation.GET)
            assert (response.status, loaded(response)) == (SUCCESS if here else NOTFOUND, here)
        ((keys, error),) = bench.far.doubts
        assert (keys, type(error)) == (bench.keys()[here:], MissingBlockError)
        for number in range(1, 5):
            bench.far.hinted.update(bench.keys(number))
            assert (await bench.perform(Operation.GET, number=number)).status is NOTFOUND
        told = bench.engine.statistics()
        assert (told.tiers["remote"].reads, told.corrupt_blocks) == ("up", 0)
        assert told.tiers["host"].used_blocks == here

    on_bench(work)


def test_the_blocks_before_one_that_is_missing_stay() -> None:
    """A fetch that ends in part leaves the leading blocks in host memory, and shortens the mask."""

    async def work(bench: Bench) -> None:
        await bench.perform(Operation.PUT, 3)
        bench.far.hold(bench.keys())
        bench.far.held.discard(bench.keys()[6])
        response = await bench.perform(Operation.GET)
        assert (response.status, loaded(response)) == (SUCCESS, 6)
        assert isinstance(response.error, MissingBlockError)
        assert bench.far.doubts[0][0] == bench.keys()[6:]
        assert bench.engine.match(_tokens(0, BLOCKS)).tokens_by_tier == {Tier.HOST: 12}
        assert bench.engine.statistics().hit_blocks == {"host": 3, "remote": 3}

    on_bench(work)


def test_damage_is_a_miss_that_is_counted() -> None:
    """A far block with wrong bytes is never loaded; what came before it is."""

    async def work(bench: Bench) -> None:
        bench.far.hold(bench.keys())
        bench.far.damage(bench.keys()[2])
        response = await bench.perform(Operation.GET)
        assert (response.status, loaded(response)) == (SUCCESS, 2)
        assert isinstance(response.error, CorruptBlockError)
        told = bench.engine.statistics()
        assert (told.corrupt_blocks, told.tiers["remote"].reads) == (1, "up")
        assert loaded(await bench.perform(Operation.GET)) == 2

    on_bench(work)


def test_two_gets_of_the_same_far_blocks_fetch_them_once() -> None:
    """The second get waits for the first one's fetch; both have all bytes."""

    async def work(bench: Bench) -> None:
        bench.far.hold(bench.keys())
        async with asyncio.TaskGroup() as group:
            gets = [group.create_task(bench.perform(Operation.GET)) for _ in range(2)]
        assert [loaded(get.result()) for get in gets] == [8, 8]
        assert bench.fetched() == [1] * BLOCKS

    on_bench(work)


def test_two_gets_of_a_wrong_hint_both_end_short() -> None:
    """The second get is planned anew when the fetch that it waits for ends in part."""

    async def work(bench: Bench) -> None:
        bench.far.hold(bench.keys())
        bench.far.held.discard(bench.keys()[4])
        async with asyncio.TaskGroup() as group:
            gets = [group.create_task(bench.perform(Operation.GET)) for _ in range(2)]
        assert [loaded(get.result()) for get in gets] == [4, 4]
        assert bench.fetched() == [1, 1, 1, 1, 0, 0, 0, 0]

    on_bench(work)


def test_a_get_cancelled_amid_its_fetch_leaves_nothing() -> None:
    """Host places come back once the port lets go; another get that waits has its blocks."""

    async def work(bench: Bench) -> None:
        bench.far.hold(bench.keys())
        get = asyncio.ensure_future(bench.perform(Operation.GET))
        await asyncio.sleep(0)
        assert bench.engine.statistics().tiers["host"].reserved_blocks == 8
        get.cancel()
        with pytest.raises(asyncio.CancelledError):
            await get
        await bench.engine.scheduler.wait_idle()
        bench.engine.residency.validate()
        assert bench.engine.statistics().claims == 0
        assert not bench.far.doubts, "a cancelled fetch says nothing about the hints"

        first = asyncio.ensure_future(bench.perform(Operation.GET, number=1))
        bench.far.hold(bench.keys(1))
        await asyncio.sleep(0)
        second = asyncio.ensure_future(bench.perform(Operation.GET, number=1))
        await asyncio.sleep(0)
        first.cancel()
        assert loaded(await second) == 8
        with pytest.raises(asyncio.CancelledError):
            await first
        assert bench.fetched(1) == [1] * BLOCKS

    on_bench(work)


def test_an_engine_closed_amid_a_fetch_leaves_nothing() -> None:
    """Closing cancels the get, and waits until the far tier's port has let go of host memory."""

    async def run() -> None:
        bench = Bench()
        await bench.engine.open()
        bench.engine.register_kv_caches([bench.device])
        bench.far.hold(bench.keys())
        get = asyncio.ensure_future(bench.perform(Operation.GET))
        await asyncio.sleep(0.0005)  # virtual: a fetch takes a millisecond at least
        assert bench.port.in_flight
        await bench.engine.close()
        assert (await get).status is KVResponseStatus.CANCELLED

    run_virtual(run())


def test_a_far_tier_that_fails_is_not_asked() -> None:
    """After three failures the tier is down, and what is here is served without it."""

    async def work(bench: Bench) -> None:
        reap, error = bench.port.reap, TransferError(0, "remote→host", 1, "planted")

        def failing() -> list[Completion]:
            return [Completion(end.op_id, error) for end in reap()]

        bench.port.reap = failing  # type: ignore[method-assign]
        bench.far.hold(bench.keys())
        for number in range(3):
            await bench.perform(Operation.PUT, 3, number)
            bench.far.hold(bench.keys(number))
            response = await bench.perform(Operation.GET, number=number)
            assert (response.status, loaded(response)) == (SUCCESS, 3)
        assert bench.engine.statistics().tiers["remote"].reads == "down"
        bench.port.reap = reap  # type: ignore[method-assign]
        bench.far.hold(bench.keys())
        response = await bench.perform(Operation.GET)
        assert (loaded(response), response.error) == (3, None)
        await asyncio.sleep(2.0)  # virtual: the breaker allows a trial
        assert loaded(await bench.perform(Operation.GET)) == 8
        assert bench.engine.statistics().tiers["remote"].reads == "up"

    on_bench(work)


def test_far_blocks_stand_in_for_those_of_a_disk_that_is_down() -> None:
    """What the disk has and cannot deliver is fetched from afar, up to what host memory has."""

    async def work(bench: Bench) -> None:
        await bench.perform(Operation.PUT, 6)
        await bench.engine.flush()
        bench.engine.residency.clear(Tier.HOST)
        await bench.perform(Operation.PREFETCH, 2)
        bench.far.hold(bench.keys())
        bench.engine.scheduler.watch.lose(Tier.DISK, "planted")
        assert loaded(await bench.perform(Operation.GET)) == 8
        assert bench.fetched() == [0, 0, 1, 1, 1, 1, 1, 1]

    on_bench(work, disk=16)


def test_far_blocks_end_where_host_memory_goes_on() -> None:
    """Far blocks stand in for two that only the lost disk has; those behind them are here."""

    async def work(bench: Bench) -> None:
        await bench.perform(Operation.PUT, 6)
        await bench.engine.flush()
        ids = bench.engine.residency.find(bench.request().keys).ready[Tier.HOST].block_ids
        bench.engine.residency.forget(Tier.HOST, ids[2:4])
        bench.far.hold(bench.keys())
        bench.engine.scheduler.watch.lose(Tier.DISK, "planted")
        assert loaded(await bench.perform(Operation.GET)) == 4
        assert loaded(await bench.perform(Operation.GET)) == 8
        assert bench.fetched() == [0, 0, 1, 1, 0, 0, 1, 1]

    on_bench(work, disk=16)


@pytest.mark.parametrize("parent", ["nowhere", "here"])
def test_far_blocks_are_fetched_only_behind_what_is_here(parent: str) -> None:
    """A get of only the last blocks fetches them if the block before them is here.

    Host memory has no holes: it cannot take a block whose parent is nowhere.
    """

    async def work(bench: Bench) -> None:
        if parent == "here":
            await bench.perform(Operation.PUT, 4)
        bench.far.hold(bench.keys())
        response = await bench.perform(Operation.GET, first=4)
        assert loaded(response) == (4 if parent == "here" else 0)
        assert response.status is (SUCCESS if parent == "here" else NOTFOUND)

    on_bench(work)


def test_a_get_that_host_memory_cannot_take_whole_is_cut_there() -> None:
    """The parent and the blocks found here are kept while others make room for far ones."""

    async def work(bench: Bench) -> None:
        await bench.perform(Operation.PUT, 3)
        for number in (1, 2):
            await bench.perform(Operation.PUT, 3, number)
        await bench.perform(Operation.GET, 3)
        bench.far.hold(bench.keys())
        response = await bench.perform(Operation.GET)
        assert (response.status, loaded(response)) == (SUCCESS, 6)
        assert isinstance(response.error, CapacityError)
        response = await bench.perform(Operation.GET, first=3)
        assert loaded(response) == 3

    on_bench(work, host=6)


def test_the_block_before_far_ones_makes_no_room_for_them() -> None:
    """The block that far ones continue is kept, although the request itself does not load it."""

    async def work(bench: Bench) -> None:
        await bench.perform(Operation.PUT, 1)
        bench.far.hold(bench.keys())
        response = await bench.perform(Operation.GET, first=1)
        assert (response.status, loaded(response)) == (SUCCESS, 3)
        assert bench.engine.match(_tokens(0, BLOCKS)).tokens == 4 * TOKENS_PER_BLOCK

    on_bench(work, host=4)


def test_explain_and_records_name_the_far_tier() -> None:
    """The drawing of a plan, and the record of a request, have a far tier by its label."""

    async def work(bench: Bench) -> None:
        await bench.perform(Operation.PUT, 3)
        bench.far.hold(bench.keys())
        request = bench.engine.requests.intake(Operation.GET, _tokens(0, BLOCKS))
        drawn = str(explain(request, bench.engine.planner))
        assert drawn.startswith("get of 8 whole blocks: 3 in host, 5 in remote")
        assert "remote→host 5 blocks" in drawn
        records = []

        class Sink:
            def record(self, record: object) -> None:
                """Keep a record."""
                records.append(record)

        bench.engine.tracing.tell(Sink())
        await bench.perform(Operation.GET)
        (told,) = [record for record in records if hasattr(record, "hit_blocks")]
        assert told.hit_blocks == {"host": 3, "remote": 5}
        (fetch,) = [r for r in records if getattr(r, "actor", "") == "remote"]
        assert (fetch.route, fetch.block_count, fetch.outcome) == ("remote→host", 5, "done")

    on_bench(work)


def test_every_transfer_names_its_blocks() -> None:
    """Whatever its route, its chunk or its piece, a transfer's keys are those of its blocks.

    Here the bytes of a block are its key, so what a write is about to move shows the key.
    """

    async def work(bench: Bench) -> None:
        port = bench.backend.port
        assert port is not None
        submit, seen = port.submit, {True: 0, False: 0}

        def checked(transfer: Transfer) -> None:
            to_host = transfer.route.target is Tier.HOST
            source = port._store if to_host else port._host
            moved = [source[at].tobytes() for at in transfer.source_ids]
            assert moved == transfer.block_keys
            assert len(list(transfer.positions)) == transfer.block_count
            seen[to_host] += transfer.block_count
            submit(transfer)

        port.submit = checked  # type: ignore[method-assign]
        await bench.perform(Operation.PUT)
        await bench.engine.flush()
        bench.far.hold(bench.keys(1))
        await bench.perform(Operation.PREFETCH, number=1)
        await bench.engine.flush()  # writes fetched blocks, which nobody has put
        bench.engine.residency.clear(Tier.HOST)
        for number in range(2):
            assert loaded(await bench.perform(Operation.GET, number=number)) == 8
        assert seen == {True: 16, False: 16}

    on_bench(work, disk=16, chunk_blocks=3)
