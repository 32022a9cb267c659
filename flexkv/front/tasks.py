"""Task ids, by which synchronous engines refer to requests. Lives on the engine's loop.

A task is PREPARED by a match (it keeps what it found from eviction), LAUNCHED once it has slots,
and OVER once it has a response. It leaves the table when its response is collected. The number of
tasks is bounded, so that a caller who never collects cannot make the table grow without end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from msgspec import structs

from flexkv.common.errors import ConfigError, FlexKVError
from flexkv.common.request import KVResponse, KVResponseStatus, TokenMask
from flexkv.engine.runner import RequestOwner
from flexkv.engine.tickets import RequestSpec, mask_of, nothing_moved
from flexkv.front.door import AnyTicket, Door

TASKS_MAX = 1 << 16


class _Task:
    """One task: its request, and what became of it."""

    __slots__ = ("_over", "response", "ticket", "work")

    def __init__(self, ticket: AnyTicket) -> None:
        self.ticket = ticket
        self.work: asyncio.Task[None] | None = None
        self.response: KVResponse | None = None
        self._over = asyncio.Event()

    def answer(self, response: KVResponse) -> None:
        """Store the response, and wake those who wait; only the first response counts."""
        if self.response is None:
            self.response = response
        if self.ticket.request.watch is not None:
            self.ticket.request.watch.end()
        self._over.set()

    def answer_nothing(self, status: KVResponseStatus, error: FlexKVError | None = None) -> None:
        """Answer that nothing was moved."""
        self.answer(nothing_moved(self.ticket.request, status, error))

    async def wait_answered(self) -> None:
        """Return once there is a response."""
        await self._over.wait()


class TaskTable:
    """Every task that was issued and not yet collected."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._tasks: dict[int, _Task] = {}

    # -- issue ----------------------------------------------------------------------------------

    def prepare(self, spec: RequestSpec) -> tuple[int, TokenMask]:
        """Issue a task that `launch` starts; return its id, and which tokens need slots."""
        self._check_room()
        ticket = self._door.prepare(spec)
        return self._add(_Task(ticket)), mask_of(ticket.request)

    def start(self, spec: RequestSpec) -> int:
        """Issue a task and launch it at once."""
        self._check_room()
        task = _Task(self._door.submit(spec))
        self._launch(task)
        return self._add(task)

    def launch(self, task_ids: Sequence[int], slot_mappings: Sequence[Any]) -> None:
        """Launch prepared tasks with their slots; a launched task is left as it is.

        Raises:
            ConfigError: an id was never issued, the lengths differ, or slots break a rule; no task
                of the call was launched.
        """
        if len(task_ids) != len(slot_mappings):
            why = f"must have one entry per task id: {len(task_ids)}"
            raise ConfigError("slot_mappings", f"{len(slot_mappings)} entries", why)
        ready: dict[_Task, AnyTicket] = {}
        for task_id, slots in zip(task_ids, slot_mappings, strict=True):
            task = self._find(task_id)
            if task.work is None and task.response is None and task not in ready:
                ready[task] = task.ticket.with_slots(slots)
        for task, ticket in ready.items():
            task.ticket = ticket
            self._launch(task)

    # -- collect --------------------------------------------------------------------------------

    def cancel(self, task_ids: Sequence[int]) -> None:
        """Cancel tasks that are not over; each is answered once no hardware touches its slots."""
        for task in [self._find(task_id) for task_id in task_ids]:
            self._cancel(task)

    def cancel_if_there(self, task_id: int) -> None:
        """Cancel a task, unless it was collected meanwhile."""
        if task_id in self._tasks:
            self._cancel(self._tasks[task_id])

    def _cancel(self, task: _Task) -> None:
        if task.response is not None:
            return
        task.ticket.release()
        if task.work is None:
            task.answer_nothing(KVResponseStatus.CANCELLED)
        else:
            task.work.cancel()

    async def cancel_and_drain(self, task_ids: Sequence[int]) -> None:
        """Cancel tasks, and return once no hardware touches their slots."""
        self.cancel(task_ids)
        works = [self._find(task_id).work for task_id in task_ids]
        if running := [work for work in works if work is not None]:
            await asyncio.wait(running)

    async def wait(
        self, task_ids: Sequence[int], timeout: float | None, completely: bool
    ) -> dict[int, KVResponse]:
        """Return the tasks' responses; a task not over in time is cancelled, with status TIMEOUT.

        Args:
            task_ids: tasks that were launched; any other task times out.
            timeout: in seconds, for all of them together; None = as long as it takes.
            completely: wait for the write-behind too.
        """
        tasks = {task_id: self._find(task_id) for task_id in task_ids}
        try:
            async with asyncio.timeout(timeout):
                for task in tasks.values():
                    await task.wait_answered()
                    if completely:
                        await task.ticket.wait_written()
        except TimeoutError:
            late = [task_id for task_id, task in tasks.items() if task.response is None]
            await self._cancel_late(late)
        return {
            task_id: self._collect(task_id, task, completely) for task_id, task in tasks.items()
        }

    async def response(self, task_id: int) -> KVResponse:
        """Return the response of one task once it has one.

        Cancellation: the task is cancelled, and CancelledError raised once it is over.
        """
        task = self._find(task_id)
        try:
            await task.wait_answered()
        except asyncio.CancelledError:
            self._cancel(task)
            while task.response is None:
                with suppress(asyncio.CancelledError):
                    await task.wait_answered()
            self._collect(task_id, task)
            raise
        return self._collect(task_id, task)

    async def _cancel_late(self, task_ids: Sequence[int]) -> None:
        """Cancel tasks that were not over in time, and answer them with TIMEOUT."""
        tasks = [self._find(task_id) for task_id in task_ids]
        await self.cancel_and_drain(task_ids)
        for task in tasks:
            task.response = nothing_moved(task.ticket.request, KVResponseStatus.TIMEOUT)

    def try_wait(self, task_ids: Sequence[int]) -> dict[int, KVResponse]:
        """Return the responses of those tasks that are over."""
        tasks = {task_id: self._find(task_id) for task_id in task_ids}
        return {
            task_id: self._collect(task_id, task)
            for task_id, task in tasks.items()
            if task.response is not None
        }

    def close(self) -> None:
        """Release what prepared tasks hold."""
        for task in self._tasks.values():
            task.ticket.release()

    # -- inside ---------------------------------------------------------------------------------

    def _launch(self, task: _Task) -> None:
        ticket = task.ticket
        if ticket.response is not None:  # no device can serve it
            ticket.end()
            task.answer(ticket.response)
            return

        def over(work: asyncio.Task[None]) -> None:
            # A task that is cancelled before its first step runs none of its own code.
            ticket.end()
            task.answer_nothing(KVResponseStatus.CANCELLED)

        ticket.begin()
        task.work = self._door.supervisor.spawn("task", self._work(task))
        task.work.add_done_callback(over)

    async def _work(self, task: _Task) -> None:
        """Run a task's request, and turn every outcome into a response."""
        try:
            task.answer(await task.ticket.run(RequestOwner(begun=task.ticket.release)))
        except FlexKVError as error:
            task.answer_nothing(KVResponseStatus.FAILED, error)

    def _check_room(self) -> None:
        if len(self._tasks) >= TASKS_MAX:
            why = f"at most {TASKS_MAX} tasks may be uncollected: wait for or cancel some"
            raise ConfigError("tasks", len(self._tasks), why)

    def _add(self, task: _Task) -> int:
        number = task.ticket.request.request_id
        self._tasks[number] = task
        return number

    def _find(self, task_id: int) -> _Task:
        task = self._tasks.get(task_id)
        if task is None:
            raise ConfigError("task_ids", task_id, "is unknown: never issued, or already collected")
        return task

    def _collect(self, task_id: int, task: _Task, completely: bool = False) -> KVResponse:
        """Drop a task from the table, and return its response.

        With `completely`, an error of the write-behind is added. If several callers wait for one
        task, each gets the response.
        """
        self._tasks.pop(task_id, None)
        response = task.response
        assert response is not None
        if not completely or response.error is not None:
            return response
        error = task.ticket.write_error()
        return response if error is None else structs.replace(response, error=error)
