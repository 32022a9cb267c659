"""The records of a trace, as JSON lines tagged by `type`.

They contain prompts in clear only where an option asks for it.

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
    """The first line of every file, and of every run that appends to one."""

    schema_version: int
    flexkv_version: str
    wall_ns: int
    """Unix time at the moment that the monotonic clock showed `monotonic_ns`."""
    monotonic_ns: int
    run: str = ""
    """Identifies the run: all files of a run have the same value."""
    tokens_per_block: int = 0
    block_bytes: int = 0
    """Of a block of the prefix chain."""
    capacity_blocks: dict[str, int] = {}
    """Capacity of each tier when it was opened."""
    backing: dict[str, str] = {}
    """What holds the blocks of each tier."""
    part: int = 0
    """Number of this file in the run, from 0; earlier ones may have been rotated away."""
    group_block_bytes: tuple[int, ...] = ()
    """Bytes of a block of each KV group."""


class PlannedOp(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One op of a plan. Its route is "wait" if it only waits for another request's op."""

    route: str
    block_count: int
    after: tuple[int, ...]
    """Numbers of the plan's ops that must end before this one begins."""
    group: int = 0
    """The KV group of its blocks."""


class PlanRecord(msgspec.Struct, tag="plan", frozen=True, gc=False):
    """The ops that a request was compiled into; a plan of one op has no such record."""

    request_id: int
    run_id: int
    at_ns: int
    ops: tuple[PlannedOp, ...]


class OpRecord(msgspec.Struct, tag="op", frozen=True, gc=False):
    """One transfer op, recorded when its actor reported its end."""

    request_id: int
    run_id: int
    op_id: int
    """Number of the op in its plan."""
    actor: str
    route: str
    block_count: int
    """Blocks that it moved; for an op that failed, the leading ones that arrived all the same."""
    bytes: int
    issued_ns: int
    """When the actor received it."""
    begun_ns: int
    """When the actor gave its first piece to its port; `ended_ns` if that is not known."""
    ended_ns: int
    outcome: str
    """`done`, `recalled`, or the name of the error."""
    detail: str = ""
    """What went wrong, in words."""
    group: int = 0
    """The KV group of its blocks."""
    peer: str = ""
    """The address of the node that it read from, or of several, separated by spaces."""


class RequestRecord(msgspec.Struct, tag="request", frozen=True, gc=False):
    """One request, recorded when its caller was answered."""

    request_id: int
    run_id: int
    kind: str
    token_count: int
    first_block: int
    """First block that was asked for; those before it were on the device already."""
    last_block: int
    """Exclusive."""
    namespace_hash: str
    keys: bytes
    """The first six bytes of each block's key, up to `last_block`; base64 in the file."""
    arrived_ns: int
    begun_ns: int
    """When it was planned; until then it waited to be admitted."""
    ended_ns: int
    status: str
    hit_blocks: dict[str, int]
    """Blocks found in each tier; a block counts at its nearest tier only."""
    moved_blocks: int
    error: str = ""
    """Name of the error, if there was one."""
    reason: str = ""
    """Why the request moved less than it could have; empty when nothing was wrong."""

    @property
    def took_ns(self) -> int:
        """Return the time from its arrival to its answer."""
        return self.ended_ns - self.arrived_ns

    @property
    def asked_blocks(self) -> int:
        """Return how many blocks were asked for."""
        return self.last_block - self.first_block


class EventRecord(msgspec.Struct, tag="event", frozen=True, gc=False):
    """A change of state, a fault, or something that was done to the engine."""

    at_ns: int
    kind: str
    """`tier_down`, `tier_hung`, `tier_on_trial`, `tier_up`, `corrupt_block`, `cancel`, `evicted`,
    `given_up`: blocks that will not be written to a lower tier.

    An `evicted` event has the id of the request that the blocks made room for, if one needed room.
    """
    tier: str = ""
    request_id: int = -1
    detail: str = ""


class SampleRecord(msgspec.Struct, tag="sample", frozen=True, gc=False):
    """How full the engine is, sampled at intervals while it works."""

    at_ns: int
    tiers: dict[str, tuple[int, int, int]]
    """For each tier: blocks used, blocks of those pinned, and blocks evicted since the start."""
    actors: dict[str, tuple[int, int, int]]
    """For each actor: ops queued or in flight, bytes in flight to the device and away from it."""
    running: int
    waiting: int
    """`running` requests are under way; `waiting` ones await admission or room in host memory."""
    owed: dict[str, tuple[int, int]] = {}
    """For each lower tier: blocks that host memory owes it, and blocks being written to it."""


class TokensRecord(msgspec.Struct, tag="tokens", frozen=True, gc=False):
    """The prompt of a request in clear, recorded only with `trace_tokens`."""

    request_id: int
    token_ids: tuple[int, ...]


class DropRecord(msgspec.Struct, tag="dropped", frozen=True, gc=False):
    """The number of records that were dropped because the writer could not keep up."""

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
    """Return the JSON Schema of a line."""
    return msgspec.json.schema(Record)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(schema(), indent=2) + "\n")
