"""A cluster's metadata on a virtual clock: real planes over a fake Redis, while much goes wrong.

Nodes store, move and drop spans, die, leave and start again. Redis is killed, flushed, trimmed and
cut off, and loses answers; snapshots fail on their way. Once all of that has ended and some time
has passed, each follower's hints are what the nodes really have.

    publishers (all nodes) ──▶ FakeRedisServer ──▶ followers (some, with hints of their own)
            └──────────── snapshots, over links that fail ──────────┘
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

from flexkv.cluster.membership import Membership
from flexkv.cluster.plane import MetadataPlane
from flexkv.cluster.publisher import SpanStep
from flexkv.cluster.records import NodeRecord, SpanTags
from flexkv.cluster.redis_store import RedisStore
from flexkv.cluster.store import ClusterStoreError
from flexkv.common.errors import PeerError
from flexkv.common.terms import BLOCK_KEY_BYTES, Tier
from flexkv.index.hints import Hints, holders_of, on_disk
from flexkv.testing.fake_redis import FakeRedis, FakeRedisServer

REDIS_KEYS_MAX = 12
"""How many keys there may be besides one for each node."""
STEP_SPANS = 64


@dataclass(frozen=True)
class Scene:
    """What happens.

    Attributes:
        nodes: how many nodes there are.
        followers: how many of them follow the others.
        ttl_s: of a beat.
        changes_per_s: how many spans change, on all nodes together.
        seconds: how long things change and go wrong.
        faults_per_s: how often something goes wrong.
        deaths_at_once: how many nodes one of the faults kills.
        delay_s: the longest time to Redis or back.
        spans_max: how many spans a node has, about.
    """

    nodes: int = 5
    followers: int = 5
    ttl_s: float = 3.0
    changes_per_s: float = 200.0
    seconds: float = 20.0
    faults_per_s: float = 1.0
    deaths_at_once: int = 1
    delay_s: float = 0.003
    spans_max: int = 400


class Change(NamedTuple):
    """Where a span is, after a change."""

    key: bytes
    on_host: bool
    on_disk: bool


class SimulatedSpans:
    """What a node has. It is the source of its publisher.

    Attributes:
        spans: by key, whether each is in host memory, and whether it is on disk.
        has_lost: whether changes are not known.
    """

    def __init__(self, random: Random, spans_max: int) -> None:
        self.spans: dict[bytes, tuple[bool, bool]] = {}
        self.has_lost = False
        self._changes: list[Change] = []
        self._random, self._spans_max = random, spans_max
        self._gone: list[bytes] = []

    def changes(self) -> list[Change] | None:
        """Return what changed since the last call."""
        changes, self._changes = self._changes, []
        if self.has_lost:
            self.has_lost = False
            return None
        return changes

    def steps(self) -> Iterator[SpanStep]:
        """Walk through what was there at the beginning, and is there still."""
        keys = list(self.spans)
        for begin in range(0, len(keys), STEP_SPANS):
            some = [(k, self.spans[k]) for k in keys[begin : begin + STEP_SPANS] if k in self.spans]
            yield SpanStep(
                b"".join(key for key, (on_host, _) in some if on_host),
                b"".join(key for key, (on_host, _) in some if not on_host),
            )

    def change(self) -> None:
        """Store, move or drop a span; some come and go at once."""
        if not self.spans or self._random.random() * self._spans_max > len(self.spans):
            if self._gone and self._random.random() < 0.3:
                key = self._gone.pop(self._random.randrange(len(self._gone)))
            else:
                key = self._random.randbytes(BLOCK_KEY_BYTES)
            self.put(key, *self._random.choice([(True, False), (True, True), (False, True)]))
            if self._random.random() < 0.2:
                self.put(key, False, False)
            return
        key = self._random.choice(list(self.spans)) if len(self.spans) < 50 else self._any()
        on_host, _ = self.spans[key]
        after = (
            [(True, True), (False, True), (False, False)]
            if on_host
            else [(True, True), (False, False)]
        )
        self.put(key, *self._random.choice(after))
        if self._random.random() < 0.2:
            self.put(key, True, False)

    def _any(self) -> bytes:
        """Return one of the oldest spans."""
        keys = iter(self.spans)
        for _ in range(self._random.randrange(16)):
            next(keys)
        return next(keys)

    def put(self, key: bytes, is_on_host: bool, is_on_disk: bool) -> None:
        """Set where a span is."""
        self.spans.pop(key, None)
        if is_on_host or is_on_disk:
            self.spans[key] = is_on_host, is_on_disk
        elif len(self._gone) < 100:
            self._gone.append(key)
        self._changes.append(Change(key, is_on_host, is_on_disk))


@dataclass
class SimulatedNode:
    """A node life.

    Attributes:
        record: who it is.
        source: what it has.
        redis: its connection.
        hints: what it knows of the others; empty if it does not follow them.
        plane: its part of the cluster's metadata.
        follows: whether it follows the others.
        tasks: its tasks.
        asked: how often it has asked for a snapshot, by the other node's life.
    """

    record: NodeRecord
    source: SimulatedSpans
    redis: FakeRedis
    hints: Hints
    plane: MetadataPlane
    follows: bool
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    asked: Counter[int] = field(default_factory=Counter)


class _Links:
    """Brings snapshots to a node."""

    def __init__(self, simulation: ClusterSimulation) -> None:
        self._simulation = simulation
        self.asked: Counter[int] = Counter()

    async def parts(self, node: NodeRecord) -> AsyncGenerator[SpanTags, None]:
        """Yield the parts of a node's snapshot; the link may fail at any time."""
        simulation, random = self._simulation, self._simulation.random
        self.asked[node.life] += 1
        await asyncio.sleep(random.random() * 0.01)
        if (other := simulation.living.get(node.life)) is None:
            raise PeerError(node.address, "snapshot", "connection refused")
        for part in other.plane.publisher.snapshot():
            yield part
            await asyncio.sleep(random.random() * 0.02)
            if node.life not in simulation.living or (
                simulation.is_faulty and random.random() < 0.02
            ):
                raise PeerError(node.address, "snapshot", "connection lost")


class ClusterSimulation:
    """A cluster and its faults.

    Attributes:
        server: the Redis server that all share.
        living: the node lives that run, by life.
        is_faulty: whether links fail.
        faults: how often each kind of fault has happened.
    """

    def __init__(self, scene: Scene, seed: int) -> None:
        self.scene, self.random = scene, Random(seed)
        self.server = FakeRedisServer()
        self.living: dict[int, SimulatedNode] = {}
        self.is_faulty = True
        self.faults: Counter[str] = Counter()
        self._group = asyncio.TaskGroup()
        self._ports = iter(range(1, 1 << 30))

    async def run(self) -> None:
        """Run the scene, and the quiet time behind it; check all laws then.

        Raises:
            AssertionError: hints are not what nodes have, or another law does not hold.
        """
        async with self.running():
            for number in range(self.scene.nodes):
                self.start(self.random.randbytes(16), follows=number < self.scene.followers)
            await self._disturbed()
            await self._calm()
            self.check()
            await self._idle()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the nodes that are started, and kill them at the end."""
        async with self._group:
            yield
            for node in list(self.living.values()):
                self.kill(node)

    # -- nodes ----------------------------------------------------------------------------------

    def start(self, node_id: bytes, follows: bool, address: str = "") -> SimulatedNode:
        """Start a life of a node that has some spans already."""
        random, scene = self.random, self.scene
        address = address or f"10.0.0.1:{next(self._ports)}"
        record = NodeRecord(node_id, random.getrandbits(64), address)
        source = SimulatedSpans(Random(random.random()), scene.spans_max)
        for _ in range(random.randrange(scene.spans_max)):
            source.change()
        source.changes()  # nobody is told of what was there at the start
        redis = FakeRedis(self.server, lambda: random.random() * scene.delay_s)
        store = RedisStore(redis, "simulated", scene.ttl_s)
        pairs = 2 * scene.nodes * scene.spans_max if follows else 64
        hints, links = Hints(max(1024, pairs), 1), _Links(self)
        membership = Membership(hints, record, scene.ttl_s)
        plane = MetadataPlane(store, membership, hints, source, links, 2 * scene.spans_max)
        node = SimulatedNode(record, source, redis, hints, plane, follows, asked=links.asked)
        self.living[record.life] = node

        def spawn(name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
            task = self._group.create_task(work, name=name)
            node.tasks.add(task)
            task.add_done_callback(node.tasks.discard)
            return task

        if follows:
            for name, work in plane.work(spawn).items():
                spawn(name, work)
        else:
            plane.publisher.interval_s = self._interval_s  # type: ignore[method-assign]
            plane.publisher.may_send = lambda: plane.registration.is_registered
            spawn("beats", self._beat(node))
            spawn("publisher", plane.publisher.run())
        return node

    def _interval_s(self) -> float:
        """Return the publish interval of a node that does not know how many there are."""
        return 0.05 * max(1.0, len(self.living) / 100)

    async def _beat(self, node: SimulatedNode) -> None:
        """Keep a node registered that does not read the registry."""
        pause_s = self.scene.ttl_s / 3
        await asyncio.sleep(self.random.random() * pause_s)
        while True:
            try:
                await node.plane.registration.beat()
            except ClusterStoreError:
                await asyncio.sleep(self.random.random() * pause_s / 2)
            else:
                await asyncio.sleep(pause_s)

    def kill(self, node: SimulatedNode) -> None:
        """End a life without a word."""
        del self.living[node.record.life]
        for task in list(node.tasks):
            task.cancel()

    # -- faults ---------------------------------------------------------------------------------

    async def _disturbed(self) -> None:
        """Change spans and make faults for the scene's time; return once all faults have ended."""
        loop, scene = asyncio.get_running_loop(), self.scene
        until_s, owed = loop.time() + scene.seconds, 0.0
        lasting: set[asyncio.Task[None]] = set()
        while loop.time() < until_s or lasting:
            await asyncio.sleep(step_s := 0.01)
            owed += scene.changes_per_s * step_s
            nodes = list(self.living.values())
            for _ in range(int(owed)):
                self.random.choice(nodes).source.change()
            owed %= 1.0
            if loop.time() < until_s and self.random.random() < scene.faults_per_s * step_s:
                task = self._group.create_task(self._fault())
                lasting.add(task)
                task.add_done_callback(lasting.discard)

    async def _fault(self) -> None:
        """Make one fault; return once it has ended."""
        kinds = [
            self._redis_dies, self._redis_is_flushed, self._redis_is_trimmed, self._is_cut_off,
            self._pool_is_split, self._is_slow,
            self._answers_are_lost, self._nodes_die, self._node_restarts, self._node_leaves,
            self._changes_are_lost, self._generation_advances, self._hints_are_cleared,
        ]  # fmt: skip
        kind = self.random.choice(kinds)
        self.faults[kind.__name__.strip("_")] += 1
        await kind()

    def _some(self) -> SimulatedNode:
        return self.random.choice(list(self.living.values()))

    async def _redis_dies(self) -> None:
        self.server.is_down = True
        await asyncio.sleep(self.random.random() * 2 * self.scene.ttl_s)
        if self.random.random() < 0.5:
            self.server.flush()
        self.server.is_down = False

    async def _redis_is_flushed(self) -> None:
        self.server.flush()

    async def _redis_is_trimmed(self) -> None:
        self.server.trim(self.random.choice([0, 1, 10]))

    async def _is_cut_off(self) -> None:
        node = self._some()
        node.redis.is_cut_off = True
        await asyncio.sleep(self.random.random() * 3 * self.scene.ttl_s)
        node.redis.is_cut_off = False

    async def _pool_is_split(self) -> None:
        half = self.random.sample(list(self.living.values()), len(self.living) // 2)
        for node in half:
            node.redis.is_cut_off = True
        await asyncio.sleep(2 * self.scene.ttl_s)
        for node in half:
            node.redis.is_cut_off = False

    async def _is_slow(self) -> None:
        node = self._some()
        usual, node.redis.delay_s = node.redis.delay_s, lambda: 0.5 * self.random.random()
        await asyncio.sleep(2 * self.scene.ttl_s)
        node.redis.delay_s = usual

    async def _answers_are_lost(self) -> None:
        node = self._some()
        node.redis.loses_answers = True
        await asyncio.sleep(self.random.random() * self.scene.ttl_s)
        node.redis.loses_answers = False

    async def _nodes_die(self) -> None:
        for _ in range(self.scene.deaths_at_once):
            if len(self.living) > 2:
                self._replace(self._some(), self.random.randbytes(16))

    async def _node_restarts(self) -> None:
        node = self._some()
        address = node.record.address if self.random.random() < 0.5 else ""
        self._replace(node, node.record.id, address)

    async def _node_leaves(self) -> None:
        node = self._some()
        tasks = list(node.tasks)
        self._replace(node, self.random.randbytes(16))
        await asyncio.wait(tasks)
        await node.plane.leave()

    async def _changes_are_lost(self) -> None:
        self._some().source.has_lost = True

    async def _generation_advances(self) -> None:
        try:
            await self._some().plane.advance()
        except ClusterStoreError:
            self.faults["generation not advanced"] += 1

    async def _hints_are_cleared(self) -> None:
        node = self._some()
        node.hints.clear()
        node.plane.follower.resync()

    def _replace(self, node: SimulatedNode, node_id: bytes, address: str = "") -> None:
        """Kill a node, and start another one or the same."""
        self.kill(node)
        self.start(node_id, node.follows, address)

    # -- laws -----------------------------------------------------------------------------------

    async def _calm(self) -> None:
        """Wait until everybody must know everything: TTLs, back-offs and some snapshots."""
        self.is_faulty = False
        await asyncio.sleep(3 * self.scene.ttl_s + 65.0)

    def check(self) -> None:
        """Check what must hold once nothing changes.

        Raises:
            AssertionError: it does not hold.
        """
        keys = self.server.keys()
        assert len(keys) <= len(self.living) + REDIS_KEYS_MAX, keys
        followers = [node for node in self.living.values() if node.follows]
        generations = [node.plane.follower.generations for node in followers]
        assert all(each.is_settled for each in generations)
        assert len({(each.number, each.book) for each in generations}) == 1, generations
        for node in followers:
            self._check_hints(node)

    def _check_hints(self, node: SimulatedNode) -> None:
        members = {member.node.life: member for member in node.plane.membership.members()}
        assert members.keys() == self.living.keys() - {node.record.life}
        assert not node.hints.counts().dead
        lost = node.hints.counts().lost
        for life, member in members.items():
            assert not node.plane.follower.is_behind(life), member
            truth = self.living[life].source.spans
            joined = b"".join(truth)
            known = int(node.hints.known(member.holder, joined).sum())
            assert known + lost >= len(truth), (member, known, len(truth))
            extra = node.hints.pairs_of(member.holder) - known
            assert not extra, (member, extra)
            if not lost:
                self._check_places(node.hints, member.holder, truth)

    def _check_places(
        self, hints: Hints, holder: int, truth: dict[bytes, tuple[bool, bool]]
    ) -> None:
        """Check in which memory each span is said to be; each is on one node only."""
        for key, (is_on_host, _) in truth.items():
            (run,) = hints.far_runs(bytes(BLOCK_KEY_BYTES) + key, 0, 1, {Tier.REMOTE})
            assert list(holders_of(run.block_ids)) == [holder]
            assert list(on_disk(run.block_ids)) == [not is_on_host]

    async def _idle(self) -> None:
        """Check that nothing is written when nothing changes, except for beats.

        Raises:
            AssertionError: something is written.
        """
        before, ttls = self.server.written, 10
        await asyncio.sleep(ttls * self.scene.ttl_s)
        beats = (self.server.written - before) / ttls / len(self.living)
        assert 2.5 <= beats <= 4.0, beats
