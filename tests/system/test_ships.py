"""Ships: whole spans that reach host memory are written to a far tier, in the background."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import islice, pairwise

import numpy as np
import pytest

from flexkv.actors.actor import Window
from flexkv.actors.health import BACKOFF_MIN_S
from flexkv.actors.write_behind import ATTEMPTS_MAX, ShipLimits
from flexkv.common.config import CacheConfig
from flexkv.common.errors import TransferError
from flexkv.common.request import KVResponseStatus, Operation
from flexkv.common.terms import BLOCK_KEY_BYTES, BlockKey, Tier, Transfer
from flexkv.engine.engine import Engine
from flexkv.index.keys import block_keys
from flexkv.testing.fake_backend import FakeBackend, empty
from flexkv.testing.fake_far import FakeFar, FarPort
from flexkv.testing.faults import FaultPlan
from flexkv.testing.simulated_groups import MODEL, TOKENS_PER_BLOCK
from flexkv.testing.virtual_time import run_virtual

BLOCKS, SPAN = 11, 4
SHIP = ShipLimits(SPAN, 2 * SPAN)


class Bench:
    """An engine that writes spans of four blocks to a far tier; a block's content is its key."""

    def __init__(
        self,
        far: FakeFar,
        failure: float,
        host: int,
        window_spans: int,
        ship: ShipLimits,
    ) -> None:
        cache = CacheConfig(tokens_per_block=TOKENS_PER_BLOCK, num_cpu_blocks=host, evict_ratio=0.0)
        self.far = far
        faults, sound = FaultPlan(1, failure, 0.001, 0.01), FaultPlan(1, 0.0, 0.001, 0.01)
        self.faults = faults
        self.backend = FakeBackend(host, faults, empty(0), sound, far=far)
        self.backend.ship = ship
        window = Window(window_spans * SPAN * BLOCK_KEY_BYTES, SPAN * BLOCK_KEY_BYTES)
        self.backend.windows = window, window
        self.engine = Engine(MODEL, cache, self.backend)
        self.device = np.zeros((BLOCKS, BLOCK_KEY_BYTES), np.uint8)

    @property
    def port(self) -> FarPort:
        """Return the port to the far tier."""
        assert self.backend.far_port is not None
        return self.backend.far_port

    async def perform(self, operation: Operation, number: int = 0, blocks: int = BLOCKS) -> int:
        """Perform an operation on the first blocks of a prompt, and return how many it moved."""
        tokens = list(range(1000 * number, 1000 * number + blocks * TOKENS_PER_BLOCK))
        mask = np.ones(len(tokens), np.bool_) if operation is not Operation.PREFETCH else None
        request = self.engine.requests.intake(operation, tokens, mask)
        right = np.array([np.frombuffer(key, np.uint8) for key in block_keys(request.keys)])
        self.device[:blocks] = right if operation is Operation.PUT else 0
        ready = request
        if operation is not Operation.PREFETCH:
            with_slots = self.engine.requests.with_slots(request, np.arange(len(tokens)))
            assert with_slots is not None
            ready = with_slots
        response = (await self.engine.requests.perform(ready)).response
        assert response is not None
        assert response.status in (KVResponseStatus.SUCCESS, KVResponseStatus.NOTFOUND)
        moved = int(np.count_nonzero(response.return_mask)) // TOKENS_PER_BLOCK
        if operation is Operation.GET:
            assert np.array_equal(self.device[:moved], right[:moved])
        return moved

    def keys(self, number: int = 0, blocks: int = BLOCKS) -> list[BlockKey]:
        """Return the keys of a prompt's blocks."""
        tokens = list(range(1000 * number, 1000 * number + blocks * TOKENS_PER_BLOCK))
        return block_keys(self.engine.requests.intake(Operation.PREFETCH, tokens).keys)


def on_bench(
    work: Callable[[Bench], Awaitable[None]],
    far: FakeFar,
    failure: float = 0.0,
    host: int = 64,
    window_spans: int = 2,
    ship: ShipLimits = SHIP,
) -> None:
    """Run something on an open engine, and close it, which checks that nothing is left."""

    async def run() -> None:
        bench = Bench(far, failure, host, window_spans, ship)
        await bench.engine.open()
        bench.engine.register_kv_caches([bench.device])
        await work(bench)
        await bench.engine.close()

    run_virtual(run())


def new_far() -> FakeFar:
    """Return an empty far tier of spans of four blocks."""
    return FakeFar(span_blocks=SPAN)


def test_what_one_engine_puts_another_gets() -> None:
    """Of eleven blocks two spans are written; an engine with empty tiers loads these eight."""
    far = new_far()

    async def first(bench: Bench) -> None:
        await bench.perform(Operation.PUT)
        await bench.engine.flush()
        assert far.held == set(bench.keys()[: 2 * SPAN])
        written = bench.engine.statistics().routes["host→remote"]
        assert (written.ops, written.blocks) == (2, 2 * SPAN)

    async def second(bench: Bench) -> None:
        assert await bench.perform(Operation.GET) == 2 * SPAN
        await bench.engine.flush()
        assert "host→remote" not in bench.engine.statistics().routes  # it is there already

    on_bench(first, far)
    on_bench(second, far)


def test_a_conversation_that_grows_completes_its_spans() -> None:
    """Blocks of two puts make up a span, which is written once the second put has stored it."""
    far = new_far()

    async def work(bench: Bench) -> None:
        await bench.perform(Operation.PUT, blocks=3)
        await bench.engine.flush()
        assert not far.held
        await bench.perform(Operation.PUT, blocks=6)
        await bench.engine.flush()
        assert far.held == set(bench.keys()[:SPAN])

    on_bench(work, far)


def test_only_what_is_used_again_is_written_if_that_is_asked_for() -> None:
    """With `reused_only` neither a put nor a flush writes a span; a get that finds it does."""
    far = new_far()

    async def work(bench: Bench) -> None:
        await bench.perform(Operation.PUT)
        await bench.engine.flush()
        assert not far.held
        assert await bench.perform(Operation.GET, blocks=SPAN) == SPAN
        await bench.engine.flush()
        assert far.held == set(bench.keys()[:SPAN])

    on_bench(work, far, ship=SHIP._replace(reused_only=True))


def test_a_write_that_fails_is_tried_again_and_then_given_up() -> None:
    """A far tier that fails every write costs a few attempts; a flush reports the error."""
    far = new_far()

    async def work(bench: Bench) -> None:
        await bench.perform(Operation.PUT)
        with pytest.raises(TransferError, match="host→remote"):
            await bench.engine.flush()
        assert not far.held
        assert bench.engine.residency.counts(Tier.HOST).pinned == 0
        assert await bench.perform(Operation.GET) == BLOCKS

    on_bench(work, far, failure=1.0)


def test_a_flush_names_a_store_that_hangs() -> None:
    """A write that has taken too long is said of the store by its name, as any failure of it."""

    async def work(bench: Bench) -> None:
        bench.faults.delay_min_s = bench.faults.delay_max_s = 5 * bench.engine.cache.io_deadline_s
        await bench.perform(Operation.PUT)
        for _ in range(2):  # as it is found out, and afterwards
            with pytest.raises(TransferError, match="a far store does not respond"):
                await bench.engine.flush()

    on_bench(work, new_far(), ship=SHIP._replace(where="a far store"))


def test_a_write_that_is_recalled_is_no_attempt() -> None:
    """A span that never got to the store, however often it was recalled, is not given up."""
    far = new_far()

    async def work(bench: Bench) -> None:
        bench.faults.delay_min_s = bench.faults.delay_max_s = 0.1
        await bench.perform(Operation.PUT)
        actor = bench.engine._actors[Tier.REMOTE]
        for _ in range(2 * ATTEMPTS_MAX):
            await asyncio.sleep(0.001)  # virtual time: the actor has its turn
            assert (len(bench.port.storing), actor.depth) == (1, 2)
            actor.recall_queued()
        await bench.engine.flush()
        assert far.held == set(bench.keys()[: 2 * SPAN])
        assert bench.engine.statistics().write_behind["remote"].given_up_blocks == {}

    on_bench(work, far, window_spans=1)


def test_a_store_that_was_down_is_written_to_again_by_itself() -> None:
    """Once a store that failed is due for a trial, it is tried at once, though nobody asks."""
    far = new_far()

    async def work(bench: Bench) -> None:
        bench.faults.failure_probability = 1.0
        await bench.perform(Operation.PUT)
        await asyncio.sleep(BACKOFF_MIN_S / 2)  # virtual time
        assert bench.engine.statistics().tiers["remote"].writes == "down"
        bench.faults.failure_probability = 0.0
        await asyncio.sleep(BACKOFF_MIN_S)
        assert far.held == set(bench.keys()[: 2 * SPAN])

    on_bench(work, far)


@pytest.mark.parametrize(("host", "spans"), [(15, 1), (24, 1), (32, 2)])
def test_writes_in_flight_are_bounded_and_keep_nobody_waiting(host: int, spans: int) -> None:
    """At most two spans are on their way; they take a quarter of host memory, or there is one.

    A put that needs the room of those that wait evicts them.
    """
    far = new_far()

    async def work(bench: Bench) -> None:
        most = 0
        for number in range(8):
            assert await bench.perform(Operation.PUT, number) == BLOCKS
            most = max(most, len(bench.port.storing))
        assert most == spans
        await bench.engine.flush()
        behind = bench.engine.statistics().write_behind["remote"]
        given_up = sum(behind.given_up_blocks.values())
        assert (behind.owed_blocks, behind.writing_blocks) == (0, 0)
        assert len(far.held) + given_up == 8 * 2 * SPAN
        assert given_up or spans > 1  # one at a time is too slow for so many puts

    on_bench(work, far, host=host)


def test_nothing_from_before_a_clear_is_far_after_it() -> None:
    """A clear forgets what is far, and a write that began before it announces nothing."""
    far = new_far()

    async def work(bench: Bench) -> None:
        await bench.perform(Operation.PUT, 0)
        await bench.engine.flush()
        await bench.perform(Operation.PUT, 1)
        await asyncio.sleep(0.0005)  # virtual time: the actor has its turn
        assert bench.port.storing
        bench.engine.clear()
        assert far.is_empty
        await bench.engine.flush()
        assert far.is_empty
        assert [await bench.perform(Operation.GET, number) for number in (0, 1)] == [0, 0]
        await bench.perform(Operation.PUT, 0)
        await bench.engine.flush()
        assert far.held == set(islice(bench.keys(), 2 * SPAN))

    on_bench(work, far)


def test_what_is_on_its_way_at_a_clear_is_written_again() -> None:
    """A span that is put again after a clear, while its old copy is still on its way, is stored."""
    far = new_far()

    async def work(bench: Bench) -> None:
        await bench.perform(Operation.PUT)
        await asyncio.sleep(0.0005)  # virtual time: the actor has its turn
        assert len(bench.port.storing) == 2
        bench.engine.clear()
        await bench.perform(Operation.PUT)
        await asyncio.sleep(1.0)
        assert far.held == set(bench.keys()[: 2 * SPAN])

    on_bench(work, far)


def test_what_waits_for_a_far_tier_at_a_clear_is_not_written_after_it() -> None:
    """A span that was queued behind others when everything was cleared is never stored."""
    far = new_far()

    async def work(bench: Bench) -> None:
        for number in range(3):
            await bench.perform(Operation.PUT, number)
        await asyncio.sleep(0.0005)  # virtual time: the actor has its turn
        actor = bench.engine._actors[Tier.REMOTE]
        assert actor.depth > len(bench.port.storing) > 0
        under_way = {transfer.block_keys[-1] for transfer, _ in bench.port.storing.values()}
        bench.engine.clear()
        begun: list[BlockKey] = []
        store = bench.port._begin_to_store
        bench.port._begin_to_store = lambda transfer: (  # type: ignore[method-assign]
            begun.append(transfer.block_keys[-1]), store(transfer)
        )[1]  # fmt: skip
        await bench.engine.flush()
        assert not begun
        assert under_way
        assert far.is_empty

    on_bench(work, far, window_spans=1)


def test_clearing_one_tier_leaves_what_is_far() -> None:
    """A clear of host memory alone keeps the far copies, and a get brings them back."""
    far = new_far()

    async def work(bench: Bench) -> None:
        await bench.perform(Operation.PUT)
        await bench.engine.flush()
        bench.engine.clear(Tier.HOST)
        assert await bench.perform(Operation.GET) == 2 * SPAN

    on_bench(work, far)


@pytest.mark.parametrize("spans_per_s", [2.0, 50.0])
def test_ships_keep_to_their_rate(spans_per_s: float) -> None:
    """In any interval what the rate allows begins, and one span more; none waits needlessly long.

    What waits counts as owed, and a flush waits for all of it.
    """
    begun_s: list[float] = []
    far = new_far()
    ship = SHIP._replace(blocks_per_s=spans_per_s * SPAN)

    async def work(bench: Bench) -> None:
        loop, submit = asyncio.get_running_loop(), bench.port.submit

        def submit_noted(transfer: Transfer) -> None:
            begun_s.append(loop.time())
            submit(transfer)

        bench.port.submit = submit_noted  # type: ignore[method-assign]
        for number in range(4):
            await bench.perform(Operation.PUT, number)
        counts = bench.engine.statistics().write_behind["remote"]
        assert counts.owed_blocks == (8 - len(begun_s)) * SPAN > 0
        assert counts.given_up_blocks == {}
        await bench.engine.flush()
        assert len(far.held) == 8 * SPAN
        await asyncio.sleep(10.0)  # a time without ships allows no more of them later
        await bench.perform(Operation.PUT, 4)
        await bench.engine.flush()

    on_bench(work, far, ship=ship)
    waits_s = [later - earlier for earlier, later in pairwise(begun_s)]
    assert len(begun_s) == 10
    assert all(wait_s >= 1 / spans_per_s - 1e-6 for wait_s in waits_s)
    assert sorted(waits_s)[-2] < 1 / spans_per_s + 0.1  # the longest one is the pause


def test_a_rate_delays_no_other_tier_and_no_load() -> None:
    """With so slow a rate that the second span waits for hours, puts, loads and closing do not."""
    far = new_far()

    async def work(bench: Bench) -> None:
        loop = asyncio.get_running_loop()
        begin_s = loop.time()
        for number in range(4):
            await bench.perform(Operation.PUT, number)
        assert await bench.perform(Operation.GET, 0) == BLOCKS
        assert loop.time() - begin_s < 1.0
        assert len(far.held) <= SPAN

    on_bench(work, far, ship=SHIP._replace(blocks_per_s=1e-3))
