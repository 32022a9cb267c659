"""The scheduler: the only writer of the index and of runs.

Everything here is synchronous, on the loop's thread, between awaits: a request is planned and
launched in one step, and a batch of ended ops from an actor is handled in one step. Waiters see
only what the core has settled: a result is in the flight before its future is resolved.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from flexkv.actors.actor import TransferActor
from flexkv.actors.flight import Flight, wake
from flexkv.actors.joins import FlightEvent, Joins
from flexkv.actors.outcome import response_of
from flexkv.actors.persistence import PersistenceHooks
from flexkv.actors.tier_health import TierHealth
from flexkv.actors.write_behind import WriteBehind
from flexkv.common.errors import (
    CorruptBlockError,
    DeadlineError,
    FlexKVError,
    InvariantError,
    RecalledError,
    TransferError,
)
from flexkv.common.request import Operation, Request, Span
from flexkv.common.terms import BLOCK_KEY_BYTES, BlockIds, Route, Tier
from flexkv.graph.draft import NOTHING_AVOIDED, Avoid
from flexkv.graph.ops import OpSpec, OpState
from flexkv.graph.plan import OPS_MAX, Plan
from flexkv.graph.planner import Planned, Planner
from flexkv.graph.run import (
    AnswerCaller,
    CancelRun,
    EndRun,
    IssueOp,
    LaunchRun,
    OpDone,
    OpFailed,
    OpOverdue,
    RecallOp,
    RunCommand,
    RunEvent,
    SettleOp,
)
from flexkv.index.claims import Claim, Holding
from flexkv.index.found import Found
from flexkv.index.owed import Taken
from flexkv.index.residency import Residency
from flexkv.io.ports import Completion
from flexkv.observe.logs import get_logger
from flexkv.observe.observer import Observer

log = get_logger(__name__)

_BEHIND = Request(Operation.PREFETCH, -1, 0, 1, Span(0, 0, 0, 0), bytes(BLOCK_KEY_BYTES))
"""The request of runs that write owed blocks, which no caller has asked for."""


class Scheduler:
    """Plans requests, runs their state machines, and posts their ops to the actors."""

    def __init__(
        self,
        residency: Residency,
        planner: Planner,
        actors: Mapping[Tier, TransferActor],
        observer: Observer,
        persistence: Mapping[Tier, PersistenceHooks] | None = None,
        io_deadline_s: float = 10.0,
    ) -> None:
        self._residency = residency
        self._planner = planner
        self._actors = actors
        self._observer = observer
        self._persistence = persistence or {}
        self.watch = TierHealth(actors, io_deadline_s, self._give_up, observer.event)
        self.on_hang: Callable[[Flight], None] = lambda flight: None
        """Called with each flight whose device does not answer."""
        self._stuck: set[int] = set()
        self._awaiting_layers: set[Flight] = set()
        """Puts that wait for layers to be written; no other request may wait for their blocks."""
        self._flights: dict[int, Flight] = {}
        self._joins = Joins()
        self._events: deque[FlightEvent] = deque()
        self.behind: WriteBehind | None = None
        """Writes what lower tiers are owed; None without lower tiers."""
        self._failed: FlexKVError | None = None
        self.moved: Counter[Tier] = Counter()  # by target, blocks from and to lower tiers
        self._next_run = 0
        self._idle: list[asyncio.Future[None]] = []
        self._on: dict[type, Callable[[Flight, int, RunCommand], None]] = {
            IssueOp: self._issue,
            SettleOp: self._settle,
            RecallOp: self._recall,
        }

    @property
    def flights(self) -> int:
        """Return the number of runs that are not over, write-behind included."""
        return len(self._flights)

    # -- in -------------------------------------------------------------------------------------

    def begin(self, request: Request, arrived_ns: int | None = None, near: bool = False) -> Flight:
        """Plan and launch a request; the returned flight may have its response already.

        For `near` see `Planner.plan`.
        """
        begin_ns = self._observer.now_ns()
        if self._residency.timed:
            self._residency.tick(begin_ns // 1_000_000_000)
        run_id = self._next_run
        self._next_run += 1
        self.update_avoid()
        planned = self._planner.plan(request, run_id, near)
        if self._persistence and request.operation is Operation.PUT:
            self._note_erased(planned.plan)
        if request.watch is not None:
            request.watch.expect(planned.plan.device_op_ids())
        if self._observer.tracer is not None:
            self._observer.planned(request, planned.plan)
        flight = Flight(request, planned, begin_ns if arrived_ns is None else arrived_ns, begin_ns)
        self._flights[run_id] = flight
        if request.watch is not None and request.operation is Operation.PUT:
            self._awaiting_layers.add(flight)
        if self.behind is not None:
            if request.operation is Operation.PUT:
                self.behind.planned(planned)
            elif len(here := planned.found.in_host):
                self.behind.reused(here)
        self._take(flight, LaunchRun())
        return flight

    def _note_erased(self, plan: Plan) -> None:
        """Record that places are about to be written, ahead of the writes, which wait for it."""
        for fill in plan.fills:
            for tier, hooks in self._persistence.items():
                if tier in fill.ids:
                    hooks.erased(fill.ids[tier])

    def write_behind(self, taken: Taken) -> None:
        """Start to write owed blocks to their tier."""
        run_id = self._next_run
        self._next_run += 1
        plan = self._planner.plan_behind(taken, run_id)
        if taken.hold is not None:  # the plan has a claim of its own
            self._residency.claims.settle(taken.hold, filled=False)
        if self._observer.tracer is not None:
            self._observer.planned(_BEHIND, plan)
        now_ns = self._observer.now_ns()
        flight = Flight(_BEHIND, Planned(plan, Found(0, 0, {}), None), now_ns, now_ns)
        flight.taken = taken
        self._flights[run_id] = flight
        self._take(flight, LaunchRun())

    def update_avoid(self) -> None:
        """Set what plans must avoid: tiers that are down, and ops that hang or wait for layers."""
        avoid = NOTHING_AVOIDED
        if not self.watch.all_up or self._stuck or self._awaiting_layers:
            waiting = {op_id for flight in self._awaiting_layers for op_id in flight.unfed_op_ids()}
            avoid = Avoid(*self.watch.unusable(), frozenset(self._stuck | waiting))
        self._planner.avoid = avoid

    def _give_up(self, tier: Tier) -> None:
        """Give up the ops of a tier that hangs: nobody waits for them, hardware keeps buffers."""
        if tier is Tier.DEVICE:
            self.strand(None, "the device did not complete it in time")
            return
        for flight in list(self._flights.values()):
            for op in flight.plan.template.ops:
                if op.route is None or op.route.outer is not tier:
                    continue
                if flight.run.states[op.index] in (OpState.IN_FLIGHT, OpState.DRAINING):
                    self._overdue(flight, op)
        self._work()

    def _overdue(self, flight: Flight, op: OpSpec) -> None:
        assert op.route is not None
        op_id = flight.plan.op_id(op)
        begin, end = flight.plan.bounds(op)
        error = DeadlineError(op_id, str(op.route), end - begin, "it did not complete in time")
        flight.hang(error)
        self._events.append((flight, OpOverdue(op.index, error)))
        if op.route.inbound:
            self._stuck.add(op_id)
        self._events += self._joins.end(op_id, False)
        self._actors[op.route.outer].recall(op_id)  # what hardware has not begun

    def strand(self, group: int | None, why: str) -> None:
        """Stop waiting for the device transfers of a group whose devices do not answer.

        If the group is None, this is done for all. Admission then still counts their requests as
        under way, since other requests would have no other device to use.

        A device may resume a transfer at any time. So the blocks stay claimed, and the caller
        waits, until the port reports the end of the transfer. Flushes, admission, and other
        requests for the same blocks do not wait for that.
        """
        for flight in list(self._flights.values()):
            if group is not None and flight.group != group:
                continue
            for op in flight.plan.template.ops:
                states = (OpState.IN_FLIGHT, OpState.DRAINING)
                if op.route is None or op.route.outer is not Tier.DEVICE:
                    continue
                if flight.run.states[op.index] in states:
                    self._strand(flight, op, why)
                    if group is not None:
                        self.on_hang(flight)
        self._work()

    def _strand(self, flight: Flight, op: OpSpec, why: str) -> None:
        assert op.route is not None
        op_id = flight.plan.op_id(op)
        begin, end = flight.plan.bounds(op)
        flight.hang(DeadlineError(op_id, str(op.route), end - begin, why))
        if op.route.target is Tier.HOST:
            self._stuck.add(op_id)
        self._events += self._joins.end(op_id, False)

    def stop_waiting(self, flight: Flight) -> None:
        """Have a flight wait no more for far blocks, nor for blocks that other requests fill.

        What is being fetched arrives all the same, for later requests and for those that wait.
        """
        for op in flight.plan.template.ops:
            if flight.run.states[op.index] is not OpState.IN_FLIGHT:
                continue
            if op.route is None:
                filler = flight.plan.fills[op.leg].fillers[op.chunk]
                self._events.append(self._joins.leave(filler, flight, op.index))
            elif op.route.source > Tier.HOST and op.route.source not in self._residency.tiers:
                begin, end = flight.plan.bounds(op)
                op_id, why = flight.plan.op_id(op), "the time of its request is over"
                error = DeadlineError(op_id, str(op.route), end - begin, why)
                self._events.append((flight, OpOverdue(op.index, error)))
        self._work()

    def cancel(self, flight: Flight) -> None:
        """End a flight early. It is answered once no hardware touches its device slots."""
        if not flight.run.ended:
            self._observer.event("cancel", request_id=flight.request.request_id)
            self._take(flight, CancelRun())

    def cancel_unanswered(self) -> None:
        """Cancel every flight whose caller still waits; write-behind of the others goes on."""
        for flight in list(self._flights.values()):
            if flight.response is None:
                self._take(flight, CancelRun())

    def cancel_all(self) -> None:
        """Cancel every flight, write-behind included."""
        for flight in list(self._flights.values()):
            if not flight.run.ended:
                self._take(flight, CancelRun())

    def report(self, ends: Iterable[Completion]) -> None:
        """Handle a batch of ended ops from an actor."""
        for op_id, error, filled in ends:
            run_id, number = divmod(op_id, OPS_MAX)
            flight = self._flights[run_id]
            op = flight.plan.template.ops[number]
            begin, end = flight.plan.bounds(op)
            moved = flight.run.leading.get(number, end - begin) if error is None else filled
            self._observer.op_ended(flight.request, flight.plan, op, moved, error)
            event = OpDone(number) if error is None else OpFailed(number, error, filled)
            self._events.append((flight, event))
            self._stuck.discard(op_id)
            if op.route is not None and op.route.outer > Tier.HOST:
                self.watch.ended(op.route, error)
                self.moved[op.route.target] += moved
            elif flight.late is not None and flight.late.op_id == op_id:
                flight.late = None  # its device answers again
            if error is not None:
                self._op_failed(flight, op, error, filled)
        self._work()

    def _op_failed(self, flight: Flight, op: OpSpec, error: TransferError, filled: int) -> None:
        route = op.route
        if route is not None and route.source is Tier.HOST and route.outer > Tier.HOST:
            self._unwritten(flight, op, error)
        if not isinstance(error, RecalledError):
            self._distrust(flight, op, error, filled)

    def _unwritten(self, flight: Flight, op: OpSpec, error: TransferError) -> None:
        """Owe a lower tier again the blocks that could not be written to it."""
        if self.behind is None or op.route is None:
            return
        begin, end = flight.plan.bounds(op)
        host_ids = flight.plan.fills[op.leg].ids[Tier.HOST][begin:end]
        self.behind.failed(op.route.target, host_ids, flight.taken, error)

    def drop_corrupt(self, tier: Tier, error: CorruptBlockError, request_id: int = -1) -> None:
        """Forget corrupt blocks of a tier, and keep a later start from restoring them."""
        block_ids = np.array(error.block_ids, np.int64)
        self._observer.corrupt(tier, error, request_id)
        self._residency.forget(tier, block_ids)
        if tier in self._persistence:
            self._persistence[tier].erased(block_ids)

    def drop_unsynced(self, tier: Tier, block_ids: BlockIds) -> None:
        """Forget blocks of a lower tier that a failed sync may have lost, and owe them again.

        Blocks being written may be lost as well, if they reached the kernel before the sync, so
        their writes prove nothing when they end.
        """
        self._residency.forget(tier, block_ids)
        route = Route(Tier.HOST, tier)
        for flight in self._flights.values():
            for op in flight.writes():
                if op.route == route:
                    begin, end = flight.plan.bounds(op)
                    ids = flight.plan.fills[op.leg].ids
                    self._residency.forget(tier, ids[tier][begin:end])
                    if self.behind is not None:
                        self.behind.owe(tier, ids[Tier.HOST][begin:end])
        self._work()

    def _distrust(self, flight: Flight, op: OpSpec, error: TransferError, filled: int) -> None:
        """Forget an op's blocks in its source tier, from the first that did not arrive on.

        A put can store them again. If the source is a far tier, its catalogue doubts them instead.
        """
        if op.route is None or op.route.source <= Tier.HOST:
            return
        source, transfer = op.route.source, flight.plan.transfer(op)
        lost = transfer.part(filled, transfer.block_count)
        if source not in self._residency.tiers:  # far
            self._planner.catalogue.doubt(lost, error)
            if isinstance(error, CorruptBlockError):
                self._observer.corrupt(source, error, flight.request.request_id)
        elif isinstance(error, CorruptBlockError):
            self.drop_corrupt(source, error, flight.request.request_id)
        else:
            # The journal keeps what could not be read: a later run may be able to read it.
            self._residency.forget(source, lost.source_ids)

    async def wait_idle(self) -> None:
        """Return once no flight is left, write-behind included, or the engine has failed."""
        while self._flights and self._failed is None:
            waiter = asyncio.get_running_loop().create_future()
            self._idle.append(waiter)
            await waiter

    def hold(self, holdings: Iterable[Holding]) -> tuple[int, ...]:
        """Keep blocks from eviction until `release` is called with the returned ids."""
        run_id = self._next_run
        self._next_run += 1
        op_ids = []
        for number, holding in enumerate(holdings):
            op_ids.append(run_id * OPS_MAX + number)
            self._residency.claims.open(op_ids[-1], Claim(run_id, holding, None))
        return tuple(op_ids)

    def release(self, op_ids: Iterable[int]) -> None:
        """Release blocks that `hold` keeps from eviction."""
        for op_id in op_ids:
            self._residency.claims.settle(op_id, filled=False)

    @property
    def failure(self) -> FlexKVError | None:
        """Return why the engine has failed; None while it has not."""
        return self._failed

    def fail(self, failure: FlexKVError) -> None:
        """Fail every flight, since an engine that failed or is gone cannot answer otherwise."""
        self._failed = failure
        for flight in self._flights.values():
            flight.fail(failure)
        wake(self._idle)

    def under_way(self) -> list[Flight]:
        """Return the puts under way."""
        flights = self._flights.values()
        return [flight for flight in flights if flight.request.operation is Operation.PUT]

    # -- work -----------------------------------------------------------------------------------

    def _take(self, flight: Flight, event: RunEvent) -> None:
        self._events.append((flight, event))
        self._work()

    def _work(self) -> None:
        """Handle events until none is left.

        Carrying out a command may add events, but never calls this again: actors and timers report
        in a later step of the loop.
        """
        while self._events:
            flight, event = self._events.popleft()
            for command in flight.run.handle(event):
                kind = type(command)
                if kind is AnswerCaller:
                    self._answer(flight)
                elif kind is EndRun:
                    self._end(flight)
                else:
                    self._on[kind](flight, command.op, command)  # type: ignore[union-attr]
        if self.behind is not None and self.behind.is_active:
            self.behind.pump()

    def _issue(self, flight: Flight, op: int, command: RunCommand) -> None:
        spec = flight.plan.template.ops[op]
        if spec.route is None:
            self._join(flight, spec)
            return
        if self._observer.tracer is not None:
            self._observer.op_issued(flight.plan.op_id(spec))
        if spec.route.outer > Tier.HOST:
            self.watch.begun(spec.route)
        elif self.watch.watches_device:
            self.watch.arm()
        transfer = flight.plan.transfer(spec)
        if op in flight.run.leading:  # the op before it has filled only these
            transfer = transfer.part(0, flight.run.leading[op])
        self._actors[spec.route.outer].post(transfer)

    def _settle(self, flight: Flight, op: int, command: RunCommand) -> None:
        op_id = flight.plan.run_id * OPS_MAX + op
        assert isinstance(command, SettleOp)
        self._residency.claims.settle(op_id, command.filled, command.leading)
        spec = flight.plan.template.ops[op]
        if spec.route is not None and spec.route.target is not Tier.DEVICE:
            self._settled(flight.plan, spec, command)
        flight.op_over()
        self._events += self._joins.end(op_id, command.filled)

    def _settled(self, plan: Plan, op: OpSpec, settle: SettleOp) -> None:
        """Record what became READY in a lower tier; owe what became READY in host memory only."""
        assert op.route is not None
        target, fill = op.route.target, plan.fills[op.leg]
        hooks = self._persistence.get(target)
        behind = self.behind if target is Tier.HOST else None
        if hooks is None and behind is None:
            return
        begin, end = plan.bounds(op)
        filled = fill.ids[target][begin : end if settle.filled else begin + settle.leading]
        if hooks is not None and len(filled):
            hooks.stored(filled)
        if behind is None:
            return
        if fill.owed_to:
            behind.coming_blocks -= end - begin
        if len(filled):
            for tier in fill.owed_to:
                behind.owe(tier, filled)
            behind.arrived(filled)

    def _recall(self, flight: Flight, op: int, command: RunCommand) -> None:
        spec = flight.plan.template.ops[op]
        if spec.route is None:
            filler = flight.plan.fills[spec.leg].fillers[spec.chunk]
            self._events.append(self._joins.leave(filler, flight, op))
            return
        op_id = flight.plan.op_id(spec)
        if not spec.keeps or op_id not in self._joins:  # else another request waits
            self._actors[spec.route.outer].recall(op_id)

    def _join(self, flight: Flight, spec: OpSpec) -> None:
        """Make a barrier wait for the op that fills its blocks, which was live at planning."""
        filler = flight.plan.fills[spec.leg].fillers[spec.chunk]
        self._joins.join(filler, flight, spec.index)

    def _answer(self, flight: Flight) -> None:
        flight.answer(response_of(flight.request, flight.planned, flight.run))
        if flight.taken is None and not flight.may_be_planned_again:
            self.tell(flight)

    def tell(self, flight: Flight) -> None:
        """Count an answered flight as the end of its request."""
        assert flight.response is not None
        self._observer.request_ended(
            flight.request,
            flight.planned,
            flight.response,
            (flight.arrived_ns, flight.begin_ns),
        )

    def _end(self, flight: Flight) -> None:
        del self._flights[flight.plan.run_id]
        if self._awaiting_layers:
            self._awaiting_layers.discard(flight)
        flight.end()
        if flight.taken is not None and self.behind is not None:
            self.behind.ended(flight.taken)
        self._residency.evict_ahead()
        if not self._flights:
            wake(self._idle)
        if self._residency.claims.of_owner(flight.plan.run_id):
            raise InvariantError(f"run {flight.plan.run_id} ended, but has open claims")
