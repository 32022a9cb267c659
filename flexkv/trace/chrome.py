"""A trace in the Trace Event Format, which Perfetto and chrome://tracing open.

There is one process for the actors, with a thread for each route and peer, and one for the
requests. Each op and each request is an asynchronous span.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from flexkv.trace.breakdown import lane_of
from flexkv.trace.load import Trace

ACTORS, REQUESTS = 1, 2


def chrome(trace: Trace) -> bytes:
    """Return a trace as JSON in the Trace Event Format."""
    content = {
        "traceEvents": list(_events(trace)),
        "displayTimeUnit": "ms",
        "otherData": {
            "flexkv_version": trace.header.flexkv_version,
            "wall_ns": trace.header.wall_ns,
            "monotonic_ns": trace.header.monotonic_ns,
        },
    }
    return msgspec.json.encode(content)


def _events(trace: Trace) -> Iterator[dict[str, Any]]:
    origin = trace.begin_ns
    args: dict[str, Any]
    told: dict[str, Any]

    def us(at_ns: int) -> float:
        return (at_ns - origin) / 1e3

    lanes = {lane: number for number, lane in enumerate(sorted(set(map(lane_of, trace.ops))), 1)}
    for pid, name in ((ACTORS, "actors"), (REQUESTS, "requests")):
        yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}
    for lane, tid in lanes.items():
        args = {"name": lane}
        yield {"ph": "M", "name": "thread_name", "pid": ACTORS, "tid": tid, "args": args}
    for op in trace.ops:
        told = {
            "cat": "op",
            "name": op.route,
            "id": op.run_id * 4096 + op.op_id,
            "pid": ACTORS,
            "tid": lanes[lane_of(op)],
        }
        args = {
            "request": op.request_id,
            "blocks": op.block_count,
            "bytes": op.bytes,
            "queued_us": (op.begun_ns - op.issued_ns) / 1e3,
            "outcome": op.outcome,
        }
        # Ops of one route overlap, which asynchronous spans may do and slices may not.
        yield {**told, "ph": "b", "ts": us(op.begun_ns), "args": args}
        yield {**told, "ph": "e", "ts": us(op.ended_ns)}
    for request in trace.requests:
        told = {"cat": "request", "name": request.kind, "id": request.request_id, "pid": REQUESTS}
        args = {
            "tokens": request.token_count,
            "status": request.status,
            "moved_blocks": request.moved_blocks,
            "reason": request.reason,
            **{f"hit_{tier}": blocks for tier, blocks in request.hit_blocks.items()},
        }
        yield {**told, "ph": "b", "tid": 1, "ts": us(request.arrived_ns), "args": args}
        yield {**told, "ph": "e", "tid": 1, "ts": us(request.ended_ns)}
    for event in trace.events:
        name = f"{event.kind} {event.tier}".strip()
        where = {"pid": ACTORS, "tid": 1, "s": "g"}
        args = {"request": event.request_id, "detail": event.detail}
        yield {"ph": "i", "name": name, "ts": us(event.at_ns), "args": args, **where}
    for sample in trace.samples:
        for actor, (depth, inbound, outbound) in sample.actors.items():
            args = {"ops": depth, "MB in": inbound / 1e6, "MB out": outbound / 1e6}
            told = {"name": f"{actor} queue", "pid": ACTORS, "ts": us(sample.at_ns)}
            yield {"ph": "C", **told, "args": args}
