"""Tests of what callers can do to resident blocks, and of eviction ahead of need."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from flexkv.common.config import CacheConfig
from flexkv.common.errors import ConfigError
from flexkv.common.request import KVResponse, Operation
from flexkv.common.terms import BLOCK_KEY_BYTES, Tier
from flexkv.engine.engine import Engine
from flexkv.testing.fake_backend import FakeBackend, empty
from flexkv.testing.faults import FaultPlan
from flexkv.testing.simulated_groups import MODEL, TOKENS_PER_BLOCK
from flexkv.testing.virtual_time import run_virtual
from flexkv.tiers.limits import disk_windows

A, B = np.arange(4 * TOKENS_PER_BLOCK), np.arange(4 * TOKENS_PER_BLOCK) + 1000


def on_engine(
    work: Callable[[Engine], Awaitable[None]],
    host: int = 8,
    disk: int = 0,
    journals: int = 0,
    **changes: Any,
) -> None:
    """Run a function on an open engine over fakes, on a virtual clock, and close it."""

    async def run() -> None:
        cache = CacheConfig(
            tokens_per_block=TOKENS_PER_BLOCK, num_cpu_blocks=host, num_ssd_blocks=disk,
            ssd_cache_dir="unused", evict_ratio=0.0, **changes,
        )  # fmt: skip
        backend = FakeBackend(host, FaultPlan(1, 0.0, 0.0001, 0.001), empty(disk, journals))
        backend.windows = disk_windows(cache)
        engine = Engine(MODEL, cache, backend)
        await engine.open()
        engine.register_kv_caches([np.zeros((16, BLOCK_KEY_BYTES), np.uint8)])
        await work(engine)
        await engine.close()

    run_virtual(run())


async def perform(
    engine: Engine, operation: Operation, tokens: Any, namespace: Any = None
) -> KVResponse:
    """Perform a get or put of a prompt, without waiting for its write-behind."""
    request = engine.requests.intake(operation, tokens, None, namespace)
    ready = engine.requests.with_slots(request, np.arange(len(tokens)))
    assert ready is not None
    response = (await engine.requests.perform(ready)).response
    assert response is not None
    return response


async def put(engine: Engine, tokens: Any, namespace: Any = None) -> None:
    """Store a prompt and wait for its write-behind."""
    await perform(engine, Operation.PUT, tokens, namespace)
    await engine.flush()


def resident(engine: Engine, tokens: Any, namespace: Any = None) -> int:
    """Count the leading blocks of a prompt that are resident."""
    return engine.match(tokens, namespace).tokens // TOKENS_PER_BLOCK


def test_a_namespace_is_cleared_alone() -> None:
    """Clearing a namespace counts its places in all tiers; other namespaces keep their blocks."""

    async def work(engine: Engine) -> None:
        await put(engine, A, "one")
        await put(engine, A, "two")
        assert engine.retention.clear(namespace="one") == 8
        assert (resident(engine, A, "one"), resident(engine, A, "two")) == (0, 4)
        assert engine.retention.clear(namespace="never seen") == 0

    on_engine(work, disk=8)


def test_a_tier_is_cleared_alone() -> None:
    """Clearing the host leaves what is on disk; clearing the disk then leaves nothing."""

    async def work(engine: Engine) -> None:
        await put(engine, A)
        assert engine.retention.clear(Tier.HOST) == 4
        assert engine.match(A).tokens_by_tier == {Tier.HOST: 0, Tier.DISK: len(A)}
        assert engine.retention.clear(Tier.DISK) == 4
        assert resident(engine, A) == 0
        with pytest.raises(ConfigError, match="namespace"):
            engine.retention.clear(Tier.HOST, "a")
        with pytest.raises(ConfigError, match="remote"):
            engine.retention.clear(Tier.REMOTE)

    on_engine(work, disk=8)


def test_a_pin_keeps_a_prefix_until_it_expires() -> None:
    """Pinned blocks survive a stream of others; once the pin has expired they are evicted."""

    async def work(engine: Engine) -> None:
        await put(engine, A)
        engine.retention.pin(A, None, 5.0, "")
        for number in range(3, 9):
            await put(engine, A + 1000 * number)
        assert resident(engine, A) == 4
        assert engine.residency.counts(Tier.HOST).pinned == 4
        await asyncio.sleep(6.0)  # virtual
        assert engine.residency.counts(Tier.HOST).pinned == 0
        for number in range(3, 9):
            await put(engine, B + 1000 * number)
        assert resident(engine, A) == 0

    on_engine(work)


def test_pins_end_with_their_owner_or_by_id() -> None:
    """Pins end with their owner, by their id, or at close."""

    async def work(engine: Engine) -> None:
        await put(engine, A)
        await put(engine, B, "ns")
        ids = [engine.retention.pin(A, None, 60, owner) for owner in ("dead", "dead", "alive")]
        whole = engine.retention.pin(None, "ns", 60, "alive")
        assert engine.residency.counts(Tier.HOST).pinned == 8
        assert engine.retention.pins.unpin_owner("dead") == 2
        assert not engine.retention.pins.unpin(ids[0])
        assert engine.retention.pins.unpin(whole)
        assert engine.residency.counts(Tier.HOST).pinned == 4
        assert len(engine.retention.pins) == 1
        with pytest.raises(ConfigError, match="ttl_s"):
            engine.retention.pin(A, None, 0, "")

    on_engine(work)


def test_a_tier_is_resized_while_it_is_used() -> None:
    """A smaller tier evicts, but no pinned block; growing gives the places back."""

    async def work(engine: Engine) -> None:
        await put(engine, A)
        await put(engine, B)
        assert engine.retention.resize(Tier.HOST, 4) == 4
        assert (resident(engine, A), resident(engine, B)) == (0, 4)
        engine.retention.pin(B, None, 60, "")
        assert engine.retention.resize(Tier.HOST, 2) == 4
        assert engine.statistics().tiers["host"].capacity_blocks == 4
        assert engine.retention.resize(Tier.HOST, 8) == 8
        await put(engine, A)
        assert resident(engine, A) == 4
        for wrong in (0, 9):
            with pytest.raises(ConfigError, match="capacity_blocks"):
                engine.retention.resize(Tier.HOST, wrong)

    on_engine(work)


@pytest.mark.parametrize("policy", ["lru", "fifo", "mru", "slru", "lfu", "lhd"])
def test_a_namespace_beyond_its_quota_costs_its_own_blocks(policy: Any) -> None:
    """A namespace beyond its quota evicts only its own blocks; a lower quota evicts at once."""

    async def work(engine: Engine) -> None:
        await put(engine, B, "other")
        engine.retention.set_quota("tenant", Tier.HOST, 4)
        await put(engine, A, "tenant")
        assert resident(engine, A, "tenant") == 4
        await put(engine, np.concatenate([A, B]), "tenant")
        assert engine.retention.namespace_blocks("tenant")[Tier.HOST] == 4
        assert resident(engine, B, "other") == 4
        engine.retention.set_quota("tenant", Tier.HOST, 1)
        assert engine.retention.namespace_blocks("tenant")[Tier.HOST] == 1
        assert resident(engine, A, "tenant") == 1
        await put(engine, A + 5000, "third")
        assert engine.residency.counts(Tier.HOST).ready == 8
        engine.retention.set_quota("tenant", Tier.HOST, 0)
        await put(engine, A, "tenant")
        assert resident(engine, A, "tenant") == 0

    on_engine(work, eviction_policy=policy)


def test_a_quota_on_what_is_there_keeps_its_order() -> None:
    """A quota set later evicts the namespace's oldest blocks; removing it lifts the bound."""

    async def work(engine: Engine) -> None:
        for tokens in (A, B):
            await put(engine, tokens, "tenant")
        engine.match(A, "tenant")
        engine.retention.set_quota("tenant", Tier.HOST, 4)
        assert (resident(engine, A, "tenant"), resident(engine, B, "tenant")) == (4, 0)
        engine.retention.set_quota("tenant", Tier.HOST, None)
        await put(engine, B, "tenant")
        assert engine.retention.namespace_blocks("tenant")[Tier.HOST] == 8

    on_engine(work)


def test_quotas_have_rules() -> None:
    """A quota that is no number of blocks, and one namespace too many, are refused."""

    async def work(engine: Engine) -> None:
        for wrong in (-1, 1.5, "7"):
            with pytest.raises(ConfigError, match="blocks"):
                engine.retention.set_quota("tenant", Tier.HOST, wrong)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="tier"):
            engine.retention.set_quota("tenant", None, 4)  # type: ignore[arg-type]
        for number in range(64):
            engine.retention.set_quota(str(number), Tier.HOST, 4)
        engine.retention.set_quota("63", Tier.HOST, 5)
        with pytest.raises(ConfigError, match="64 namespaces"):
            engine.retention.set_quota("one more", Tier.HOST, 4)
        engine.retention.set_quota("nobody", Tier.HOST, None)
        engine.retention.set_quota("5", Tier.HOST, None)
        engine.retention.set_quota("one more", Tier.HOST, 4)

    on_engine(work)


def test_places_are_freed_ahead_of_need() -> None:
    """With a start threshold, a tier is never full when a request comes."""

    async def work(engine: Engine) -> None:
        for number in range(5):
            await put(engine, A + 1000 * number)
            assert engine.residency.counts(Tier.HOST).free >= 4
        assert resident(engine, A + 4000) == 4

    on_engine(work, evict_start_threshold=0.5)


def test_a_put_that_was_given_up_is_no_failure() -> None:
    """A put recalled from the device's queue is not reported by a flush, nor counted as failed."""

    async def work(engine: Engine) -> None:
        puts = []
        for tokens in (A, B):
            request = engine.requests.intake(Operation.PUT, tokens)
            ready = engine.requests.with_slots(request, np.arange(len(tokens)))
            assert ready is not None
            puts.append(asyncio.create_task(engine.requests.perform(ready)))
        await asyncio.sleep(0.00005)  # virtual: one is in flight, the other waits for the window
        puts[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await puts[1]
        await puts[0]
        await engine.flush()
        assert (resident(engine, A), resident(engine, B)) == (4, 0)
        route = engine.statistics().routes["device→host"]
        assert (route.ops, route.failed_ops) == (1, 0)

    on_engine(work, device_window_mb=4 * BLOCK_KEY_BYTES / 2**20)
