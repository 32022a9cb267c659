"""Where the time of one request went: the chain of ops that its caller waited for, in steps."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from flexkv.common.terms import FAR_TIERS, Tier
from flexkv.observe.records import OpRecord, PlanRecord, RequestRecord
from flexkv.trace.load import Trace

ADMISSION, PLANNING, JOINED, BETWEEN = (
    "waiting to be admitted",
    "planning",
    "waiting for another request",
    "between steps",
)

FAR = frozenset(tier.label for tier in FAR_TIERS)
"""The tiers whose blocks are a store's or other engines'."""

PEER = Tier.PEER.label


class Step(NamedTuple):
    """A stretch of a request's time, and what it was spent on."""

    what: str
    begin_ns: int
    end_ns: int
    op_id: int = -1

    @property
    def ns(self) -> int:
        """Return the length of the step in nanoseconds."""
        return self.end_ns - self.begin_ns


class Breakdown(NamedTuple):
    """A request's time as steps without gaps, from its arrival to its answer."""

    request: RequestRecord
    steps: tuple[Step, ...]

    @property
    def critical_ops(self) -> tuple[int, ...]:
        """Return the ids of the ops that the caller waited for, one after the other."""
        return tuple(dict.fromkeys(step.op_id for step in self.steps if step.op_id >= 0))

    @property
    def shares(self) -> dict[str, int]:
        """Return the nanoseconds of each kind of step, the longest first."""
        total: dict[str, int] = defaultdict(int)
        for step in self.steps:
            total[step.what] += step.ns
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    @property
    def words(self) -> str:
        """Return a sentence that says where the time went."""
        whole = max(1, self.request.took_ns)
        parts = [
            f"{100 * ns / whole:.0f} % {what} ({ns / 1e6:.2f} ms)"
            for what, ns in self.shares.items()
            if ns >= 0.01 * whole
        ]
        return f"{whole / 1e6:.2f} ms: " + (", ".join(parts) or "nothing to wait for")


def step_name(op: OpRecord) -> str:
    """Return the name of the step in which an op was with its device, tier or store."""
    source, _, _ = op.route.partition("→")
    if source == PEER:
        return "waiting for peers"
    return f"waiting for {source}" if source in FAR else op.route


def lane_of(op: OpRecord) -> str:
    """Return the name of an op's lane in drawings: its route, and the peer that it reads from."""
    return f"{op.route} {op.peer}" if op.peer else op.route


def queue_name(op: OpRecord) -> str:
    """Return the name of the step in which an op waited for its turn."""
    return f"queued for {op.route}"


class Breakdowns:
    """The breakdowns of the requests of a trace, made on demand."""

    def __init__(self, trace: Trace) -> None:
        self._plans = trace.plans
        self._ops: dict[int, dict[int, OpRecord]] = defaultdict(dict)
        for op in trace.ops:
            self._ops[op.run_id][op.op_id] = op

    def ops_of(self, run_id: int) -> dict[int, OpRecord]:
        """Return the recorded ops of a run, by op id."""
        return self._ops.get(run_id, {})

    def of(self, request: RequestRecord) -> Breakdown:
        """Return where a request's time went, from its arrival to its answer."""
        steps: list[Step] = []
        until = request.ended_ns
        plan = self._plans.get(request.run_id)
        path = self._path(request, plan)
        for op_id in path:
            op = self._ops[request.run_id][op_id]
            ended = min(op.ended_ns, until)
            if until > ended:
                steps.append(Step(BETWEEN, ended, until))
            begun = min(max(op.begun_ns, op.issued_ns), ended)
            steps.append(Step(step_name(op), begun, ended, op_id))
            if begun > op.issued_ns:
                steps.append(Step(queue_name(op), op.issued_ns, begun, op_id))
            until = min(op.issued_ns, ended)
        begun_ns = min(max(request.begun_ns, request.arrived_ns), until)
        if until > begun_ns:
            what = JOINED if plan and _joined(plan, path) else PLANNING
            steps.append(Step(what, begun_ns, until))
        if begun_ns > request.arrived_ns:
            steps.append(Step(ADMISSION, request.arrived_ns, begun_ns))
        return Breakdown(request, tuple(reversed(steps)))

    def _path(self, request: RequestRecord, plan: PlanRecord | None) -> list[int]:
        """Return the ids of the ops that the caller waited for, the last one first."""
        ops = self._ops.get(request.run_id, {})
        answering = [op for op in ops.values() if _answers(request, op)]
        if not answering:
            return []
        path = [max(answering, key=_ended).op_id]
        while plan is not None and path[-1] < len(plan.ops):
            after = plan.ops[path[-1]].after
            before = [ops[number] for number in after if number in ops and number not in path]
            if not before:
                break
            path.append(max(before, key=_ended).op_id)
        return path


def _joined(plan: PlanRecord, path: list[int]) -> bool:
    """Return whether a request waited for another request's op before its own first op."""
    after = plan.ops[path[-1]].after if path and path[-1] < len(plan.ops) else range(len(plan.ops))
    return any(plan.ops[number].route == "wait" for number in after)


def _ended(op: OpRecord) -> int:
    return op.ended_ns


def _answers(request: RequestRecord, op: OpRecord) -> bool:
    """Return whether the caller may have waited for an op; not for one issued after its answer."""
    source, _, target = op.route.partition("→")
    wanted = {"get": target == "device", "put": source == "device"}.get(
        request.kind, target == "host"
    )
    return wanted and op.issued_ns <= request.ended_ns
