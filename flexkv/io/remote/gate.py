"""Lets requests pass, as many at once as their limit allows; the others wait in turn.

Callers start no more requests than the limit allows. But the limit may fall while they are under
way. If these requests fail, they must not all be repeated at once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress

from flexkv.io.remote.pacing import Limit
from flexkv.io.remote.until import Until


class Gate:
    """The gate of one direction.

    Attributes:
        limit: how many may be inside.
    """

    def __init__(self, limit: Limit) -> None:
        self.limit, self._inside = limit, 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def enter(self, until: Until) -> None:
        """Return once one more request may be in flight; the caller must `leave` at its end.

        Raises:
            TimeoutError: its turn did not come in time.
        """
        if self._inside < self.limit.now and not self._waiting:
            self._inside += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            while not turn.done():
                with suppress(TimeoutError):  # meanwhile the deadline may have been put off
                    await until.wait(asyncio.wait([turn]))
                if until.left_s <= 0 and not turn.done():
                    raise TimeoutError
        except asyncio.CancelledError:
            if turn.done():
                self.leave()
            raise
        finally:
            if not turn.done():
                self._waiting.remove(turn)

    def leave(self) -> None:
        """Record that a request has ended, and let others pass."""
        self._inside -= 1
        while self._waiting and self._inside < self.limit.now:
            self._inside += 1
            self._waiting.popleft().set_result(None)
