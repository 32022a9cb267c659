"""Requests side by side, at a bounded rate, that end as soon as nobody wants them any more."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

from flexkv.actors.supervisor import Bell
from flexkv.io.remote.until import Until
from flexkv.process.spawning import Spawn

T = TypeVar("T")

REQUEST_S = 10.0
"""How long the store may take for what is done with one object."""


class Pacer:
    """Spreads requests evenly: so many a second at most."""

    def __init__(self, per_s: float) -> None:
        self._apart_s, self._next_s = 1 / per_s, -math.inf

    async def turn(self) -> None:
        """Return when it is the next request's turn."""
        now_s = asyncio.get_running_loop().time()
        at_s = max(now_s, self._next_s)
        self._next_s = at_s + self._apart_s
        if at_s > now_s:
            await asyncio.sleep(at_s - now_s)


async def side_by_side(
    spawn: Spawn,
    tasks: int,
    items: deque[T],
    pacer: Pacer,
    work: Callable[[T, Until], Awaitable[None]],
) -> None:
    """Do some work for every item, those included that are added meanwhile.

    Args:
        spawn: starts tasks.
        tasks: how many items are worked on at once.
        items: they are taken from the left; nobody else takes any.
        pacer: bounds the rate.
        work: what is done; it must end when its `Until` does, and raise nothing.

    Cancellation: what has been begun ends at once, and nothing more is begun.
    """
    bell, waits = Bell(), set[Until]()

    async def one(item: T, until: Until) -> None:
        try:
            await work(item, until)
        finally:
            waits.remove(until)
            bell.ring()

    try:
        while items or waits:
            if items and len(waits) < tasks:
                await pacer.turn()
                until = Until(asyncio.get_running_loop().time() + REQUEST_S)
                waits.add(until)
                spawn("remote collection", one(items.popleft(), until))
            else:
                await bell.wait()
    finally:
        for until in waits:
            until.stop()
