"""Admission: how many requests may be under way, and who waits in which order."""

from __future__ import annotations

import asyncio
from collections import deque

from flexkv.common.errors import ClosedError


class Admission:
    """A bound on requests under way, first come first served; closing turns the waiters away.

    Unlike a semaphore it can be closed, and entering costs nothing while there is room.
    """

    def __init__(self, requests_max: int) -> None:
        self._room = requests_max
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._closed = False

    @property
    def waiting(self) -> int:
        """Count the requests that wait to be admitted."""
        return len(self._waiters)

    def enter_nowait(self) -> bool:
        """Enter if there is room, and tell; `leave` must follow.

        Raises:
            ClosedError: closed.
        """
        if self._closed:
            raise ClosedError("the engine is shut down")
        if not self._room:
            return False
        self._room -= 1
        return True

    async def enter(self) -> None:
        """Return once admitted; `leave` must follow.

        Raises:
            ClosedError: closed, before or while waiting.
        """
        if self.enter_nowait():
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self.leave()  # admitted and cancelled in the same turn: hand the place on
            elif waiter in self._waiters:
                self._waiters.remove(waiter)
            raise

    def leave(self) -> None:
        """Give the place to the next waiter."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
        self._room += 1

    def close(self) -> None:
        """Admit nobody any more; waiters get a ClosedError."""
        self._closed = True
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_exception(ClosedError("the engine is shut down"))
