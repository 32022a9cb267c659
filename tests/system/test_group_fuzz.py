"""Tests of hostile peers at a live server of a model with several KV groups."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flexkv.server.operator import command
from flexkv.testing.hostile import Hostile

from .forked import forked_server
from .group_serving import GROUP_MODEL, GroupInstance
from .serving import eventually, settings_in

FRAMES = int(os.environ.get("GROUP_FUZZ_FRAMES", "2000"))
SEED = int(os.environ.get("FUZZ_SEED", "1"))


class GroupNeighbour:
    """A well-behaved instance that puts and gets and compares every byte, in its own thread."""

    def __init__(self, instance: GroupInstance) -> None:
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
            keys = self._instance.keys(self.rounds, 17, shared=4)
            put = self._instance.put(keys, 17, ends=[4, 16])
            assert put.status in ("success", "unready"), put
            matched = self._instance.match(keys)
            got = self._instance.get(keys, matched)
            assert got.status in ("success", "notfound", "unready", "failed"), got
            self.right += got.moved > 0
            self.rounds += 1

    def end(self) -> None:
        """Stop, and raise what went wrong."""
        self._stop.set()
        self._work.result(60)
        self._threads.shutdown()


def test_hostile_peers_disturb_no_group(tmp_path: Path) -> None:
    """Invalid leaves of hostile peers neither end the server nor spoil a block of any group.

    GROUP_FUZZ_FRAMES and FUZZ_SEED choose the frames.
    """
    settings = settings_in(tmp_path, num_cpu_blocks=128, io_deadline_s=2.0)
    server = forked_server(settings, GROUP_MODEL)
    instance = GroupInstance(settings)
    instance.begin()
    hostile = Hostile(settings, GROUP_MODEL, SEED, instance.client.order)
    neighbour = GroupNeighbour(instance)
    hostile.run(FRAMES, lambda: neighbour.goes_on)
    neighbour.end()
    assert hostile.frames >= FRAMES
    assert neighbour.right > 0
    instance.close()
    address = settings.server_recv_port

    def is_idle() -> bool:
        status = command(address, "status")
        host = status["statistics"]["tiers"]["host"]
        return not (status["instances"] or host["pinned_blocks"] or host["reserved_blocks"])

    eventually(is_idle, 30.0)
    server.close()
    assert server.exit_status == 0
