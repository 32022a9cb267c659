"""An asyncio loop on a virtual clock: time passes only when nothing else is left to do.

A simulation on it takes only the time of its work, and is the same in every run. A loop that has
nothing to do and no timer would wait for ever: a deadlock of the system under test, which raises.
"""

from __future__ import annotations

import asyncio
import selectors
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any, ParamSpec, TypeVar

from flexkv.common.errors import FlexKVError

T = TypeVar("T")
P = ParamSpec("P")


class DeadlockError(AssertionError):
    """Every task waits, and nothing is scheduled that could wake one."""


class _InstantSelector(selectors.SelectSelector):
    """A selector that never sleeps: a wait moves the clock instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return what is ready now; if nothing is, advance the clock by the timeout."""
        ready = super().select(0)
        if ready:
            return ready
        if timeout is None:
            raise DeadlockError(
                "no task can run and no timer is set: the system would wait forever"
            )
        self.now_s += max(timeout, 0.0)
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """A selector event loop whose clock is virtual."""

    def __init__(self) -> None:
        self._virtual = _InstantSelector()
        super().__init__(self._virtual)

    def time(self) -> float:
        """Return the virtual time in seconds, which begins at 0."""
        return self._virtual.now_s


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end on a fresh virtual-time loop, as `asyncio.run` would.

    Raises:
        DeadlockError: the coroutine waits for something that cannot happen.
    """
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)


class VirtualThread(Executor):
    """An executor on the virtual-time loop that makes calls in order, each after a delay.

    If the loop's own thread waits for a result, all queued calls are made at once.
    """

    def __init__(self, delay_s: Callable[[], float]) -> None:
        self._delay_s = delay_s
        self._calls: deque[Callable[[], None]] = deque()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue a call, and return its future."""
        made: _Made[T] = _Made(self._drain)
        self._calls.append(partial(_make, made, partial(fn, *args, **kwargs)))
        asyncio.get_running_loop().call_later(self._delay_s(), self._next)
        return made

    def _next(self) -> None:
        if self._calls:
            self._calls.popleft()()

    def _drain(self) -> None:
        while self._calls:
            self._next()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Make the queued calls if `wait`; drop them if `cancel_futures`."""
        if cancel_futures:
            self._calls.clear()
        elif wait:
            self._drain()


class _Made(Future[T]):
    """The result of a call, which is made at the latest when the result is asked for."""

    def __init__(self, drain: Callable[[], None]) -> None:
        super().__init__()
        self._drain = drain

    def result(self, timeout: float | None = None) -> T:
        """Make all queued calls, and return the result of this one."""
        self._drain()
        return super().result(timeout)


def _make(made: Future[T], call: Callable[[], T]) -> None:
    """Make a call and set its result, as a thread of a pool does."""
    if not made.set_running_or_notify_cancel():
        return
    try:
        made.set_result(call())
    except (OSError, FlexKVError) as error:  # others are bugs, which the loop reports
        made.set_exception(error)
