"""The cost of hostile peers to others: random frames and sessions, sent as fast as possible.

Limit: the same gets without other peers. The peers run in a process of their own.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from benchmarks.harness import Figures, Options, percentile
from benchmarks.rigs import SMALL
from benchmarks.served import MODEL, Served
from flexkv.common.config import ModelConfig, settings_of
from flexkv.server.launch import told_of
from flexkv.testing.hostile import Hostile


def measure(options: Options) -> Figures:
    """Return the figures of the case."""
    with tempfile.TemporaryDirectory(prefix="flexkv-") as directory:  # a socket's path is short
        return _measure(Path(directory), options)


def _measure(folder: Path, options: Options) -> Figures:
    gets = 100 if options.quick else 2000
    idle_s: list[float] = []
    fuzzed_s: list[float] = []
    ratios: list[float] = []
    frames = 0
    model, host_blocks = (SMALL, 1024) if options.quick else (MODEL, 2048)
    with Served(folder, host_blocks, model) as served:
        served.gets_s(gets)
        for seed in range(options.repeats):
            idle = served.gets_s(gets)
            fuzzed, said = _while_fuzzed(served, seed, gets)
            ratios.append(percentile(fuzzed, 99) / percentile(idle, 99))
            idle_s += idle
            fuzzed_s += fuzzed
            frames += said
    return {
        "get p50, nobody else (us)": percentile(idle_s, 50) * 1e6,
        "get p99, nobody else (us)": percentile(idle_s, 99) * 1e6,
        "get p50, hostile peers (us)": percentile(fuzzed_s, 50) * 1e6,
        "get p99, hostile peers (us)": percentile(fuzzed_s, 99) * 1e6,
        "hostile frames": float(frames),
        "p99 ratio, median of the rounds (bar: 2)": statistics.median(ratios),
    }


def _while_fuzzed(served: Served, seed: int, gets: int) -> tuple[list[float], int]:
    """Return how long gets took beside hostile peers, and how many frames the peers sent."""
    spawning = multiprocessing.get_context("spawn")
    over, said = spawning.Event(), spawning.Value("q", 0)
    told = told_of(served.settings), told_of(served.model)
    peers = spawning.Process(target=_talk, args=(*told, seed, over, said))
    peers.start()
    try:
        while not said.value and peers.is_alive():
            peers.join(0.01)
        took_s = served.gets_s(gets)
    finally:
        over.set()
        peers.join()
    assert not peers.exitcode
    assert not served.server.has_ended, f"the server ended under seed {seed}"
    return took_s, said.value


def _talk(settings: Any, model: Any, seed: int, over: Event, said: Any) -> None:
    """Run hostile sessions until `over` is set, and count their frames in `said`."""
    hostile = Hostile(settings_of(settings), ModelConfig(**model), seed)

    def going_on() -> bool:
        said.value = hostile.frames
        return not over.is_set()

    hostile.run(1 << 40, going_on)
