"""The cost of an instance to the others when its worker hangs in the middle of its copies.

Limit: the same gets while the other instance is idle. SIGSTOP stops the other instance's agent
while it copies, with many more puts waiting; SIGCONT continues it after each round.
"""

from __future__ import annotations

import signal
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.harness import Figures, Options, percentile
from benchmarks.rigs import SMALL, prompt
from benchmarks.served import GET_BLOCKS, MODEL, Served
from flexkv.common.request import Operation
from flexkv.server.client import Client
from flexkv.testing.agent_process import AgentProcess

PUTS = 1100


def measure(options: Options) -> Figures:
    """Return the figures of the case."""
    with tempfile.TemporaryDirectory(prefix="flexkv-") as directory:  # a socket's path is short
        return _measure(Path(directory), options)


def _measure(folder: Path, options: Options) -> Figures:
    gets, puts = (100, 60) if options.quick else (2000, PUTS)
    idle_s: list[float] = []
    stuck_s: list[float] = []
    ratios: list[float] = []
    model, host_blocks = (SMALL, 1024) if options.quick else (MODEL, 2048)
    with Served(folder, host_blocks, model) as served:
        worker, other = served.agent_of(1), served.client_of(1)
        served.gets_s(gets)
        for number in range(options.repeats):
            idle = served.gets_s(gets)
            stuck = _while_stopped(
                served, worker, other, range(number * puts, (number + 1) * puts), gets
            )
            ratios.append(percentile(stuck, 99) / percentile(idle, 99))
            idle_s += idle
            stuck_s += stuck
        other.close()
    return {
        "get p50, other idle (us)": percentile(idle_s, 50) * 1e6,
        "get p99, other idle (us)": percentile(idle_s, 99) * 1e6,
        "get p50, other stopped (us)": percentile(stuck_s, 50) * 1e6,
        "get p99, other stopped (us)": percentile(stuck_s, 99) * 1e6,
        "puts that wait on the stopped one": float(puts),
        "p99 ratio, median of the rounds (bar: 2)": statistics.median(ratios),
    }


def _while_stopped(
    served: Served, worker: AgentProcess, other: Client, puts: range, gets: int
) -> list[float]:
    """Return how long gets took while the other instance was stopped amid its puts."""
    ids = np.arange(GET_BLOCKS)
    numbers = set()
    for number in puts:
        keys = other.keys(prompt(1000 + number, GET_BLOCKS))
        numbers.add(other.start(Operation.PUT, keys, 0, ids))
        if number == puts.start + len(puts) // 4:
            other.flush()
            worker.signal(signal.SIGSTOP)
    try:
        other.match(keys)  # the answer proves that the server has read all puts
        took_s = served.gets_s(gets)
    finally:
        worker.signal(signal.SIGCONT)
    until_s = time.monotonic() + 60
    while numbers and time.monotonic() < until_s:
        numbers -= {done.number for done in other.poll()}
    assert not numbers, "puts did not end"
    return took_s
