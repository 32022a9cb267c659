"""The records of a trace, as JSON lines tagged by `type`.

Prompts stand in them in clear by explicit option only.

Times are nanoseconds of the monotonic clock; a file's header anchors them to the wall clock.
`docs/trace-schema.json` is the JSON Schema of a line (`python -m flexkv.observe.records`).
"""

from __future__ import annotations

import json
import sys
from typing import Any, TypeAlias

import msgspec

SCHEMA_VERSION = 3


class HeaderRecord(msgspec.Struct, tag="header", frozen=True, gc=False):
    """The first line of every file, and of every run that adds to one."""

    schema_version: int
    flexkv_version: str
    wall_ns: int
    """Unix time at the moment that the monotonic clock showed `monotonic_ns`."""
    monotonic_ns: int
    run: str = ""
    """Names the run: the files of one have the same."""
    tokens_per_block: int = 0
    block_bytes: int = 0
    capacity_blocks: dict[str, int] = {}
    """By tier, as it was opened."""
    backing: dict[str, str] = {}
    """What holds the blocks of each tier."""
    part: int = 0
    """Which file of the run this one is: those before it may be rotated away."""


class PlannedOp(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One op of a plan: its route ("wait" for one that waits for another request), and what for."""

    route: str
    block_count: int
    after: tuple[int, ...]
    """The ops of the plan that end before this one begins."""


class PlanRecord(msgspec.Struct, tag="plan", frozen=True, gc=False):
    """The ops that a request was compiled into, when they were; none for plans of one op."""

    request_id: int
    run_id: int
    at_ns: int
    ops: tuple[PlannedOp, ...]


class OpRecord(msgspec.Struct, tag="op", frozen=True, gc=False):
    """One transfer op, when its actor reported its end."""

    request_id: int
    run_id: int
    op_id: int
    """Number of the op in its plan."""
    actor: str
    route: str
    block_count: int
    bytes: int
    issued_ns: int
    """When the actor got it."""
    begun_ns: int
    """When the actor gave its first piece to the device; `ended_ns` if it never did."""
    ended_ns: int
    outcome: str
    """`done`, `recalled`, or the name of the error."""
    detail: str = ""
    """What went wrong, in words."""


class RequestRecord(msgspec.Struct, tag="request", frozen=True, gc=False):
    """One request, when its caller was told."""

    request_id: int
    run_id: int
    kind: str
    token_count: int
    first_block: int
    """Where the blocks begin that were asked for; those before were on the device already."""
    last_block: int
    """Exclusive."""
    namespace_hash: str
    keys: bytes
    """The first six bytes of each block's key, up to `last_block`; base64 in the file."""
    arrived_ns: int
    begun_ns: int
    """When it was planned: until then it waited to be admitted."""
    ended_ns: int
    status: str
    hit_blocks: dict[str, int]
    """By tier, each block at its nearest one."""
    moved_blocks: int
    error: str = ""
    """Name of the error, if there was one."""
    reason: str = ""
    """Why less was moved than could have been; empty when nothing was wrong."""


class EventRecord(msgspec.Struct, tag="event", frozen=True, gc=False):
    """A change of state, a fault, or something that was done to the engine."""

    at_ns: int
    kind: str
    """`tier_down`, `tier_hung`, `tier_on_trial`, `tier_up`, `corrupt_block`, `cancel`, `evicted`,
    `given_up`: blocks that will not be written to a lower tier.

    `evicted` has the request for which room was made, if one was planned since.
    """
    tier: str = ""
    request_id: int = -1
    detail: str = ""


class SampleRecord(msgspec.Struct, tag="sample", frozen=True, gc=False):
    """How full the engine is, now and then while it works."""

    at_ns: int
    tiers: dict[str, tuple[int, int, int]]
    """Blocks used, of those pinned, and evicted since the start."""
    actors: dict[str, tuple[int, int, int]]
    """Ops queued or in flight, and bytes in flight towards the device and away from it."""
    running: int
    waiting: int
    """Requests under way, and those that wait to be admitted or for room in host memory."""
    owed: dict[str, tuple[int, int]] = {}
    """For each lower tier, the blocks that host memory owes it, and those being written to it."""


class TokensRecord(msgspec.Struct, tag="tokens", frozen=True, gc=False):
    """The prompt of a request in clear: only where `trace_tokens` asks for it."""

    request_id: int
    token_ids: tuple[int, ...]


class DropRecord(msgspec.Struct, tag="dropped", frozen=True, gc=False):
    """Records that were lost, since the writer could not keep up."""

    count: int


Record: TypeAlias = (
    HeaderRecord
    | PlanRecord
    | OpRecord
    | RequestRecord
    | EventRecord
    | SampleRecord
    | TokensRecord
    | DropRecord
)


def schema() -> dict[str, Any]:
    """Give the JSON Schema of a line."""
    return msgspec.json.schema(Record)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(schema(), indent=2) + "\n")
