"""How much of host memory the puts of one instance may be filling at once.

A put takes its host blocks when it is planned, and a device that hangs fills none of them. Without
a limit the puts of one instance could take all of host memory, and nobody else could load or store.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import NamedTuple

from flexkv.common.errors import FlexKVError


class _Waiter(NamedTuple):
    blocks: int
    admitted: asyncio.Future[None]


class PutShare:
    """A limit of the blocks being filled, first come first served; one put is always allowed."""

    def __init__(self, blocks_max: int) -> None:
        self._blocks_max = blocks_max
        self._puts = self._blocks = 0
        self._waiters: deque[_Waiter] = deque()

    async def enter(self, blocks: int) -> None:
        """Return once there is room for a put of `blocks` blocks; the caller must `leave` later.

        Raises:
            FlexKVError: the waiting puts were turned away.
        """
        if not self._waiters and self._has_room(blocks):
            self._take(blocks)
            return
        waiter = _Waiter(blocks, asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        try:
            await waiter.admitted
        except asyncio.CancelledError:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
                self._admit()  # a smaller put may wait behind it
            elif not waiter.admitted.cancelled() and waiter.admitted.exception() is None:
                self.leave(blocks)  # admitted and cancelled in the same turn
            raise

    def leave(self, blocks: int) -> None:
        """Record the end of a put that has entered, and let waiting ones enter."""
        self._puts -= 1
        self._blocks -= blocks
        self._admit()

    def turn_away(self, reason: FlexKVError) -> None:
        """Refuse the puts that wait: raise `reason` in each."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.admitted.done():
                waiter.admitted.set_exception(reason)

    def _has_room(self, blocks: int) -> bool:
        return not self._puts or self._blocks + blocks <= self._blocks_max

    def _take(self, blocks: int) -> None:
        self._puts += 1
        self._blocks += blocks

    def _admit(self) -> None:
        while self._waiters and self._has_room(self._waiters[0].blocks):
            waiter = self._waiters.popleft()
            if not waiter.admitted.done():
                self._take(waiter.blocks)
                waiter.admitted.set_result(None)
