"""Passes calls to the loop of an engine: from that loop, another thread, or another loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from flexkv.common.errors import ClosedError, ConfigError, DeviceError
from flexkv.common.request import KVResponse, Operation
from flexkv.engine.tickets import RequestSpec
from flexkv.front import unclosed
from flexkv.front.door import Door
from flexkv.front.loop_thread import STOP_S, UNWIND_S, LoopThread
from flexkv.front.tasks import TaskTable
from flexkv.observe.logs import get_logger
from flexkv.process import forks
from flexkv.process.forks import HomeProcess
from flexkv.tiers.backend import Progress

log = get_logger(__name__)

T = TypeVar("T")


class LoopBridge:
    """An engine or a client, and its tasks, on the caller's loop or in a thread of its own.

    Attributes:
        door: the engine, or the client of one.
        tasks: the requests that have task ids.
        thread: runs the loop after `start`.
        name: the name of the class that callers use, for messages.
    """

    def __init__(self, door: Door, name: str, progress: Progress | None = None) -> None:
        self.door, self.name, self._progress = door, name, progress
        self.tasks = TaskTable(door)
        self.thread: LoopThread | None = None
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

    # -- the begin ------------------------------------------------------------------------------

    async def enter(self) -> None:
        """Open on the running loop."""
        self.check_process()
        if self.thread is not None:
            why = "use either start() or `async with`, not both"
            raise ConfigError("manager", "started already", why)
        await self.door.open(self._progress)
        self._loop = asyncio.get_running_loop()
        self._note_started()

    def start(self) -> None:
        """Open on a loop in a thread; do nothing while open."""
        self.check_process()
        if self.thread is not None or self.door.is_open:
            return
        thread = LoopThread()
        thread.start()
        try:
            thread.call(lambda: self.door.open(self._progress))
        except BaseException:
            thread.stop()
            self.door.abandon()
            raise
        self.thread = thread
        self._note_started()

    def _note_started(self) -> None:
        """Bind the manager to this process, and end it at exit if nobody closes it before."""
        self._home = HomeProcess("the manager")
        unclosed.remember(self)

    # -- the end --------------------------------------------------------------------------------

    async def leave(self, error: BaseException | None) -> None:
        """Close at the end of an `async with` block that raised `error`, on whatever loop."""
        if not self.is_unclosed:
            return  # closed already, or a forked child, which has nothing to release
        if asyncio.get_running_loop() is self._loop:
            await self._close()
            return
        assert self._loop is not None
        if self._loop.is_running():
            closing = asyncio.run_coroutine_threadsafe(self._close(), self._loop)
            await asyncio.wrap_future(closing)
            return
        self.end()
        if error is None:
            raise ClosedError(
                "the manager was closed on another event loop than its own, which no longer runs:"
                " everything is released, but blocks that were not flushed are not on SSD"
            )

    def shutdown(self) -> None:
        """Close, from any thread, in a signal handler, and at exit. Idempotent."""
        if forks.is_exiting() and not self.is_unclosed:
            return  # such as in a forked child, by a callback that its parent has registered
        self.check_process()
        if self._home is not None:
            self.end()

    async def _close(self) -> None:
        unclosed.forget(self)
        self.tasks.close()
        await self.door.close()

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
            thread, self.thread = self.thread, None
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
                if self.door.abandon():
                    why = "its event loop could not close it: what was not flushed is not on SSD"
                    log.warning("engine_abandoned", reason=why)

    def __del__(self) -> None:
        if self._home is not None:
            unclosed.end_forgotten(self)

    @property
    def is_unclosed(self) -> bool:
        """Return whether this process has to close the engine."""
        return self._home is not None and self._home.is_here and not self.door.is_closed

    # -- calls ----------------------------------------------------------------------------------

    def run(self, *arguments: Any) -> Coroutine[Any, Any, KVResponse]:
        """Return a coroutine that runs a request on the engine's loop; await it on any loop."""
        spec = RequestSpec(*arguments)
        if self.thread is None:
            self._check_loop()
            self.order_requests_after(spec.operation)
            return self.door.submit(spec).run()
        self.check_process()
        self.order_requests_after(spec.operation)
        return self.thread.call_async(lambda: self.door.submit(spec).run())

    def blocking(self, call: str, instead: str) -> LoopThread:
        """Return the thread that runs the loop, for a call that waits for it.

        Raises:
            ClosedError: there is none, because the loop is the caller's own.
        """
        self.check_process()
        if self.thread is None:
            why = f"{call}() is for a manager started with start(); with `async with`, {instead}"
            raise ClosedError(why)
        return self.thread

    def start_task(self, spec: RequestSpec) -> int:
        """Start a request behind what this thread's streams have queued; return its task id."""
        self.check_process()
        self.order_requests_after(spec.operation)
        return self.call(lambda: self.tasks.start(spec))

    async def task_response(self, task_id: int) -> KVResponse:
        """Return a task's response once it has one.

        Cancellation: the task is cancelled, and CancelledError raised once it is over.
        """
        return await self.call_async(lambda: self.tasks.response(task_id))

    def order_after(self, operation: Operation) -> None:
        """Make later copies wait for what the calling thread's streams have queued by now.

        Raises:
            DeviceError: a driver refused. The device is down from then on.
        """
        self.door.order_after(operation)

    def order_requests_after(self, operation: Operation) -> None:
        """Do what `order_after` does, but let a request end as UNREADY if a device is down."""
        if self.door.streams:
            with suppress(DeviceError):
                self.door.order_after(operation)

    def nudge_device(self) -> None:
        """Check again whether transfers that wait for layers may go on. From any thread.

        Raises:
            ClosedError: not started, or shut down.
        """
        self._post(self.door.nudge_device)

    def cancel_soon(self, task_id: int) -> None:
        """Cancel a task soon, without waiting for its end. From any thread."""
        self._post(lambda: self.tasks.cancel_if_there(task_id))

    def _post(self, work: Callable[[], None]) -> None:
        self.check_process()
        thread, loop = self.thread, self._loop
        if thread is not None:
            thread.post(work)
            return
        if loop is None:
            raise ClosedError("the manager is not started, or is shut down")
        try:
            loop.call_soon_threadsafe(work)
        except RuntimeError as error:
            raise ClosedError("the event loop that the manager runs on is closed") from error

    def call(self, work: Callable[[], T]) -> T:
        """Return the result of synchronous work on the engine's loop."""
        if self.thread is None:
            self._check_loop()
            return work()

        async def wrapped() -> T:
            return work()

        return self.thread.call(wrapped)

    async def call_async(self, work: Callable[[], Awaitable[T]]) -> T:
        """Return the result of work on the engine's loop, awaited there or on another loop."""
        if self.thread is not None:
            return await self.thread.call_async(work)
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
