"""A load whose layers may be used as they arrive, beside one that is waited for as a whole.

    whole      get ─────────────▶ end, then layer 0, layer 1, …        (each computed for as long)
    by layer   get ▶ layer 0 ▶ layer 1 ▶ …  computed while the later ones are on their way

An engine's worker, its agent, its scheduler's client and a server in a process of its own, as vLLM
has them; the device is this machine's memory. "Computing" a layer is a pause, as if a device did
it, or the work of a core, as an engine on a CPU does it. Pauses and work last a multiple of what a
layer's load takes. Limit: the longer of load and computing, divided by their sum.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.harness import Figures, Options, alternate, median_ratio
from benchmarks.rigs import LARGE, cache_of, kv_caches, prompt
from flexkv.common.config import Settings
from flexkv.common.request import Operation
from flexkv.server.agent import Agent
from flexkv.server.client import Client
from flexkv.server.launch import LaunchedServer

BLOCKS, QUICK_BLOCKS = 128, 4
"""256 MiB, and 8 MiB."""
COMPUTE_PER_LOAD = (0.25, 1.0, 4.0)
PATIENCE_S = 60.0


class Worker:
    """An engine of one rank, with one resident prompt. A context manager."""

    def __init__(self, directory: Path, blocks: int) -> None:
        cache = cache_of(2 * blocks)
        settings = Settings(
            server_recv_port=f"ipc://{directory}/socket",
            cache_config=cache,
            server_answer_ms=int(1e3 * PATIENCE_S),
        )
        self._server = LaunchedServer(LARGE, settings)
        self._agent = Agent(settings.server_recv_port, LARGE, cache)
        self._agent.start(kv_caches(LARGE, 2 * blocks))
        self._client = Client(settings, LARGE)
        self._wait(lambda: self._client.is_ready)
        self._keys = self._client.keys(prompt(0, blocks))
        self._ids = np.arange(blocks)
        self._end(self._client.start(Operation.PUT, self._keys, 0, self._ids))
        self._ids += blocks

    def close(self) -> None:
        """End the server, after the agent's copies."""
        self._client.close()
        self._agent.close()
        self._server.close()

    def whole(self, compute: Callable[[], None]) -> float:
        """Return the seconds of a load and of computing every layer after it."""
        begin_s = time.perf_counter()
        self._end(self._client.get(self._keys, 0, self._ids, 0, False))
        for _ in range(LARGE.num_layers):
            compute()
        return time.perf_counter() - begin_s

    def by_layer(self, compute: Callable[[], None]) -> float:
        """Return the seconds of a load by layer, with each layer computed once it is there."""
        begin_s = time.perf_counter()
        number = self._client.get_by_layer(self._keys, 0, self._ids, 0, False)
        self._client.flush()
        for layer in range(LARGE.num_layers):
            assert self._agent.wait_for_layer([number], layer)
            compute()
        took_s = time.perf_counter() - begin_s
        self._end(number)
        return took_s

    def _end(self, number: int) -> None:
        self._client.flush()
        self._wait(lambda: number in {done.number for done in self._client.poll()})

    def _wait(self, is_over: Callable[[], bool]) -> None:
        until_s = time.monotonic() + PATIENCE_S
        while not is_over():
            self._client.poll() if not self._client.is_ready else time.sleep(2e-5)
            assert time.monotonic() < until_s


def measure(options: Options) -> Figures:
    """Return the figures of the case."""
    blocks = QUICK_BLOCKS if options.quick else BLOCKS
    with tempfile.TemporaryDirectory() as directory:
        worker = Worker(Path(directory), blocks)
        try:
            return _figures(worker, options.repeats)
        finally:
            worker.close()


def _figures(worker: Worker, repeats: int) -> Figures:
    nothing: Callable[[], None] = lambda: None  # noqa: E731
    took_s = alternate(
        {
            "whole": partial(worker.whole, nothing),
            "again": partial(worker.whole, nothing),
            "by layer": partial(worker.by_layer, nothing),
        },
        repeats,
    )
    load_s = statistics.median(took_s["whole"])
    figures: Figures = {
        "load ms": 1e3 * load_s,
        "load, A/A": median_ratio(took_s["again"], took_s["whole"]),
        "load alone: by layer / whole": median_ratio(took_s["by layer"], took_s["whole"]),
    }
    for share in COMPUTE_PER_LOAD:
        layer_s = share * load_s / LARGE.num_layers
        for name, compute in (("a device", time.sleep), ("a core", _work)):
            took_s = alternate(
                {
                    "whole": partial(worker.whole, partial(compute, layer_s)),
                    "by layer": partial(worker.by_layer, partial(compute, layer_s)),
                },
                repeats,
            )
            ratio = median_ratio(took_s["by layer"], took_s["whole"])
            figures[f"{name} computes {share:g} x the load: by layer / whole"] = ratio
        figures[f"computing {share:g} x the load: limit"] = max(1.0, share) / (1.0 + share)
    return figures


def _work(seconds: float) -> None:
    until_s = time.perf_counter() + seconds
    while time.perf_counter() < until_s:
        pass
