"""The names of the index's model: blocks by their prompt, leaves, and the keys of both."""

from __future__ import annotations

from functools import cache
from itertools import product
from operator import xor

from flexkv import _ext
from flexkv.common.space import GroupRule
from flexkv.common.terms import Tier
from flexkv.index.found import Found, LeafFound, Limits

Path = tuple[int, ...]
"""A block of a chain, named by its whole prompt up to it; the first number is the namespace.

A leaf is named by its chain's block, followed by minus its KV group.
"""

TIERS = (Tier.HOST, Tier.DISK)
NAMESPACES = 2
HOSTILE = 9
"""The last number of a block of a chain that has the key of its parent's leaf in group 1.

So its own leaf in that group has its parent's key.
"""

BRANCHES = ((0, 1), (0, HOSTILE), (0,), (0, 1), (0,), (0,))
"""The numbers that a prompt may continue with, at each depth."""

DEPTH = len(BRANCHES)
PATHS = [
    (space, *rest)
    for space in range(NAMESPACES)
    for depth in range(1, DEPTH + 1)
    for rest in product(*BRANCHES[:depth])
]
PROMPTS = [path for path in PATHS if len(path) == DEPTH + 1]

BLOCK_TOKENS = 4
FULL, WINDOW, CHUNK, STATE = range(4)


def rule(group: int, kind: int, window: int = 0, ratio: int = 1) -> GroupRule:
    """Return the rule of a KV group over blocks of BLOCK_TOKENS tokens."""
    return GroupRule(group, kind, window, ratio, ratio * BLOCK_TOKENS)


RULES: list[tuple[GroupRule, ...]] = [
    (),
    (rule(1, WINDOW, 6),),
    (rule(1, STATE), rule(2, WINDOW, 9)),
    (rule(1, WINDOW, 10, 2), rule(2, FULL, 0, 3)),
    (rule(1, CHUNK, 12), rule(2, STATE, 0, 2), rule(3, FULL)),
]
"""The KV groups of models, the chain's left out."""


def salt_of(group: int) -> bytes:
    """Return what turns the key of a chain's block into that of its leaf."""
    return _ext.hash128(b"flexkv leaf", group)


def salted(key: bytes, group: int) -> bytes:
    """Return the key of a leaf of the block with this key."""
    return bytes(map(xor, key, salt_of(group)))


@cache
def key_of(path: Path) -> bytes:
    """Return the key of a block, of a leaf, or of a namespace's root."""
    if path[-1] == HOSTILE:
        return salted(key_of(path[:-1]), 1)
    if path[-1] < 0:
        return salted(key_of(path[:-1]), -path[-1])
    return _ext.hash128(repr(path).encode())


@cache
def keys_of(path: Path) -> bytes:
    """Return the keys of a namespace's root and of a prompt's blocks."""
    return b"".join(key_of(path[: length + 1]) for length in range(len(path)))


def group_of(path: Path) -> int:
    """Return the KV group of a block."""
    return max(0, -path[-1])


def chain_of(path: Path) -> Path:
    """Return the block of the chain: a leaf's parent, or the block itself."""
    return path[:-1] if path[-1] < 0 else path


DEPTHS = {
    (key_of(name), group_of(name)): len(path) - 1
    for path in PATHS
    for name in (path, *((*path, -group) for group in range(1, 4)))
}
"""How many blocks of the chain each block ends, by its key and KV group; leaves, too."""


def positions_of(rules: tuple[GroupRule, ...], group: int, end: int) -> list[int]:
    """Return the positions before `end` at which a KV group may have a block."""
    ratio = rules[group - 1].ratio if group else 1
    return [p for p in range(end) if (p + 1) % ratio == 0]


def allows(limits: Limits, group: int, position: int) -> bool:
    """Return whether the device has a block for a leaf."""
    device = limits.device
    return device is None or (position < device.shape[1] and bool(device[group - 1, position]))


def places_found(found: Found | LeafFound) -> dict[int, tuple[Tier, int, bool]]:
    """Return where blocks were found, by position, and whether they are ready there."""
    placed = [(tier, each, True) for tier, each in found.ready.items()]
    if found.pending is not None:
        placed.append((Tier.HOST, found.pending, False))
    return {
        n: (tier, block_id, is_ready)
        for tier, each, is_ready in placed
        for n, block_id in zip(each.positions, each.block_ids.tolist(), strict=True)
    }
