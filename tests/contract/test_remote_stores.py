"""The contract of the stores of the remote tier, checked on every real adapter."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from flexkv.common.errors import ConfigError
from flexkv.io.remote.landing import OpenStore
from flexkv.io.remote.names import Pool, PoolDescription
from flexkv.io.remote.open import join_pool
from flexkv.io.remote.round_trip import round_trip
from flexkv.io.remote.store import Listed
from tests.remote_rigs import (
    LISTED_STORES,
    OPTIONS,
    POOL,
    STORES,
    MakeStore,
    fetched,
    pages_of,
)
from tests.servers import Servers

NAME = POOL.object_name(bytes(range(16)))
PARTS = [b"a" * 70_000, bytes(range(64)), b"", b"c" * 9]
WHOLE = b"".join(PARTS)


@pytest.fixture(params=STORES.values(), ids=STORES.keys())
async def store(
    request: pytest.FixtureRequest, tmp_path: Path, servers: Servers
) -> AsyncIterator[OpenStore]:
    """Yield each store, empty; close it afterwards."""
    make: MakeStore = request.param
    made = make(tmp_path, servers, OPTIONS)
    yield made
    made.close()


@pytest.fixture(params=LISTED_STORES.values(), ids=LISTED_STORES.keys())
def listed_store(
    request: pytest.FixtureRequest, tmp_path: Path, servers: Servers
) -> Iterator[OpenStore]:
    """Yield each store that has a listing, empty; close it afterwards."""
    make: MakeStore = request.param
    made = make(tmp_path, servers, OPTIONS)
    yield made
    made.close()


async def listed(store: OpenStore, prefix: str) -> list[Listed]:
    """Return what a listing reports."""
    return [each async for page in store.pages(prefix) for each in page]


async def test_an_object_is_its_buffers_in_turn(store: OpenStore) -> None:
    """What was put from several buffers is read back as a whole, and by ranges across them."""
    assert await store.put(NAME, [memoryview(part) for part in PARTS])
    size = len(WHOLE)
    for first, last in ((0, size), (69_990, 70_030), (size - 5, size), (70_000, 70_064)):
        assert await fetched(store, NAME, first, last) == WHOLE[first:last]
    assert await store.read(NAME) == WHOLE


async def test_an_object_is_created_once(store: OpenStore) -> None:
    """A put of a name that exists changes nothing, and says so."""
    assert await store.put(NAME, [b"first"])
    assert not await store.put(NAME, [b"second"])
    assert await store.read(NAME) == b"first"


async def test_a_read_ends_where_the_object_does(store: OpenStore) -> None:
    """A get beyond the end returns what there is; one that begins there says so."""
    await store.put(NAME, [WHOLE])
    size = len(WHOLE)
    assert await fetched(store, NAME, size - 4, size + 400) == WHOLE[-4:]
    try:
        assert await fetched(store, NAME, size + 1, size + 9) == b""
    except EOFError:
        assert store.kind != "directory"


async def test_what_is_not_there_is_said_to_be_missing(store: OpenStore) -> None:
    """Get, read, head and touch of no object raise FileNotFoundError; a delete does nothing."""
    await store.put(POOL.description_name, [b"{}"])
    for call in (
        lambda: fetched(store, NAME, 0, 9),
        lambda: store.read(NAME),
        lambda: store.head(NAME),
        lambda: store.touch(NAME),
    ):
        with pytest.raises(FileNotFoundError):
            await call()
    await store.delete(NAME)


async def test_a_head_says_how_large(store: OpenStore) -> None:
    """A head has the name and the size of the object."""
    await store.put(NAME, [WHOLE])
    head = await store.head(NAME)
    assert (head.name, head.size_bytes) == (NAME, len(WHOLE))


async def test_a_listing_says_what_a_head_says(listed_store: OpenStore) -> None:
    """A listing and a head report the same size and the same time of an object."""
    await listed_store.put(NAME, [WHOLE])
    assert [await listed_store.head(NAME)] == await listed(listed_store, POOL.shard(0))


async def test_a_touch_makes_an_object_new(store: OpenStore) -> None:
    """Its time is not earlier than before, and its bytes are the same."""
    await store.put(NAME, [memoryview(part) for part in PARTS])
    before = await store.head(NAME)
    await store.touch(NAME)
    await store.touch(NAME)
    assert (await store.head(NAME)).modified_s >= before.modified_s
    assert await store.read(NAME) == WHOLE


async def test_what_is_deleted_is_gone_and_may_come_again(store: OpenStore) -> None:
    """After a delete the name is free."""
    await store.put(NAME, [b"first"])
    await store.delete(NAME)
    assert await listed(store, POOL.shard(0)) == []
    assert await store.put(NAME, [b"second"])
    assert await store.read(NAME) == b"second"


async def test_a_listing_has_every_object_of_a_prefix(listed_store: OpenStore) -> None:
    """Over several pages, each object is listed once, with its name and size, and no other."""
    store = listed_store
    names = list(pages_of(1003 if store.kind != "s3" else 30))
    for name in names:
        await store.put(name, [b"12345"])
    await store.put(POOL.object_name(b"\x01" * 16), [b"1"])
    found = await listed(store, POOL.shard(0))
    assert sorted(each.name for each in found) == sorted(names)
    assert {each.size_bytes for each in found} == {5}
    assert all(POOL.span_key(name) is not None for name in names)
    assert len(await listed(store, f"{POOL.name}/")) == len(names) + 1
    assert await listed(store, POOL.shard(2)) == []


async def test_a_pool_is_described_once(store: OpenStore) -> None:
    """The first engine describes the pool, others agree; one that differs is told the field."""
    await join_pool(store, POOL)
    await join_pool(store, POOL)
    other = Pool(PoolDescription({"model": "another", "key_secret_digest": "0"}, (1,), 4))
    other.name = POOL.name
    with pytest.raises(ConfigError, match=r"block_bytes .*; model is 'test' there and 'another'"):
        await join_pool(store, other)


async def test_a_round_trip_leaves_nothing(store: OpenStore) -> None:
    """The check of access writes, reads and deletes an object, and says how fast that was."""
    trip = await round_trip(store, 100_000)
    assert trip.put_mb_per_s > 0
    assert trip.get_mb_per_s > 0
    assert await listed(store, "") == []


async def test_nothing_is_swept_that_is_whole(store: OpenStore) -> None:
    """A sweep of a store without leftovers removes nothing."""
    await store.put(NAME, [WHOLE])
    assert await store.sweep(f"{POOL.name}/", 0.0) == 0
    assert await store.read(NAME) == WHOLE
