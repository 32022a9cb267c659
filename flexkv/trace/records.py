"""The records of a trace, as JSON lines tagged by `type`. Prompts never stand in them.

Times are monotonic nanoseconds; a file's header anchors them to the wall clock.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

SCHEMA_VERSION = 1


class HeaderRecord(msgspec.Struct, tag="header", frozen=True):
    """The first line of every file."""

    schema_version: int
    flexkv_version: str
    wall_ns: int
    """Unix time at the moment that the monotonic clock showed `monotonic_ns`."""
    monotonic_ns: int


class RequestRecord(msgspec.Struct, tag="request", frozen=True):
    """One request, when its caller was told."""

    request_id: int
    kind: str
    token_count: int
    block_count: int
    namespace_hash: str
    begin_ns: int
    end_ns: int
    status: str
    hit_blocks: dict[str, int]
    """By tier, each block at its nearest one."""
    moved_blocks: int
    reason: str
    """Why less was moved than could have been; empty when nothing was wrong."""


class OpRecord(msgspec.Struct, tag="op", frozen=True):
    """One transfer op, when its actor reported its end."""

    request_id: int
    op_id: int
    """Number of the op in its request's plan."""
    route: str
    block_count: int
    bytes: int
    issued_ns: int
    ended_ns: int
    outcome: str
    """`done`, or what went wrong."""


class DropRecord(msgspec.Struct, tag="dropped", frozen=True):
    """Records that were lost, since the writer could not keep up."""

    count: int


Record: TypeAlias = HeaderRecord | RequestRecord | OpRecord | DropRecord
