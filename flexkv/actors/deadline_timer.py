"""A timer for checks against a deadline, which are not made while the loop lags behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

CHECKS_PER_DEADLINE = 4


class DeadlineTimer:
    """Calls a check once each time that it is armed, a fraction of the deadline later.

    If the loop was blocked meanwhile, it may not have seen yet what has ended. Then the check is
    put off by another such interval.
    """

    def __init__(self, deadline_s: float, check: Callable[[], None]) -> None:
        self._interval_s, self._check = deadline_s / CHECKS_PER_DEADLINE, check
        self._timer: asyncio.TimerHandle | None = None
        self._due_s = 0.0
        self._is_closed = False

    def arm(self) -> None:
        """Start the timer, if it is not running."""
        if self._timer is None and not self._is_closed:
            loop = asyncio.get_running_loop()
            self._due_s = loop.time() + self._interval_s
            self._timer = loop.call_at(self._due_s, self._fire)

    def _fire(self) -> None:
        self._timer = None
        if asyncio.get_running_loop().time() - self._due_s > self._interval_s:
            self.arm()
        else:
            self._check()

    def close(self) -> None:
        """Stop checking."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
