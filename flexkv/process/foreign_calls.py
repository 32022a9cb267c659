"""Calls of a library that has threads of its own, and enters Python from them.

    call ──▶ the library holds futures and buffers ──▶ result, or cancelled ──▶ it drops them: ended

A call that was cancelled has not ended: soon after, a thread of the library enters Python to see
that nobody waits, and to give back what it was lent. If the interpreter is exiting then, the
process crashes (before Python 3.14). So whoever uses such a library registers here what it holds,
and waits until all of that is gone: when it is closed, or else at exit.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from flexkv.process import forks

T = TypeVar("T")

LOOK_S = 0.002
"""How often it is checked whether a library has dropped something: it does not say so."""
EXIT_S = 10.0
"""How long the interpreter's exit waits for calls that nobody has waited for."""


class ForeignCalls:
    """The calls that one object has made into a library."""

    def __init__(self, nudge: Callable[[], object]) -> None:
        """Take a call that makes the library drop what it has put off to drop."""
        self._nudge = nudge
        self._refs: dict[int, weakref.ref[Any]] = {}
        forks.on_fork(self._let_go_in_child)

    def hold(self, thing: T) -> T:
        """Register a future or buffer that the library holds until its call has ended; return it.

        Others may keep it no longer than that, or its end is never seen.
        """
        key, refs = id(thing), self._refs

        def dropped(_: weakref.ref[Any]) -> None:  # by any thread
            del refs[key]
            if not refs:
                _busy.pop(id(self), None)

        refs[key] = weakref.ref(thing, dropped)
        _busy[id(self)] = self
        return thing

    @property
    def held(self) -> int:
        """Return how many things the library holds."""
        return len(self._refs)

    def cancel(self) -> None:
        """Cancel all calls that nobody has cancelled; call this on their loop, or once it ended."""
        for each in list(self._refs.values()):
            if asyncio.isfuture(future := each()):
                with suppress(RuntimeError):  # the loop is closed, but the future is cancelled
                    future.cancel()

    async def ended(self, within_s: float) -> bool:
        """Cancel all calls, and return whether they have ended within some seconds."""
        self.cancel()
        until_s = time.monotonic() + within_s
        while self._refs and time.monotonic() < until_s:
            await asyncio.sleep(LOOK_S)
            self._nudge()
        return not self._refs

    def wait(self, until_s: float) -> None:
        """Wait for the end of all calls, whose loop has ended, in the calling thread.

        Calls whose loop has ended before they were cancelled end by the library's own limit.
        """
        self.cancel()
        gc.collect()  # the callbacks of futures whose loop is closed never run, and hold on to them
        while self._refs and time.monotonic() < until_s:
            time.sleep(LOOK_S)
            self._nudge()

    def _let_go_in_child(self) -> None:
        self._refs.clear()
        _busy.pop(id(self), None)


_busy: dict[int, ForeignCalls] = {}
"""Those whose calls have not ended, by id; nobody else may keep them."""


def before_calls_end(callback: Callable[[], object]) -> None:
    """Have a callback run at exit, before calls are waited for: those of its loops go on."""
    atexit.register(callback)  # the latest registration runs first, and ours was made on import


def _at_exit() -> None:
    until_s = time.monotonic() + EXIT_S
    for calls in list(_busy.values()):
        calls.wait(until_s)


atexit.register(_at_exit)
