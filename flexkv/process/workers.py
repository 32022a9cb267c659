"""Threads that run blocking calls, one after the other, until they are shut down."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress
from errno import EAGAIN
from queue import Empty, SimpleQueue
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_Call = tuple[Future[Any], Callable[[], Any]]


class Workers(Executor):
    """Threads that run queued calls, also while the interpreter exits.

    Python's own executors accept no calls once the interpreter has begun to exit, so an engine
    that is closed then could write nothing. These threads do not keep a process alive.
    """

    def __init__(self, count: int, name: str) -> None:
        """Start the threads.

        Raises:
            OSError: a thread cannot be started.
        """
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._is_shut = False
        self._threads: list[threading.Thread] = []
        for number in range(count):
            thread = threading.Thread(
                target=_work, args=(self._calls,), name=f"{name}_{number}", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as error:
                self.shutdown()
                raise OSError(EAGAIN, str(error)) from error
            self._threads.append(thread)

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue a call, and return the future of its result.

        Raises:
            RuntimeError: the threads were shut down.
        """
        if self._is_shut:
            raise RuntimeError("the threads were shut down")
        future: Future[T] = Future()
        self._calls.put((future, lambda: fn(*args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more calls, and end once the accepted ones are done. Idempotent.

        Args:
            wait: return only once the threads have ended.
            cancel_futures: cancel the calls that have not begun.
        """
        if cancel_futures:
            with suppress(Empty):
                while call := self._calls.get_nowait():
                    call[0].cancel()
                self._calls.put(None)  # put back the marker that ends a thread
        if not self._is_shut:
            self._is_shut = True
            for _ in self._threads:
                self._calls.put(None)
        if wait:
            for thread in self._threads:
                thread.join()


def _work(calls: SimpleQueue[_Call | None]) -> None:
    while (call := calls.get()) is not None:
        future, work = call
        if future.set_running_or_notify_cancel():
            _settle(future, work)
        del call, future, work  # keep nothing alive while waiting for the next call


def _settle(future: Future[Any], work: Callable[[], Any]) -> None:
    """Run a call, and set its result or its exception in its future."""
    with suppress(BaseException):  # the future has it
        try:
            result = work()
        except BaseException as error:
            future.set_exception(error)
            raise
        future.set_result(result)
