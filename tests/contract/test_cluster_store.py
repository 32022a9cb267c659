"""One suite over the fake Redis and a real server: what a cluster's store does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from typing import Any

import pytest

from flexkv.cluster.generations import RANDOM_BITS, Heard, later_than
from flexkv.cluster.records import STREAMS, Beat, Entry, NodeRecord, encoded, entry_from
from flexkv.cluster.redis_commands import RedisCommands
from flexkv.cluster.redis_store import KEPT_MS, Command, Commands, RedisStore
from flexkv.cluster.store import BEGIN, ClusterStoreError
from flexkv.testing.fake_redis import FakeRedis, FakeRedisServer
from flexkv.testing.redis_server import RedisServer

TTL_S = 60.0
ALL = (BEGIN,) * STREAMS


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    """Return a real server, whose clients need a password."""
    server = RedisServer("open sesame")
    server.start()
    yield server
    server.close()


@pytest.fixture(params=["fake", "real"])
async def redis(request: pytest.FixtureRequest, server: RedisServer) -> AsyncIterator[Commands]:
    """Return a client of an empty server."""
    client: Commands
    if request.param == "fake":
        client = FakeRedis(FakeRedisServer())
    else:
        client = RedisCommands("127.0.0.1", server.port, server.password)
        await client.run([("FLUSHALL",)])
    yield client
    await client.close()


@pytest.fixture
def store(redis: Commands) -> RedisStore:
    """Return the store of a pool."""
    return RedisStore(redis, "pool", TTL_S)


async def heard(store: RedisStore) -> Heard:
    """Return what the store says of the generation."""
    return (await store.read(ALL, 0.0)).heard


def node(number: int, life: int = 0, address: str = "") -> NodeRecord:
    """Return a node."""
    return NodeRecord(bytes([number]) * 16, life or number, address or f"10.0.0.{number}:1")


async def test_a_registered_node_is_in_the_registry_once(store: RedisStore) -> None:
    """Beats replace each other; a node that has left is not registered any more."""
    for count in range(3):
        assert await store.register(Beat(node(1), 7, count), 1 if count else None) is None
    assert await store.register(Beat(node(2)), None) is None
    beats = sorted((await store.registry()).beats, key=lambda beat: beat.node.id)
    assert beats == [Beat(node(1), 7, 2), Beat(node(2))]
    await store.leave(node(1))
    registry = await store.registry()
    assert (registry.beats, registry.expired) == ([Beat(node(2))], [])


async def test_an_id_belongs_to_one_life(store: RedisStore) -> None:
    """A life does not get, keep or remove an id that another life has, unless it may take over."""
    first, second = Beat(node(1, 11)), Beat(node(1, 22))
    assert await store.register(first, None) is None
    assert await store.register(second, None) == first
    assert await store.register(second, 22) == first
    await store.leave(node(1, 22))
    assert (await store.registry()).beats == [first]
    assert await store.register(second, 11) is None
    assert await store.register(first, 11) == second
    assert (await store.registry()).beats == [second]


async def test_a_registration_ends_with_its_ttl(redis: Commands) -> None:
    """An id whose TTL is over is named as expired until somebody has it forgotten."""
    brief, lasting = RedisStore(redis, "pool", 0.001), RedisStore(redis, "pool", TTL_S)
    await brief.register(Beat(node(1)), None)
    await lasting.register(Beat(node(2)), None)
    registry = await lasting.registry()
    while registry.expired != [node(1).id]:
        registry = await lasting.registry()
    assert registry.beats == [Beat(node(2))]
    await lasting.forget(registry.expired)
    assert (await lasting.registry()).expired == []


async def test_entries_are_read_in_order_and_once(store: RedisStore) -> None:
    """Each stream's entries come in order, whole, and only those behind a position."""
    for seq in range(1, 6):
        await store.append(seq % 2, [encoded(Entry(9, 10 * seq + n, bytes(8))) for n in (0, 1)])
    page = await store.read(ALL, 0.0)
    seqs = [[entry_from(data).seq for data in entries] for entries in page.entries]
    assert seqs[:3] == [[20, 21, 40, 41], [10, 11, 30, 31, 50, 51], []]
    assert page.positions[:2] == (await store.registry()).ends[:2]
    assert page.positions[2] == BEGIN
    again = await store.read(page.positions, 0.0)
    assert not any(again.entries)
    assert again.positions == page.positions


async def test_a_page_is_bounded(store: RedisStore) -> None:
    """A page that does not reach the end of a stream says so, and the next one goes on."""
    await store.append(3, [b"%d" % number for number in range(300)])
    first = await store.read(ALL, 0.0)
    second = await store.read(first.positions, 0.0)
    assert (first.is_at_end[3], second.is_at_end[3]) == (False, True)
    assert [*first.entries[3], *second.entries[3]] == [b"%d" % number for number in range(300)]


async def test_a_read_waits_for_an_entry(store: RedisStore) -> None:
    """A read of an empty log ends as soon as there is an entry, long before its time is over."""
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(store.read(ALL, 100.0))
        await asyncio.sleep(0)
        await store.append(5, [b"new"])
    assert waiting.result().entries[5] == [b"new"]


async def test_a_read_that_waits_in_vain_ends(store: RedisStore) -> None:
    """A read returns nothing once its time is over."""
    assert not any((await store.read(ALL, 0.001)).entries)


async def test_the_log_is_bounded(store: RedisStore) -> None:
    """A stream loses its oldest entries once it has more than its bytes allow."""
    entry = bytes(16 << 10)
    for _ in range(12):
        await store.append(0, [entry] * 100)
    await store.append(0, [b"last"])
    (size,) = await store._redis.run([("XREVRANGE", store._streams[0], "+", "-", "COUNT", 1)])
    assert size[0][1][1] == b"last"
    positions, count = ALL, 0
    while (page := await store.read(positions, 0.0)).entries[0]:
        positions, count = page.positions, count + len(page.entries[0])
    assert 1000 <= count < 1201
    assert (await store.registry()).log_bytes > 1000 * len(entry)


async def test_what_nobody_uses_any_more_is_removed(redis: Commands, store: RedisStore) -> None:
    """All keys but the generation have a TTL, which each entry and each beat begins anew."""
    keys = [f"flexkv:{{pool}}:{name}" for name in ("nodes", "log:0", "log:3", "generation")]

    async def use(over: int | None) -> list[int]:
        """Use all keys, and return their TTLs."""
        await store.register(Beat(node(1)), over)
        await store.append(3, [b"an entry"])
        await store.advance(0)
        return await redis.run([("PTTL", key) for key in keys])

    *first, forever = await use(None)
    assert (min(first) > KEPT_MS / 2, forever) == (True, -1)
    await redis.run([("PEXPIRE", key, 60_000) for key in keys[:3]])
    assert min((await use(1))[:3]) > KEPT_MS / 2


@pytest.mark.parametrize("answer", [b"OK", b"", 7, None, [], [[]], [[b"x", [[b"1-1", [b"e"]]]]]])
async def test_answers_that_make_no_sense_are_errors(answer: Any) -> None:
    """Whatever answers at the port, and whatever it says, only ClusterStoreErrors come of it."""

    class Stranger:
        where = "a stranger"

        async def run(self, commands: Sequence[Command], wait_s: float = 0.0) -> list[Any]:
            return [answer] * len(commands)

        async def close(self) -> None:
            pass

    store = RedisStore(Stranger(), "pool", TTL_S)
    calls: list[Callable[[], Coroutine[Any, Any, object]]] = [
        store.registry, lambda: store.read(ALL, 0.0), lambda: store.advance(1),
        lambda: store.register(Beat(node(1)), None), lambda: store.register(Beat(node(1)), 1),
        lambda: store.leave(node(1)),
    ]  # fmt: skip
    for call in calls:
        with suppress(ClusterStoreError):
            await call()


@pytest.mark.parametrize("name", ["now", "made", "book", "closed"])
@pytest.mark.parametrize("score", ["inf", "-1", "1e30"])
async def test_a_generation_that_cannot_be_is_an_error(
    redis: Commands, store: RedisStore, name: str, score: str
) -> None:
    """It is no number that nodes could tell each other."""
    await redis.run([("ZADD", "flexkv:{pool}:generation", "GT", score, name)])
    with pytest.raises(ClusterStoreError, match="makes no sense"):
        await store.read(ALL, 0.0)


async def test_a_generation_never_goes_back(store: RedisStore) -> None:
    """A generation is later than all that anybody knew, also if the store has lost it."""
    assert (await heard(store)).now == 0
    first = await store.advance(0)
    second = await store.advance(0)
    assert 0 < first < second
    await store.begin(first)
    await store.put_back(first)
    assert (await heard(store)).now == second
    much_later = later_than(later_than(second))
    third = await store.advance(much_later)
    assert third > much_later
    await store.begin(much_later)
    assert (await heard(store)).now == third
    last = later_than(third)
    await store.begin(last)
    assert (await heard(store)).now == last


async def test_no_generation_is_made_twice(redis: Commands, store: RedisStore) -> None:
    """A store that has lost everything does not make the generations that it has made before."""
    made = []
    for _ in range(3):
        made += [await store.advance(0), await store.advance(0)]
        await redis.run([("DEL", "flexkv:{pool}:generation")])
    assert len(set(made)) == len(made)
    assert {each % (1 << RANDOM_BITS) for each in made} != {0}


async def test_what_a_store_has_lost_is_put_back(redis: Commands, store: RedisStore) -> None:
    """A book and a generation are put back where there is none; no reset is pretended."""
    assert await heard(store) == Heard()
    await store.put_back(0)
    book = (await heard(store)).book
    assert await heard(store) == Heard(book=book)
    assert 0 < book < 1 << RANDOM_BITS
    generation = await store.advance(0)
    await store.close_generation(generation)
    await store.put_back(later_than(generation))
    assert await heard(store) == Heard(generation, 1, book, generation)
    await redis.run([("DEL", "flexkv:{pool}:generation")])
    await store.put_back(generation)
    again = await heard(store)
    assert (again.now, again.made, again.closed) == (generation, 0, 0)
    assert again.book != book
    await store.begin(later_than(generation))
    assert (await heard(store)).made == 1


async def test_a_new_generation_wakes_readers(store: RedisStore) -> None:
    """A read that waits returns the new generation when there is one."""
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(store.read(ALL, 100.0))
        await asyncio.sleep(0)
        await store.advance(0)
    assert waiting.result().heard.now > 0


async def test_pools_do_not_meet(redis: Commands) -> None:
    """Nodes whose blocks differ see nothing of each other."""
    one, other = RedisStore(redis, "one", TTL_S), RedisStore(redis, "other", TTL_S)
    await one.register(Beat(node(1)), None)
    await one.append(0, [b"entry"])
    await one.advance(0)
    assert (await other.registry()).beats == []
    page = await other.read(ALL, 0.0)
    assert (any(page.entries), page.heard) == (False, Heard())


async def test_an_unknown_command_is_an_error(redis: Commands) -> None:
    """An answer that is an error is raised, and the connection can be used again."""
    with pytest.raises(ClusterStoreError, match="NONSENSE"):
        await redis.run([("NONSENSE", "a")])
    assert await redis.run([("GET", "nothing")]) == [None]


async def test_no_cancellation_is_lost(redis: Commands) -> None:
    """A task that is cancelled at any step of a command ends so, and the next command works."""
    for steps in range(40):
        task = asyncio.ensure_future(redis.run([("GET", "nothing"), ("GET", "nothing")]))
        for _ in range(steps):
            await asyncio.sleep(0)
        if task.cancel():
            await asyncio.wait([task])
            assert task.cancelled(), steps
        assert await redis.run([("GET", "nothing")]) == [None]


async def test_no_error_tells_the_password(server: RedisServer) -> None:
    """Neither a refused password nor a server that is away makes an error that quotes it."""
    for port in (server.port, 1):
        redis = RedisCommands("127.0.0.1", port, "wrong secret")
        with pytest.raises(ClusterStoreError) as failed:
            await redis.run([("GET", "x")])
        assert "wrong secret" not in f"{failed.value!r} {failed.value} {failed.value.__cause__!r}"
        await redis.close()
