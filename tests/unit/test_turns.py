"""Turns of the event loop, each for one caller."""

from __future__ import annotations

import asyncio
from itertools import pairwise

from flexkv.server.planning_turns import PlanningTurns


async def _let_go(turns: int) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)


async def test_each_turn_of_the_loop_is_given_once() -> None:
    """Each turn goes to one caller, in order, and other tasks run between any two."""
    turns, told = PlanningTurns(), list[str]()

    async def put(number: int) -> None:
        await turns.wait()
        told.append(f"put {number}")

    async def other() -> None:
        for _ in range(8):
            told.append("other")
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        for number in range(4):
            group.create_task(put(number))
        group.create_task(other())
    puts = [each for each in told if each != "other"]
    assert puts == [f"put {number}" for number in range(4)]
    assert not any(a != "other" and b != "other" for a, b in pairwise(told))


async def test_a_turn_of_one_who_gave_up_goes_to_the_next() -> None:
    """The turn of a cancelled caller goes to the next, and turns are free again afterwards."""
    turns, told = PlanningTurns(), list[int]()

    async def put(number: int) -> None:
        await turns.wait()
        told.append(number)

    tasks = [asyncio.create_task(put(number)) for number in range(4)]
    await _let_go(1)
    tasks[1].cancel()
    tasks[2].cancel()
    await asyncio.wait(tasks)
    assert told == [0, 3]
    await _let_go(3)
    await put(4)
    assert told[-1] == 4
