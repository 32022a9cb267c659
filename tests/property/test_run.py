"""The state machine of a run, under every order of completions, failures and cancels."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv.common.errors import InvalidTransition, TransferError
from flexkv.common.request import Operation
from flexkv.common.terms import Route, Tier
from flexkv.graph.compile import compile_shape
from flexkv.graph.ops import Leg, Shape
from flexkv.graph.run import (
    AnswerCaller,
    CancelRun,
    EndRun,
    IssueOp,
    LaunchRun,
    OpDone,
    OpFailed,
    OpOverdue,
    OpState,
    RecallOp,
    Run,
    RunCommand,
    SettleOp,
)

D, H, K, R = Tier.DEVICE, Tier.HOST, Tier.DISK, Tier.REMOTE
PATHS = {
    Operation.GET: [((H, D),), ((K, H), (H, D)), ((R, H), (H, D))],
    Operation.PUT: [((D, H),), ((D, H), (H, K)), ((D, H), (H, K), (H, R)), ((H, K),)],
    Operation.PREFETCH: [((K, H),), ((R, H),)],
}


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """Draw any shape that the planner could make."""
    goal = draw(st.sampled_from(Operation))
    paths = draw(st.lists(st.sampled_from(PATHS[goal]), max_size=3))
    legs = [Leg(tuple(Route(*hop) for hop in path), draw(st.integers(0, 4))) for path in paths]
    if goal is not Operation.PUT and draw(st.booleans()):
        onward = (Route(H, D),) if goal is Operation.GET else ()
        legs.append(Leg(onward, draw(st.integers(1, 3)), waits=True))
    return Shape(goal, tuple(legs))


def error(op: int) -> TransferError:
    """Return an error for an op."""
    return TransferError(op, "test", 1, "injected")


def check_log(run: Run, log: list[RunCommand], partly: dict[int, int]) -> None:
    """Check the commands of a run that has ended; `partly` has ops that filled leading blocks."""
    assert run.ended
    moving = [op.index for op in run.template.ops if op.route is not None]
    assert sorted(c.op for c in log if isinstance(c, SettleOp)) == moving
    assert sum(isinstance(c, AnswerCaller) for c in log) == 1
    assert [isinstance(c, EndRun) for c in log].count(True) == 1
    assert isinstance(log[-1], EndRun)
    settled = {c.op: c for c in log if isinstance(c, SettleOp)}
    whole = {op for op, command in settled.items() if command.filled}
    assert whole >= {i for i in moving if run.states[i] is OpState.DONE and i not in run.leading}
    for op, command in settled.items():
        assert not (command.filled and command.leading)
        if run.states[op] is OpState.FAILED:
            assert command.leading == partly.get(op, 0)
            assert run.filled(op, 4) == partly.get(op, 0)


@given(shapes(), st.data())
def test_every_run_ends_once_and_settles_everything_once(shape: Shape, data: st.DataObject) -> None:
    """Every run ends once and settles each op once, under any events in any order.

    Each op that moves bytes is settled exactly once. The answer comes exactly once, and only when
    no answering op is live. `EndRun` comes once, and last. An op starts only when all ops before it
    are done, or the only one before it has filled some leading blocks: then it moves these. Leading
    blocks are committed for ops that failed, and for no others.
    """
    template = compile_shape(shape)
    run = Run(template)
    commands = run.handle(LaunchRun())
    in_flight: set[int] = set()
    overdue: set[int] = set()
    partly: dict[int, int] = {}
    """Ops that failed with some leading blocks filled, or that went on with such blocks."""
    log: list[RunCommand] = []
    predecessors = {
        op.index: [b for b, after in enumerate(template.successors) if op.index in after]
        for op in template.ops
    }
    while True:
        for command in commands:
            log.append(command)
            if isinstance(command, IssueOp):
                in_flight.add(command.op)
                before = predecessors[command.op]
                filled = partly.get(before[0], 0) if len(before) == 1 else 0
                assert run.leading.get(command.op, 0) == filled
                assert filled or all(run.states[op] is OpState.DONE for op in before)
            if isinstance(command, AnswerCaller):
                answering = {op.index for op in template.ops if op.answers}
                assert not answering & (in_flight - overdue)
        run.validate()
        if not in_flight:
            break
        event = data.draw(st.sampled_from(["done", "failed", "cancel", "overdue"]))
        if event == "cancel":
            commands = run.handle(CancelRun())
        elif event == "overdue":
            late = sorted(in_flight - overdue)
            overdue.update(late)
            commands = run.handle(*(OpOverdue(op, error(op)) for op in late))
        else:
            op = data.draw(st.sampled_from(sorted(in_flight)))
            in_flight.remove(op)
            route = template.ops[op].route
            blocks = 0
            if event == "failed" and route is not None and route.inbound:
                blocks = data.draw(st.integers(0, run.leading.get(op, 3)))
            if blocks and run.states[op] is OpState.IN_FLIGHT:
                partly[op] = blocks
            is_done = event == "done"
            commands = run.handle(OpDone(op) if is_done else OpFailed(op, error(op), blocks))
    check_log(run, log, partly)


def test_what_a_failed_read_has_filled_goes_on_to_the_device() -> None:
    """The copy behind a read that failed in part moves the leading blocks, and the run succeeds."""
    run = Run(compile_shape(Shape(Operation.GET, (Leg((Route(K, H), Route(H, D)), 1),))))
    run.handle(LaunchRun())
    commands = run.handle(OpFailed(0, error(0), 3))
    assert commands == [SettleOp(0, False, 3), IssueOp(1)]
    assert (run.filled(0, 4), run.filled(1, 4)) == (3, 0)
    assert run.handle(OpDone(1)) == [SettleOp(1, False, 3), AnswerCaller(), EndRun()]
    assert run.filled(1, 4) == 3


def test_a_copy_that_fails_behind_a_partial_read_has_moved_nothing() -> None:
    """What the read filled stays in host memory; nothing counts as moved to the device."""
    run = Run(compile_shape(Shape(Operation.GET, (Leg((Route(K, H), Route(H, D)), 1),))))
    run.handle(LaunchRun(), OpFailed(0, error(0), 3))
    assert run.handle(OpFailed(1, error(1))) == [SettleOp(1, False), AnswerCaller(), EndRun()]
    assert run.filled(1, 4) == 0


@given(shapes())
def test_a_cancel_before_the_launch_ends_the_run(shape: Shape) -> None:
    """A run that is cancelled before its launch issues nothing, answers once and ends once."""
    run = Run(compile_shape(shape))
    commands = run.handle(CancelRun())
    assert run.ended
    assert not [c for c in commands if isinstance(c, IssueOp | RecallOp)]
    assert sum(isinstance(c, AnswerCaller) for c in commands) == 1
    assert sum(isinstance(c, EndRun) for c in commands) == 1


def test_a_drained_store_is_never_kept_but_a_drained_load_is() -> None:
    """A cancelled put's bytes are dropped, as they may be torn; a disk read's are kept."""
    for route, kept in ((Route(D, H), False), (Route(K, H), True)):
        goal = Operation.PUT if route.source is D else Operation.PREFETCH
        run = Run(compile_shape(Shape(goal, (Leg((route,), 1),))))
        run.handle(LaunchRun(), CancelRun())
        commands = run.handle(OpDone(0))
        assert SettleOp(0, kept) in commands


def test_an_event_out_of_turn_tells_the_story() -> None:
    """A second completion or launch raises InvalidTransition with the story of the run."""
    run = Run(compile_shape(Shape(Operation.PREFETCH, (Leg((Route(K, H),), 1),))))
    with pytest.raises(InvalidTransition):
        run.handle(OpDone(0))
    run = Run(run.template)
    run.handle(LaunchRun(), OpDone(0))
    with pytest.raises(InvalidTransition, match="Launch"):
        run.handle(OpDone(0))
    with pytest.raises(InvalidTransition):
        run.handle(LaunchRun())
