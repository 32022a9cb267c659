"""Waiting for work on memory that nothing may stop halfway, least of all a cancelled task."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Fence:
    """Counts the work under way; who waits for its end does so even when cancelled."""

    def __init__(self) -> None:
        self._count = 0
        self._waiters: list[asyncio.Future[None]] = []

    def begin(self) -> None:
        """Count one more piece of work."""
        self._count += 1

    def end(self) -> None:
        """Count one less, and wake the waiters if it was the last."""
        self._count -= 1
        if not self._count:
            for waiter in self._waiters:
                if not waiter.done():
                    waiter.set_result(None)

    async def passed(self, on_cancel: Callable[[], None] = lambda: None) -> None:
        """Return once no work is under way.

        Cancellation: `on_cancel` is called, to hasten the end, and the task is cancelled when the
        work has ended.
        """
        cancelled: asyncio.CancelledError | None = None
        while self._count:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError as error:
                cancelled = error
                on_cancel()
            finally:
                self._waiters.remove(waiter)
        if cancelled is not None:
            try:
                raise cancelled
            finally:
                cancelled = None  # its traceback has this frame: a cycle would keep its locals
