"""A trace as one HTML page that needs no network: its charts use plotly, which it contains.

Times in the page are microseconds from the first record. If there are too many transfers for the
timeline, it leaves out the shortest, and the page says so. Every request can still be looked up.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from importlib.resources import files
from typing import Any

import msgspec
import numpy as np

from flexkv.common.errors import BackendUnavailableError
from flexkv.observe.records import OpRecord
from flexkv.trace.breakdown import lane_of
from flexkv.trace.findings import findings
from flexkv.trace.summary import Summary, rates

SHOWN_MAX = 30_000
"""The most transfers on the timeline."""
LANES_MAX = 40
"""With more lanes than these, peers have no lanes of their own."""
ROWS_MAX = 8
"""The most rows of a lane; overlapping transfers of a route share rows beyond that."""
SLOWEST = 20
POINTS, STRETCHES = 300, 60
"""Points of a curve over time, and of the hit rates, where a point needs several gets."""


def page(summary: Summary) -> str:
    """Return the page of a trace.

    Raises:
        BackendUnavailableError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise BackendUnavailableError("plotly", f"{error}; install flexkv[viewer]") from error
    text = (files(__package__) / "page.html").read_text("utf-8")
    # The page is parsed as HTML first, so the data must not contain markup.
    content = msgspec.json.encode(data(summary)).decode().replace("<", "\\u003c")
    head, _, rest = text.partition("/*PLOTLY*/")
    middle, _, tail = rest.partition("/*DATA*/")
    return "".join([head, get_plotlyjs(), middle, content, tail])


def data(summary: Summary) -> dict[str, Any]:
    """Return everything that the page shows."""
    trace, origin = summary.trace, summary.trace.begin_ns
    routes = sorted({op.route for op in trace.ops})
    lanes = sorted({lane_of(op) for op in trace.ops})
    if len(lanes) > LANES_MAX:
        lanes = routes
    shown = _shown(trace.ops)
    return {
        "facts": _facts(summary),
        "findings": [
            {"kind": f.kind, "text": f.text, "at": (f.at_ns - origin) / 1e3}
            for f in findings(summary)
        ],
        "detail": _detail(len(shown), len(trace.ops)),
        "routes": routes,
        "lanes": lanes,
        "block_bytes": trace.header.block_bytes,
        "shown": shown,
        **_ops(trace.ops, routes, lanes, origin),
        "after": {
            plan.run_id: {n: op.after for n, op in enumerate(plan.ops) if op.after}
            for plan in trace.plans.values()
            if any(op.after for op in plan.ops)
        },
        "events": [
            {
                "at": (event.at_ns - origin) / 1e3,
                "kind": event.kind,
                "tier": event.tier,
                "request": event.request_id,
                "detail": event.detail,
            }
            for event in trace.events
        ],
        **_requests(summary, origin),
        "rates": [_rate(summary, route, origin) for route in routes],
        "queues": _queues(summary, origin),
        "hits": _hits(summary, origin),
        "latency": _latency(summary),
        "sankey": _sankey(summary),
        "steps": _steps(summary),
    }


def _facts(summary: Summary) -> str:
    trace = summary.trace
    capacities = trace.header.capacity_blocks
    backing = {**dict.fromkeys(capacities, "?"), **trace.header.backing}
    tiers = ", ".join(  # a far tier has no blocks of this engine
        f"{tier} {capacities[tier]} blocks ({name})" if tier in capacities else f"{tier} ({name})"
        for tier, name in backing.items()
    )
    size = f"blocks of {trace.header.block_bytes / 1024:.0f} KiB"
    whole = f"{len(trace.requests)} requests, {len(trace.ops)} transfers in {trace.seconds:.2f} s"
    return f"{whole} · {tiers}, {size} · FlexKV {trace.header.flexkv_version}"


def _shown(ops: list[OpRecord]) -> list[int]:
    if len(ops) <= SHOWN_MAX:
        return list(range(len(ops)))

    def length(number: int) -> int:
        return ops[number].ended_ns - ops[number].begun_ns

    return sorted(heapq.nlargest(SHOWN_MAX, range(len(ops)), key=length))


def _detail(shown: int, ops: int) -> str:
    if shown == ops:
        return (
            f"All {ops} transfers. Drag to zoom, double-click to zoom out, click for the request."
        )
    return (
        f"The {shown} longest of {ops} transfers; the others are in the curves below, and every "
        "request can be looked up. Drag to zoom, double-click to zoom out, click for the request."
    )


def _ops(ops: list[OpRecord], routes: list[str], lanes: list[str], origin: int) -> dict[str, Any]:
    """Return the transfers as one list for each field, and the rows that each lane needs."""
    number = {route: at for at, route in enumerate(routes)}
    lane_number = {name: at for at, name in enumerate(lanes)}
    lane = [lane_number.get(lane_of(op), lane_number.get(op.route, 0)) for op in ops]
    outcomes = sorted({op.outcome for op in ops})
    outcome = {name: at for at, name in enumerate(outcomes)}
    free: list[list[int]] = [[] for _ in lanes]  # for each lane: when each row is free again
    rows = [0] * len(ops)
    for at in sorted(range(len(ops)), key=lambda at: ops[at].begun_ns):
        ends = free[lane[at]]
        row = next((row for row, end in enumerate(ends) if end <= ops[at].begun_ns), len(ends))
        row = row if row < ROWS_MAX else row % ROWS_MAX
        if row == len(ends):
            ends.append(0)
        ends[row] = max(ends[row], ops[at].ended_ns)
        rows[at] = row
    columns = {
        "run": [op.run_id for op in ops],
        "request": [op.request_id for op in ops],
        "op": [op.op_id for op in ops],
        "route": [number[op.route] for op in ops],
        "lane": lane,
        "blocks": [op.block_count for op in ops],
        "issued": [(op.issued_ns - origin) // 1000 for op in ops],
        "begun": [(op.begun_ns - origin) // 1000 for op in ops],
        "ended": [(op.ended_ns - origin) // 1000 for op in ops],
        "outcome": [outcome[op.outcome] for op in ops],
        "row": rows,
    }
    return {"ops": columns, "outcomes": outcomes, "rows": [len(ends) for ends in free]}


def _requests(summary: Summary, origin: int) -> dict[str, Any]:
    requests = summary.trace.requests
    order = sorted(range(len(requests)), key=lambda at: requests[at].took_ns, reverse=True)
    columns = {
        "id": [r.request_id for r in requests],
        "run": [r.run_id for r in requests],
        "kind": [r.kind for r in requests],
        "status": [r.status for r in requests],
        "blocks": [r.asked_blocks for r in requests],
        "moved": [r.moved_blocks for r in requests],
        "arrived": [(r.arrived_ns - origin) // 1000 for r in requests],
        "ended": [(r.ended_ns - origin) // 1000 for r in requests],
        "reason": [r.reason for r in requests],
        "words": [breakdown.words for breakdown in summary.by_request],
        "critical": [breakdown.critical_ops for breakdown in summary.by_request],
    }
    return {"requests": columns, "slowest": order[:SLOWEST]}


def _rate(summary: Summary, route: str, origin: int) -> dict[str, Any]:
    ops = [op for op in summary.trace.ops if op.route == route and op.outcome == "done"]
    window_ns = max(1_000_000, int(summary.trace.seconds * 1e9 / POINTS))
    at, rate = rates(ops, window_ns)
    most = summary.routes[route].peak_rate
    return {
        "route": route,
        "at": ((at - origin) / 1e3).tolist(),
        "rate": (rate / 1e9).round(4).tolist(),
        "most": most / 1e9,
    }


def _queues(summary: Summary, origin: int) -> list[dict[str, Any]]:
    samples = _thinned(summary.trace.samples)
    at = [(sample.at_ns - origin) / 1e3 for sample in samples]
    names = sorted({name for sample in samples for name in sample.actors})
    curves = [
        {"name": name, "at": at, "depth": [s.actors.get(name, (0, 0, 0))[0] for s in samples]}
        for name in names
    ]
    waiting = {"name": "waiting to be admitted", "at": at, "depth": [s.waiting for s in samples]}
    return [*curves, waiting]


def _thinned(records: list[Any]) -> list[Any]:
    return records[:: max(1, len(records) // (10 * POINTS))]


def _hits(summary: Summary, origin: int) -> list[dict[str, Any]]:
    """Return the hit rates over time, in stretches with the same number of gets."""
    gets = [r for r in summary.trace.requests if r.kind == "get"]
    tiers = sorted({tier for request in gets for tier in request.hit_blocks})
    at: list[float] = []
    found: dict[str, list[float]] = {tier: [] for tier in tiers}
    for group in np.array_split(np.arange(len(gets)), min(len(gets), STRETCHES) or 1):
        of_group = [gets[number] for number in group.tolist()]
        if not of_group:
            break
        asked = max(1, sum(r.asked_blocks for r in of_group))
        at.append((of_group[-1].ended_ns - origin) / 1e3)
        for tier in tiers:
            hits = sum(r.hit_blocks.get(tier, 0) for r in of_group)
            found[tier].append(round(100 * hits / asked, 2))
    return [{"tier": tier, "at": at, "rate": found[tier]} for tier in tiers]


def _latency(summary: Summary) -> list[dict[str, Any]]:
    percents = [*range(99), 99, 99.5, 99.9, 100]
    curves = []
    for kind in summary.kinds:
        ms = [r.took_ns / 1e6 for r in summary.trace.requests if r.kind == kind]
        curves.append(
            {"kind": kind, "percent": percents, "ms": np.percentile(ms, percents).round(4).tolist()}
        )
    return curves


def _sankey(summary: Summary) -> dict[str, list[Any]]:
    """Return the bytes that each route moved as flows between tiers, stores and loads apart."""
    flows = [(route, facts.bytes) for route, facts in summary.routes.items() if facts.bytes]
    labels: list[str] = []

    def node(name: str) -> int:
        if name not in labels:
            labels.append(name)
        return labels.index(name)

    source, target = [], []
    for route, _ in flows:
        begin, _, end = route.partition("→")
        # A Sankey diagram cannot have cycles, so a tier has a node for stores and one for loads.
        stored = _DEPTH.get(end, 9) > _DEPTH.get(begin, 9)
        side = "stored" if stored else "loaded"
        source.append(node(f"{begin}, {side}"))
        target.append(node(f"{end}, {side}"))
    return {
        "labels": labels,
        "source": source,
        "target": target,
        "bytes": [size for _, size in flows],
        "route": [route for route, _ in flows],
    }


_DEPTH = {"device": 0, "host": 1, "disk": 2, "remote": 3, "peer": 4}


def _steps(summary: Summary) -> list[dict[str, Any]]:
    kinds = list(summary.time_by_step)
    whats: Iterable[str] = dict.fromkeys(
        what for steps in summary.time_by_step.values() for what in steps
    )
    bars = []
    for what in whats:
        percent = [
            100 * steps.get(what, 0) / max(1, sum(steps.values()))
            for steps in summary.time_by_step.values()
        ]
        if max(percent) >= 0.5:
            bars.append({"what": what, "kinds": kinds, "percent": percent})
    return bars
