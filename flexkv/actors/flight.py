"""A request under way: its plan, its run, and who waits for its answer or its end."""

from __future__ import annotations

import asyncio

from flexkv.common.errors import DeadlineError, FlexKVError
from flexkv.common.request import KVResponse, Request
from flexkv.common.terms import Tier
from flexkv.graph.ops import OpSpec, OpState
from flexkv.graph.planner import Planned
from flexkv.graph.run import Run
from flexkv.index.owed import Taken

_BEGUN = (OpState.IN_FLIGHT, OpState.DRAINING, OpState.OVERDUE)


class Flight:
    """One request under way: its plan, its run, and the response for its caller."""

    __slots__ = (
        "_answer_waiters", "_end_waiters", "arrived_ns", "begin_ns", "failure", "group",
        "has_place", "late", "plan", "planned", "request", "response", "run", "taken",
    )  # fmt: skip

    def __init__(self, request: Request, planned: Planned, arrived_ns: int, begin_ns: int) -> None:
        self.request = request
        self.planned = planned
        self.plan = planned.plan
        # A caller that follows layers expects every planned block in a layer that is there.
        goes_on_in_part = planned.plan.watch is None and not planned.is_whole
        self.run = Run(planned.plan.template, goes_on_in_part)
        self.arrived_ns, self.begin_ns = arrived_ns, begin_ns
        self.response: KVResponse | None = None
        self.failure: FlexKVError | None = None
        self.late: DeadlineError | None = None
        """Why nobody should wait for the end: an op hangs. None while none does."""
        self.group, self.has_place = 0, True
        """The group with which it was admitted, and whether admission still counts it there."""
        self.taken: Taken | None = None
        """The owed blocks that are written to a lower tier; None for a caller's request."""
        self._answer_waiters: list[asyncio.Future[None]] = []
        self._end_waiters: list[asyncio.Future[None]] = []

    async def wait_answered(self) -> KVResponse:
        """Return the response once there is one. Cancelling the wait cancels nothing else.

        Raises:
            FlexKVError: the engine failed, or is gone.
        """
        while self.response is None:
            await self._waiter(self._answer_waiters)
        return self.response

    async def wait_drained(self) -> KVResponse:
        """Return the response once there is one, even if cancelled: hardware uses the slots."""
        while self.response is None:
            try:
                await self._waiter(self._answer_waiters)
            except asyncio.CancelledError:
                continue
        return self.response

    async def wait_ended(self) -> None:
        """Return once every op is over, write-behind included.

        Raises:
            FlexKVError: the engine failed, or is gone.
            DeadlineError: an op has not ended in time.
        """
        while not self.run.ended:
            if self.late is not None:
                raise self.late
            await self._waiter(self._end_waiters)

    async def wait_written(self) -> None:
        """Return once every write to a lower tier that has begun is over.

        Raises:
            FlexKVError: the engine failed, or is gone.
            DeadlineError: a write has not ended in time.
        """
        begun = {op.index for op in self.writes()}
        while writes := [op for op in self.writes() if op.index in begun]:
            late = {self.plan.op_id(op) for op in writes if self._state(op) is OpState.OVERDUE}
            for error in self.run.errors:
                if error.op_id in late:
                    raise error
            await self._waiter(self._end_waiters)

    def writes(self) -> list[OpSpec]:
        """Return the ops that write to lower tiers, have begun, and are not over."""
        ops = self.plan.template.ops
        return [
            op
            for op in ops
            if op.route is not None and op.route.source is Tier.HOST < op.route.target
            if self._state(op) in _BEGUN
        ]

    def _state(self, op: OpSpec) -> OpState:
        return self.run.states[op.index]

    @property
    def may_be_planned_again(self) -> bool:
        """Return whether blocks are missing that another plan may do without.

        Either another request did not fill them; or they were to be fetched from far, by a load
        that brings all or nothing: the catalogue promises less by now, so another plan may bring a
        shorter prefix. If the device has failed, no other plan helps.
        """
        if not self.run.errors or self.run.cancelled:
            return False
        ops = [self.plan.template.ops[number] for number in self.run.failed]
        routes = [op.route for op in ops if op.route is not None]
        if any(route.outer is Tier.DEVICE for route in routes):
            return False
        return len(routes) < len(ops) or any(route.source in self.planned.far for route in routes)

    def unfed_op_ids(self) -> list[int]:
        """Return the ids of the ops that wait for layers to be written."""
        watch = self.request.watch
        if watch is None or watch.ready >= watch.num_layers:
            return []
        return self.plan.device_op_ids()

    def _waiter(self, waiters: list[asyncio.Future[None]]) -> asyncio.Future[None]:
        if self.failure is not None:
            raise self.failure
        waiter = asyncio.get_running_loop().create_future()
        waiters.append(waiter)
        return waiter

    def answer(self, response: KVResponse) -> None:
        """Store the response, and wake those who wait for it."""
        self.response = response
        wake(self._answer_waiters)

    def end(self) -> None:
        """Wake those who wait for the end."""
        wake(self._end_waiters)

    def op_over(self) -> None:
        """Wake those who wait for the end, since they may wait for this op."""
        if self._end_waiters:
            wake(self._end_waiters)

    def hang(self, error: DeadlineError) -> None:
        """Record that an op hangs, and wake those who wait for the end."""
        self.late = error
        wake(self._end_waiters)

    def fail(self, failure: FlexKVError) -> None:
        """Record that the engine failed, and wake all waiters: no answer and no end will come."""
        self.failure = failure
        wake(self._answer_waiters)
        wake(self._end_waiters)


def wake(waiters: list[asyncio.Future[None]]) -> None:
    """Wake all waiters, and empty the list."""
    for waiter in waiters:
        if not waiter.done():
            waiter.set_result(None)
    waiters.clear()
