"""Transfers over a way that is slow, stalls or hangs, on a virtual clock.

A failure names its seed.
"""

from __future__ import annotations

import asyncio
import math
from asyncio import Future
from collections.abc import Awaitable, Callable, Sequence
from random import Random
from typing import Any, cast

import numpy as np
import pytest

from flexkv.common.errors import RemoteError
from flexkv.common.terms import Transfer
from flexkv.io.memory.copier import Copier
from flexkv.io.memory.host_blocks import HostBlocks
from flexkv.io.ports import Completion
from flexkv.io.remote.landing import Arrival, Landing, OpenStore
from flexkv.io.remote.options import RemoteOptions
from flexkv.io.remote.requests import Requests
from flexkv.io.remote.seal import SEAL_BYTES, seal, sums_in
from flexkv.io.remote.spans import SpanPart
from flexkv.io.remote.until import Until
from flexkv.testing.virtual_time import run_virtual
from tests.remote_rigs import BLOCK_BYTES, RECORD_BYTES, SPAN_BLOCKS, PortRig, span_key

G, SPANS = SPAN_BLOCKS, 5
SPAN_BYTES = G * RECORD_BYTES
DEADLINE_S = 8.0
ALONE_MAX = 0.45
"""The share of the deadline that a span may take alone, if it is to arrive on the first attempt."""
SLACK_S = 0.2


class _Flow:
    """A request whose bytes are on their way."""

    def __init__(self, nbytes: float, ended: Future[None], is_stalled: bool) -> None:
        self.left_bytes, self.ended = nbytes, ended
        self.stops_at_bytes = nbytes / 2 if is_stalled else 0.0


class _Pipe:
    """One direction of the way."""

    def __init__(self, way: SlowWay) -> None:
        self._way, self._flows = way, set[_Flow]()
        self._at_s, self._next = 0.0, cast("asyncio.TimerHandle | None", None)

    def _advance(self) -> None:
        """Move bytes until now, and set a timer for the next end."""
        loop, way = asyncio.get_running_loop(), self._way
        now_s = loop.time()
        moving = [flow for flow in self._flows if flow.left_bytes > flow.stops_at_bytes]
        each = way.rate / max(1, len(moving)) * (min(now_s, way.hangs_s) - self._at_s)
        self._at_s = min(now_s, way.hangs_s)
        for flow in moving:
            flow.left_bytes = max(flow.left_bytes - each, flow.stops_at_bytes)
            if flow.left_bytes <= 1e-3:
                self._flows.discard(flow)
                if not flow.ended.done():
                    flow.ended.set_result(None)
        if self._next is not None:
            self._next.cancel()
        left = [flow for flow in self._flows if flow.left_bytes > flow.stops_at_bytes]
        if left and now_s < way.hangs_s:
            soonest = min(flow.left_bytes - flow.stops_at_bytes for flow in left)
            self._next = loop.call_later(max(1e-6, soonest * len(left) / way.rate), self._advance)

    async def move(self, nbytes: int) -> None:
        """Return once so many bytes have moved."""
        self._advance()
        way = self._way
        is_stalled, way.stalls = way.stalls > 0, max(0, way.stalls - 1)
        flow = _Flow(nbytes, asyncio.get_running_loop().create_future(), is_stalled)
        self._flows.add(flow)
        self._advance()
        try:
            await flow.ended
        finally:
            self._flows.discard(flow)
            self._advance()


class SlowWay:
    """A store behind a way whose bandwidth the requests of one direction share.

    Attributes:
        rate: bytes a second, in each direction.
        hangs_s: from when on nothing moves.
        stalls: how many of the next requests stop in the middle of their bodies.
    """

    kind, where = "memory", "slow way"

    def __init__(self, span_s: float) -> None:
        """Move a span in so many seconds, if nothing else moves."""
        self.rate, self.hangs_s, self.stalls = SPAN_BYTES / span_s, math.inf, 0
        self.pipes = _Pipe(self), _Pipe(self)

    async def put(self, name: str, buffers: Sequence[Any]) -> bool:
        """Create an object, once its bytes have moved."""
        await self.pipes[1].move(sum(memoryview(buffer).nbytes for buffer in buffers))
        return True

    def get(self, name: str, first: int, last: int) -> Future[Any]:
        """Return a body, once its bytes have moved."""

        async def get() -> list[bytes]:
            await self.pipes[0].move(last - first)
            return [bytes(last - first)]

        return asyncio.get_running_loop().create_task(get())

    def landing(self, requests: Requests, host: HostBlocks, copier: Copier) -> Landing:
        """Return a landing that brings spans from here without threads."""
        return _Landing(self, requests, host)

    def error_of(self, raised: BaseException, what: str) -> BaseException:
        """Return what was raised."""
        return raised

    async def leave(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class _Landing:
    """Seals the zeros that come as if they were the blocks."""

    def __init__(self, store: SlowWay, requests: Requests, host: HostBlocks) -> None:
        self._store, self._requests, self._host = store, requests, host

    async def fetch(self, part: SpanPart, name: str, until: Until) -> Arrival:
        """Ask for a part's records."""
        store = cast("Any", self._store)
        nbytes = part.blocks * RECORD_BYTES
        await self._requests.get(store, name, (0, nbytes), until)
        seals = np.array(
            [np.frombuffer(seal(each, BLOCK_BYTES[0], 7), np.uint8) for each in part.names]
        ).reshape(-1, SEAL_BYTES)

        async def land(blocks: int) -> None:
            self._host.sums[part.host_ids[:blocks]] = sums_in(seals[:blocks])

        return Arrival(nbytes, seals, land)

    def close(self) -> None:
        """Do nothing."""


class Bench:
    """A port over a slow way.

    Attributes:
        ended_s: when each transfer ended, by op.
    """

    def __init__(self, way: SlowWay, seed: int, **limits: Any) -> None:
        options = RemoteOptions(deadline_s=DEADLINE_S, **limits)
        self.way, self.rig = way, PortRig(cast("OpenStore", way), options, seed)
        self.ended_s: dict[int, float] = {}
        self.ends: dict[int, Completion] = {}
        self.waited_s_max = 0.0
        self._submitted: list[Transfer] = []

    def submit(self, transfer: Transfer) -> int:
        """Begin a transfer, and return its op id."""
        self._submitted.append(transfer)
        self.rig.port.submit(transfer)
        return transfer.op_id

    async def watch(self, count: int | None = None) -> None:
        """Record ends, and how long any transfer has waited without progress, until all ended.

        Transfers that are still to be submitted belong to them, `count` in all.
        """
        loop = asyncio.get_running_loop()
        while len(self.ends) < (count or len(self._submitted)):
            for end in self.rig.port.reap():
                self.ends[end.op_id], self.ended_s[end.op_id] = end, loop.time()
            for transfer in self._submitted:
                if transfer.op_id not in self.ends:
                    since_s = self.rig.port.waiting_since_s(transfer.op_id)
                    self.waited_s_max = max(self.waited_s_max, loop.time() - since_s)
            await asyncio.sleep(0.05)

    async def watch_others(self, count: int, apart_s: float) -> None:
        """Submit so many gets of the second span one after the other; watch until all ended."""
        watching = asyncio.get_running_loop().create_task(self.watch(len(self._submitted) + count))
        for _ in range(count):
            self.submit(self.rig.get(G, 2 * G, at=G))
            await asyncio.sleep(apart_s)
        await watching

    def random_transfer(self, random: Random) -> Transfer:
        """Return a get of some spans, or a put of one."""
        if random.random() < 0.3:
            return self.rig.put(random.randrange(SPANS), at=20)
        first = random.randrange(SPANS)
        return self.rig.get(first * G, random.randint(first + 1, SPANS) * G)


def on_bench(
    way: SlowWay, seed: int, work: Callable[[Bench], Awaitable[None]], **limits: Any
) -> Bench:
    """Do work on a bench, and check that nothing is left."""

    async def main() -> Bench:
        bench = Bench(way, seed, **limits)
        await work(bench)
        await bench.rig.close()
        return bench

    return run_virtual(main())


@pytest.mark.parametrize("seed", range(25))
def test_a_way_that_is_only_slow_fails_nothing(seed: int) -> None:
    """However many parts wait, all arrive if a span alone takes less than half of the deadline.

    None of them counts as hung meanwhile.
    """
    random = Random(seed)
    way = SlowWay(random.uniform(0.001, ALONE_MAX) * DEADLINE_S)
    limits = {"gets_max": random.choice([1, 2, 8, 16]), "puts_max": random.choice([1, 4])}

    async def work(bench: Bench) -> None:
        for _ in range(random.randint(1, 12)):
            bench.submit(bench.random_transfer(random))
        await bench.watch()

    bench = on_bench(way, seed, work, **limits)
    assert [end.error for end in bench.ends.values() if end.error is not None] == []
    assert bench.waited_s_max <= DEADLINE_S + SLACK_S


def test_many_parts_take_as_long_as_they_need() -> None:
    """A transfer that takes many times the deadline arrives; once the way is known, none is late.

    Few are under way at once then, so that each takes a fraction of the deadline.
    """
    way = SlowWay(0.2 * DEADLINE_S)
    seen: list[tuple[float, dict[str, int]]] = []

    async def work(bench: Bench) -> None:
        for _ in range(8):
            bench.submit(bench.rig.get(0, SPANS * G))
        await bench.watch()
        counts = bench.rig.requests.counts()
        seen.append((asyncio.get_running_loop().time(), counts.failures))
        assert counts.gets_limit <= 2

    bench = on_bench(way, 1, work)
    assert [end.error for end in bench.ends.values()] == [None] * 8
    took_s, failures = seen[0]
    assert took_s >= 40 * 0.2 * DEADLINE_S
    assert took_s < 1.4 * 40 * 0.2 * DEADLINE_S
    assert failures == {"get": 8}, "only the first ones, which were too many"


@pytest.mark.parametrize("seed", range(25))
def test_everything_ends_within_the_deadline_once_nothing_moves(seed: int) -> None:
    """A store that hangs ends all that was asked for, or waits for its turn, a deadline later."""
    random = Random(seed)
    way = SlowWay(random.uniform(0.01, 0.3) * DEADLINE_S)
    way.hangs_s = random.choice([0.0, random.uniform(0, 20.0)])
    limits = {"gets_max": random.choice([1, 2, 8]), "puts_max": random.choice([1, 4])}
    late: dict[int, float] = {}

    async def work(bench: Bench) -> None:
        count = random.randint(1, 30)
        watching = asyncio.get_running_loop().create_task(bench.watch(count))
        for _ in range(count):
            op_id = bench.submit(bench.random_transfer(random))
            late[op_id] = asyncio.get_running_loop().time()
            await asyncio.sleep(random.uniform(0, 0.4))
        await watching

    bench = on_bench(way, seed, work, **limits)
    for op_id, submitted_s in late.items():
        bound_s = max(submitted_s, way.hangs_s) + DEADLINE_S + SLACK_S
        assert bench.ended_s[op_id] <= bound_s
        error = bench.ends[op_id].error
        assert error is None or isinstance(error, RemoteError)
    assert bench.waited_s_max <= DEADLINE_S + SLACK_S


def test_a_part_that_stalls_in_the_middle_ends_though_others_move() -> None:
    """A body that stops coming is asked for again; if all its tries stall it has a definite end.

    The others go on for far longer than that.
    """
    way = SlowWay(0.05 * DEADLINE_S)
    stalled: list[int] = []

    async def work(bench: Bench) -> None:
        way.stalls = 1
        stalled.append(bench.submit(bench.rig.get(0, G)))
        await bench.watch_others(200, 0.06 * DEADLINE_S)

    bench = on_bench(way, 2, work)
    assert [end.error for end in bench.ends.values() if end.error is not None] == []
    assert bench.ended_s[stalled[0]] < 1.1 * DEADLINE_S
    assert max(bench.ended_s.values()) > 10 * DEADLINE_S


def test_a_part_whose_tries_all_stall_ends_though_others_move() -> None:
    """Progress of other parts puts a part's deadline off, but gives it no more tries."""
    way = SlowWay(0.02 * DEADLINE_S)
    bad = "the object of span 0"

    async def work(bench: Bench) -> None:
        move, name = way.pipes[0].move, span_key(0).hex()

        def get(asked: str, first: int, last: int) -> Future[Any]:
            async def run() -> list[bytes]:
                if name in asked:
                    await asyncio.sleep(1e6)
                await move(last - first)
                return [bytes(last - first)]

            return asyncio.get_running_loop().create_task(run())

        way.get = get  # type: ignore[method-assign]
        bench.submit(bench.rig.get(0, G))
        await bench.watch_others(300, 0.03 * DEADLINE_S)

    bench = on_bench(way, 3, work)
    first, *others = bench.ends
    errors = [end.error for end in bench.ends.values() if end.error is not None]
    assert len(errors) == 1, bad
    assert isinstance(errors[0], RemoteError)
    (failed,) = (op_id for op_id, end in bench.ends.items() if end.error is not None)
    assert bench.ended_s[failed] < 3.1 * DEADLINE_S
    assert bench.waited_s_max <= DEADLINE_S + SLACK_S
    assert first is not None
    assert others


def test_stopping_ends_what_waits_too() -> None:
    """When the engine is closed, parts under way and parts that wait end at once."""
    way = SlowWay(1e6)
    seen: list[float] = []

    async def work(bench: Bench) -> None:
        for _ in range(6):
            bench.submit(bench.rig.get(0, SPANS * G))
        await asyncio.sleep(1.0)
        bench.rig.port.stop()
        await bench.watch()
        seen.append(asyncio.get_running_loop().time())

    bench = on_bench(way, 4, work)
    assert seen[0] < 1.2
    assert all(isinstance(end.error, RemoteError) for end in bench.ends.values())
