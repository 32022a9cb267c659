"""Trace records."""

from __future__ import annotations

from typing import TypeAlias

import msgspec


class RequestRecord(msgspec.Struct, tag="request", frozen=True):
    """One request."""

    request_id: int
    kind: str
    token_count: int
    block_count: int
    namespace_hash: str
    begin_ns: int
    end_ns: int
    status: str
    hit_blocks: dict[str, int]
    moved_blocks: int
    reason: str


class OpRecord(msgspec.Struct, tag="op", frozen=True):
    """One op."""

    request_id: int
    op_id: int
    route: str
    block_count: int
    bytes: int
    issued_ns: int
    ended_ns: int
    outcome: str


Record: TypeAlias = RequestRecord | OpRecord
