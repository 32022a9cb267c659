"""An asyncio loop whose clock jumps to the next timer when nothing has happened for a moment.

Sockets and threads are real, so they are given a little real time; but a deadline of seconds costs
some milliseconds. On a busy machine the clock may jump too early: a deadline then passes that would
have been kept. So a test on this loop must allow each deadline to pass.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

MOMENT_S = 0.002
"""How long nothing must have happened."""


class _HurriedSelector(selectors.EpollSelector):
    """A selector that does not wait for long: it moves the clock instead."""

    def __init__(self) -> None:
        super().__init__()
        self.ahead_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return what is ready within a moment; if nothing is, advance the clock by the rest."""
        if timeout is None or timeout <= MOMENT_S:
            return super().select(timeout)
        ready = super().select(MOMENT_S)
        if not ready:
            self.ahead_s += timeout - MOMENT_S
        return ready


class HurriedLoop(asyncio.SelectorEventLoop):
    """A selector event loop that waits for no timer."""

    def __init__(self) -> None:
        self._hurried = _HurriedSelector()
        super().__init__(self._hurried)

    def time(self) -> float:
        """Return the time in seconds: it runs like the real one, and jumps over waits."""
        return super().time() + self._hurried.ahead_s


def run_hurried(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end on a fresh loop that waits for no timer."""
    with asyncio.Runner(loop_factory=HurriedLoop) as runner:
        return runner.run(main)
