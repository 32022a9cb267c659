"""The figures of a whole trace: rates, hits, latencies, and where the time went."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray

from flexkv.observe.records import OpRecord, RequestRecord
from flexkv.trace.breakdown import Breakdown, Breakdowns
from flexkv.trace.load import Trace

WINDOW_NS = 100_000_000
"""The window of time for a route's peak rate."""


@dataclass(frozen=True)
class RouteSummary:
    """The figures of one route. Rates are in bytes per second."""

    ops: int
    blocks: int
    bytes: int
    failed_ops: int
    busy_s: float
    """Time in which at least one op was with the device."""
    queue_ms: tuple[float, float]
    """p50 and p99 of the time that an op waits for its turn."""
    service_ms: tuple[float, float]
    """p50 and p99 of the time that an op is with the device."""
    rate: float
    """The mean while the route is busy."""
    peak_rate: float
    """The rate in the best tenth of a second."""


@dataclass(frozen=True)
class KindSummary:
    """The outcomes and latencies of one kind of request."""

    count: int
    statuses: dict[str, int]
    ms: tuple[float, float, float, float]
    """Latency: p50, p90, p99 and the maximum."""


class Summary:
    """The figures of a trace, each computed once, for every command that shows them."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.breakdowns = Breakdowns(trace)

    @cached_property
    def by_request(self) -> list[Breakdown]:
        """Return where the time of each request went, in the order of the trace."""
        return [self.breakdowns.of(request) for request in self.trace.requests]

    @cached_property
    def kinds(self) -> dict[str, KindSummary]:
        """Return the outcomes and latencies of each kind of request."""
        by_kind: dict[str, list[RequestRecord]] = defaultdict(list)
        for request in self.trace.requests:
            by_kind[request.kind].append(request)
        found = {}
        for kind, requests in sorted(by_kind.items()):
            ms = np.array([r.took_ns for r in requests]) / 1e6
            p50, p90, p99 = (float(p) for p in np.percentile(ms, [50, 90, 99]))
            statuses = dict(Counter(r.status for r in requests).most_common())
            found[kind] = KindSummary(len(requests), statuses, (p50, p90, p99, float(ms.max())))
        return found

    @cached_property
    def routes(self) -> dict[str, RouteSummary]:
        """Return the figures of each route."""
        by_route: dict[str, list[OpRecord]] = defaultdict(list)
        for op in self.trace.ops:
            if (
                op.outcome != "recalled"
            ):  # a recalled op may have moved a part: its times mean nothing
                by_route[op.route].append(op)
        return {route: _route(ops) for route, ops in sorted(by_route.items())}

    @cached_property
    def hits(self) -> dict[str, float]:
        """Return the share of the blocks requested by gets that each tier had."""
        asked, found = 0, Counter[str]()
        for request in self.trace.requests:
            if request.kind == "get":
                asked += request.asked_blocks
                found.update(request.hit_blocks)
        return {tier: blocks / max(asked, 1) for tier, blocks in found.items()}

    @cached_property
    def evicted(self) -> dict[str, int]:
        """Return how many blocks of each tier were evicted while the trace was on."""
        samples = self.trace.samples
        if not samples:
            return {}
        first, last = samples[0].tiers, samples[-1].tiers
        return {tier: counts[2] - first.get(tier, counts)[2] for tier, counts in last.items()}

    @cached_property
    def time_by_step(self) -> dict[str, dict[str, int]]:
        """Return the nanoseconds of each kind of step by kind of request, the longest first."""
        total: dict[str, Counter[str]] = defaultdict(Counter)
        for breakdown in self.by_request:
            total[breakdown.request.kind].update(breakdown.shares)
        return {kind: dict(steps.most_common()) for kind, steps in sorted(total.items())}

    def slowest(self, count: int) -> list[Breakdown]:
        """Return where the time of the `count` slowest requests went, the slowest first."""
        return sorted(self.by_request, key=attrgetter("request.took_ns"), reverse=True)[:count]


def _route(ops: list[OpRecord]) -> RouteSummary:
    done = [op for op in ops if op.outcome == "done"]
    issued, begun, ended = (
        np.array(times, np.int64)
        for times in zip(*((op.issued_ns, op.begun_ns, op.ended_ns) for op in ops), strict=True)
    )
    size = sum(op.bytes for op in done)
    busy_s = _union_ns(begun, ended) / 1e9
    return RouteSummary(
        ops=len(ops),
        blocks=sum(op.block_count for op in done),
        bytes=size,
        failed_ops=len(ops) - len(done),
        busy_s=busy_s,
        queue_ms=_p50_p99((begun - issued) / 1e6),
        service_ms=_p50_p99((ended - begun) / 1e6),
        rate=size / busy_s if busy_s else 0.0,
        peak_rate=float(rates(done, WINDOW_NS)[1].max(initial=0.0)),
    )


def _p50_p99(values: NDArray[np.float64]) -> tuple[float, float]:
    p50, p99 = np.percentile(values, [50, 99])
    return float(p50), float(p99)


def _union_ns(begins: NDArray[np.int64], ends: NDArray[np.int64]) -> int:
    """Return the length of the union of intervals."""
    order = np.argsort(begins, kind="stable")
    begins, reach = begins[order], np.maximum.accumulate(ends[order])
    # There is a gap where an interval begins after all before it have ended.
    gaps = np.maximum(0, begins[1:] - reach[:-1]).sum()
    return int(reach[-1] - begins[0] - gaps) if len(begins) else 0


def rates(ops: list[OpRecord], window_ns: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the bytes per second in each window of time, from the begin of the first op on.

    An op's bytes count evenly over the time that it was with the device.

    Returns:
        The begin of each window in nanoseconds, int64[windows], and its rate, float64[windows].
    """
    if not ops:
        return np.empty(0, np.int64), np.empty(0)
    begun = np.array([op.begun_ns for op in ops], np.int64)
    ended = np.maximum(np.array([op.ended_ns for op in ops], np.int64), begun + 1)
    size = np.array([op.bytes for op in ops], np.float64)
    edges = np.arange(begun.min(), ended.max() + window_ns, window_ns)
    # The bytes that an op has moved are a ramp over time; their sum bends where a ramp does.
    times = np.concatenate([begun, ended])
    slopes = np.concatenate([size / (ended - begun), -size / (ended - begun)])
    order = np.argsort(times, kind="stable")
    times, slopes = times[order], np.cumsum(slopes[order])
    moved = np.concatenate([[0.0], np.cumsum(slopes[:-1] * np.diff(times))])
    by_edge = np.interp(edges, times, moved)
    return edges[:-1], np.diff(by_edge) / (window_ns / 1e9)
