"""Holds of what matches found: their time to live, and their share of each tier."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import numpy as np
import pytest

from flexkv.actors.scheduler import Scheduler
from flexkv.common.terms import Positions, Tier
from flexkv.engine import pins
from flexkv.engine.pins import HOLD_S, HOLDS_MAX, Holds
from flexkv.index.claims import Claim, Holding
from flexkv.index.residency import Residency
from flexkv.testing.virtual_time import run_virtual

BLOCKS = 16


class Keeper:
    """The part of a scheduler that `Holds` uses: claims that pin."""

    def __init__(self, residency: Residency) -> None:
        self._claims, self._next = residency.claims, 0

    def hold(self, holdings: list[Holding]) -> tuple[int, ...]:
        """Pin blocks, and return the op ids of the claims."""
        op_ids = []
        for holding in holdings:
            self._next += 1
            self._claims.open(self._next, Claim(self._next, holding, None))
            op_ids.append(self._next)
        return tuple(op_ids)

    def release(self, op_ids: tuple[int, ...]) -> None:
        """End the claims, which unpins the blocks."""
        for op_id in op_ids:
            self._claims.settle(op_id, filled=False)


class Rig:
    """An index with one prompt that fills host memory, and its holds."""

    def __init__(self) -> None:
        self.residency = Residency({Tier.HOST: BLOCKS})
        keys = b"".join(bytes([number]) * 16 for number in range(BLOCKS + 1))
        ids = self.residency.reserve(Tier.HOST, keys, Positions(0, BLOCKS))
        self.residency.commit(Tier.HOST, ids)
        self.holds = Holds(cast(Scheduler, Keeper(self.residency)), self.residency)

    def hold(self, group: int, number: int, begin: int, end: int) -> None:
        """Hold the blocks from `begin` to `end`."""
        ids = np.arange(begin, end, dtype=np.int64)
        self.holds.hold(group, number, [Holding(Tier.HOST, ids)])

    @property
    def pinned(self) -> int:
        """Return the number of blocks that are pinned."""
        return self.residency.counts(Tier.HOST).pinned


def test_a_hold_ends_by_itself() -> None:
    """Each hold ends HOLD_S after it began, all by one timer; ending it again is harmless."""

    async def check() -> None:
        rig, loop = Rig(), asyncio.get_running_loop()
        rig.hold(1, 1, 0, 2)
        await asyncio.sleep(HOLD_S / 2)
        rig.hold(1, 2, 2, 5)
        scheduled: Any = vars(loop)["_scheduled"]
        assert len([timer for timer in scheduled if not timer.cancelled()]) == 1
        await asyncio.sleep(HOLD_S / 2 + 0.1)
        assert rig.pinned == 3
        await asyncio.sleep(HOLD_S / 2)
        assert (rig.pinned, len(rig.holds)) == (0, 0)
        for number in (1, 2, 99):
            rig.holds.release(1, number)
        rig.residency.validate()

    run_virtual(check())


def test_a_hold_that_is_made_anew_lives_from_then_on() -> None:
    """A new hold under the same number replaces the old one, and its time starts anew."""

    async def check() -> None:
        rig = Rig()
        rig.hold(1, 1, 0, 4)
        await asyncio.sleep(HOLD_S - 1)
        rig.hold(1, 1, 4, 6)
        await asyncio.sleep(2)
        assert rig.pinned == 2
        rig.holds.release(1, 1)
        assert rig.pinned == 0

    run_virtual(check())


def test_holds_keep_half_of_a_tier_at_most_and_the_oldest_goes_first() -> None:
    """Holds pin at most half of a tier, and the oldest goes first.

    Blocks that several holds pin count once. A hold that is too large keeps its first blocks.
    """

    async def check() -> None:
        rig = Rig()
        for number in range(10):
            rig.hold(1, number, 0, BLOCKS // 2)
        assert (rig.pinned, len(rig.holds)) == (BLOCKS // 2, 10)
        rig.holds.release_group(1)
        for number in range(BLOCKS):
            rig.hold(1, number, number, number + 1)
            assert rig.pinned <= BLOCKS // 2
        rig.holds.release(1, 0)
        assert rig.pinned == BLOCKS // 2
        rig.holds.release(1, BLOCKS - 1)
        assert rig.pinned == BLOCKS // 2 - 1
        rig.hold(2, 1, 0, 4)
        assert rig.pinned == BLOCKS // 2
        rig.holds.release_group(1)
        rig.hold(2, 2, 0, BLOCKS)
        assert rig.pinned == BLOCKS // 2
        rig.holds.close()
        assert (rig.pinned, len(rig.holds)) == (0, 0)

    run_virtual(check())


def test_a_group_that_holds_much_loses_before_one_that_holds_little() -> None:
    """The group that holds more loses a hold first, even if its holds are younger."""

    async def check() -> None:
        rig = Rig()
        rig.hold(1, 1, 0, 2)
        for number in range(20):
            rig.hold(2, number, number % 14 + 2, number % 14 + 3)
        rig.holds.release_group(2)
        assert rig.pinned == 2

    run_virtual(check())


def test_the_number_of_holds_is_bounded() -> None:
    """Each group has at most HOLDS_MAX holds, and ended holds leave only bounded records."""

    async def check() -> None:
        rig = Rig()
        for number in range(HOLDS_MAX + 5):
            rig.hold(1, number, 0, 1)
        assert len(rig.holds) == HOLDS_MAX
        rig.hold(2, 0, 0, 1)
        assert len(rig.holds) == HOLDS_MAX + 1
        for number in range(10 * HOLDS_MAX):
            rig.hold(3, number, 0, 1)
            rig.holds.release(3, number)
        assert len(rig.holds._by_age) <= 4 * HOLDS_MAX
        rig.holds.close()

    run_virtual(check())


def test_what_it_takes_to_remember_holds_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of all holds of a group are bounded, with repeated blocks counted each time."""
    monkeypatch.setattr(pins, "HELD_BLOCKS_MAX", 20)

    async def check() -> None:
        rig = Rig()
        for number in range(10):
            rig.hold(1, number, 0, 5)
            assert len(rig.holds) <= 4
        assert rig.pinned == 5
        rig.holds.close()

    run_virtual(check())
