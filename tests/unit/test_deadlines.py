"""Instances whose devices do not answer: refused once, and served again once they answer."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from flexkv.server.deadlines import DeviceDeadlines
from flexkv.testing.virtual_time import run_virtual

DEADLINE_S = 1.0


class Rank:
    """A rank whose oldest copy has waited for as long as the test sets."""

    def __init__(self) -> None:
        self.waited_s = 0.0
        self.failed: list[str] = []

    def oldest_s(self) -> float:
        """Return how long the oldest copy has waited for its answer."""
        return self.waited_s

    @property
    def is_busy(self) -> bool:
        """Return whether a copy waits for an answer."""
        return self.waited_s > 0

    def fail_unsent(self, why: str) -> None:
        """Record why unsent copies fail."""
        self.failed.append(why)


class World:
    """One instance of two ranks, and a record of what its watcher does."""

    def __init__(self) -> None:
        self.ranks = [Rank(), Rank()]
        self.instance = SimpleNamespace(ports=dict(enumerate(self.ranks)), stuck="")
        self.fleet: Any = SimpleNamespace(instances={7: self.instance}, begun=None)
        self.said: list[str] = []
        runner: Any = SimpleNamespace(
            turn_away=lambda number, why: self.said.append(f"refused {number}"),
            take_back=lambda number: self.said.append(f"served {number}"),
        )
        self.deadlines = DeviceDeadlines(
            self.fleet, runner, DEADLINE_S, lambda number, why: self.said.append(f"stuck {number}")
        )

    def look(self, waited_s: float) -> list[str]:
        """Return what one look does when the second rank has not answered for `waited_s`."""
        self.ranks[1].waited_s = waited_s
        self.said.clear()
        self.deadlines.look()
        return list(self.said)


@pytest.fixture
def world() -> World:
    """Return one instance of two ranks and its watcher."""
    return World()


async def test_an_instance_may_be_stuck_more_than_once(world: World) -> None:
    """Each time an instance is stuck, it is refused once and served again once."""
    for times in (1, 2):
        assert world.look(DEADLINE_S) == []
        assert world.look(1.1 * DEADLINE_S) == ["stuck 7", "refused 7"]
        assert "ranks [1]" in world.instance.stuck
        assert [len(rank.failed) for rank in world.ranks] == [times, times]
        assert world.look(2 * DEADLINE_S) == []
        assert world.look(0.0) == ["served 7"]
        assert world.instance.stuck == ""
        assert world.look(0.0) == []
    world.deadlines.close()


async def test_an_instance_that_left_while_it_was_stuck_may_come_again(world: World) -> None:
    """When a stuck instance leaves, its number is served again, for the next one's devices."""
    assert world.look(2 * DEADLINE_S) == ["stuck 7", "refused 7"]
    world.fleet.instances.clear()
    assert world.look(2 * DEADLINE_S) == ["served 7"]
    assert world.look(2 * DEADLINE_S) == []
    world.deadlines.close()


def test_nobody_is_found_stuck_by_a_watcher_that_was_closed() -> None:
    """A copy that begins after the watcher was closed is not watched, however long it takes."""

    async def work(is_closed: bool) -> list[str]:
        world = World()
        if is_closed:
            world.deadlines.close()
        world.ranks[0].waited_s = 2 * DEADLINE_S
        world.fleet.begun()
        await asyncio.sleep(10 * DEADLINE_S)  # in virtual time
        world.deadlines.close()
        return world.said

    assert run_virtual(work(is_closed=False)) == ["stuck 7", "refused 7"]
    assert run_virtual(work(is_closed=True)) == []
