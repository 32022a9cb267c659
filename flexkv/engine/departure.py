"""Releases an engine that its loop cannot close: at once, and from any thread.

This is needed when the loop is closed or does not run, when closing was interrupted, and in a
forked child, which has a copy of an engine that it must not touch.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

from flexkv.common.errors import ClosedError, FlexKVError
from flexkv.process import forks

RELEASE_S = 10.0
"""How long to wait for I/O under way; whatever it still uses after that stays open."""


class Departure:
    """Answers everyone who waits for an engine, and releases what it has acquired."""

    def __init__(
        self,
        fail: Callable[[FlexKVError], object],
        close: Sequence[Callable[[], object]],
        cancel: Callable[[], object],
        resources: ExitStack,
    ) -> None:
        """Take an engine's parts, on the loop that it runs on.

        Args:
            fail: answers every request under way.
            close: closes each other part that admits or answers requests.
            cancel: requests that the engine's tasks be cancelled.
            resources: memory, files and ports.
        """
        self._fail, self._steps, self._cancel = fail, tuple(close), cancel
        self._resources = resources
        self._loop = asyncio.get_running_loop()
        self._is_over = False
        forks.on_fork(self._let_go_in_child)

    def note_closed(self) -> None:
        """Record that the engine was closed normally: there is nothing left to do."""
        self._is_over = True

    def abandon(self) -> bool:
        """Release everything; return whether there was anything left to release."""
        if self._is_over:
            return False
        self._is_over = True
        self._dismiss(
            ClosedError("the engine was released at once: its event loop could not close it")
        )
        with suppress(RuntimeError):  # the loop is closed
            self._cancel()
        releasing = threading.Thread(target=self._release, name="flexkv-release", daemon=True)
        try:
            releasing.start()
        except RuntimeError:  # the interpreter is exiting
            self._release()
        else:
            releasing.join(RELEASE_S)
        return True

    def _release(self) -> None:
        with suppress(FlexKVError, OSError, RuntimeError):  # each part logs what it could not do
            self._resources.close()

    def _dismiss(self, reason: FlexKVError) -> None:
        """Stop admission and answer all waiters, as far as the loop still works."""
        for step in self._steps:
            with suppress(RuntimeError, FlexKVError):
                step()
        with suppress(RuntimeError, FlexKVError):
            self._fail(reason)

    def _let_go_in_child(self) -> None:
        """Answer all waiters in the child, in case it unwinds its copy of the loop."""
        if not self._is_over:
            self._is_over = True
            forks.detach_loop(self._loop)
            self._dismiss(ClosedError("the engine belongs to the process that forked this one"))
