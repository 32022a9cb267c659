"""Admission by group: shares, turns, and groups that are turned away."""

from __future__ import annotations

import asyncio

import pytest

from flexkv.common.errors import ClosedError
from flexkv.engine.admission import SHARES, Admission


def fill(admission: Admission, group: int) -> int:
    """Enter a group until it would have to wait, and return how often it entered."""
    count = 0
    while admission.enter_nowait(group):
        count += 1
    return count


async def waiters_of(admission: Admission, *groups: int) -> list[asyncio.Task[None]]:
    """Return tasks that wait to enter, in the order of their arrival."""
    waiting = [asyncio.ensure_future(admission.enter(group)) for group in groups]
    await asyncio.sleep(0)
    return waiting


async def test_one_group_may_use_every_place_and_keeps_no_other_from_its_share() -> None:
    """One group may take all room; each other group still gets its share, and no more."""
    admission = Admission(16 * SHARES)
    assert fill(admission, 1) == 16 * SHARES
    assert [fill(admission, group) for group in (2, 3)] == [16, 16]
    assert Admission(1).requests_most > 1


async def test_a_small_bound_gives_everybody_one_place() -> None:
    """A share is at least one request."""
    admission = Admission(1)
    assert [fill(admission, group) for group in (0, 1, 2)] == [1, 1, 1]


async def test_free_places_go_to_the_groups_in_turns() -> None:
    """Groups take turns at free room, and each group's requests enter in order."""
    admission = Admission(1)
    for group in (1, 2):
        assert admission.enter_nowait(group)
    order: list[tuple[int, int]] = []

    async def visit(group: int, number: int) -> None:
        await admission.enter(group)
        order.append((group, number))
        await asyncio.sleep(0)
        admission.leave(group)

    visits = [asyncio.ensure_future(visit(1, number)) for number in range(4)]
    visits += [asyncio.ensure_future(visit(2, number)) for number in range(2)]
    await asyncio.sleep(0)
    admission.leave(1)
    admission.leave(2)
    await asyncio.wait(visits)
    assert [each for each in order if each[0] == 1] == [(1, number) for number in range(4)]
    assert {each[0] for each in order[:4]} == {1, 2}
    assert admission.waiting == 0


async def test_waiters_of_a_group_whose_places_are_stuck_block_no_other() -> None:
    """Free room skips a group that is at its limit, until that group may enter again."""
    admission = Admission(SHARES)
    fill(admission, 1)
    stuck = await waiters_of(admission, 1, 1)
    assert admission.enter_nowait(2)
    other = await waiters_of(admission, 2)
    admission.leave(2)
    await asyncio.sleep(0)
    assert other[0].done()
    assert not any(each.done() for each in stuck)
    admission.leave(1)
    admission.leave(2)
    await asyncio.sleep(0)
    assert stuck[0].done()
    stuck[1].cancel()
    await asyncio.sleep(0)
    assert admission.waiting == 0


async def test_a_group_that_is_turned_away_waits_no_more_and_may_come_back() -> None:
    """A group that is turned away gets the reason as an error; other groups enter as before."""
    admission = Admission(SHARES)
    fill(admission, 1)
    (waiting,) = await waiters_of(admission, 1)
    admission.turn_away(1, ClosedError("its devices do not answer"))
    with pytest.raises(ClosedError, match="do not answer"):
        await waiting
    with pytest.raises(ClosedError, match="do not answer"):
        await admission.enter(1)
    assert admission.enter_nowait(2)
    admission.turn_away(1, None)
    admission.leave(1)
    admission.leave(1)
    assert admission.enter_nowait(1)


async def test_a_place_that_was_given_to_a_cancelled_waiter_goes_on() -> None:
    """If a waiter is cancelled in the turn in which it was admitted, the next one is admitted."""
    admission = Admission(1)
    await admission.enter(1)
    first, second = await waiters_of(admission, 1, 1)
    admission.leave(1)
    first.cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert first.cancelled()
    assert second.done()
    assert not second.cancelled()
