"""What was wrong in a trace, in words: each finding has its cause, its size and what to check.

The rules are few and their thresholds stand here, so that a reader can dispute a finding.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from flexkv.observe.records import OpRecord
from flexkv.trace.breakdown import ADMISSION, FAR, PEER, step_name
from flexkv.trace.summary import RouteSummary, Summary

SLOW_DISK_RATE = 200e6
"""Bytes per second while busy, below which a disk may be slow: a tenth of a cheap NVMe drive."""
SLOW_DISK_MS = 10.0
"""The median op of a slow disk takes longer than this; small ops alone make a low rate."""
SLOW_STORE_MS = 1000.0
"""The median get from a slow store takes longer than this."""
SLOW_STORE_SHARE = 0.5
"""A slow store takes this share of the time of gets or prefetches."""
WRONG_HINTS_SHARE = 0.05
"""Hints are wrong too often if this share of the fetches finds a span missing."""
WRONG_HINTS = 3
"""Fewer wrong hints are no finding."""
STARVED_SHARE = 0.5
"""A queue starves requests if they spend this share of their time waiting for a turn."""
STARVED_MS = 10.0


class Finding(NamedTuple):
    """Something that made the engine slower or less useful than it could have been."""

    kind: str
    """`slow_disk`, `slow_store`, `wrong_hints`, `starved_queue`, `cancelled`, `corrupt`,
    `full_tier`, `tier_down`, `failed`, `given_up`, `lost_records`, `rotated_away`."""
    text: str
    at_ns: int
    """When it first occurred."""
    times: int = 1


def findings(summary: Summary) -> list[Finding]:
    """Return what was wrong, the gravest first; an empty list if nothing was."""
    return [
        *_corrupt(summary),
        *_tiers(summary),
        *_failed(summary),
        *_given_up(summary),
        *_slow_disk(summary),
        *_slow_store(summary),
        *_wrong_hints(summary),
        *_starved(summary),
        *_full(summary),
        *_cancelled(summary),
        *_lost(summary),
    ]


def _corrupt(summary: Summary) -> list[Finding]:
    events = [event for event in summary.trace.events if event.kind == "corrupt_block"]
    found = []
    for tier in sorted({event.tier for event in events}):
        of_tier = [event for event in events if event.tier == tier]
        text = (
            f"{len(of_tier)} reads from {_SOURCES.get(tier, tier)} returned other bytes than were "
            f"written: the blocks were dropped and counted as misses. The first: "
            f"{of_tier[0].detail}. Check the {_TO_CHECK.get(tier, 'drive')}."
        )
        found.append(Finding("corrupt", text, of_tier[0].at_ns, len(of_tier)))
    return found


_SOURCES = {"disk": "SSD", "remote": "the remote store", "peer": "peers"}
_TO_CHECK = {"remote": "store", "peer": "memory of the nodes, and the network between them"}


def _tiers(summary: Summary) -> list[Finding]:
    events = [e for e in summary.trace.events if e.kind in ("tier_down", "tier_hung")]
    found = []
    for tier, count in Counter(event.tier for event in events).items():
        first = next(event for event in events if event.tier == tier)
        word = "hung" if first.kind == "tier_hung" else "went down"
        text = (
            f"the {tier} tier {word} ({count} times): {first.detail}. Requests went on without it."
        )
        found.append(Finding("tier_down", text, first.at_ns, count))
    return found


def _failed(summary: Summary) -> list[Finding]:
    told = ("done", "recalled", "CorruptBlockError", "MissingBlockError")
    failed = [op for op in summary.trace.ops if op.outcome not in told]
    found = []
    for route, count in Counter(op.route for op in failed).most_common():
        first = next(op for op in failed if op.route == route)
        text = f"{count} transfers {route} failed. The first: {first.detail}"
        found.append(Finding("failed", text, first.ended_ns, count))
    return found


def _given_up(summary: Summary) -> list[Finding]:
    events = [event for event in summary.trace.events if event.kind == "given_up"]
    found = []
    for tier in sorted({event.tier for event in events}):
        of_tier = [event for event in events if event.tier == tier]
        far_keys = "`remote_write_mb_per_s` and `remote_write_window_mb`"
        keys = far_keys if tier in FAR else "`write_behind_wait_s`"
        text = (
            f"blocks were put and never written to the {tier} tier ({of_tier[-1].detail}). If they "
            f"were evicted first, puts come faster than the tier writes: see {keys}."
        )
        found.append(Finding("given_up", text, of_tier[0].at_ns, len(of_tier)))
    return found


def _slow_disk(summary: Summary) -> list[Finding]:
    found = []
    for route, facts in summary.routes.items():
        if "disk" not in route or not _is_slow(facts):
            continue
        ops = [op for op in summary.trace.ops if op.route == route]
        text = (
            f"{route} is slow: {facts.rate / 1e6:.0f} MB/s while busy, an op takes "
            f"{facts.service_ms[0]:.1f} ms (p50) and {facts.service_ms[1]:.1f} ms (p99) on the "
            f"device{_blame(summary, route)}."
        )
        found.append(Finding("slow_disk", text, min(op.begun_ns for op in ops), len(ops)))
    return found


def _is_slow(facts: RouteSummary) -> bool:
    return bool(facts.bytes) and facts.rate < SLOW_DISK_RATE and facts.service_ms[0] > SLOW_DISK_MS


def _blame(summary: Summary, route: str) -> str:
    """Return words on the share of the time of gets that went there; empty if it is small."""
    steps = summary.time_by_step.get("get", {})
    whole = sum(steps.values())
    share = steps.get(route, 0) / whole if whole else 0.0
    return f"; gets spend {100 * share:.0f} % of their time there" if share >= 0.1 else ""


def _slow_store(summary: Summary) -> list[Finding]:
    found = []
    for route, ops in _fetches(summary).items():
        facts = summary.routes[route]
        if facts.service_ms[0] < SLOW_STORE_MS:
            continue
        waits = [_share(summary, kind, step_name(ops[0])) for kind in ("get", "prefetch")]
        if max(waits) < SLOW_STORE_SHARE:
            continue
        text = (
            f"{route} is slow: a fetch takes {facts.service_ms[0] / 1e3:.1f} s (p50) and "
            f"{facts.service_ms[1] / 1e3:.1f} s (p99), {facts.rate / 1e6:.0f} MB/s while busy; "
            f"gets spend {100 * waits[0]:.0f} % of their time {step_name(ops[0])}, prefetches "
            f"{100 * waits[1]:.0f} %. {_way_to(route)}"
        )
        found.append(Finding("slow_store", text, min(op.begun_ns for op in ops), len(ops)))
    return found


def _way_to(route: str) -> str:
    """Return what to do about slow fetches on a route."""
    if route.partition("→")[0] == PEER:
        return "Check the network to the peers; `flexkv cluster status` says which were read."
    return "Check the way to the store: `flexkv doctor` measures it."


def _share(summary: Summary, kind: str, step: str) -> float:
    """Return the share of the time of a kind of request that a step took."""
    steps = summary.time_by_step.get(kind, {})
    return steps.get(step, 0) / max(1, sum(steps.values()))


def _wrong_hints(summary: Summary) -> list[Finding]:
    found = []
    for route, ops in _fetches(summary).items():
        missing = [op for op in ops if op.outcome == "MissingBlockError"]
        if len(missing) < max(WRONG_HINTS, WRONG_HINTS_SHARE * len(ops)):
            continue
        text = (
            f"{len(missing)} of {len(ops)} fetches {route} found a span missing that hints had "
            f"promised: {_why_missing(route)} The first: {missing[0].detail}"
        )
        found.append(Finding("wrong_hints", text, missing[0].ended_ns, len(missing)))
    return found


def _why_missing(route: str) -> str:
    """Return why spans were missing that a far tier was said to have, and what to do about it."""
    if route.partition("→")[0] == PEER:
        return (
            "its node evicted it a moment ago. Requests computed the blocks. Give the nodes more "
            "host memory, or tell changes sooner (`p2p_publish_ms`)."
        )
    return (
        "it was deleted since the last listing. Requests computed the blocks. See "
        "`remote_list_per_s`, and what deletes objects there."
    )


def _fetches(summary: Summary) -> dict[str, list[OpRecord]]:
    """Return the ops of each route from a far tier, without recalled ones."""
    ops = [op for op in summary.trace.ops if op.outcome != "recalled"]
    routes = [route for route in summary.routes if route.partition("→")[0] in FAR]
    return {route: [op for op in ops if op.route == route] for route in routes}


def _starved(summary: Summary) -> list[Finding]:
    found = []
    for kind, steps in summary.time_by_step.items():
        whole = sum(steps.values())
        requests = [r for r in summary.trace.requests if r.kind == kind]
        for what, ns in steps.items():
            waits = what == ADMISSION or what.startswith("queued for ")
            mean_ms = ns / 1e6 / len(requests)
            if not waits or ns < STARVED_SHARE * whole or mean_ms < STARVED_MS:
                continue
            remedy = (
                "more requests came at once than `requests_max` admits"
                if what == ADMISSION
                else "other transfers keep the device busy: see its window in the configuration"
            )
            text = (
                f"{kind}s starve: {100 * ns / whole:.0f} % of their time is {what}, "
                f"{mean_ms:.1f} ms on average; {remedy}."
            )
            found.append(
                Finding("starved_queue", text, min(r.arrived_ns for r in requests), len(requests))
            )
    return found


def _full(summary: Summary) -> list[Finding]:
    short = [r for r in summary.trace.requests if r.error == "CapacityError"]
    found = []
    for tier in sorted({r.reason.partition(":")[0] for r in short}):
        of_tier = [r for r in short if r.reason.startswith(tier)]
        used = [s.tiers[tier][0] for s in summary.trace.samples if tier in s.tiers]
        capacity = summary.trace.header.capacity_blocks.get(tier, 0)
        most = f", at most {max(used)} of {capacity} blocks used" if used and capacity else ""
        lacking = sum(r.asked_blocks - r.moved_blocks for r in of_tier)
        text = (
            f"the {tier} tier was full: {len(of_tier)} requests moved {lacking} blocks less than "
            f"they could have{most}. The first: {of_tier[0].reason}"
        )
        found.append(Finding("full_tier", text, of_tier[0].begun_ns, len(of_tier)))
    return found


def _cancelled(summary: Summary) -> list[Finding]:
    events = [event for event in summary.trace.events if event.kind == "cancel"]
    if not events:
        return []
    ids = ", ".join(str(event.request_id) for event in events[:5])
    more = ", …" if len(events) > 5 else ""
    lengths = _cancelled_ms(summary, {event.request_id for event in events})
    text = f"{len(events)} requests were cancelled (ids {ids}{more}){lengths}."
    return [Finding("cancelled", text, events[0].at_ns, len(events))]


def _cancelled_ms(summary: Summary, ids: set[int]) -> str:
    ms = [r.took_ns / 1e6 for r in summary.trace.requests if r.request_id in ids]
    return f", {np.median(ms):.1f} ms after their arrival (median)" if ms else ""


def _lost(summary: Summary) -> list[Finding]:
    trace, found = summary.trace, []
    if trace.dropped:
        text = (
            f"{trace.dropped} records are missing: the writer could not keep up, or the file was "
            "cut."
        )
        found.append(Finding("lost_records", text, trace.begin_ns, trace.dropped))
    if trace.begins_late:
        text = (
            f"The first {trace.header.part} files of the run are gone (trace_max_files, "
            "trace_max_file_size_mb): their records are missing here."
        )
        found.append(Finding("rotated_away", text, trace.begin_ns, trace.header.part))
    return found
