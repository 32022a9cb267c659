"""An index with one chain, to which tests add leaves of several KV groups."""

from __future__ import annotations

from typing import Any

import numpy as np

from flexkv import _ext
from flexkv.common.space import GroupRule
from flexkv.common.terms import Positions, Tier
from flexkv.index.residency import Residency

FULL, WINDOW, CHUNK, STATE = range(4)
BLOCK = 4
"""Tokens of a block of the chain."""


def rule(group: int, kind: int, window: int = 0, ratio: int = 1) -> GroupRule:
    """Return the rule of a KV group."""
    return GroupRule(group, kind, window, ratio, ratio * BLOCK)


def key(number: int) -> bytes:
    """Return the key of a number."""
    return _ext.hash128(number.to_bytes(8, "little"))


def prompt(*numbers: int) -> bytes:
    """Return the keys of a root and its blocks."""
    return b"".join(key(number) for number in numbers)


KEYS = prompt(*range(13))
"""Twelve blocks."""


def salted(of: bytes, group: int) -> bytes:
    """Return the key of a leaf."""
    return bytes(a ^ b for a, b in zip(of, _ext.hash128(b"flexkv leaf", group), strict=True))


def table(*rules: GroupRule, chain: int = 12, **changes: Any) -> Residency:
    """Return an index of two tiers with the first blocks of KEYS in host memory."""
    index = Residency({Tier.HOST: 64, Tier.DISK: 64}, rules=rules, **changes)
    put(index, range(chain))
    return index


def put(
    index: Residency, positions: Any, group: int = 0, tier: Tier = Tier.HOST, keys: bytes = KEYS
) -> Any:
    """Store blocks, and return their places."""
    ids = reserved(index, positions, group, tier, keys)
    index.commit(tier, ids)
    return ids


def reserved(
    index: Residency, positions: Any, group: int = 0, tier: Tier = Tier.HOST, keys: bytes = KEYS
) -> Any:
    """Reserve places for blocks, and return them."""
    places = np.array(list(positions), np.int64)
    if not len(places):
        return places
    at = Positions(int(places[0]), len(places), places)
    ids = index.reserve(tier, keys, at, group=group)
    assert len(ids) == len(places)
    return ids


def leaves(index: Residency, first: int = 0, drop: int = 0) -> dict[int, list[int]]:
    """Return the positions of the leaves that a search finds, by group."""
    found = index.find(KEYS, first, drop=drop)
    return {
        of.group: sorted(n for placed in of.ready.values() for n in placed.positions)
        for of in found.leaves
    }
