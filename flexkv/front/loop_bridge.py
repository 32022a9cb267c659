"""Passes calls to the engine's loop: from that loop, another thread, or another loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar

from flexkv.common.errors import ClosedError, DeviceError
from flexkv.common.request import KVResponse, Operation
from flexkv.engine.engine import Engine
from flexkv.engine.tickets import RequestSpec
from flexkv.front import unclosed
from flexkv.front.loop_thread import STOP_S, UNWIND_S, LoopThread
from flexkv.front.tasks import TaskTable
from flexkv.observe.logs import get_logger
from flexkv.process.forks import HomeProcess

log = get_logger(__name__)

T = TypeVar("T")


class LoopBridge:
    """An engine and its tasks, on the caller's loop or in a thread of its own."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tasks = TaskTable(engine)
        self._thread: LoopThread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._home: HomeProcess | None = None
        self._ending = threading.RLock()

    def check_process(self) -> None:
        """Check that this process may use the manager.

        Raises:
            ClosedError: it is a forked child of the one that has started it.
        """
        if self._home is not None:
            self._home.check()

    # -- the end --------------------------------------------------------------------------------

    def _note_started(self) -> None:
        """Bind the manager to this process, and end it at exit if nobody closes it before."""
        self._home = HomeProcess("the manager")
        unclosed.remember(self)

    async def _close(self) -> None:
        unclosed.forget(self)
        self._tasks.close()
        await self._engine.close()

    def end(self, timeout_s: float | None = None) -> None:
        """Close the engine, from any thread; if its loop cannot, release everything at once.

        Idempotent, and safe in a signal handler.

        Raises:
            TimeoutError: closing took longer than `timeout_s`, and was cut short.
            InternalError: as for `Engine.close`.
        """
        unclosed.forget(self)
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        with self._ending:
            thread, self._thread = self._thread, None
            try:
                if thread is not None and not thread.is_this:
                    thread.call(self._close, timeout_s)
                elif thread is None and self._loop is not None and _runs_elsewhere(self._loop):
                    closing = asyncio.run_coroutine_threadsafe(self._close(), self._loop)
                    closing.result(timeout_s)
            finally:
                if thread is not None:
                    left_s = STOP_S if until_s is None else until_s - time.monotonic()
                    thread.stop(max(left_s, UNWIND_S))
                if self._engine.abandon():
                    why = "its event loop could not close it: what was not flushed is not on SSD"
                    log.warning("engine_abandoned", reason=why)

    def __del__(self) -> None:
        # An object that `__init__` refused has no engine.
        if getattr(self, "_home", None) is not None:
            unclosed.end_forgotten(self)

    @property
    def is_unclosed(self) -> bool:
        """Return whether this process has to close the engine."""
        return self._home is not None and self._home.is_here and not self._engine.is_closed

    # -- calls ----------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """Return the engine, for tools; it lives on its own loop."""
        return self._engine

    def on_loop(self, work: Callable[[], T]) -> T:
        """Return the result of synchronous work on the engine's loop, for tools.

        Raises:
            ClosedError: not started, or shut down.
        """
        return self._call(work)

    @property
    def num_layers(self) -> int:
        """Return the number of the model's layers."""
        return self._engine.model.num_layers

    def start_task(self, operation: Operation, *arguments: Any) -> int:
        """Start a request behind what this thread's streams have queued; return its task id."""
        self.check_process()
        self._order_after(operation)
        return self._call(lambda: self._tasks.start(RequestSpec(operation, *arguments)))

    async def task_response(self, task_id: int) -> KVResponse:
        """Return a task's response once it has one.

        Cancellation: the task is cancelled, and CancelledError raised once it is over.
        """
        return await self._async(lambda: self._tasks.response(task_id))

    def order_after(self, operation: Operation) -> None:
        """Make later copies wait for what the calling thread's streams have queued by now.

        Raises:
            DeviceError: a driver refused. The device is down from then on.
        """
        self._engine.order_after(operation)

    def _order_after(self, operation: Operation) -> None:
        """Do the same for a request that begins now, which ends as UNREADY if a device is down."""
        if self._engine.streams:
            with suppress(DeviceError):
                self._engine.order_after(operation)

    def nudge_device(self) -> None:
        """Check again whether transfers that wait for layers may go on. From any thread.

        Raises:
            ClosedError: not started, or shut down.
        """
        self._post(self._engine.nudge_device)

    def cancel_soon(self, task_id: int) -> None:
        """Cancel a task soon, without waiting for its end. From any thread."""
        self._post(lambda: self._tasks.cancel_if_there(task_id))

    def _post(self, work: Callable[[], None]) -> None:
        self.check_process()
        thread, loop = self._thread, self._loop
        if thread is not None:
            thread.post(work)
            return
        if loop is None:
            raise ClosedError("the manager is not started, or is shut down")
        try:
            loop.call_soon_threadsafe(work)
        except RuntimeError as error:
            raise ClosedError("the event loop that the manager runs on is closed") from error

    def _call(self, work: Callable[[], T]) -> T:
        """Return the result of synchronous work on the engine's loop."""
        if self._thread is None:
            self._check_loop()
            return work()

        async def wrapped() -> T:
            return work()

        return self._thread.call(wrapped)

    async def _async(self, work: Callable[[], Awaitable[T]]) -> T:
        """Return the result of work on the engine's loop, awaited there or on another loop."""
        if self._thread is not None:
            return await self._thread.call_async(work)
        self._check_loop()
        return await work()

    def _check_loop(self) -> None:
        """Refuse a call from a thread that does not run the engine's loop, or in a forked child."""
        if self._home is not None and not self._home.is_here:
            self._home.check()
        if self._loop is None:
            raise ClosedError("the manager is not started: use `async with` or start()")
        try:
            here = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            here = False
        if not here:
            why = "the manager runs on another event loop: call it there, or use start()"
            raise ClosedError(why)


def _runs_elsewhere(loop: asyncio.AbstractEventLoop) -> bool:
    """Return whether a loop runs in another thread."""
    try:
        return loop.is_running() and asyncio.get_running_loop() is not loop
    except RuntimeError:  # none runs here
        return True
