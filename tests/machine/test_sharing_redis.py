"""Engines on several machines share blocks while their Redis is away, slow or loses everything."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flexkv.cluster.redis_commands import ANSWER_S
from flexkv.testing.namespaces import drop_from, lose_from
from tests.machine.bed import TTL_S, Bed, check_machine
from tests.machine.sharing_node import BLOCKS

pytestmark = pytest.mark.machine

OUTAGE_S = 2 * TTL_S
"""How long each fault lasts: no node would be registered any more."""


def nothing(bed: Bed) -> None:
    """Repair nothing."""


def kill(bed: Bed) -> None:
    """Kill the Redis."""
    bed.redis.kill()


def start(bed: Bed) -> None:
    """Start it again, empty."""
    bed.redis.start()


def stop(bed: Bed) -> None:
    """Stop its process: it accepts connections and answers nothing."""
    os.kill(bed.redis.pid, signal.SIGSTOP)


def go_on(bed: Bed) -> None:
    """Let it go on."""
    os.kill(bed.redis.pid, signal.SIGCONT)


def flush(bed: Bed) -> None:
    """Have it forget everything."""
    bed.redis_says("FLUSHALL")


def part(bed: Bed) -> None:
    """Let nothing arrive at it from any node."""
    bed.redis_host.suffers(*(drop_from(host.address) for host in bed.hosts))


def disturb(bed: Bed) -> None:
    """Lose a third of what nodes send it, which makes it slow."""
    bed.redis_host.suffers(*(lose_from(host.address, 33) for host in bed.hosts))


def heal(bed: Bed) -> None:
    """End the faults of the network."""
    bed.network.heal()


FAULTS = [
    (kill, start), (stop, go_on), (flush, nothing), (part, heal), (disturb, heal),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "repair"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_without_redis_hints_stand_and_nobody_waits(
    tmp_path: Path, fault: Callable[[Bed], None], repair: Callable[[Bed], None]
) -> None:
    """Puts and gets do not wait for Redis, and blocks of peers are read by the hints of before.

    What happened meanwhile is known afterwards, as is what happens later.
    """
    check_machine()
    with Bed(tmp_path, 2) as bed:
        owner, reader = bed.nodes
        owner.do("put", seed=1)
        reader.do("put", seed=2)
        reader.until("known", lambda known: known["far"] == BLOCKS, seed=1)

        fault(bed)
        until_s = time.monotonic() + OUTAGE_S
        owner.do("put", seed=3)
        while time.monotonic() < until_s:
            own = reader.do("get", seed=2)
            assert (own["blocks"], own["right"]) == (BLOCKS, True)
            assert own["took_s"] < ANSWER_S / 2
        far = reader.do("get", seed=1)
        assert (far["blocks"], far["right"]) == (BLOCKS, True)
        assert far["took_s"] < ANSWER_S / 2

        repair(bed)
        reader.until("known", lambda known: known["far"] == BLOCKS, seed=3)
        owner.do("put", seed=4)
        reader.until("known", lambda known: known["far"] == BLOCKS, seed=4)
        for seed in (3, 4):
            got = reader.do("get", seed=seed)
            assert (got["blocks"], got["right"]) == (BLOCKS, True)
        for node in bed.nodes:
            node.is_free()
            assert node.end() == 0
