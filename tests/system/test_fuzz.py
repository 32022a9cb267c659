"""Tests of hostile peers at a live server."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil

from flexkv.common.request import Operation
from flexkv.server.operator import command
from flexkv.testing.hostile import Hostile

from .conftest import MODEL
from .forked import forked_server
from .serving import BLOCKS, Instance, eventually, settings_in

FRAMES = int(os.environ.get("FUZZ_FRAMES", "5000"))
SEED = int(os.environ.get("FUZZ_SEED", "1"))
WARM_FRAMES = 2000
"""After this many frames the server's memory grows only by leaks."""
GROWTH_BYTES_MAX = 48 << 20


class Neighbour:
    """A well-behaved instance that puts and gets and compares every byte, in its own thread."""

    def __init__(self, instance: Instance) -> None:
        self._instance, self._stop = instance, threading.Event()
        self.right = self.rounds = 0
        self._threads = ThreadPoolExecutor(1)
        self._work = self._threads.submit(self._run)

    @property
    def goes_on(self) -> bool:
        """Return whether nothing has gone wrong."""
        return not self._work.done()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._round(self.rounds)
            self.rounds += 1

    def _round(self, number: int) -> None:
        source = range(number % 4 * BLOCKS, (number % 4 + 1) * BLOCKS)
        target = range(40, 40 + BLOCKS)
        put = self._instance.request(Operation.PUT, number, source)
        assert put.status in ("success", "unready"), put
        got = self._instance.request(Operation.GET, number, target)
        assert got.status in ("success", "notfound", "unready"), got
        loaded, stored = target[: got.moved], source[: got.moved]
        if got.moved:
            np.testing.assert_array_equal(
                self._instance.content(loaded), self._instance.content(stored)
            )
            self.right += 1

    def end(self) -> None:
        """Stop, and raise what went wrong."""
        self._stop.set()
        self._work.result(60)
        self._threads.shutdown()


def test_hostile_peers_stop_nobody(tmp_path: Path) -> None:
    """Random frames of hostile peers neither end the server nor disturb another instance.

    Descriptors are closed, memory does not grow with the frames, and the server ends with a sound
    and empty index. FUZZ_FRAMES and FUZZ_SEED choose the frames.
    """
    settings = settings_in(tmp_path, num_cpu_blocks=64, io_deadline_s=2.0)
    server = forked_server(settings)
    instance = Instance(settings)
    instance.begin()
    process = psutil.Process(server.pid)
    before_fds = process.num_fds()
    hostile, neighbour = Hostile(settings, MODEL, SEED), Neighbour(instance)

    def going_on() -> bool:
        return neighbour.goes_on and not server.has_ended

    try:
        hostile.run(min(FRAMES, WARM_FRAMES), going_on)
        warm_bytes = process.memory_info().rss
        hostile.run(FRAMES - hostile.frames, going_on)
        assert not server.has_ended, (
            f"the server ended in session {hostile.sessions} of seed {SEED}"
        )
        rounds = neighbour.rounds
        eventually(lambda: not neighbour.goes_on or neighbour.rounds > rounds + 1)
        neighbour.end()
        assert neighbour.right > neighbour.rounds // 2
        grown_bytes = process.memory_info().rss - warm_bytes
        assert grown_bytes < GROWTH_BYTES_MAX, f"{grown_bytes >> 20} MiB more"
        eventually(lambda: process.num_fds() <= before_fds, 20.0)
        status = command(settings.server_recv_port, "status")
        assert list(status["instances"]) == ["0"]
    finally:
        hostile.close()
        instance.close()
        server.close()
    assert server.exit_status == 0
