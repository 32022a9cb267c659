"""The cost of a trace: the demo's workload with and without one, in alternation.

Limit: the same run without a trace. Measured: requests per second, and the latency of gets.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

from benchmarks.harness import Figures, Options, median_ratio, percentile
from flexkv.cli.demo import CONCURRENCY, DEVICE_BLOCKS, MODEL, SPACE, TOKENS_PER_BLOCK
from flexkv.cli.replay import SimulatedEngine
from flexkv.common.config import CacheConfig
from flexkv.index.keys import KeyChain
from flexkv.kvmanager import KVManager
from flexkv.testing.known_bytes import KnownDevice
from flexkv.testing.workload import ChatShape, chat


def measure(options: Options) -> Figures:
    """Return the figures of the case."""
    count = 100 if options.quick else 2500
    took: dict[bool, list[float]] = {True: [], False: []}
    p99: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(options.repeats + 1):
        for traced in (True, False) if turn % 2 else (False, True):
            seconds, gets = asyncio.run(_run(count, traced, options.directory))
            if turn:  # the first warms up
                took[traced].append(seconds)
                p99[traced].append(percentile(gets, 99))
    return {
        "throughput with a trace / without": median_ratio(took[False], took[True]),
        "p99 of gets with a trace / without": median_ratio(p99[True], p99[False]),
        "requests a second without": count * 2 / min(took[False]),
    }


async def _run(count: int, traced: bool, directory: Path) -> tuple[float, list[float]]:
    """Return the seconds of a run, and those of each get."""
    device = KnownDevice(MODEL, TOKENS_PER_BLOCK, DEVICE_BLOCKS)
    prompts = list(chat(count, 0, ChatShape()))
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        cache = CacheConfig(
            tokens_per_block=TOKENS_PER_BLOCK,
            num_cpu_blocks=3000,
            num_ssd_blocks=9000,
            ssd_cache_dir=folder,
            enable_trace=traced,
            trace_file_path=f"{folder}/trace",
        )
        async with KVManager(MODEL, cache) as manager:
            manager.register_kv_caches(device.kv_caches)
            keys = KeyChain(SPACE)
            engine = SimulatedEngine(manager, device, keys)
            begin = time.perf_counter()
            outcome = await engine.run(prompts, CONCURRENCY, 0.0, lambda: None)
            return time.perf_counter() - begin, outcome.get_s
