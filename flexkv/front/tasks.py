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

import numpy as np
from msgspec import structs

from flexkv.actors.flight import Flight
from flexkv.common.errors import ConfigError, FlexKVError, TransferError
from flexkv.common.request import (
    KVResponse,
    KVResponseStatus,
    Operation,
    Request,
    Span,
    TokenMask,
)
from flexkv.common.terms import BLOCK_KEY_BYTES, Tier
from flexkv.engine.engine import Engine
from flexkv.engine.runner import RequestOwner
from flexkv.engine.tickets import RequestSpec, Ticket
from flexkv.index.keys import Namespace
from flexkv.index.residency import Placement

TASKS_MAX = 1 << 16
TASKS = -1
"""The group of all holds of tasks; the groups of instances are not negative."""


class _Task:
    """One task: its request, and what became of it."""

    __slots__ = ("_over", "response", "ticket", "work")

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket
        self.work: asyncio.Task[None] | None = None
        self.response: KVResponse | None = None
        self._over = asyncio.Event()

    @property
    def request(self) -> Request:
        """Return what is asked for."""
        return self.ticket.request

    @property
    def flight(self) -> Flight | None:
        """Return the request under way, or what became of it."""
        return self.ticket.flight

    def answer(self, response: KVResponse) -> None:
        """Store the response, and wake those who wait; only the first response counts."""
        if self.response is None:
            self.response = response
        if self.request.watch is not None:
            self.request.watch.end()
        self._over.set()

    async def wait_answered(self) -> None:
        """Return once there is a response."""
        await self._over.wait()


class TaskTable:
    """Every task that was issued and not yet collected."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tasks: dict[int, _Task] = {}

    # -- issue ----------------------------------------------------------------------------------

    def get_match(
        self, token_ids: Any, token_mask: Any, namespace: Namespace
    ) -> tuple[int, TokenMask]:
        """Find what a get would load and keep it from eviction until launch or cancel.

        If it is not launched for long, the blocks may be evicted again: see `Holds`.
        """
        request = self._engine.intake(Operation.GET, token_ids, token_mask, namespace)
        self._check_room()
        found = self._engine.residency.find(request.keys, request.span.first_block)
        self._engine.holds.hold(TASKS, request.request_id, found.holdings)
        request = _narrowed(request, found.first, found.last)
        return self._add(_Task(self._engine.ticket(request))), _mask_of(request)

    def put_match(
        self, token_ids: Any, token_mask: Any, namespace: Namespace
    ) -> tuple[int, TokenMask]:
        """Find the tokens that a put should bring: from the first block that host memory lacks."""
        request = self._engine.intake(Operation.PUT, token_ids, token_mask, namespace)
        self._check_room()
        found = self._engine.residency.find(request.keys, request.span.first_block)
        resident = found.first + _leading(found.ready.get(Tier.HOST), found.first)
        request = _narrowed(request, resident, request.span.last_block)
        return self._add(_Task(self._engine.ticket(request))), _mask_of(request)

    def start(self, spec: RequestSpec) -> int:
        """Issue a task and launch it at once."""
        self._check_room()
        task = _Task(self._engine.submit(spec))
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
        ready: dict[_Task, Request | None] = {}
        for task_id, slots in zip(task_ids, slot_mappings, strict=True):
            task = self._find(task_id)
            if task.work is None and task.response is None and task not in ready:
                ready[task] = self._engine.with_slots(task.request, slots)
        for task, request in ready.items():
            task.ticket = self._engine.ticket_with_slots(task.request, request)
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
        self._release(task)
        if task.work is None:
            task.answer(_response(task.request, KVResponseStatus.CANCELLED))
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
                    if completely and task.flight is not None:
                        await task.flight.wait_ended()
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
            task.response = _response(task.request, KVResponseStatus.TIMEOUT)

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
            self._release(task)

    # -- inside ---------------------------------------------------------------------------------

    def _launch(self, task: _Task) -> None:
        if task.ticket.response is not None:  # no device can serve it
            self._release(task)
            task.answer(task.ticket.response)
            return
        uses_device = task.request.device_ids is not None

        def over(work: asyncio.Task[None]) -> None:
            # A task that is cancelled before its first step runs none of its own code.
            self._release(task)
            if uses_device:
                self._engine.devices_in_use.leave()
            task.answer(_response(task.request, KVResponseStatus.CANCELLED))

        if uses_device:  # in the same step in which its slots were checked
            self._engine.devices_in_use.enter()
        task.work = self._engine.supervisor.spawn("task", self._work(task))
        task.work.add_done_callback(over)

    async def _work(self, task: _Task) -> None:
        """Run a task's request, and turn every outcome into a response."""
        try:
            task.answer(await task.ticket.run(RequestOwner(begun=lambda: self._release(task))))
        except FlexKVError as error:
            task.answer(_response(task.request, KVResponseStatus.FAILED, error))

    def _release(self, task: _Task) -> None:
        self._engine.holds.release(TASKS, task.request.request_id)

    def _check_room(self) -> None:
        if len(self._tasks) >= TASKS_MAX:
            why = f"at most {TASKS_MAX} tasks may be uncollected: wait for or cancel some"
            raise ConfigError("tasks", len(self._tasks), why)

    def _add(self, task: _Task) -> int:
        self._tasks[task.request.request_id] = task
        return task.request.request_id

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
        if not completely or task.flight is None or response.error is not None:
            return response
        run = task.flight.run
        error = run.errors[0] if run.errors else None
        if not run.ended:
            error = TransferError(0, "write-behind", 0, "it was not finished in time")
        return response if error is None else structs.replace(response, error=error)


def _narrowed(request: Request, first_block: int, last_block: int) -> Request:
    """Return the request for fewer blocks; its slots begin and end with them."""
    per_block = request.tokens_per_block
    span = Span(first_block, last_block, first_block * per_block, last_block * per_block)
    keys = request.keys[: (last_block + 1) * BLOCK_KEY_BYTES]
    return structs.replace(request, span=span, keys=keys)


def _mask_of(request: Request) -> TokenMask:
    mask = np.zeros(request.token_count, np.bool_)
    mask[request.span.first_token : request.span.last_token] = True
    return mask


def _response(
    request: Request, status: KVResponseStatus, error: FlexKVError | None = None
) -> KVResponse:
    """Return the response of a request that moved nothing."""
    mask = np.zeros(request.token_count, np.bool_)
    return KVResponse(status, request.request_id, mask, error)


def _leading(placement: Placement | None, first: int) -> int:
    """Return the length of the unbroken run of blocks in a tier from position `first` on."""
    if placement is None or placement.positions.first != first:
        return 0
    places = placement.positions.places
    if places is None:
        return placement.block_count
    return int(np.count_nonzero(places == np.arange(first, first + len(places))))
