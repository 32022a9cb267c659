"""An event loop in a thread of its own, and calls into it from other threads and loops."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar, cast

from flexkv.actors.supervisor import spawn_on
from flexkv.common.errors import ClosedError
from flexkv.process import forks

T = TypeVar("T")

STOP_S, UNWIND_S = 10.0, 1.0
"""How long a loop may take to finish its current step, and how long if it is late already."""


class LoopThread:
    """A thread that runs one event loop from `start` to `stop`."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._calls: set[SimpleQueue[asyncio.Task[Any] | None]] = set()
        self._unanswered: dict[concurrent.futures.Future[Any], Callable[[], object]] = {}
        self._home = forks.HomeProcess("the engine")

    def start(self) -> None:
        """Start the thread; return once its loop accepts calls."""
        ready: SimpleQueue[asyncio.AbstractEventLoop] = SimpleQueue()
        self._thread = threading.Thread(
            target=self._run, args=(ready,), name="flexkv-loop", daemon=True
        )
        self._thread.start()
        self._loop = ready.get()
        forks.on_fork(self._let_go_in_child)

    @staticmethod
    def _run(ready: SimpleQueue[asyncio.AbstractEventLoop]) -> None:
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            loop = runner.get_loop()
            loop.call_soon(ready.put, loop)
            loop.run_forever()

    @property
    def is_this(self) -> bool:
        """Return whether the caller runs in this thread, which must not wait for itself."""
        return threading.current_thread() is self._thread

    def stop(self, within_s: float = STOP_S) -> None:
        """Stop the loop and join the thread, unless the caller runs in it.

        A thread that does not end within `within_s` is left alone; no process waits for it.
        """
        if self._loop is not None and self._thread is not None:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._loop.stop)
            if not self.is_this:
                self._thread.join(within_s)
            self._loop = self._thread = None
        for answer in list(self._calls):
            answer.put(None)  # the call came between the loop's last step and its end
        for outcome, wake in list(self._unanswered.items()):
            if not outcome.done():
                outcome.set_exception(ClosedError("the engine was shut down during the call"))
                wake()

    def call(self, work: Callable[[], Awaitable[T]], timeout_s: float | None = None) -> T:
        """Run `work` on the loop, wait for it in the calling thread, and return its result.

        The wait holds no lock: a signal handler that interrupts it may call this, or shut down.

        Raises:
            ClosedError: the thread is not running, was stopped meanwhile, or is the caller's own.
            TimeoutError: it was not done within `timeout_s`; it is cancelled.
        """
        loop = self._running()
        if self.is_this:
            raise ClosedError("called on the engine's own thread, which would wait for itself")
        answer: SimpleQueue[asyncio.Task[Any] | None] = SimpleQueue()
        begun: list[asyncio.Task[T]] = []
        self._calls.add(answer)
        task = None
        try:
            _post(loop, lambda: begun.append(spawn_on(loop, _awaited(work), answer.put)))
            try:
                task = answer.get(timeout=timeout_s)
            except Empty as error:
                raise TimeoutError(f"not done within {timeout_s} s") from error
        finally:
            self._calls.discard(answer)
            if task is None:  # a timeout, a signal or the loop's end: the work ends, too
                with suppress(ClosedError):
                    _post(loop, lambda: [each.cancel() for each in begun])
        if task is None or task.cancelled():
            raise ClosedError("the engine was shut down during the call")
        return cast("T", task.result())

    def post(self, work: Callable[[], object]) -> None:
        """Do synchronous work on the loop soon, without waiting for it.

        Raises:
            ClosedError: the thread is not running.
        """
        _post(self._running(), work)

    async def call_async(self, work: Callable[[], Awaitable[T]]) -> T:
        """Run `work` on the loop, await it on the caller's loop, and return its result.

        Cancellation: the work is cancelled, and CancelledError raised once the work is over, so
        that what it guarantees about buffers holds for the caller too.
        """
        theirs, ours = self._running(), asyncio.get_running_loop()
        over = asyncio.Event()
        outcome: concurrent.futures.Future[T] = concurrent.futures.Future()
        inner: list[asyncio.Task[T]] = []

        def ended(task: asyncio.Task[T]) -> None:
            if outcome.done():
                return  # stopped meanwhile: the caller has its error already
            if task.cancelled():
                outcome.cancel()
            elif (error := task.exception()) is not None:
                outcome.set_exception(error)
            else:
                outcome.set_result(task.result())
            wake()

        def wake() -> None:
            with suppress(RuntimeError):  # the caller's loop is closed: nobody waits there
                ours.call_soon_threadsafe(over.set)

        def begin() -> None:
            inner.append(spawn_on(theirs, _awaited(work), ended))

        cancelled = False
        try:
            self._unanswered[outcome] = wake
            _post(theirs, begin)
            while not over.is_set():
                try:
                    await over.wait()
                except asyncio.CancelledError:
                    cancelled = True
                    with suppress(ClosedError):  # stopped meanwhile: `stop` ends the wait
                        _post(theirs, lambda: inner[0].cancel())
        finally:
            del self._unanswered[outcome]
        if cancelled or outcome.cancelled():
            raise asyncio.CancelledError
        return outcome.result()

    def _running(self) -> asyncio.AbstractEventLoop:
        self._home.check()
        if self._loop is None:
            raise ClosedError("the engine is not started, or is shut down")
        return self._loop

    def _let_go_in_child(self) -> None:
        """Detach the child's copy of the loop: it shares selector and sockets with the parent's."""
        if self._loop is not None:
            forks.detach_loop(self._loop, is_ours=True)


def _post(loop: asyncio.AbstractEventLoop, work: Callable[[], object]) -> None:
    try:
        loop.call_soon_threadsafe(work)
    except RuntimeError as error:
        raise ClosedError("the engine is shut down") from error


async def _awaited(work: Callable[[], Awaitable[T]]) -> T:
    return await work()
