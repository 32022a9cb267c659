"""Tests that the statistics agree with what happened."""

from __future__ import annotations

import asyncio
from errno import EIO

import numpy as np
import pytest
from structlog.testing import capture_logs

from flexkv.common.errors import UnfilledError
from flexkv.common.request import KVResponseStatus, Operation
from flexkv.common.terms import BLOCK_KEY_BYTES, Tier
from flexkv.engine.engine import Engine
from flexkv.testing.faults import FaultPlan
from flexkv.testing.simulated_groups import TOKENS_PER_BLOCK
from tests.system.test_degraded import disk_of, fail_with
from tests.system.test_keeping import A, B, on_engine, perform, put

LONG = np.arange(8 * TOKENS_PER_BLOCK) + 5000


def blocks(count: int, of: np.ndarray = LONG) -> np.ndarray:
    """Return the first blocks of a prompt."""
    return of[: count * TOKENS_PER_BLOCK]


def test_hits_are_counted_by_the_tier_that_had_the_blocks() -> None:
    """Each block that a get returns counts once, for the tier that had it.

    A block that the get waited for counts for host memory. Other requests do not count.
    """

    async def work(engine: Engine) -> None:
        await put(engine, blocks(6))
        engine.residency.clear(Tier.HOST)
        await perform(engine, Operation.PREFETCH, blocks(2))
        engine.match(LONG)
        told = engine.statistics()
        assert (told.asked_blocks, told.hit_rate) == (0, 0.0)
        await perform(engine, Operation.GET, LONG)
        told = engine.statistics()
        assert told.asked_blocks == 8
        assert told.hit_blocks == {"host": 2, "disk": 4}
        assert told.hit_rate == 6 / 8
        assert told.disk_written_per_hit == 6 / 4
        storing = asyncio.ensure_future(perform(engine, Operation.PUT, A))
        await asyncio.sleep(0)
        await perform(engine, Operation.GET, A)
        await storing
        told = engine.statistics()
        assert told.asked_blocks == 12
        assert told.hit_blocks == {"host": 6, "disk": 4}
        assert told.requests == {
            "get": {"success": 2}, "put": {"success": 2}, "prefetch": {"success": 1},
        }  # fmt: skip

    on_engine(work, host=32, disk=64)


def test_what_did_not_come_is_no_hit() -> None:
    """A get whose read failed, or whose blocks are in no tier, counts queries and no hits."""

    async def work(engine: Engine) -> None:
        await put(engine, A)
        engine.residency.clear(Tier.HOST)
        repair = fail_with(engine, EIO)
        assert (await perform(engine, Operation.GET, A)).status is KVResponseStatus.FAILED
        repair()
        assert (await perform(engine, Operation.GET, B)).status is KVResponseStatus.NOTFOUND
        told = engine.statistics()
        assert told.asked_blocks == 8
        assert set(told.hit_blocks.values()) == {0}
        assert told.requests["get"] == {"failed": 1, "notfound": 1}
        route = told.routes["disk→host"]
        assert (route.ops, route.failed_ops, route.blocks, route.bytes) == (1, 1, 0, 0)
        assert told.routes["host→disk"].bytes == 4 * BLOCK_KEY_BYTES

    on_engine(work, host=32, disk=64)


def test_what_is_under_way_is_told_and_nothing_is_left_of_it() -> None:
    """Requests that run or wait, claims and bytes in flight are counted, and are zero when idle."""

    async def work(engine: Engine) -> None:
        disk_of(engine)._faults = FaultPlan(1, 0.0, 0.5, 0.5)
        puts = [asyncio.ensure_future(perform(engine, Operation.PUT, A + n)) for n in (0, 100, 200)]
        await asyncio.sleep(0)
        assert engine.statistics().requests_waiting == 2
        await asyncio.gather(*puts)
        await asyncio.sleep(0.1)
        told = engine.statistics()
        assert told.requests_waiting == 0
        assert told.runs_in_flight == 3
        assert told.claims == 3
        assert told.queues["disk"].waiting_ops == 3
        assert told.queues["disk"].outbound_bytes_in_flight == 12 * BLOCK_KEY_BYTES
        assert told.queues["disk"].inbound_bytes_in_flight == 0
        assert told.tiers["disk"].reserved_blocks == told.tiers["host"].pinned_blocks == 12
        await engine.flush()
        told = engine.statistics()
        assert (told.runs_in_flight, told.claims, told.queues["disk"].waiting_ops) == (0, 0, 0)
        assert told.queues["disk"].outbound_bytes_in_flight == 0
        assert told.tiers["disk"].ready_blocks == told.tiers["disk"].used_blocks == 12

    on_engine(work, host=32, disk=64, requests_max=1)


@pytest.mark.parametrize(("host", "wanted"), [(4, 4), (3, 3)])
def test_a_get_that_finds_no_room_says_how_much_it_lacks(host: int, wanted: int) -> None:
    """A get returns what fits in the host, and has an error if that is not all."""

    async def work(engine: Engine) -> None:
        await put(engine, A)
        engine.residency.clear(Tier.HOST)
        engine.retention.resize(Tier.HOST, host)
        response = await perform(engine, Operation.GET, A)
        assert response.return_mask.sum() == wanted * TOKENS_PER_BLOCK
        assert engine.statistics().hit_blocks == {"host": 0, "disk": wanted}
        assert (response.error is None) == (wanted == 4)

    on_engine(work, disk=8)


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_get_that_is_tried_again_counts_once(on_disk: bool) -> None:
    """A get that waits for a put which is given up, and then looks elsewhere, counts once."""

    async def work(engine: Engine) -> None:
        if on_disk:
            await put(engine, A)
            engine.residency.clear(Tier.HOST)
        storing = asyncio.ensure_future(perform(engine, Operation.PUT, A))
        await asyncio.sleep(0)
        getting = asyncio.ensure_future(perform(engine, Operation.GET, A))
        await asyncio.sleep(0)
        assert engine.match(A).pending_tokens == len(A)
        storing.cancel()
        response = await getting
        assert response.return_mask.all() == on_disk
        told = engine.statistics()
        status = "success" if on_disk else "notfound"
        assert told.requests["get"] == {status: 1}
        assert told.asked_blocks == 4
        assert told.hit_blocks == {"host": 0, "disk": 4 * on_disk}

    on_engine(work, host=32, disk=64)


def test_a_get_that_waits_in_vain_twice_counts_once() -> None:
    """A get that waits in vain for two puts counts once, and fails after the second."""

    async def work(engine: Engine) -> None:
        async def store_twice() -> None:
            for _ in range(2):
                try:
                    await perform(engine, Operation.PUT, A)
                except asyncio.CancelledError:
                    given_up.set()

        given_up = asyncio.Event()
        storing = asyncio.ensure_future(store_twice())
        await asyncio.sleep(0)
        getting = asyncio.ensure_future(perform(engine, Operation.GET, A))
        await asyncio.sleep(0)
        for _ in range(2):
            assert not getting.done()
            storing.cancel()
            await given_up.wait()
            given_up.clear()
            await asyncio.sleep(0)
        response = await getting
        assert response.status is KVResponseStatus.FAILED
        assert isinstance(response.error, UnfilledError)
        told = engine.statistics()
        assert told.requests == {"get": {"failed": 1}, "put": {"cancelled": 2}, "prefetch": {}}
        assert (told.asked_blocks, told.hit_rate) == (4, 0.0)

    on_engine(work, host=32)


def test_a_request_without_a_device_counts_once() -> None:
    """A request without a device counts once, and its blocks not as asked for."""

    async def work(engine: Engine) -> None:
        engine.requests.unready(engine.requests.intake(Operation.GET, A))
        told = engine.statistics()
        assert told.requests == {"get": {"unready": 1}, "put": {}, "prefetch": {}}
        assert told.asked_blocks == 0

    on_engine(work)


def test_a_line_of_the_log_sums_up_so_many_requests() -> None:
    """After each `num_log_interval_requests` requests a log line has their hit rates by tier."""

    async def work(engine: Engine) -> None:
        for number in range(3):
            await perform(engine, Operation.PUT, A + 100 * number)
            for _ in range(2):
                await perform(engine, Operation.GET, A + 100 * number)
        await perform(engine, Operation.GET, LONG)

    with capture_logs() as logs:
        on_engine(work, host=32, num_log_interval_requests=5)
    told = [entry for entry in logs if entry["event"] == "requests"]
    assert [entry["ended"] for entry in told] == [5, 10]
    assert [entry["hit_rate"] for entry in told] == [{"host": 1.0}, {"host": 0.75}]
