"""Finds the blocks of an earlier run that form prompts without holes, and their parents."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flexkv.common.terms import BLOCK_KEY_BYTES
from flexkv.index.keys import leaf_salt

DOUBLINGS_MAX = 40
"""Enough for prompts of 2**40 blocks; parents that take more steps form a circle."""


class Forest(NamedTuple):
    """Blocks that can be reached from the first block of a prompt, parents before children."""

    order: NDArray[np.int64]
    """int64[m]: the index of each among the given blocks."""
    parents: NDArray[np.int64]
    """int64[m]: the index in `order` of each one's parent; -1 for the first of a prompt."""


def forest(blocks: NDArray[np.uint8], groups: int = 1) -> Forest:
    """Return the blocks that can be reached from the first block of a prompt.

    Args:
        blocks: uint8[n, 36]: key, parent's key, and a uint32: bit 0 is set for the first of a
            prompt, bits 8 and up are the KV group, above 0 for a leaf. Of blocks of one group with
            the same key the last counts.
        groups: the number of KV groups; leaves of others are left out.
    """
    size = BLOCK_KEY_BYTES
    keys, above = _words(blocks[:, :size]), _words(blocks[:, size : 2 * size])
    flags = np.ascontiguousarray(blocks[:, 2 * size :]).view("<u4")[:, 0]
    group = flags >> 8
    is_first = (flags & 1 > 0) & (group == 0)
    chain = _last_of_each(keys, np.flatnonzero(group == 0))
    parent = np.where(is_first, -1, _find(keys, chain, above))
    stays = np.zeros(len(keys), np.bool_)
    stays[chain] = True
    for leaves in range(1, groups):
        of_group = np.flatnonzero(group == leaves)
        right = np.all(above[of_group] ^ leaf_salt(leaves) == keys[of_group], axis=1)
        stays[_last_of_each(keys, of_group[right])] = True
    stays &= is_first | (parent >= 0)
    depth = _depths(parent, is_first)
    order = np.flatnonzero(stays & (depth >= 0))
    order = order[np.argsort(depth[order], kind="stable")]
    number = np.full(len(keys) + 1, -1)
    number[order] = np.arange(len(order))
    return Forest(order, number[parent[order]])


def _words(keys: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return keys as two words each: uint64[n, 2]."""
    return np.ascontiguousarray(keys).view(np.uint64)


def _last_of_each(keys: NDArray[np.uint64], among: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the last index of each key `among` ascending indices, sorted by key."""
    if not len(among):
        return np.zeros(0, np.int64)
    order = among[np.lexsort((among, keys[among, 1], keys[among, 0]))]
    ordered = keys[order]
    ends = np.append(np.any(ordered[1:] != ordered[:-1], axis=1), True)
    return np.asarray(order[ends])


def _find(
    keys: NDArray[np.uint64], last: NDArray[np.int64], wanted: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """Return the index of each wanted key, or -1; `last` has those of known keys, sorted by key."""
    if not len(last):
        return np.full(len(wanted), -1)
    kinds = np.dtype([("high", np.uint64), ("low", np.uint64)])
    known = np.ascontiguousarray(keys[last]).view(kinds)[:, 0]
    # The first word nearly always decides. Of keys with the same first word only one is found.
    at = np.searchsorted(known["high"], wanted[:, 0])
    at = np.minimum(at, len(last) - 1)
    found = last[at]
    return np.where(np.all(keys[found] == wanted, axis=1), found, -1)


def _depths(parent: NDArray[np.int64], is_first: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return each block's depth, or -1 if no first block leads to it, by doubling steps."""
    nowhere = len(parent)
    step = np.append(np.where(is_first, np.arange(nowhere), parent), -1)
    step[step < 0] = nowhere
    depth = np.append(np.where(is_first, 0, 1), 0)
    for _ in range(DOUBLINGS_MAX):
        further = step[step]
        if np.array_equal(further, step):
            break
        depth = depth + depth[step]
        step = further
    reached = step[:-1] < nowhere
    reached &= np.append(is_first, False)[step[:-1]]
    return np.where(reached, depth[:-1], -1)
