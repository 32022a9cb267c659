"""Tests of hostile peers at a live server of a model with several KV groups."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from flexkv.server.operator import command
from flexkv.testing.hostile import Hostile

from .forked import forked_server
from .group_serving import GROUP_MODEL, GroupInstance
from .neighbour import Neighbour
from .serving import eventually, settings_in

FRAMES = int(os.environ.get("GROUP_FUZZ_FRAMES", "2000"))
SEED = int(os.environ.get("FUZZ_SEED", "1"))


def put_and_get(instance: GroupInstance, number: int) -> bool:
    """Put and get a prompt; return whether blocks came. The get checks their bytes."""
    keys = instance.keys(number, 17, shared=4)
    put = instance.put(keys, 17, ends=[4, 16])
    assert put.status in ("success", "unready"), put
    got = instance.get(keys, instance.match(keys))
    assert got.status in ("success", "notfound", "unready", "failed"), got
    return got.moved > 0


def test_hostile_peers_disturb_no_group(tmp_path: Path) -> None:
    """Invalid leaves of hostile peers neither end the server nor spoil a block of any group.

    GROUP_FUZZ_FRAMES and FUZZ_SEED choose the frames.
    """
    settings = settings_in(tmp_path, num_cpu_blocks=128, io_deadline_s=2.0)
    server = forked_server(settings, GROUP_MODEL)
    instance = GroupInstance(settings)
    instance.begin()
    hostile = Hostile(settings, GROUP_MODEL, SEED, instance.client.order)
    neighbour = Neighbour(partial(put_and_get, instance))
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
