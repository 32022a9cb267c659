"""The state machine of one executing plan: events in, commands out. No I/O, no clock.

    READY ─── LaunchRun ────┐              ┌─ OpDone ───▶ DONE
                            ├─▶ IN_FLIGHT ─┼─ OpFailed ─▶ FAILED
    BLOCKED ─ others DONE ──┘       │      └─ OpOverdue ┐
                                CancelRun               ├─▶ OVERDUE ─ OpDone, OpFailed ─▶ SKIPPED
    READY, BLOCKED                  ▼                   │
       └─ CancelRun ─▶ SKIPPED   DRAINING ── OpOverdue ─┘
                                    └─────── OpDone, OpFailed ─▶ SKIPPED

A BLOCKED op begins when all ops before it are DONE.
Ops behind one that is FAILED or OVERDUE are SKIPPED, with one exception: the op that brings the
same blocks nearer to the device goes on with the leading blocks that a failed op has filled.

An overdue op is given up: nobody waits for it any more. Like a cancelled op in flight, which
drains, it is live until `OpDone` or `OpFailed`, because hardware owns its buffers until then. Every
op that claimed something is settled exactly once, on leaving its last live state. `AnswerCaller`
comes once, when every op that the caller waits for is over or overdue; by then no hardware touches
the device slots, because ops that do are never given up. `EndRun` comes once, last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import msgspec

from flexkv.common.errors import InvalidTransition, InvariantError, TransferError
from flexkv.graph.ops import OpState
from flexkv.graph.plan import Template

# -- events -------------------------------------------------------------------------------------


class LaunchRun(msgspec.Struct, frozen=True, gc=False):
    """The run may start."""


class OpDone(msgspec.Struct, frozen=True, gc=False):
    """An actor moved every byte of an op, or the blocks that a barrier waits for are there."""

    op: int


class OpFailed(msgspec.Struct, frozen=True, gc=False):
    """An actor gave up an op, or the blocks that a barrier waits for will not come."""

    op: int
    error: TransferError
    filled: int = 0
    """How many of the op's leading blocks arrived all the same."""


class OpOverdue(msgspec.Struct, frozen=True, gc=False):
    """An op in flight has not ended in time: whoever waits for it is told that it failed."""

    op: int
    error: TransferError


class CancelRun(msgspec.Struct, frozen=True, gc=False):
    """Nobody wants the run's result any more."""


RunEvent: TypeAlias = LaunchRun | OpDone | OpFailed | OpOverdue | CancelRun

# -- commands -----------------------------------------------------------------------------------


class IssueOp(msgspec.Struct, frozen=True, gc=False):
    """Post the op to its actor, or, for a barrier, wait for the op that fills its blocks."""

    op: int


class SettleOp(msgspec.Struct, frozen=True, gc=False):
    """End the op's claim: commit the blocks that it filled, or abort."""

    op: int
    filled: bool
    leading: int = 0
    """How many leading blocks are committed although the op did not fill all."""


class RecallOp(msgspec.Struct, frozen=True, gc=False):
    """Ask the op's actor to drop what hardware has not begun."""

    op: int


class AnswerCaller(msgspec.Struct, frozen=True, gc=False):
    """Answer the caller: every op that it waits for is over or overdue."""


class EndRun(msgspec.Struct, frozen=True, gc=False):
    """Forget the run: every op is over, every claim settled."""


RunCommand: TypeAlias = IssueOp | SettleOp | RecallOp | AnswerCaller | EndRun

_WAITED_FOR = (OpState.BLOCKED, OpState.READY, OpState.IN_FLIGHT, OpState.DRAINING)
_LIVE = (*_WAITED_FOR, OpState.OVERDUE)
_LAUNCH, _CANCEL, _ANSWER, _END = LaunchRun(), CancelRun(), AnswerCaller(), EndRun()


class Run:
    """One executing plan. Others may read `states`, `errors`, `failed` and `leading`.

    Attributes:
        failed: why ops have failed or are overdue, of those that were not cancelled before.
        leading: for ops that fill only some of their blocks, how many of the leading ones: ops that
            failed in part, and ops that go on with what such an op has filled.
    """

    __slots__ = (
        "_answers_left", "_blockers", "_goes_on_in_part", "_live", "cancelled", "errors",
        "failed", "launched", "leading", "states", "story", "template",
    )  # fmt: skip

    def __init__(self, template: Template, goes_on_in_part: bool = True) -> None:
        """Take the compiled graph.

        Args:
            template: of the plan.
            goes_on_in_part: whether the op behind one that has filled only some leading blocks
                goes on with these.
        """
        self.template, self._goes_on_in_part = template, goes_on_in_part
        self.states = list(template.start_states)
        self.errors: list[TransferError] = []
        self.failed: dict[int, TransferError] = {}
        self.leading: dict[int, int] = {}
        self.story: list[RunEvent] = []
        self.launched = False
        self.cancelled = False
        self._blockers = list(template.blockers)
        self._live = len(self.states)
        self._answers_left = template.answer_count

    @property
    def ended(self) -> bool:
        """Return whether every op is over."""
        return self.launched and not self._live

    def handle(self, *events: RunEvent) -> list[RunCommand]:
        """Process events in order, and return the commands to carry out, in order.

        Raises:
            InvalidTransition: an event cannot happen in the present state.
        """
        commands: list[RunCommand] = []
        for event in events:
            self.story.append(event)
            if isinstance(event, _OP_EVENTS):
                op = event.op
                method = _ON_OP.get((self.states[op], type(event)))
                if method is None:
                    raise InvalidTransition(self.states[op].name, event, self.story)
                method(self, op, event, commands)
            elif isinstance(event, LaunchRun):
                self._launch(commands)
            else:
                self._cancel(commands)
        return commands

    # -- whole run ------------------------------------------------------------------------------

    def _launch(self, commands: list[RunCommand]) -> None:
        if self.launched:
            raise InvalidTransition("launched", _LAUNCH, self.story)
        self.launched = True
        states, in_flight, ready = self.states, OpState.IN_FLIGHT, OpState.READY
        for op, state in enumerate(states):
            if state is ready:
                states[op] = in_flight
                commands.append(IssueOp(op))
        if not self._answers_left:
            commands.append(_ANSWER)
        if not self._live:
            commands.append(_END)

    def _cancel(self, commands: list[RunCommand]) -> None:
        if self.cancelled or self.ended:
            return
        self.cancelled = True
        if not self.launched:
            self.launched = True
            if not self._answers_left:
                commands.append(_ANSWER)
            if not self._live:
                commands.append(_END)
        for op, state in enumerate(self.states):
            if state is OpState.IN_FLIGHT:
                self.states[op] = OpState.DRAINING
                commands.append(RecallOp(op))
        for op, state in enumerate(self.states):
            if state is OpState.BLOCKED or state is OpState.READY:
                self._over(op, OpState.SKIPPED, False, commands)

    # -- one op ---------------------------------------------------------------------------------

    def _done(self, op: int, event: RunEvent, commands: list[RunCommand]) -> None:
        self._over(op, OpState.DONE, True, commands)
        blockers, states = self._blockers, self.states
        for after in self.template.successors[op]:
            blockers[after] -= 1
            if not blockers[after] and states[after] is OpState.BLOCKED:
                states[after] = OpState.IN_FLIGHT
                commands.append(IssueOp(after))

    def _failed(self, op: int, event: OpFailed, commands: list[RunCommand]) -> None:
        self.errors.append(event.error)
        self.failed[op] = event.error
        if event.filled:
            self.leading[op] = event.filled
        else:
            self.leading.pop(op, None)
        goes_on = event.filled and self._goes_on_in_part
        follower = self._follower(op) if goes_on else None
        self._skip_after(op, commands, follower)
        self._over(op, OpState.FAILED, False, commands)
        if follower is not None:
            self.leading[follower] = event.filled
            self.states[follower] = OpState.IN_FLIGHT
            commands.append(IssueOp(follower))

    def _follower(self, op: int) -> int | None:
        """Return the op that brings the same blocks further and waits for this one only."""
        ops = self.template.ops
        for after in self.template.successors[op]:
            is_same = (ops[after].leg, ops[after].chunk) == (ops[op].leg, ops[op].chunk)
            route = ops[after].route
            waits = self.states[after] is OpState.BLOCKED and self._blockers[after] == 1
            if is_same and waits and route is not None and route.inbound:
                return after
        return None

    def _drained(self, op: int, event: RunEvent, commands: list[RunCommand]) -> None:
        self.leading.pop(op, None)
        filled = type(event) is OpDone and self.template.ops[op].keeps
        self._over(op, OpState.SKIPPED, filled, commands)

    def _overdue(self, op: int, event: OpOverdue, commands: list[RunCommand]) -> None:
        self.errors.append(event.error)
        self.failed[op] = event.error
        self._skip_after(op, commands)
        self.states[op] = OpState.OVERDUE
        if self.template.ops[op].answers:
            self._answered(commands)

    def _failed_late(self, op: int, event: OpFailed, commands: list[RunCommand]) -> None:
        self.errors.append(event.error)
        self._drained(op, event, commands)

    def _skip_after(self, op: int, commands: list[RunCommand], but: int | None = None) -> None:
        for after in self.template.successors[op]:
            if self.states[after] is OpState.BLOCKED and after != but:
                self._skip_after(after, commands)
                self._over(after, OpState.SKIPPED, False, commands)

    def _over(self, op: int, state: OpState, filled: bool, commands: list[RunCommand]) -> None:
        was, self.states[op] = self.states[op], state
        self._live -= 1
        spec = self.template.ops[op]
        if spec.route is not None:
            commands.append(self._settlement(op, filled) if self.leading else SettleOp(op, filled))
        if spec.answers and was is not OpState.OVERDUE:
            self._answered(commands)
        if not self._live:
            commands.append(_END)

    def _settlement(self, op: int, filled: bool) -> SettleOp:
        """Return how an op's claim ends, in a run where some op has filled only a part."""
        leading = self.leading.get(op, 0)
        counts = self.states[op] in (OpState.DONE, OpState.FAILED)
        return SettleOp(op, filled and not leading, leading if counts else 0)

    def filled(self, op: int, block_count: int) -> int:
        """Return how many of an op's leading blocks it has filled, of `block_count`."""
        if self.states[op] is OpState.DONE:
            return self.leading.get(op, block_count)
        return self.leading.get(op, 0) if self.states[op] is OpState.FAILED else 0

    def _answered(self, commands: list[RunCommand]) -> None:
        """Count down the ops that the caller waits for."""
        self._answers_left -= 1
        if not self._answers_left:
            commands.append(_ANSWER)

    def validate(self) -> None:
        """Check that counters and states agree.

        Raises:
            InvariantError: they do not.
        """
        live = sum(1 for state in self.states if state in _LIVE)
        waiting = sum(
            1 for op in self.template.ops if op.answers and self.states[op.index] in _WAITED_FOR
        )
        if (live, waiting) != (self._live, self._answers_left):
            raise InvariantError(
                f"the run counts {self._live} live ops and {self._answers_left} still to answer,"
                f" but its states have {live} and {waiting}: {self.states}"
            )


_OP_EVENTS = (OpDone, OpFailed, OpOverdue)
_ON_OP: dict[tuple[OpState, type[RunEvent]], Callable[[Run, int, Any, list[RunCommand]], None]] = {
    (OpState.IN_FLIGHT, OpDone): Run._done,
    (OpState.IN_FLIGHT, OpFailed): Run._failed,
    (OpState.IN_FLIGHT, OpOverdue): Run._overdue,
    (OpState.DRAINING, OpOverdue): Run._overdue,
    (OpState.OVERDUE, OpDone): Run._drained,
    (OpState.OVERDUE, OpFailed): Run._failed_late,
    (OpState.DRAINING, OpDone): Run._drained,
    (OpState.DRAINING, OpFailed): Run._drained,
}
