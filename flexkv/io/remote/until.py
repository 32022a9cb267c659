"""When something that is asked of a store must have ended."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


def _never() -> float:
    return -math.inf


class Until:
    """When something must have ended: at its deadline, or as soon as it is stopped.

    Attributes:
        is_stopped: whether nobody waits for it any more.
        since_s: when it began to wait for what it waits for now, by the loop's clock.
    """

    def __init__(self, deadline_s: float, put_off_s: Callable[[], float] = _never) -> None:
        """Set the deadline, by the loop's clock; `put_off_s` may return a later one."""
        self.is_stopped, self.since_s = False, -math.inf
        self._deadline_s, self._put_off_s = deadline_s, put_off_s
        self._waits: set[asyncio.Timeout] = set()

    @property
    def deadline_s(self) -> float:
        """Return the deadline as it is now."""
        return self._deadline_s if self.is_stopped else max(self._deadline_s, self._put_off_s())

    @property
    def left_s(self) -> float:
        """Return how many seconds are left: 0 or less if none are."""
        return self.deadline_s - asyncio.get_running_loop().time()

    def stop(self) -> None:
        """End it now, because nobody waits for it any more."""
        now_s = asyncio.get_running_loop().time()
        self._deadline_s, self.is_stopped = min(self.deadline_s, now_s), True
        for wait in self._waits:
            if not wait.expired():
                wait.reschedule(now_s)

    async def wait(self, work: Awaitable[T], share: float = 1.0) -> T:
        """Return the result of work that may take a share of the time that is left now.

        Raises:
            TimeoutError: it took longer, and was cancelled.
        """
        now_s = self.since_s = asyncio.get_running_loop().time()
        async with asyncio.timeout_at(now_s + share * (self.deadline_s - now_s)) as timeout:
            self._waits.add(timeout)
            try:
                return await work
            finally:
                self._waits.remove(timeout)
