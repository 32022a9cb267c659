"""Takes a request from its arrival to its answer: admission, planning, and waiting.

perform ─▶ Admission ─▶ look up ─▶ check ─▶ Scheduler.begin ─▶ answered ─▶ leave
                                                │
                    its device hangs: it no longer counts in admission;
                    the answer comes when hardware has let go
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import NamedTuple

from flexkv.actors.flight import Flight
from flexkv.actors.scheduler import Scheduler
from flexkv.actors.write_behind import WriteBehind
from flexkv.common.errors import ClosedError, FlexKVError
from flexkv.common.request import Operation, Request
from flexkv.engine.admission import Admission
from flexkv.engine.devices import UseCount
from flexkv.observe.observer import Observer


class RequestOwner(NamedTuple):
    """The group of a request, and what is called when the request is planned."""

    group: int = 0
    """The group with which it is admitted: see `Admission`."""
    check: Callable[[], None] | None = None
    """Called right before the request is planned, and again when it is planned anew.

    It raises if the request may not be planned any more."""
    begun: Callable[[], None] | None = None
    """Called whenever the request has been planned: a match's hold may be released then."""


ALONE = RequestOwner()

AGAIN_MAX = 4
"""How often a request is planned again because far blocks did not arrive; at last without any.

All tries after the first one end within `io_deadline_s` of its beginning, but for the one without
far blocks, which comes then at the latest."""


def times_again(flight: Flight) -> int:
    """Return how often a request may be planned again: once, or more if it is all or nothing.

    Other plans may each wait for blocks that another request fetches from far, in vain.
    """
    return AGAIN_MAX if flight.planned.is_whole else 1


class RequestRunner:
    """Runs the requests of one engine."""

    def __init__(
        self,
        admission: Admission,
        scheduler: Scheduler,
        observer: Observer,
        behind: WriteBehind,
        look_up: Callable[[Request], Awaitable[None] | None],
    ) -> None:
        """Take the parts of an engine; a request that hangs leaves `admission` early.

        `look_up` asks a far tier what a load may find there: see `Core.look_up`.
        """
        self._behind, self._look_up = behind, look_up
        self.admission = admission
        self._scheduler, self._observer = scheduler, observer
        scheduler.on_hang = self._give_place_back

    async def perform(self, request: Request, use: UseCount, turn: RequestOwner = ALONE) -> Flight:
        """Run a request to its answer; the returned flight has its response.

        Raises:
            FlexKVError: it was not admitted, or `turn.check` refused it.

        Cancellation: the request is cancelled, and CancelledError raised once no hardware touches
        its device slots any more; their content is undefined then.
        """
        flight: Flight | None = None
        arrived_ns, is_inside = None, False
        use.count += 1
        try:
            behind = self._behind
            if (request.operation is Operation.PUT or behind.is_active) and behind.lacks(request):
                await behind.make_room(request)
            if not self.admission.enter_nowait(turn.group):
                arrived_ns = self._observer.now_ns()
                await self.admission.enter(turn.group)
            is_inside = True
            arrived_ns = await self._informed(request, arrived_ns)
            clock_s = asyncio.get_running_loop().time
            until_s = clock_s() + self._scheduler.watch.deadline_s
            flight = self._begin(request, arrived_ns, turn)
            if flight.response is None:
                await flight.wait_answered()
            again, near = 0, False
            while flight.may_be_planned_again and again < times_again(flight) and not near:
                again += 1
                near = again == AGAIN_MAX or clock_s() >= until_s
                flight = self._begin(request, flight.arrived_ns, turn, flight.has_place, near)
                await self._answered(flight, None if near else until_s)
            if again and flight.may_be_planned_again:
                self._scheduler.tell(flight)
        except asyncio.CancelledError:
            if flight is not None:
                await self._cancelled(flight)
            raise
        else:
            return flight
        finally:
            if is_inside and (flight is None or flight.has_place):
                self.admission.leave(turn.group)
            use.leave()

    async def _informed(self, request: Request, arrived_ns: int | None) -> int | None:
        """Wait a moment for what a far tier says that it has; return when the request arrived."""
        if (answered := self._look_up(request)) is None:
            return arrived_ns
        if arrived_ns is None:
            arrived_ns = self._observer.now_ns()
        await answered
        return arrived_ns

    async def _cancelled(self, flight: Flight) -> None:
        """Cancel a flight, and return once no hardware touches its device slots any more."""
        self._scheduler.cancel(flight)
        with suppress(FlexKVError):  # the engine is gone, and with it the request
            await flight.wait_drained()
            if flight.may_be_planned_again:  # it had its answer, and was to be planned again
                self._scheduler.tell(flight)

    async def _answered(self, flight: Flight, until_s: float | None) -> None:
        """Wait for the answer to a flight, from `until_s` on without blocks from far or of others.

        What the flight needs of these is missing then.
        """
        try:
            async with asyncio.timeout_at(until_s):
                await flight.wait_answered()
        except TimeoutError:
            self._scheduler.stop_waiting(flight)
            await flight.wait_answered()

    def _begin(
        self, request: Request, arrived_ns: int | None, turn: RequestOwner, has_place: bool = True,
        near: bool = False,
    ) -> Flight:  # fmt: skip
        """Plan and launch a request.

        Args:
            request: what is asked for.
            arrived_ns: when it arrived; None: now.
            turn: whose it is.
            has_place: whether admission counts it.
            near: whether to plan it without far blocks: see `Planner.plan`.
        """
        if turn.check is not None:
            turn.check()
        flight = self._scheduler.begin(request, arrived_ns, near)
        flight.group, flight.has_place = turn.group, has_place
        if turn.begun is not None:
            turn.begun()
        return flight

    def turn_away(self, group: int, why: str) -> None:
        """Refuse a group's requests, and stop waiting for its devices, which do not answer."""
        self.admission.turn_away(group, ClosedError(why))
        self._scheduler.strand(group, why)

    def take_back(self, group: int) -> None:
        """Admit a group's requests again, since its devices answer."""
        self.admission.turn_away(group, None)

    def _give_place_back(self, flight: Flight) -> None:
        if flight.has_place and flight.response is None:
            flight.has_place = False
            self.admission.leave(flight.group)
