"""Collecting, touching and inspecting a pool, on every real store."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from msgspec import structs

from flexkv.common.errors import RemoteError
from flexkv.io.remote.landing import OpenStore
from flexkv.io.remote.offline import SpanProver, fault_of, pools_of
from flexkv.io.remote.open import open_store
from flexkv.io.remote.options import RemoteOptions
from flexkv.io.remote.requests import Requests
from flexkv.io.remote.seal import SEAL_BYTES
from flexkv.process.spawning import Spawn
from flexkv.tiers.remote_gc.collector import Collector, generation_of
from flexkv.tiers.remote_gc.lease import Lease, folder_of, within
from flexkv.tiers.remote_gc.once import SinglePool, collect, shards_of
from flexkv.tiers.remote_gc.removal import Removal
from flexkv.tiers.remote_gc.rules import Limits, ShardListing
from flexkv.tiers.remote_gc.touches import Touches
from tests.remote_pools import (
    BLOCK_BYTES,
    DESCRIPTION,
    POOL,
    fill,
    leaf_content,
    leaf_key,
    span_content,
    span_key,
)
from tests.s3 import S3Server

OPTIONS = RemoteOptions()
STORES: dict[str, Callable[[Path, S3Server], OpenStore]] = {
    "memory": lambda _, __: open_store("memory://", {}, OPTIONS),
    "s3": lambda _, s3: open_store(f"s3://{s3.new_bucket()}/kv", s3.custom, OPTIONS),
    "directory": lambda folder, _: open_store(f"file://{folder}/kv", {}, OPTIONS),
}


@pytest.fixture(params=STORES.values(), ids=[*STORES])
def requests(request: pytest.FixtureRequest, tmp_path: Path, s3: S3Server) -> Iterator[Requests]:
    """Yield the requests of each store, which is empty; close it afterwards."""
    store = request.param(tmp_path, s3)
    yield Requests(store, OPTIONS)
    store.close()


@asynccontextmanager
async def spawning() -> AsyncIterator[Spawn]:
    """Yield what starts tasks, and wait for them."""
    async with asyncio.TaskGroup() as group:
        yield lambda _, work: group.create_task(work)


async def listings_of(requests: Requests, spawn: Spawn) -> list[ShardListing]:
    """Return the listings of all shards; only those are listed that spans of the prompt are in."""
    shards = {span_key(span)[0] for span in range(16)} | {leaf_key(3)[0]}
    return await shards_of(requests, POOL, spawn, lambda _: None, shards)


async def spans_there(requests: Requests) -> set[bytes]:
    """Return the keys of the spans that are in the store."""
    async with spawning() as spawn:
        listings = await listings_of(requests, spawn)
    return {key.tobytes() for listing in listings for key in listing.keys}


async def lease_held(requests: Requests, later_s: float = 0.0) -> Lease:
    """Return a lease that is held, with the store's clock as it will be some seconds later."""
    lease = Lease(requests)
    assert await lease.hold(POOL)
    now_s = asyncio.get_running_loop().time()
    lease.clock.read(now_s, now_s, lease.clock.early_s() + later_s)
    return lease


async def test_a_command_collects_what_the_budget_has_no_room_for(requests: Requests) -> None:
    """One collection deletes some spans of a pool over its budget; a dry one only counts them."""
    await fill(requests.store, spans=12)
    lease, removal = await lease_held(requests), Removal(requests, 1e3, lambda key: None)
    async with spawning() as removal.spawn:
        listings = await listings_of(requests, removal.spawn)
        dry = await collect(removal, lease, POOL, Limits(7), listings, is_dry=True)
        assert len(await spans_there(requests)) == dry.spans == 13
        done = await collect(removal, lease, POOL, Limits(7), listings, is_dry=False)
    assert 0 < dry.victims == done.victims == done.deleted < 13
    assert len(await spans_there(requests)) == 13 - done.deleted


async def test_a_command_deletes_what_has_expired(requests: Requests) -> None:
    """One collection deletes spans older than the TTL, and spares one that was touched since."""
    await fill(requests.store)
    lease, removal = await lease_held(requests, 1e4), Removal(requests, 1e3, lambda key: None)
    async with spawning() as removal.spawn:
        listings = await listings_of(requests, removal.spawn)
        listings[span_key(3)[0]].modified_s -= 10  # as if it was touched only after the listing
        young = await collect(removal, lease, POOL, Limits(ttl_s=2e4), listings, is_dry=False)
        assert (young.spans, young.victims) == (6, 0)
        done = await collect(removal, lease, POOL, Limits(ttl_s=5e3), listings, is_dry=False)
    assert (done.expired, done.deleted) == (6, 5)
    assert removal.counting["spared"] == 1
    assert await spans_there(requests) == {span_key(3)}


async def test_a_read_touches_an_old_span(requests: Requests) -> None:
    """A span that is read and old is touched: it has the same bytes, and is no older than before.

    This is so on every store, whether it copies, rewrites or sets the time of an object.
    """
    await fill(requests.store, spans=1)
    name = POOL.object_name(span_key(0))
    before = await requests.store.head(name)
    pool = SinglePool(POOL)
    collector = Collector(requests, pool, Limits(ttl_s=2e4), 1e3, lambda key: None)
    touches = Touches(requests, pool, collector)
    collector.lease = await lease_held(requests, 1.5e4)
    async with asyncio.timeout(20), spawning() as spawn:
        for shard, listing in enumerate(await listings_of(requests, spawn)):
            await collector.listed(POOL, shard, listing, is_first=True)
        touches.used(span_key(0))
        with suppress(asyncio.CancelledError):
            async with asyncio.TaskGroup() as group:
                running = group.create_task(touches.run(spawn))
                while not touches.counts().touched:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                running.cancel()
    after = await requests.store.head(name)
    assert after.modified_s >= before.modified_s
    assert await requests.store.read(name) == span_content(0)


async def test_the_lease_is_an_object_of_the_store(requests: Requests) -> None:
    """One of two engines gets the lease; once it is released, nothing of it is left."""
    first, second = Lease(requests), Lease(requests)
    assert await first.hold(POOL)
    assert not await second.hold(POOL)
    assert first.clock.early_s() <= first.clock.late_s()
    await first.release()
    assert [page async for page in requests.pages(folder_of(POOL), 10)] == []


async def test_pools_are_found_with_their_descriptions(requests: Requests) -> None:
    """The pools of a store are found, with their spans, bytes and generations."""
    await fill(requests.store)
    newer = generation_of(POOL, 1)
    await requests.store.put(f"{POOL.generations}1", [b"\n"])
    await fill(requests.store, spans=1, pool=newer)
    await requests.store.put("something/else", [b"\n"])
    found = await pools_of(requests, lambda count: None)
    assert found.pools.keys() == {POOL.name, newer.name}
    base, other = found.pools[POOL.name], found.pools[newer.name]
    assert base.pool is not None
    assert base.pool.description == DESCRIPTION
    assert (base.spans, other.spans) == (6, 2)
    assert base.nbytes == 5 * len(span_content(0)) + len(leaf_content(3))
    assert 0 < base.oldest_s <= base.newest_s
    assert found.latest(base) == found.latest(other) == 1


async def test_wrong_objects_are_found(requests: Requests) -> None:
    """A right object has no fault; a damaged, swapped or cut one has, and both answers agree."""
    await fill(requests.store, spans=2)
    right = span_content(2)
    record = BLOCK_BYTES[0] + SEAL_BYTES
    wrong = {
        3: (span_content(4), "another span's"),
        5: (right[:-1], "bytes, which no span"),
        6: (flipped(span_content(6), record + 7), "bytes of its block 1"),
        7: (flipped(span_content(7), 3 * record - 1), "seal of its block 2"),
        8: (flipped(span_content(8), 2 * record - SEAL_BYTES + 40), "does not follow"),
    }
    for span, (content, _) in wrong.items():
        await requests.store.put(POOL.object_name(span_key(span)), [content])
    prover, until = SpanProver(DESCRIPTION), within(60)
    try:
        for span in (0, 1):
            name = POOL.object_name(span_key(span))
            found = await fault_of(requests, prover, name, span_key(span), until)
            assert found == (len(span_content(span)), "", True)
        leaf = POOL.object_name(leaf_key(3))
        assert (await fault_of(requests, prover, leaf, leaf_key(3), until))[1] == ""
        for span, (content, why) in wrong.items():
            name = POOL.object_name(span_key(span))
            nbytes, fault, is_proved = await fault_of(requests, prover, name, span_key(span), until)
            assert (nbytes, is_proved) == (len(content), True)
            assert why in fault
        with pytest.raises((FileNotFoundError, RemoteError)):
            await fault_of(requests, prover, POOL.object_name(bytes(16)), bytes(16), until)
    finally:
        prover.close()


def flipped(content: bytes, at: int) -> bytes:
    """Return content with one bit of the byte at `at` changed."""
    changed = bytearray(content)
    changed[at] ^= 1
    return bytes(changed)


def test_a_proof_needs_the_parent_of_a_leaf() -> None:
    """A leaf whose seal names another parent is wrong, though its bytes are right."""
    prover = SpanProver(DESCRIPTION)
    try:
        assert prover.fault(leaf_key(3), leaf_content(3)) == ""
        other = bytearray(leaf_content(3))
        parent_at = BLOCK_BYTES[1] + struct.calcsize("<4sHHQ16s")
        other[parent_at] ^= 1
        assert "another parent" in prover.fault(leaf_key(3), bytes(other))
        assert "another span's" in prover.fault(leaf_key(4), leaf_content(3))
    finally:
        prover.close()


@pytest.mark.parametrize("group", [1, 2, 3])
def test_leaves_of_groups_with_equal_blocks_are_proved(group: int) -> None:
    """Groups may have leaves of one size: the keys of a leaf and its parent tell its group."""
    description = structs.replace(DESCRIPTION, block_bytes=(BLOCK_BYTES[0], *[BLOCK_BYTES[1]] * 2))
    prover = SpanProver(description)
    try:
        fault = prover.fault(leaf_key(3, group), leaf_content(3, group))
        assert ("another parent" in fault) == (group == 3), "there is no group 3"
        assert prover.fault(leaf_key(3, group), flipped(leaf_content(3, group), 5)) != ""
    finally:
        prover.close()
