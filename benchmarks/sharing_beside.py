"""Gets beside a peer that hangs, and beside a Redis that is dead or silent.

Limit: the same gets while all is well; a second such slice beside each shows the noise.

Three nodes share their host memory: this process, and two others. One of these is stopped by
SIGSTOP, while this one goes on to ask it for blocks, six prompts at once; each such get has to be
answered a second after `io_deadline_s` at the latest. Blocks of the other one are got all the time.
This node's host memory has no room for all of them, so each get reads from the peer.

Then Redis is killed or stopped, while hot prompts are got from host memory alone.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from itertools import cycle
from typing import Any

from benchmarks.harness import Figures, Options, percentile
from benchmarks.rigs import LARGE, SMALL, cache_of, kv_caches, prompt, slots_of
from benchmarks.sharing_node import Node
from flexkv.kvmanager import KVManager
from flexkv.testing.redis_server import PROGRAMS, RedisServer
from flexkv.tiers.parts import ClusterStatistics

BLOCKS, PROMPTS = 16, 24
"""Blocks of a prompt, which are whole spans, and the prompts of each other node."""
ASKED = 6
"""How many prompts a peer that hangs is asked for at once: more than may be under way at once."""
HOST_BLOCKS = BLOCKS * PROMPTS * 2 // 3
HOT = 4
DEADLINE_S, PAUSE_S, PATIENCE_S, LOOK_S, WAITED_S = 4.0, 4e-3, 60.0, 0.02, 0.5
SHORT_MAX = 100
PASSWORD = "of the benchmark"


def measure(options: Options) -> Figures:
    """Return the figures of the case."""
    if not any(map(shutil.which, PROGRAMS)):
        return {"nodes that share": "are not measured: redis-server is not installed"}
    return asyncio.run(_measure(options))


async def _measure(options: Options) -> Figures:
    figures: Figures = {}
    with _redis() as redis:
        with ExitStack() as stack:
            hung, other = (_node(options, redis, first, stack) for first in (0, 100))
            async with _rig(options, redis) as rig:
                await rig.until_known(hung, other)
                figures |= await _beside_hung(rig, hung, other, options)
        with ExitStack() as stack:
            other = _node(options, redis, 0, stack)
            async with _rig(options, redis) as rig:
                await rig.until_known(other)
                figures |= await _beside_redis(rig, redis, options)
    return figures | {"load average": os.getloadavg()[0]}


@contextmanager
def _redis() -> Iterator[RedisServer]:
    redis = RedisServer(PASSWORD)
    redis.start()
    try:
        yield redis
    finally:
        redis.close()


def _keys(redis: RedisServer) -> dict[str, Any]:
    return {
        "enable_p2p_cpu": True, "redis_port": redis.port, "redis_password": PASSWORD,
        "io_deadline_s": DEADLINE_S,
    }  # fmt: skip


def _node(options: Options, redis: RedisServer, first: int, stack: ExitStack) -> Node:
    """Start a node that has prompts from this number on, and wait until it has them."""
    node = stack.enter_context(Node(options.quick, first, PROMPTS, BLOCKS, **_keys(redis)))
    node.wait_ready()
    return node


class _Rig:
    """This node, with an area on its device for each get that is under way at once.

    Attributes:
        short: how many gets of a peer that is well did not bring all.
    """

    def __init__(self, manager: KVManager) -> None:
        self.manager, self.short = manager, 0
        areas = [range(number * BLOCKS, (number + 1) * BLOCKS) for number in range(1 + ASKED)]
        self._slots = [slots_of(area) for area in areas]

    @property
    def cluster(self) -> ClusterStatistics:
        """Return what the node knows of its cluster."""
        cluster = self.manager.statistics().cluster
        assert cluster is not None
        return cluster

    async def get(self, number: int, area: int) -> tuple[float, bool]:
        """Return how long a get of a prompt takes, and whether it brings all."""
        begin_s = time.perf_counter()
        response = await self.manager.get(prompt(number, BLOCKS), self._slots[area])
        return time.perf_counter() - begin_s, bool(response.return_mask.all())

    async def peer_gets_s(self, numbers: Iterator[int], count: int) -> list[float]:
        """Return how long gets take that each read a prompt from a peer."""
        took_s: list[float] = []
        while len(took_s) < count:
            await asyncio.sleep(PAUSE_S)
            before = self._read_blocks()
            one_s, is_whole = await self.get(next(numbers), 0)
            if not is_whole:  # this machine was too busy to send or take it in time
                self.short += 1
                assert self.short < SHORT_MAX, "a peer that is well does not send everything"
                continue
            assert self._read_blocks() >= before + BLOCKS, "it was here already"
            took_s.append(one_s)
        return took_s

    def _read_blocks(self) -> int:
        return self.cluster.read_in_all.blocks

    async def host_gets_s(self, numbers: Iterator[int], count: int) -> list[float]:
        """Return how long gets from host memory take."""
        took_s = []
        for _ in range(count):
            await asyncio.sleep(PAUSE_S)
            one_s, is_whole = await self.get(next(numbers), 0)
            assert is_whole, "it is not here"
            took_s.append(one_s)
        return took_s

    async def put(self, number: int) -> None:
        """Put a prompt."""
        await self.manager.put(prompt(number, BLOCKS), self._slots[0])

    async def until_known(self, *nodes: Node) -> None:
        """Wait until it is known that other nodes have their prompts."""
        for number in (number for node in nodes for number in node.prompts):
            await self.until(partial(self._is_far, number))

    def _is_far(self, number: int) -> bool:
        found = self.manager.match(prompt(number, BLOCKS))
        return sum(found.far_tokens_by_tier.values()) > 0

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():  # noqa: ASYNC110 -- the state of another process
                await asyncio.sleep(LOOK_S)

    async def until_sent_again(self, node: Node) -> None:
        """Wait until all prompts of a node that hung can be got again."""
        async with asyncio.timeout(PATIENCE_S):
            for number in node.prompts:
                while not (await self.get(number, 1))[1]:  # noqa: ASYNC110 -- as above
                    await asyncio.sleep(LOOK_S)


@asynccontextmanager
async def _rig(options: Options, redis: RedisServer) -> AsyncIterator[_Rig]:
    model = SMALL if options.quick else LARGE
    keys = {**_keys(redis), "p2p_admit": "always"}  # so that the oldest prompt is evicted
    async with KVManager(model, cache_of(HOST_BLOCKS, **keys)) as manager:
        manager.register_kv_caches(kv_caches(model, (1 + ASKED) * BLOCKS))
        yield _Rig(manager)


async def _beside_hung(rig: _Rig, hung: Node, other: Node, options: Options) -> Figures:
    gets = 5 if options.quick else 100
    numbers, asked = cycle(other.prompts), cycle(hung.prompts)
    p99_s: dict[str, list[float]] = {"idle": [], "idle again": [], "hung": []}
    answered: list[tuple[float, bool]] = []

    async def ask(area: int) -> None:
        while True:
            answered.append(await rig.get(next(asked), area))
            await asyncio.sleep(LOOK_S)

    def failed(since: int) -> bool:  # a get that is answered at once has not asked the peer
        ends = answered[since:]
        return any(took_s > WAITED_S and not is_whole for took_s, is_whole in ends)

    for number in range(options.repeats + 1):
        order = ["idle", "hung", "idle again"]
        for what in order if number % 2 else reversed(order):
            if what != "hung":
                took_s = await rig.peer_gets_s(numbers, gets)
            else:
                hung.signal(signal.SIGSTOP)
                before = len(answered)
                tasks = [asyncio.create_task(ask(area)) for area in range(1, 1 + ASKED)]
                took_s = await rig.peer_gets_s(numbers, gets)
                await rig.until(partial(failed, before))
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                hung.signal(signal.SIGCONT)
                await rig.until_sent_again(hung)
            if number:  # the first round warms up
                p99_s[what].append(percentile(took_s, 99))
    return {
        "hung peer: longest get of its blocks, s (bar: 5)": max(took for took, _ in answered),
        "hung peer: gets of others that came short": float(rig.short),
        **_ratios("hung peer: others' p99", p99_s, {"idle again": "A/A", "hung": "bar: 2"}),
    }


async def _beside_redis(rig: _Rig, redis: RedisServer, options: Options) -> Figures:
    gets = 20 if options.quick else 400
    own = range(500, 500 + HOT)
    for number in own:
        await rig.put(number)
    numbers = cycle(own)
    p99_s: dict[str, list[float]] = {
        "idle": [], "idle again": [], "dead": [], "silent": [],
    }  # fmt: skip
    for number in range(options.repeats + 1):
        order = ["idle", "dead", "silent", "idle again"]
        for what in order if number % 2 else reversed(order):
            if what == "dead":
                redis.kill()
                await rig.until(lambda: not rig.cluster.state.is_store_up)
            elif what == "silent":
                os.kill(redis.pid, signal.SIGSTOP)
                await rig.until(lambda: not rig.cluster.state.is_store_up)
            took_s = await rig.host_gets_s(numbers, gets)
            if what == "dead":
                redis.start()
            elif what == "silent":
                os.kill(redis.pid, signal.SIGCONT)
            await rig.until(lambda: rig.cluster.state.is_store_up)
            if number:  # the first round warms up
                p99_s[what].append(percentile(took_s, 99))
    bars = {"idle again": "A/A", "dead": "bar: 1.1", "silent": "bar: 1.1"}
    return _ratios("Redis: local p99", p99_s, bars)


def _ratios(name: str, p99_s: dict[str, list[float]], bars: dict[str, str]) -> Figures:
    figures: Figures = {}
    for what, bar in bars.items():
        ratios = [mine / idle for mine, idle in zip(p99_s[what], p99_s["idle"], strict=True)]
        figures[f"{name} {what} / idle ({bar})"] = statistics.median(ratios)
    for what, each in p99_s.items():
        figures[f"{name}, {what}, us"] = statistics.median(each) * 1e6
    return figures
