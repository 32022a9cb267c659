"""What strangers at the port of a node cost it: its own gets beside hostile frames.

Limit: the same gets without strangers, twice, which shows how much two equal runs differ. The
stranger is a process of this machine and needs a CPU, too. So it also goes flat out at another
port, which drops everything and which nobody serves: what that costs is not the node's work. What a
frame costs the node is told in CPU time. A connection that the kernel drops counts as a frame: the
stranger gives it up soon, and tries again.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from multiprocessing.sharedctypes import Synchronized
from typing import Any, NamedTuple

import numpy as np

from benchmarks.harness import Figures, Options, alternate, median_ratio, percentile
from flexkv.cluster import syn_filter, tcp
from flexkv.cluster.strangers import ShutOut
from flexkv.common.config import CacheConfig, ModelConfig
from flexkv.kvmanager import KVManager
from flexkv.testing.redis_server import RedisServer
from flexkv.testing.stranger import Stranger

MODEL = ModelConfig(num_layers=4, num_kv_heads=8, head_size=128, dtype="float16", model_id="m")
TOKENS, BLOCKS = 16, 8
PACE = 1000
"""Frames a second."""
CONNECT_S = 0.002
"""How long the stranger waits for a connection; one that is not dropped takes a tenth of that."""
ALONE, AGAIN, PACED, FLAT_OUT = "alone", "alone again", f"{PACE} frames/s", "flat out"
ELSEWHERE = "flat out elsewhere"
PACES = {ALONE: 0, AGAIN: 0, PACED: PACE, FLAT_OUT: 1 << 30, ELSEWHERE: 1 << 30}


class _Run(NamedTuple):
    """Gets of one run: their times, and the CPU time of the node, in seconds; hostile frames."""

    gets_s: list[float]
    cpu_s: float
    frames: int

    @property
    def cpu_of_a_get_s(self) -> float:
        """Return the CPU time for each get."""
        return self.cpu_s / len(self.gets_s)


def measure(options: Options) -> Figures:
    """Return the figures of the case."""
    gets = 50 if options.quick else 3000
    with closing(RedisServer()) as redis, tcp.listening("127.0.0.1", 0, 16) as nobody:
        redis.start()
        syn_filter.apply(nobody, ShutOut(is_all=True))
        with (
            closing(_Node(redis.port)) as node,
            closing(_Strangers(node.port)) as here,
            closing(_Strangers(nobody.getsockname()[1])) as elsewhere,
        ):
            runs: dict[str, list[_Run]] = {name: [] for name in PACES}

            def run(name: str) -> Callable[[], float]:
                strangers = elsewhere if name == ELSEWHERE else here

                def work() -> float:
                    strangers.talk(PACES[name])
                    try:
                        runs[name].append(node.gets(gets, strangers))
                    finally:
                        strangers.talk(0)
                    return statistics.median(runs[name][-1].gets_s)

                return work

            took = alternate({name: run(name) for name in PACES}, options.repeats)
    counted = {name: each[1:] for name, each in runs.items()}
    idle_s = statistics.median(each.cpu_of_a_get_s for each in counted[ALONE])
    figures: Figures = {}
    for name, own in counted.items():
        p99_s = statistics.median(percentile(each.gets_s, 99) for each in own)
        figures[f"get p50, {name} (us)"] = statistics.median(took[name]) * 1e6
        figures[f"get p99, {name} (us)"] = p99_s * 1e6
        figures[f"p50, {name} / alone"] = median_ratio(took[name], took[ALONE])
    figures["p50, flat out / elsewhere"] = median_ratio(took[FLAT_OUT], took[ELSEWHERE])
    for name in PACED, FLAT_OUT:
        frames = sum(each.frames for each in counted[name])
        more_s = sum(each.cpu_s - idle_s * len(each.gets_s) for each in counted[name])
        figures[f"hostile frames, {name}"] = float(frames)
        each_s = max(0.0, more_s) / max(1, frames)
        figures[f"CPU of the node for a frame, {name} (us)"] = each_s * 1e6
    return figures


class _Node:
    """A node that shares blocks, whose engine runs in a thread of its own.

    Attributes:
        port: at which other nodes reach it.
    """

    def __init__(self, redis_port: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        cache = CacheConfig(
            tokens_per_block=TOKENS, num_cpu_blocks=64, enable_p2p_cpu=True,
            redis_port=redis_port, p2p_port=self.port, cluster_secret="a secret",
        )  # fmt: skip
        self._manager = KVManager(MODEL, cache)
        self._tokens = np.arange(BLOCKS * TOKENS)
        self._loop = asyncio.Runner()
        self._loop.run(self._open())

    async def _open(self) -> None:
        """Open the engine, and put the prompt."""
        await self._manager.__aenter__()
        shape = 2, BLOCKS, TOKENS, MODEL.num_kv_heads, MODEL.head_size
        layers = [np.zeros(shape, np.float16) for _ in range(MODEL.num_layers)]
        self._manager.register_kv_caches(layers)
        await self._manager.put(self._tokens, self._tokens)

    def gets(self, count: int, strangers: _Strangers) -> _Run:
        """Get a prompt from host memory, again and again."""
        return self._loop.run(self._gets(count, strangers))

    async def _gets(self, count: int, strangers: _Strangers) -> _Run:
        await strangers.until_talking()
        took_s, cpu_s, frames = [], time.process_time(), strangers.frames
        for _ in range(count):
            begin_s = time.perf_counter()
            got = await self._manager.get(self._tokens, self._tokens)
            took_s.append(time.perf_counter() - begin_s)
            assert got.return_mask.all()
        return _Run(took_s, time.process_time() - cpu_s, strangers.frames - frames)

    def close(self) -> None:
        """Close the engine."""
        self._loop.run(self._manager.__aexit__(None, None, None))
        self._loop.close()


class _Strangers:
    """A process that talks to a port at a pace that can be changed."""

    def __init__(self, port: int) -> None:
        spawning = multiprocessing.get_context("spawn")
        self._pace, self._frames = spawning.Value("q", 0), spawning.Value("q", 0)
        self._process = spawning.Process(
            target=_talk, args=(port, self._pace, self._frames), daemon=True
        )
        self._process.start()

    @property
    def frames(self) -> int:
        """Return how many frames were sent, and connections tried in vain, since the start."""
        return int(self._frames.value)

    def talk(self, pace: int) -> None:
        """Send so many frames a second from now on."""
        self._pace.value = pace

    async def until_talking(self) -> None:
        """Wait for the next frame, if there is to be one."""
        before = self.frames
        while self._pace.value and self.frames == before:
            await asyncio.sleep(0.001)
            assert self._process.is_alive()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


def _talk(port: int, pace: Synchronized[Any], frames: Synchronized[Any]) -> None:
    """Talk at the pace that is asked for, until the process is killed."""
    stranger = Stranger(lambda: socket.create_connection(("127.0.0.1", port), CONNECT_S), 1)
    begun_s, begun_frames, last = time.monotonic(), 0, 0

    def going_on() -> bool:
        nonlocal begun_s, begun_frames, last
        now = frames.value = stranger.frames + stranger.refused
        if pace.value != last:
            begun_s, begun_frames, last = time.monotonic(), now, pace.value
        if not last:
            time.sleep(0.005)
            return False
        due_s = begun_s + (now - begun_frames) / last
        time.sleep(max(0.0, due_s - time.monotonic()))
        return True

    while True:
        stranger.run(1 << 30, going_on)
