"""Tests of hostile peers at a live server."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
import psutil

from flexkv.common.request import Operation
from flexkv.server.operator import command
from flexkv.testing.hostile import Hostile

from .conftest import MODEL
from .forked import forked_server
from .neighbour import Neighbour
from .serving import BLOCKS, Instance, eventually, settings_in

FRAMES = int(os.environ.get("FUZZ_FRAMES", "5000"))
SEED = int(os.environ.get("FUZZ_SEED", "1"))
WARM_FRAMES = 2000
"""After this many frames the server's memory grows only by leaks."""
GROWTH_BYTES_MAX = 48 << 20


def put_and_get(instance: Instance, number: int) -> bool:
    """Put and get a prompt; return whether blocks came, all of whose bytes are right."""
    source = range(number % 4 * BLOCKS, (number % 4 + 1) * BLOCKS)
    target = range(40, 40 + BLOCKS)
    put = instance.request(Operation.PUT, number, source)
    assert put.status in ("success", "unready"), put
    got = instance.request(Operation.GET, number, target)
    assert got.status in ("success", "notfound", "unready"), got
    loaded, stored = target[: got.moved], source[: got.moved]
    np.testing.assert_array_equal(instance.content(loaded), instance.content(stored))
    return got.moved > 0


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
    hostile, neighbour = Hostile(settings, MODEL, SEED), Neighbour(partial(put_and_get, instance))

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
