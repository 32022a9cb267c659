"""Counts what happens in an engine and, when a trace is on, records it.

Counters are plain integers that only the loop's thread writes; `statistics()` copies them. A trace
costs some structs per request and one per op, which go to a recorder that never blocks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from flexkv.common.errors import CorruptBlockError, RecalledError, TransferError
from flexkv.common.request import KVResponse, KVResponseStatus, Operation, Request
from flexkv.common.terms import Route, Tier
from flexkv.graph.ops import OpSpec
from flexkv.graph.plan import Plan
from flexkv.graph.planner import Planned
from flexkv.observe.logs import get_logger
from flexkv.observe.tracer import Tracer

log = get_logger(__name__)


class RouteCount(msgspec.Struct):
    """What one route has moved, and how many of its ops failed."""

    ops: int = 0
    blocks: int = 0
    bytes: int = 0
    failed_ops: int = 0


class Observer:
    """The counters of one engine, and its trace."""

    def __init__(
        self,
        block_bytes: Sequence[int],
        now_ns: Callable[[], int] = time.monotonic_ns,
        log_every_requests: int = 200,
    ) -> None:
        """Start at zero; `block_bytes` has the bytes of a block of each KV group."""
        self.now_ns = now_ns
        self.tracer: Tracer | None = None
        self.remind: Callable[[], None] = lambda: None
        """Called each time that a summary is logged."""
        self.requests: dict[Operation, dict[KVResponseStatus, int]] = {
            operation: dict.fromkeys(KVResponseStatus, 0) for operation in Operation
        }
        self.routes: dict[Route, RouteCount] = {}
        self.asked_blocks = 0
        self.corrupt_blocks = 0
        self.hit_blocks: dict[Tier, int] = dict.fromkeys(Tier, 0)
        self._block_bytes = block_bytes
        self._log_every = log_every_requests
        self._ended = 0

    def corrupt(self, tier: Tier, error: CorruptBlockError, request_id: int = -1) -> None:
        """Record blocks that a request or a scrub read back with other bytes than were written."""
        self.corrupt_blocks += len(error.block_ids)
        self.event("corrupt_block", tier, request_id, str(error))
        log.error(
            "corrupt_block",
            request=request_id,
            path=error.path,
            offset_bytes=error.offset_bytes,
            blocks=len(error.block_ids),
        )

    def event(
        self, kind: str, tier: Tier | None = None, request_id: int = -1, detail: str = ""
    ) -> None:
        """Record that something changed, failed, or was done to the engine."""
        if self.tracer is not None:
            name = "" if tier is None else tier.label
            self.tracer.event(kind, self.now_ns(), name, request_id, detail)

    def planned(self, request: Request, plan: Plan) -> None:
        """Record that a request was compiled into a plan."""
        if self.tracer is not None:
            self.tracer.planned(request, plan, self.now_ns())

    def op_issued(self, op_id: int) -> None:
        """Record that an op was given to its actor."""
        if self.tracer is not None:
            self.tracer.issued(op_id, self.now_ns())

    def op_ended(
        self, request: Request, plan: Plan, op: OpSpec, blocks: int, error: TransferError | None
    ) -> None:
        """Record the end of an op, and how many of its blocks it has moved."""
        if op.route is None:
            return
        count = self.routes.get(op.route)
        if count is None:
            count = self.routes[op.route] = RouteCount()
        count.blocks += blocks
        count.bytes += blocks * self._block_bytes[op.group]
        if error is None:
            count.ops += 1
        elif not isinstance(error, RecalledError):
            count.ops += 1
            count.failed_ops += 1
            if not error.is_miss:  # `corrupt` logs wrong bytes, with the place
                log.warning(
                    "op_failed", request=request.request_id, route=op.label, error=str(error)
                )
        if self.tracer is not None:
            self.tracer.op_ended(request, plan, op, blocks, error, self.now_ns())

    def refused(self, request: Request, response: KVResponse) -> None:
        """Record that a request was answered without a plan."""
        self.requests[request.operation][response.status] += 1
        if self.tracer is not None:
            self.tracer.refused(request, response, self.now_ns())

    def request_ended(
        self, request: Request, planned: Planned, response: KVResponse, since_ns: tuple[int, int]
    ) -> None:
        """Record an answer; `since_ns` is when the request arrived, and when it was planned."""
        self.requests[request.operation][response.status] += 1
        found = planned.found
        if request.operation is Operation.GET:
            self.asked_blocks += request.span.last_block - request.span.first_block
            if response.status is not KVResponseStatus.SUCCESS or response.error is not None:
                # Only blocks that were loaded count as hits, not all that were found.
                loaded = int(np.count_nonzero(response.return_mask)) // request.tokens_per_block
                found = found.before(found.first + loaded)
            for tier, placement in found.ready.items():
                self.hit_blocks[tier] += placement.block_count
            if found.pending is not None:
                self.hit_blocks[Tier.HOST] += found.pending.block_count
        self._ended += 1
        if not self._ended % self._log_every:
            self._summarise()
        if self.tracer is not None:
            ended = planned.plan.run_id, found, response
            self.tracer.request_ended(request, ended, (*since_ns, self.now_ns()))

    def _summarise(self) -> None:
        self.remind()
        asked = max(self.asked_blocks, 1)
        log.info(
            "requests",
            ended=self._ended,
            hit_rate={
                tier.label: round(hits / asked, 3) for tier, hits in self.hit_blocks.items() if hits
            },
            moved_gb={
                str(route): round(count.bytes / 1e9, 3) for route, count in self.routes.items()
            },
        )
