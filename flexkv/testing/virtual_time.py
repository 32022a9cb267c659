"""An asyncio loop on a virtual clock: time passes only when nothing else is left to do.

A simulation on it is as fast as its work and the same at every run. A loop with nothing to do and
no timer to wait for would wait for ever: that is a deadlock of the system under test, and raises.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class DeadlockError(AssertionError):
    """Every task waits and nothing is scheduled that could wake one."""


class _InstantSelector(selectors.SelectSelector):
    """A selector that never sleeps: a wait moves the clock instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Give what is ready now; with nothing ready, let the timeout pass on the clock."""
        ready = super().select(0)
        if ready:
            return ready
        if timeout is None:
            raise DeadlockError("no task can run, no timer is set: the system waits for ever")
        self.now_s += max(timeout, 0.0)
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """A selector event loop whose clock is virtual."""

    def __init__(self) -> None:
        self._virtual = _InstantSelector()
        super().__init__(self._virtual)

    def time(self) -> float:
        """Give the virtual time in seconds; begins at 0."""
        return self._virtual.now_s


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end on a fresh virtual-time loop, as `asyncio.run` would.

    Raises:
        DeadlockError: the coroutine waits for something that cannot come.
    """
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
