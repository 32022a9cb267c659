"""Grants over a fake engine, on a virtual clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from flexkv.actors.supervisor import Supervisor
from flexkv.cluster.grants import (
    GrantLimits,
    Grants,
    Lent,
    ReadStatus,
)
from flexkv.cluster.wire import WITHIN_MS_MAX, Busy, Grant, PeerId, Want
from flexkv.testing.virtual_time import run_virtual
from tests.cluster_rigs import FakeOwner, keys_of, tasks_of, turns

A, B, C = (PeerId(bytes([n]) * 16, n) for n in range(3))
LIMITS = GrantLimits(100)


class Rig:
    """Grants over a fake engine, and every answer that they gave.

    Attributes:
        within_ms: how long readers wait for an answer.
    """

    def __init__(self, limits: GrantLimits) -> None:
        self.owner = FakeOwner()
        self.failures: list[BaseException] = []
        self.supervisor = Supervisor(self.failures.append)
        self.grants = Grants(self.owner, limits, self.supervisor.spawn)
        self.answers: list[Grant | Busy] = []
        self.within_ms = WITHIN_MS_MAX
        self._number = 0

    def want(self, peer: PeerId, keys: bytes, first: int, last: int, group: int = 0) -> int:
        """Ask for blocks, and return the number."""
        self._number += 1
        want = Want(self._number, keys, first, last, group, within_ms=self.within_ms)
        self.grants.want(peer, want, self.answers.append)
        return self._number

    def stored(self, prompt: int, blocks: int) -> bytes:
        """Return the keys of a prompt whose blocks are in host memory."""
        keys = keys_of(prompt, blocks)
        self.owner.put(keys)
        return keys


def with_grants(
    work: Callable[[Rig], Coroutine[Any, Any, None]], limits: GrantLimits = LIMITS
) -> None:
    """Run a test on a virtual clock; afterwards nothing may be held or running."""

    async def main() -> None:
        rig = Rig(limits)
        await rig.supervisor.start()
        await work(rig)
        rig.grants.close()
        await turns()
        timers = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]
        assert all(timer.cancelled() for timer in timers)
        assert not rig.owner.holds
        assert rig.grants.counts.pinned_blocks == rig.grants.counts.grants == 0
        assert rig.grants._kept_by == {}
        assert rig.grants._reserved == rig.grants._prefetches == 0
        assert tasks_of(rig.supervisor) == 0
        await rig.supervisor.stop()
        assert not rig.failures

    run_virtual(main())


def lent(told: Lent | ReadStatus) -> Lent:
    """Return blocks that were lent."""
    assert isinstance(told, Lent)
    return told
