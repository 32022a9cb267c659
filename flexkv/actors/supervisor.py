"""The tasks of an engine: their group, with its root task, and the bell for which a task waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, cast

from flexkv.common.errors import InternalError
from flexkv.observe.logs import get_logger

log = get_logger(__name__)

T = TypeVar("T")


class Bell:
    """A signal for which one task waits; a ring while it does not wait is kept."""

    def __init__(self) -> None:
        self._rung = False
        self._waiter: asyncio.Future[None] | None = None

    def ring(self) -> None:
        """Wake the waiter, now or when it next waits."""
        self._rung = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> None:
        """Return once the bell has rung since the last wait."""
        if not self._rung:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._rung = False


class Supervisor:
    """The root task of an engine and the group of its other tasks, which are all started here.

    A task that raises is a bug of ours: it is logged, the group ends, and `on_failure` is called,
    so that nobody waits for an answer that cannot come. A session, which serves one peer and holds
    no state of the engine, ends alone.
    """

    def __init__(self, on_failure: Callable[[BaseException], None]) -> None:
        self._on_failure = on_failure
        self._stop = asyncio.Event()
        self._started = asyncio.Event()
        self._group = asyncio.TaskGroup()
        self._root: asyncio.Task[None] | None = None
        self._permanent: list[asyncio.Task[None]] = []
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Start the root task."""
        self._root = asyncio.get_running_loop().create_task(self._main(), name="flexkv")
        await self._started.wait()

    def spawn(self, name: str, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task that ends by itself; one that raises ends the engine."""
        return cast("asyncio.Task[T]", self._spawn(name, work, is_session=False))

    def spawn_session(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start a task that serves one peer; what it raises is logged, and ends only this task.

        An InternalError ends the engine all the same: it means that the engine's own state is
        wrong, and not what the peer has sent.
        """
        return self._spawn(name, work, is_session=True)

    def _spawn(
        self, name: str, work: Coroutine[Any, Any, T], is_session: bool
    ) -> asyncio.Task[T | None]:
        reporting = self._reporting(name, work, is_session)
        task = self._group.create_task(reporting, name=f"flexkv {name}")
        # A task that is cancelled before its first step never awaits its work.
        task.add_done_callback(lambda _: work.close())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def keep(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Start a task that runs until `stop`."""
        self._permanent.append(self.spawn(name, work))

    async def stop(self) -> None:
        """Cancel the permanent tasks and return once every task is over."""
        self._stop.set()
        if self._root is not None:
            await asyncio.wait([self._root])

    def abandon(self) -> None:
        """Cancel every task, without waiting for its end: the loop may no longer run.

        No task takes another step, not even one that has been woken already.
        """
        for task in (*self._tasks, self._root):
            if task is not None:
                task.cancel()

    async def _main(self) -> None:
        try:
            async with self._group:
                self._started.set()
                await self._stop.wait()
                for task in self._permanent:
                    task.cancel()
        except BaseExceptionGroup as failures:
            self._on_failure(failures.exceptions[0])

    async def _reporting(
        self, name: str, work: Coroutine[Any, Any, T], is_session: bool
    ) -> T | None:
        """Run a task, and report at once what it raises, since others may wait for its work."""
        try:
            return await work
        except Exception as error:
            log.exception("task_failed", task=name)
            if is_session and not isinstance(error, InternalError):
                return None
            self._on_failure(error)
            raise


def spawn_on(
    loop: asyncio.AbstractEventLoop,
    work: Coroutine[Any, Any, T],
    ended: Callable[[asyncio.Task[T]], None],
) -> asyncio.Task[T]:
    """Start a task for a caller in another thread; `ended` is called once, when it is over."""
    task = loop.create_task(work, name="flexkv call")
    task.add_done_callback(ended)
    return task
