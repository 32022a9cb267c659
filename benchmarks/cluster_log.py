"""How soon a node knows what others have, through a real Redis: 50 nodes that publish at 20 Hz.

Limits: from the making of an entry until its spans are in another node's hints 25 ms at the median
and 100 ms at the 99th percentile; 12 bytes of Redis' memory for a span that is told; 12 keys
besides one a node; a tenth of a core for the follower. A change waits for up to 50 ms more until
an entry is made of it. There are no peers: none tells its changes.

    load: a process with 50 publishers, each with 312 changes a second ──▶ Redis ──▶ follower: here
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import shutil
import time
from collections import deque
from collections.abc import AsyncGenerator, Coroutine, Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import psutil

from benchmarks.harness import Figures, Options, percentile
from flexkv.cluster.membership import Membership
from flexkv.cluster.plane import MetadataPlane
from flexkv.cluster.publisher import Publisher, SpanStep
from flexkv.cluster.records import STREAMS, TAG_BYTES, Beat, NodeRecord, SpanTags
from flexkv.cluster.redis_commands import RedisCommands
from flexkv.cluster.redis_store import RedisStore
from flexkv.common.terms import BLOCK_KEY_BYTES
from flexkv.index.hints import Hints
from flexkv.testing.redis_server import PROGRAMS, RedisServer

NODES, CHANGES_PER_S, KEPT_SPANS = 50, 312, 1000
TTL_S, POOL = 60.0, "benchmark"


def measure(options: Options) -> Figures:
    """Return the figures of the case."""
    if not any(map(shutil.which, PROGRAMS)):
        return {"cluster_log": f"{PROGRAMS[0]} is not installed"}
    nodes, seconds = (3, 0.5) if options.quick else (NODES, 2.0 * options.repeats)
    server = RedisServer()
    server.start()
    try:
        return asyncio.run(_follow(server, nodes, seconds))
    finally:
        server.close()


class _Change(NamedTuple):
    key: bytes
    on_host: bool
    on_disk: bool


class _Spans:
    """What a node of the load has: spans come at a steady rate, and the oldest go.

    Attributes:
        tags: of the spans that came.
        times_s: when each of them came, and when an entry was made of it.
    """

    def __init__(self, seed: int) -> None:
        self.tags: list[bytes] = []
        self.times_s: list[tuple[float, float]] = []
        self._random = np.random.default_rng(seed)
        self._held: deque[bytes] = deque()
        self._since_s = time.monotonic()

    def begin(self) -> None:
        """Let the first span come."""
        self._since_s = time.monotonic()

    def changes(self) -> Iterator[_Change]:
        """Yield what changed since the last call."""
        now_s = time.monotonic()
        count = int((now_s - self._since_s) * CHANGES_PER_S / 2)  # as many go as come
        for number in range(1, count + 1):
            key = self._random.bytes(BLOCK_KEY_BYTES)
            self.tags.append(key[:TAG_BYTES])
            self.times_s.append((self._since_s + 2 * number / CHANGES_PER_S, now_s))
            self._held.append(key)
            yield _Change(key, True, False)
            if len(self._held) > KEPT_SPANS:
                yield _Change(self._held.popleft(), False, False)
        self._since_s += 2 * count / CHANGES_PER_S

    def steps(self) -> Iterator[SpanStep]:
        """Yield nothing: the load begins without spans."""
        yield from ()


def _load(pipe: Connection, port: int, nodes: int, seconds: float) -> None:
    """Publish as many nodes do, in a process of its own; send when which span came."""
    spans = [_Spans(seed) for seed in range(nodes)]

    async def publish(source: _Spans, number: int, record: NodeRecord) -> None:
        redis = RedisCommands("127.0.0.1", port)
        publisher = Publisher(RedisStore(redis, POOL, TTL_S), record, source, 2 * KEPT_SPANS)
        try:
            await asyncio.sleep(publisher.interval_s() * number / nodes)
            async with asyncio.timeout(seconds):
                await publisher.run()
        except TimeoutError:
            await publisher.publish()  # what was made, and not sent
            await publisher.publish()
        finally:
            await redis.close()

    async def main() -> None:
        records = [
            NodeRecord(os.urandom(16), 8 * n + n % STREAMS + 8, f"10.0.0.{n}:1")
            for n in range(nodes)
        ]
        redis = RedisCommands("127.0.0.1", port)
        for record in records:
            await RedisStore(redis, POOL, TTL_S).register(Beat(record), None)
        await redis.close()
        pipe.send("registered")
        pipe.recv()
        for each in spans:
            each.begin()
        async with asyncio.TaskGroup() as tasks:
            for number, record in enumerate(records):
                tasks.create_task(publish(spans[number], number, record))

    asyncio.run(main())
    pipe.send([(b"".join(each.tags), each.times_s) for each in spans])


class _TimedHints(Hints):
    """Hints that remember when each tag was noted."""

    def __init__(self, pairs_max: int) -> None:
        super().__init__(pairs_max, 1)
        self.noted: list[tuple[float, bytes]] = []

    def note(
        self, holder: int, keys: bytes, on_disk: bool = False, size: int = BLOCK_KEY_BYTES
    ) -> int:
        """Note spans, and the time."""
        added = super().note(holder, keys, on_disk, size)
        self.noted.append((time.monotonic(), keys))
        return added


class _NoSpans:
    """The snapshots of nodes that begin without spans.

    Attributes:
        all_asked: set once every node was asked.
    """

    def __init__(self, nodes: int) -> None:
        self.all_asked = asyncio.Event()
        self._left = nodes

    async def parts(self, node: NodeRecord) -> AsyncGenerator[SpanTags, None]:
        """Yield the only part."""
        yield SpanTags(0, b"", b"", True)
        self._left -= 1
        if not self._left:
            self.all_asked.set()


async def _follow(server: RedisServer, nodes: int, seconds: float) -> Figures:
    """Return the figures of one follower of a load."""
    hints = _TimedHints(4 * nodes * KEPT_SPANS)
    redis = RedisCommands("127.0.0.1", server.port)
    own = NodeRecord(os.urandom(16), 1, "127.0.0.1:1")
    membership, store = Membership(hints, own, TTL_S), RedisStore(redis, POOL, TTL_S)
    snapshots = _NoSpans(nodes)
    plane = MetadataPlane(store, membership, hints, _Spans(0), snapshots, 64)
    plane.publisher.may_send = lambda: False
    theirs, ours = multiprocessing.get_context("spawn").Pipe()
    load = multiprocessing.get_context("spawn").Process(
        target=_load, args=(theirs, server.port, nodes, seconds)
    )
    load.start()
    theirs.close()
    try:
        await asyncio.to_thread(ours.recv)
        async with asyncio.TaskGroup() as tasks:

            def spawn(name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
                return tasks.create_task(work, name=name)

            running = [tasks.create_task(work) for work in plane.work(spawn).values()]
            plane.registration.look_soon()
            await snapshots.all_asked.wait()
            redis_process = psutil.Process(server.pid)
            cpu_s, redis_cpu_s = time.process_time(), sum(redis_process.cpu_times()[:2])
            begin_s = time.monotonic()
            ours.send("go")
            came = await asyncio.to_thread(ours.recv)
            await asyncio.sleep(0.3)  # the last entries
            took_s = time.monotonic() - begin_s
            cpu_s = time.process_time() - cpu_s
            redis_cpu_s = sum(redis_process.cpu_times()[:2]) - redis_cpu_s
            figures = await _of_redis(redis, plane, came, nodes)
            for task in running:
                task.cancel()
    finally:
        load.join()
        await redis.close()
    return figures | {
        "follower, of a core (at most 0.1)": cpu_s / took_s,
        "redis, of a core": redis_cpu_s / took_s,
        "load average": f"{os.getloadavg()[0]:.1f}",
        **_freshness(hints, came),
    }


Came = list[tuple[bytes, list[tuple[float, float]]]]


async def _of_redis(redis: RedisCommands, plane: MetadataPlane, came: Came, nodes: int) -> Figures:
    keys = [("MEMORY", "USAGE", f"flexkv:{{{POOL}}}:log:{n}", "SAMPLES", 0) for n in range(STREAMS)]
    (count, *sizes) = await redis.run([("DBSIZE",), *keys])
    told = sum(len(times_s) + max(0, len(times_s) - KEPT_SPANS) for _, times_s in came)
    return {
        f"keys besides one for each of {nodes} nodes (at most 12)": float(count - nodes - 1),
        "bytes of the log a span told (at most 12)": sum(each or 0 for each in sizes) / told,
        "spans told an entry": told / max(1, plane.follower.entries),
        "entries read": float(plane.follower.entries),
        "snapshots beyond one a node": float(plane.follower.snapshots_taken - nodes),
    }


def _freshness(hints: _TimedHints, came: Came) -> Figures:
    """Return how long it took from the change of a span until it was in the hints."""
    came_s = {
        tags[TAG_BYTES * n : TAG_BYTES * (n + 1)]: time_s
        for tags, times_s in came
        for n, time_s in enumerate(times_s)
    }
    took = [
        (noted_s, *came_s.pop(tags[begin : begin + TAG_BYTES]))
        for noted_s, tags in hints.noted
        for begin in range(0, len(tags), TAG_BYTES)
    ]
    from_change = [1e3 * (noted_s - changed_s) for noted_s, changed_s, _ in took]
    from_entry = [1e3 * (noted_s - made_s) for noted_s, _, made_s in took]
    return {
        "spans never noted": float(len(came_s)),
        "freshness p50 (at most 25), ms": percentile(from_entry, 50),
        "freshness p99 (at most 100), ms": percentile(from_entry, 99),
        "from the change p50, ms": percentile(from_change, 50),
        "from the change p99, ms": percentile(from_change, 99),
    }
