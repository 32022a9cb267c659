"""Helpers for tests of the core: prompts of numbered blocks, and tiers that hold some of them."""

from __future__ import annotations

import numpy as np

from flexkv.common.request import Operation, Request, Span
from flexkv.common.terms import BlockIds, Positions, Tier
from flexkv.graph.draft import PlanLimits
from flexkv.index.residency import Residency

LIMITS = PlanLimits(chunk_blocks=2, write_behind_blocks_max=8)


def keys(*numbers: int) -> bytes:
    """Return the key of a root and a key for each number; such a chain of keys is a prompt."""
    return b"".join((number + 2).to_bytes(16, "little") for number in (-1, *numbers))


def residency(host: int = 4, disk: int = 8) -> Residency:
    """Return the index of empty tiers."""
    counts = {Tier.HOST: host, Tier.DISK: disk}
    return Residency({tier: count for tier, count in counts.items() if count})


def request(operation: Operation, *numbers: int) -> Request:
    """Return a request for a prompt of numbered blocks, with device blocks 0, 1, …"""
    count = len(numbers)
    ids = None if operation is Operation.PREFETCH else np.arange(count)
    return Request(operation, 1, count, 1, Span(0, count, 0, count), keys(*numbers), ids)


def filled(tiers: Residency, tier: Tier, *numbers: int, first: int = 0) -> BlockIds:
    """Make a prompt's blocks from position `first` on READY in a tier; return their ids."""
    ids = tiers.reserve(tier, keys(*numbers), Positions(first, len(numbers) - first))
    tiers.commit(tier, ids)
    return ids


def resident(tiers: Residency, *numbers: int) -> int:
    """Return the number of leading blocks of a prompt that are in some tier."""
    return tiers.find(keys(*numbers)).last
