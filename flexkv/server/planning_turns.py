"""Turns of the event loop, in each of which one put is planned, so that matches do not wait.

A scheduler's step waits for the answer to a match, and nobody waits for a put. An event loop runs
everything that is ready before it looks at its sockets again. So each turn of the loop plans only
one of the puts that could be planned, and a match that has arrived meanwhile goes before the next.
"""

from __future__ import annotations

import asyncio
from collections import deque


class PlanningTurns:
    """Turns of the running loop, given to callers in the order of their calls."""

    def __init__(self) -> None:
        self._waiting = deque[asyncio.Future[None]]()
        self._is_taken = False

    async def wait(self) -> None:
        """Return in a turn of the loop that no other caller gets; the first caller returns at once.

        Cancellation: the turn goes to the next caller.
        """
        loop = asyncio.get_running_loop()
        if not self._is_taken:
            self._is_taken = True
            loop.call_soon(self._hand_out, loop)
            return
        mine = loop.create_future()
        self._waiting.append(mine)
        await mine

    def _hand_out(self, loop: asyncio.AbstractEventLoop) -> None:
        while self._waiting:
            if not (first := self._waiting.popleft()).done():
                first.set_result(None)
                loop.call_soon(self._hand_out, loop)
                return
        self._is_taken = False
