"""The cluster's store in Redis or Valkey, by a few commands that both have.

    flexkv:{<pool>}:nodes         set: the ids of nodes that were registered
    flexkv:{<pool>}:node:<id>     string: the node's beat, with a TTL
    flexkv:{<pool>}:log:<0 … 7>   stream: entries, each in one field
    flexkv:{<pool>}:generation    sorted set: what the cluster's generation is, as scores

So there are ten keys besides one for each node. The braces make a Redis Cluster keep them all in
one place. A sorted set has an atomic maximum (`ZADD GT`), which a number has not. What is in the
last key is in `generations.py`.

All but the generation are removed some time after the last node has left, since blocks of another
model are another pool. Nodes keep the generation beside their SSD.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from flexkv.cluster.generations import GENERATION_MAX, Heard, new_book, step
from flexkv.cluster.records import STREAMS, Beat, NodeRecord, beat_from, encoded
from flexkv.cluster.store import BEGIN, ClusterStoreError, LogPage, Positions, Registry
from flexkv.common.errors import MalformedError

STREAM_BYTES = 16 << 20
"""About how large a stream may become."""
ENTRY_OVERHEAD_BYTES = 24
"""About what a stream needs for an entry besides its bytes."""
STREAM_ENTRIES_MIN = 1000
READ_ENTRIES_MAX = 256
"""How many entries of each stream one read returns at most."""
FIELD = b"e"
NOW, MADE, BOOK, CLOSED = b"now", b"made", b"book", b"closed"
"""What the sorted set of the generation has: see `Heard`."""
KEPT_MS = 24 * 3600 * 1000
"""How long the log and the set of nodes outlive the last entry and the last beat."""

Command = tuple[bytes | str | int, ...]


class Commands(Protocol):
    """A connection to Redis.

    Attributes:
        where: names the server, without credentials.
    """

    where: str

    async def run(self, commands: Sequence[Command], wait_s: float = 0.0) -> list[Any]:
        """Send commands at once and return their answers: bytes, numbers, lists or None.

        Args:
            commands: carried out in order.
            wait_s: how long the server may wait on purpose.

        Raises:
            ClusterStoreError: there was no answer in time, or one of them is an error.
        """
        ...

    async def close(self) -> None:
        """Close all connections."""
        ...


class RedisStore:
    """A `ClusterStore` in Redis."""

    def __init__(self, redis: Commands, pool: str, ttl_s: float) -> None:
        """Take the connection, the digest of what the blocks are, and the TTL of a beat."""
        self.where = redis.where
        self._redis, self._ttl_ms = redis, max(1, round(1000 * ttl_s))
        base = f"flexkv:{{{pool}}}"
        self._nodes, self._generation = f"{base}:nodes", f"{base}:generation"
        self._node = f"{base}:node:"
        self._streams = tuple(f"{base}:log:{number}" for number in range(STREAMS))
        self._stream_of = {name.encode(): i for i, name in enumerate(self._streams)}

    # -- registry -------------------------------------------------------------------------------

    async def register(self, beat: Beat, over: int | None) -> Beat | None:
        """Register a node: see `ClusterStore.register`."""
        key, value = self._key(beat.node.id), encoded(beat)
        member: Command = ("SADD", self._nodes, beat.node.id)
        keep: Command = ("PEXPIRE", self._nodes, KEPT_MS)
        if over is None:
            new: Command = ("SET", key, value, "PX", self._ttl_ms, "NX")
            taken, now, *_ = await self._redis.run([new, ("GET", key), member, keep])
            return None if taken is not None else _decoded(now)
        set_: Command = ("SET", key, value, "PX", self._ttl_ms, "GET")
        before, *_ = await self._redis.run([set_, member, keep])
        other = _decoded(before)
        if other is None or other.node.life in (beat.node.life, over):
            return None
        await self._redis.run([("SET", key, before, "PX", self._ttl_ms)])
        return other

    async def leave(self, node: NodeRecord) -> None:
        """Remove a node from the registry, unless another life has taken its id."""
        key = self._key(node.id)
        (now,) = await self._redis.run([("GET", key)])
        beat = _decoded(now)
        if beat is not None and beat.node.life == node.life:
            await self._redis.run([("DEL", key), ("SREM", self._nodes, node.id)])

    async def forget(self, ids: Collection[bytes]) -> None:
        """Remove ids from the registry; a node that lives adds itself again with its next beat."""
        if ids:
            await self._redis.run([("SREM", self._nodes, *ids)])

    async def registry(self) -> Registry:
        """Return what is registered, in two round trips however many nodes there are."""
        last: list[Command] = [("XREVRANGE", name, "+", "-", "COUNT", 1) for name in self._streams]
        size: list[Command] = [("MEMORY", "USAGE", name) for name in self._streams]
        ids, *rest = await self._redis.run([("SMEMBERS", self._nodes), *last, *size])
        with self._understood("the registry"):
            last_ids = [entries[0][0] if entries else BEGIN for entries in rest[:STREAMS]]
            ends = tuple(map(_checked_id, last_ids))
            log_bytes = sum(each or 0 for each in rest[STREAMS:])
            keys = list(map(self._key, ids))
        values: list[bytes | None] = []
        if keys:
            (values,) = await self._redis.run([("MGET", *keys)])
        with self._understood("the registry"):
            beats = [beat for value in values if (beat := _decoded(value)) is not None]
            expired = [node for node, value in zip(ids, values, strict=True) if value is None]
        return Registry(beats, expired, ends, log_bytes)

    def _key(self, node_id: bytes) -> str:
        return self._node + node_id.hex()

    # -- log ------------------------------------------------------------------------------------

    async def append(self, stream: int, entries: Sequence[bytes]) -> None:
        """Append entries to a stream, which is cut to as many entries of their size as it may have.

        Redis removes whole nodes of its stream only ("~"), so that it costs next to nothing.
        """
        name = self._streams[stream]
        added: list[Command] = [
            ("XADD", name, "MAXLEN", "~", _entries_max(len(entry)), "*", FIELD, entry)
            for entry in entries
        ]
        await self._redis.run([*added, ("PEXPIRE", name, KEPT_MS)])

    async def read(self, positions: Positions, wait_s: float) -> LogPage:
        """Return what the log has behind some positions: see `ClusterStore.read`.

        The generation is read behind the entries. So it is asked for once the wait is over.
        """
        block: Command = ("BLOCK", max(1, round(1000 * wait_s))) if wait_s else ()
        read: Command = ("XREAD", "COUNT", READ_ENTRIES_MAX, *block)
        streams: Command = ("STREAMS", *self._streams, *positions)
        found, scores = await self._redis.run(
            [(*read, *streams), ("ZMSCORE", self._generation, NOW, MADE, BOOK, CLOSED)], wait_s
        )
        entries: list[Sequence[bytes]] = [()] * STREAMS
        behind = list(positions)
        with self._understood("the log"):
            for name, rows in found or ():
                stream = self._stream_of[name]
                entries[stream] = [fields[1] for _, fields in rows if len(fields) == 2]
                behind[stream] = _checked_id(rows[-1][0])
            now, made, book, closed = map(_number, scores)
        at_end = [len(each) < READ_ENTRIES_MAX for each in entries]
        return LogPage(entries, tuple(behind), at_end, Heard(now, made, book, closed))

    # -- generation -----------------------------------------------------------------------------

    async def put_back(self, generation: int) -> None:
        """Write to the store what it has lost: see `ClusterStore.put_back`."""
        known: Command = ("ZADD", self._generation, "NX", generation, NOW)
        book: Command = ("ZADD", self._generation, "NX", new_book(), BOOK)
        await self._redis.run([known, book] if generation else [book])

    async def close_generation(self, name: int) -> None:
        """Record that a node was cleared alone in this generation: see `ClusterStore`."""
        await self._redis.run([("ZADD", self._generation, name, CLOSED)])

    async def begin(self, generation: int) -> None:
        """Begin a generation, unless a later one has begun."""
        new: Command = ("ZADD", self._generation, "GT", generation, NOW)
        await self._redis.run([new, ("ZADD", self._generation, "GT", 1, MADE)])
        await self.append(0, [b""])

    async def advance(self, known: int) -> int:
        """Begin another generation; an entry that says nothing wakes those who read the log."""
        *_, score, _ = await self._redis.run(
            [
                ("ZADD", self._generation, "NX", new_book(), BOOK),
                ("ZADD", self._generation, "GT", known, NOW),
                ("ZINCRBY", self._generation, step(), NOW),
                ("ZADD", self._generation, "GT", 1, MADE),  # last: what is known may be outdated
            ]
        )
        await self.append(0, [b""])
        with self._understood("the generation"):
            return _number(score)

    async def close(self) -> None:
        """Close all connections."""
        await self._redis.close()

    @contextmanager
    def _understood(self, what: str) -> Iterator[None]:
        """Read an answer, which may be of something that is no Redis, or not as we left it.

        Raises:
            ClusterStoreError: it makes no sense.
        """
        try:
            yield
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            why = f"the answer makes no sense: {type(error).__name__}"
            raise ClusterStoreError(self.where, f"reading {what}", why) from error


def _entries_max(entry_bytes: int) -> int:
    """Return how many entries of this size a stream may have."""
    return max(STREAM_ENTRIES_MIN, STREAM_BYTES // (entry_bytes + ENTRY_OVERHEAD_BYTES))


def _checked_id(entry_id: bytes) -> bytes:
    time_ms, _, number = entry_id.partition(b"-")
    int(time_ms), int(number)
    return entry_id


def _number(score: bytes | None) -> int:
    number = int(float(score or 0))
    if not 0 <= number <= GENERATION_MAX:
        raise ValueError(number)
    return number


def _decoded(value: bytes | None) -> Beat | None:
    if not isinstance(value, bytes):
        return None
    try:
        return beat_from(value)
    except MalformedError:
        return None
