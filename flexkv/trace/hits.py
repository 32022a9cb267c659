"""Hit rates that a request trace would have: with the real index, and with offline bounds.

A hit is a requested block in the unbroken resident prefix. After each request its blocks are
resident, as far as they fit.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from flexkv import _ext
from flexkv.common.terms import Positions, Tier
from flexkv.index.eviction import Eviction
from flexkv.index.residency import WORTHY, Residency
from flexkv.index.secret import derived
from flexkv.trace.mooncake import TOKENS_PER_HASH_ID, TraceLine

_ROOT = bytes(16)


class Prompt(NamedTuple):
    """One request of a trace: its arrival in seconds, and the root and keys of its blocks."""

    at_s: int
    keys: bytes
    ids: Sequence[int]
    """The same blocks as numbers: equal where their prefixes are equal."""
    whole_blocks: int
    """How many of the blocks are full of tokens: the last one may not be."""


class Hits(NamedTuple):
    """The result of a policy on a trace."""

    hit_blocks: int
    asked_blocks: int

    @property
    def rate(self) -> float:
        """Return the share of the requested blocks that were hits."""
        return self.hit_blocks / self.asked_blocks if self.asked_blocks else 0.0


def prompts_of(lines: Iterable[TraceLine]) -> list[Prompt]:
    """Return the requests of a trace as prompts; blocks of different prefixes differ in number."""
    numbers: dict[bytes, int] = {}
    prompts = []
    for line in lines:
        halves = np.array(line.hash_ids, np.int64).view(np.uint32).astype(np.int64)
        keys = _ext.chain_keys(halves, 2, _ROOT, derived("").hash_secret)
        ids = [
            numbers.setdefault(keys[at : at + 16], len(numbers)) for at in range(16, len(keys), 16)
        ]
        whole = min(len(ids), line.input_length // TOKENS_PER_HASH_ID)
        prompts.append(Prompt(int(line.timestamp // 1000), keys, ids, whole))
    return prompts


def replay(prompts: Iterable[Prompt], capacity_blocks: int, eviction: Eviction) -> Hits:
    """Return the hits of a tier of `capacity_blocks` blocks under an eviction policy."""
    index = Residency({Tier.HOST: capacity_blocks}, eviction)
    hit = asked = now_s = 0
    for prompt in prompts:
        now_s = max(now_s, prompt.at_s)
        index.tick(now_s)
        blocks = len(prompt.ids)
        found = index.find(prompt.keys, use=True)
        hit += found.last
        asked += blocks
        if found.last < blocks:
            with index.holding(found.holdings):
                rest = Positions(found.last, blocks - found.last)
                index.commit(Tier.HOST, index.reserve(Tier.HOST, prompt.keys, rest, WORTHY))
    return Hits(hit, asked)


def infinite(prompts: Iterable[Prompt]) -> Hits:
    """Return the hits when nothing is ever evicted."""
    seen: set[int] = set()
    hit = asked = 0
    for prompt in prompts:
        hit += _prefix(prompt.ids, seen)
        asked += len(prompt.ids)
        seen.update(prompt.ids)
    return Hits(hit, asked)


def belady(prompts: Sequence[Prompt], capacity_blocks: int) -> Hits:
    """Return the hits of Belady's policy: keep the blocks that are used again soonest.

    A new block that would be used again last is not stored at all. A block is used again no sooner
    than its parent, so the blocks that stay have no holes.
    """
    never = len(prompts)
    next_use = _next_uses(prompts)
    resident: dict[int, int] = {}  # block -> number of the next request that has it
    # Heap of (-next use, -block) that may have stale entries; a child has a higher number.
    farthest: list[tuple[int, int]] = []
    hit = asked = 0
    for number, prompt in enumerate(prompts):
        hit += _prefix(prompt.ids, resident)
        asked += len(prompt.ids)
        for position, block in enumerate(prompt.ids):
            again = next_use[number][position]
            if again == never:
                resident.pop(block, None)
                continue
            if block not in resident and len(resident) >= capacity_blocks:
                while resident.get(-farthest[0][1]) != -farthest[0][0]:
                    heapq.heappop(farthest)
                if -farthest[0][0] <= again:
                    continue
                del resident[-heapq.heappop(farthest)[1]]
            resident[block] = again
            heapq.heappush(farthest, (-again, -block))
    return Hits(hit, asked)


def _next_uses(prompts: Sequence[Prompt]) -> list[list[int]]:
    """Return, for each block of each request, the number of the next request that has it."""
    never = len(prompts)
    seen: dict[int, int] = {}
    uses: list[list[int]] = [[] for _ in prompts]
    for number in range(len(prompts) - 1, -1, -1):
        ids = prompts[number].ids
        uses[number] = [seen.get(block, never) for block in ids]
        seen.update(dict.fromkeys(ids, number))
    return uses


def _prefix(ids: Sequence[int], resident: set[int] | dict[int, int]) -> int:
    """Return how many leading blocks are resident."""
    for count, block in enumerate(ids):
        if block not in resident:
            return count
    return len(ids)
