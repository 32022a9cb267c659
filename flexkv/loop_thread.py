"""An event loop in a thread of its own, and calls into it from other threads and loops."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from flexkv.actors.actor import spawn_on
from flexkv.common.errors import ClosedError

T = TypeVar("T")


class LoopThread:
    """A thread that runs one event loop from `start` to `stop`."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._calls: set[concurrent.futures.Future[Any]] = set()
        self._unanswered: dict[concurrent.futures.Future[Any], Callable[[], object]] = {}

    def start(self) -> None:
        """Start the thread; returns once its loop takes calls."""
        ready: concurrent.futures.Future[asyncio.AbstractEventLoop] = concurrent.futures.Future()
        self._thread = threading.Thread(
            target=self._run, args=(ready,), name="flexkv-loop", daemon=True
        )
        self._thread.start()
        self._loop = ready.result()

    @staticmethod
    def _run(ready: concurrent.futures.Future[asyncio.AbstractEventLoop]) -> None:
        with asyncio.Runner() as runner:
            loop = runner.get_loop()
            loop.call_soon(ready.set_result, loop)
            loop.run_forever()

    def stop(self) -> None:
        """Stop the loop and join the thread."""
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop = self._thread = None
        for future in list(self._calls):
            future.cancel()  # came between the loop's last turn and its end
        for outcome, wake in list(self._unanswered.items()):
            if not outcome.done():
                outcome.set_exception(ClosedError("the engine was shut down during the call"))
                wake()

    def call(self, work: Callable[[], Awaitable[T]]) -> T:
        """Run `work` on the loop, and wait for its result in this thread.

        Raises:
            ClosedError: the thread is not running, or was stopped meanwhile.
        """
        future = asyncio.run_coroutine_threadsafe(_awaited(work), self._running())
        self._calls.add(future)
        try:
            return future.result()
        except concurrent.futures.CancelledError as error:
            raise ClosedError("the engine was shut down during the call") from error
        finally:
            self._calls.discard(future)
            future.cancel()  # when a signal ended the wait, the work ends too

    def post(self, work: Callable[[], None]) -> None:
        """Do synchronous work on the loop, some time soon.

        Raises:
            ClosedError: the thread is not running.
        """
        try:
            self._running().call_soon_threadsafe(work)
        except RuntimeError as error:
            raise ClosedError("the engine is shut down") from error

    async def call_async(self, work: Callable[[], Awaitable[T]]) -> T:
        """Run `work` on the loop, and await its result on the caller's.

        Cancellation: the work is cancelled, and CancelledError raised once the work is over, so
        that what it guarantees about buffers holds for the caller too.
        """
        theirs, ours = self._running(), asyncio.get_running_loop()
        over = asyncio.Event()
        outcome: concurrent.futures.Future[T] = concurrent.futures.Future()
        inner: list[asyncio.Task[T]] = []

        def ended(task: asyncio.Task[T]) -> None:
            if outcome.done():
                return  # stopped meanwhile: the caller is told so already
            if task.cancelled():
                outcome.cancel()
            elif (error := task.exception()) is not None:
                outcome.set_exception(error)
            else:
                outcome.set_result(task.result())
            wake()

        def wake() -> None:
            ours.call_soon_threadsafe(over.set)

        def begin() -> None:
            inner.append(spawn_on(theirs, _awaited(work), ended))

        self._unanswered[outcome] = wake
        theirs.call_soon_threadsafe(begin)
        cancelled = False
        try:
            while not over.is_set():
                try:
                    await over.wait()
                except asyncio.CancelledError:
                    cancelled = True
                    theirs.call_soon_threadsafe(lambda: inner[0].cancel())
        finally:
            del self._unanswered[outcome]
        if cancelled or outcome.cancelled():
            raise asyncio.CancelledError
        return outcome.result()

    def _running(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            raise ClosedError("the engine is not started, or is shut down")
        return self._loop


async def _awaited(work: Callable[[], Awaitable[T]]) -> T:
    return await work()
