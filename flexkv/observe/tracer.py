"""Makes trace records of what the scheduler does, and hands them to sinks that never block.

A tracer exists while a trace or metrics are on. What began before it is recorded as far as it is
known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from flexkv.common.errors import RecalledError, TransferError
from flexkv.common.request import KVResponse, Operation, Request
from flexkv.common.terms import BLOCK_KEY_BYTES, Tier
from flexkv.graph.ops import OpSpec
from flexkv.graph.plan import Plan, Template
from flexkv.index.found import Found
from flexkv.index.hints import holders_of
from flexkv.index.residency import Residency
from flexkv.observe.records import (
    EventRecord,
    OpRecord,
    PlannedOp,
    PlanRecord,
    Record,
    RequestRecord,
    SampleRecord,
)

KEY_BYTES = 6
"""How much of each block's key is recorded. Whoever has `key_secret` can test guesses with it."""
PLANS_MAX = 1024
"""Plans whose recorded ops are cached."""
SAMPLE_NS = 20_000_000
"""Shortest time between two samples."""


class Sink(Protocol):
    """Where trace records go."""

    def record(self, record: Record) -> None:
        """Accept a record, without blocking."""
        ...


class RecordedActor(Protocol):
    """What a tracer needs of an actor."""

    name: str

    def take_begun(self, op_id: int) -> float | None:
        """Return when a transfer's first piece went to the port, and forget it; None if unknown."""
        ...


class Tracer:
    """Sends records of what an engine does to sinks.

    Attributes:
        sinks: where the records go.
    """

    def __init__(
        self,
        sinks: list[Sink],
        block_bytes: Sequence[int],
        actors: Mapping[Tier, RecordedActor],
        residency: Residency,
        sample: Callable[[int], SampleRecord],
        peer_of: Callable[[int], str] = str,
    ) -> None:
        """Ask `actors` when ops began, and `sample` how full the engine is.

        `block_bytes` has the bytes of a block of each KV group; `peer_of` returns the address of a
        holder of blocks.
        """
        self.sinks, self._block_bytes = sinks, block_bytes
        self._actors, self._residency, self._sample = actors, residency, sample
        self._peer_of = peer_of
        self._evicted = residency.evicted
        self._issued_ns: dict[int, int] = {}
        self._sampled_ns = 0
        self._plans: dict[tuple[object, ...], tuple[Template, tuple[PlannedOp, ...]]] = {}

    def planned(self, request: Request, plan: Plan, now_ns: int) -> None:
        """Record a request's plan; for a plan of one op, the op's own record is enough."""
        several = len(plan.template.ops) > 1
        needs_room = several or request.operation is Operation.PUT
        if needs_room and self._evicted != (evicted := self._residency.evicted):
            self._tell_evicted(evicted, request.request_id, now_ns)
        if several:
            self._tell(PlanRecord(request.request_id, plan.run_id, now_ns, self._ops_of(plan)))

    def _ops_of(self, plan: Plan) -> tuple[PlannedOp, ...]:
        """Return the ops of a plan for its record, cached: most plans differ only in places."""
        key = (id(plan.template), *[fill.bounds for fill in plan.fills])
        known = self._plans.get(key)
        if known is None:
            template, ops = plan.template, []
            for spec, before in zip(template.ops, template.predecessors, strict=True):
                begin, end = plan.bounds(spec)
                ops.append(PlannedOp(spec.label, end - begin, before, spec.group))
            if len(self._plans) >= PLANS_MAX:
                self._plans.clear()
            known = self._plans[key] = template, tuple(ops)
        return known[1]

    def issued(self, op_id: int, now_ns: int) -> None:
        """Remember when an op was given to its actor."""
        self._issued_ns[op_id] = now_ns

    def op_ended(
        self,
        request: Request,
        plan: Plan,
        op: OpSpec,
        blocks: int,
        error: TransferError | None,
        now_ns: int,
    ) -> None:
        """Record the end of an op, which has moved some or all of its blocks."""
        assert op.route is not None
        op_id, actor = plan.op_id(op), self._actors[op.route.outer]
        begun_s, issued_ns = actor.take_begun(op_id), self._issued_ns.pop(op_id, None)
        if issued_ns is None:
            return  # issued before the tracer existed: its times are not known
        begun_ns = now_ns if begun_s is None else int(begun_s * 1e9)
        outcome, detail = "done", ""
        if error is not None:
            detail = str(error)
            outcome = "recalled" if isinstance(error, RecalledError) else type(error).__name__
        self._tell(
            OpRecord(
                request.request_id, plan.run_id, op.index, actor.name, op.label, blocks,
                blocks * self._block_bytes[op.group], issued_ns, begun_ns,
                now_ns, outcome, detail, op.group,
                self._peers(plan, op) if op.route.source is Tier.PEER else "",
            )
        )  # fmt: skip
        if now_ns - self._sampled_ns >= SAMPLE_NS:
            self._look(now_ns)

    def _peers(self, plan: Plan, op: OpSpec) -> str:
        """Return the addresses of the nodes that an op reads from."""
        holders = holders_of(plan.transfer(op).source_ids).tolist()
        return " ".join(map(self._peer_of, dict.fromkeys(holders)))

    def request_ended(
        self,
        request: Request,
        ended: tuple[int, Found, KVResponse],
        times_ns: tuple[int, int, int],
    ) -> None:
        """Record a request whose caller was answered.

        `ended` is its run id, what it found, and the response; `times_ns` are when it arrived, was
        planned, and ended.
        """
        span, (run_id, found, response) = request.span, ended
        keys = np.frombuffer(request.keys, np.uint8).reshape(-1, BLOCK_KEY_BYTES)
        error, arrived_ns, begun_ns, ended_ns = response.error, *times_ns
        moved_tokens = int(np.count_nonzero(response.return_mask))
        self._tell(
            RequestRecord(  # by position: keywords would cost more than all else
                request.request_id, run_id, request.operation.label, request.token_count,
                span.first_block, span.last_block, request.namespace_hash,
                keys[1 : span.last_block + 1, :KEY_BYTES].tobytes(),
                arrived_ns, begun_ns, ended_ns, response.status.value, _hits(found),
                moved_tokens // request.tokens_per_block,
                "" if error is None else type(error).__name__,
                "" if error is None else str(error),
            )
        )  # fmt: skip
        if ended_ns - self._sampled_ns >= SAMPLE_NS:
            self._look(ended_ns)

    def refused(self, request: Request, response: KVResponse, now_ns: int) -> None:
        """Record a request that was answered without a plan."""
        nothing = Found(0, 0, {})
        self.request_ended(request, (-1, nothing, response), (now_ns, now_ns, now_ns))

    def event(self, kind: str, now_ns: int, tier: str, request_id: int, detail: str) -> None:
        """Record that something changed, failed, or was done to the engine."""
        self._tell(EventRecord(now_ns, kind, tier, request_id, detail))

    def _tell_evicted(self, evicted: list[int], request_id: int, now_ns: int) -> None:
        """Record what was evicted since the last call, for a request or ahead of need."""
        for tier, now, before in zip(self._residency.tiers, evicted, self._evicted, strict=True):
            if now > before:
                self.event("evicted", now_ns, tier.label, request_id, f"{now - before} blocks")
        self._evicted = evicted

    def _tell(self, record: Record) -> None:
        for sink in self.sinks:
            sink.record(record)

    def _look(self, now_ns: int) -> None:
        self._sampled_ns = now_ns
        self._tell(self._sample(now_ns))


def _hits(found: Found) -> dict[str, int]:
    """Return the blocks found by tier; blocks on their way to host memory count there."""
    hits = {tier.label: place.block_count for tier, place in found.ready.items()}
    if found.pending is not None:
        host = Tier.HOST.label
        hits[host] = hits.get(host, 0) + found.pending.block_count
    return hits
