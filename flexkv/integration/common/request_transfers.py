"""What is known about the loads and puts of one request, and what each of their ends changes.

`stored_blocks` is how many of its first blocks need no put: they are stored, or a put of them is
under way. A block is found only behind its parents, so an end that leaves a gap sets it back:

    a put failed, or its request was dropped   to the put's first block
    a put stored nothing                       to 0: its parents may be gone as well; unchanged if
                                               the engine has taken back the block before the put's
    a put was stale                            unchanged: no block of this generation is stored
    a load came whole, from the first block    to the load's end
    a load by layer came short                 to the load's first block: the rest is computed anew

Leaves of other KV groups do not count: without one, a later hit is only shorter.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from flexkv import _ext
from flexkv.common.request import LeafBlocks
from flexkv.common.terms import BlockIds
from flexkv.server.prompts import Prompt, PromptPart
from flexkv.server.wire import Done, Matched

ROOM_S = 2.0
"""How long a load for which host memory has no room is retried."""
AGAIN_S = 0.002
"""Pause before a load is retried."""


@dataclass(slots=True, eq=False)
class Load:
    """A load that is wanted, or whose get is under way: then it has a number."""

    keys: PromptPart
    local: int
    """How many of its blocks the device has."""
    first: int
    """The first block that it moves: after `local`, if the engine has null blocks in between."""
    block_ids: list[int]
    found: Matched
    leaves: tuple[LeafBlocks, ...] = ()
    """The blocks of other KV groups that it writes."""
    is_whole: bool = False
    """Whether it counts only if all of it was loaded: the engine has several KV groups."""
    number: int | None = None
    again_s: float = 0.0
    wanted_s: float = field(default_factory=lambda: time.monotonic())
    """When it was first wanted, in seconds of the monotonic clock."""

    @property
    def device_ids(self) -> BlockIds:
        """Return the device blocks of all groups that it writes."""
        return with_leaves(ids_of(self.block_ids), self.leaves)

    @property
    def by_tier(self) -> dict[str, int]:
        """Return an estimate of how many blocks of all KV groups it moves from each tier."""
        return moved_by_tier(self.found, len(self.block_ids), self.local)


class Put(NamedTuple):
    """A put under way.

    Attributes:
        first: the first block of the prompt that it stores.
        last: where it ends, exclusive; `first` if it stores only leaves.
        block_ids: the device blocks that it reads, of all groups.
        generation: the generation of the cache when computing the blocks began.
        is_behind_gap: whether the engine has taken back the block before the first one, so that
            this request cannot store it any more.
    """

    first: int
    last: int
    block_ids: BlockIds
    generation: int
    is_behind_gap: bool = False


@dataclass(slots=True, eq=False)
class RequestTransfers:
    """The blocks, the offer, the load and the puts of one request of an engine."""

    request_id: str
    prompt: Prompt
    """The keys of its blocks, as far as they have been needed."""
    generation: int
    """The generation of the cache when its blocks began to be computed or looked up."""
    block_ids: list[int] = field(default_factory=list)
    """Its device blocks of the prefix chain."""
    junction_blocks: int = 0
    """How many of its first blocks are stored without the leaves that a hit there needs; 0 if no
    missing leaf made its hit shorter. The request stores these leaves."""
    stored_blocks: int = 0
    found: Matched | None = None
    """The match that is offered to it, with a hold on its blocks."""
    local_blocks: int = 0
    """How many of its blocks the device had when a load was offered."""
    waits_for: tuple[int, int] | None = None
    """While its load waits for other loads: the blocks and computed tokens that `found` is for."""
    by_layer: bool = False
    """Whether the step loads what was found for it, layer by layer."""
    may_load: bool = True
    """Whether it may load: a request whose load came short would get the same offer again."""
    may_fetch: bool = True
    """Whether far blocks may be fetched for it: once in its life."""
    load_deadline_s: float | None = None
    """How long it may wait for far blocks; None: as long as the rule of all requests says."""
    was_put_off: bool = False
    """Whether it was put off because too many matches were under way."""
    is_told: bool = False
    """Whether the server was asked to report the tiers of its blocks."""
    load: Load | None = None
    puts: dict[int, Put] = field(default_factory=dict)
    finished: bool = False
    is_stale: bool = False
    """Whether the cache was cleared since `generation`, so that none of its blocks are stored."""
    has_loaded: bool = False
    """Whether it has loaded blocks, which are no newer than that generation."""

    @property
    def has_begun(self) -> bool:
        """Return whether it has blocks, perhaps loaded and not computed on yet, or transfers."""
        return bool(self.block_ids or self.load or self.puts or self.has_loaded)

    def begins_anew(self, generation: int) -> None:
        """Record that it has new blocks, computed from now on, unless some were loaded."""
        if not self.has_loaded:
            self.generation, self.is_stale = generation, False
        self.has_loaded = False

    # -- loads ----------------------------------------------------------------------------------

    def accept(self, block_ids: list[int], first: int, blocks: int) -> Load:
        """Return the load of what is offered.

        Args:
            block_ids: the device blocks of the request, from its first one on.
            first: where the load begins, in blocks.
            blocks: where it ends.
        """
        found, self.found, self.has_loaded = self.found, None, True
        assert found is not None
        part = PromptPart(self.prompt, blocks)
        self.load = Load(part, self.local_blocks, first, block_ids[first:blocks], found)
        return self.load

    def retries(self, done: Done) -> bool:
        """Return whether its load is to begin again, because host memory had no room for it."""
        load, now_s = self.load, time.monotonic()
        assert load is not None
        if done.status != "unready" or self.finished or now_s >= load.wanted_s + ROOM_S:
            return False
        load.number, load.again_s = None, now_s + AGAIN_S
        return True

    def end_load(self, done: Done) -> list[int]:
        """Record the end of its load, and return the device blocks that were not loaded."""
        load, self.load = self.load, None
        assert load is not None
        missing = load.block_ids[done.moved :]
        if load.is_whole and (missing or done.status != "success"):
            missing, self.has_loaded = load.block_ids, False
        if missing:
            self.may_load = False
        elif not load.local:
            self.stored_blocks = load.keys.blocks
        return missing

    def begin_layers(self) -> Load:
        """Return its load by layer, which it no longer waits for: it runs as if that had ended."""
        load, self.load = self.load, None
        assert load is not None
        if not load.first:
            self.stored_blocks = len(load.block_ids)
        return load

    def end_layers(self, load: Load, done: Done) -> None:
        """Record the end of a load by layer; if it came short, the step has computed the rest."""
        if done.moved < len(load.block_ids):
            self.may_load = False
            self.stored_blocks = min(self.stored_blocks, load.first)

    # -- puts -----------------------------------------------------------------------------------

    def first_to_put(self, blocks: int, has_null: bool) -> int:
        """Return where a put of its blocks up to `blocks` begins: behind those that need no put.

        If `has_null`, a block id of 0 stands for a block that the engine has taken back, such as
        one before a window. It cannot be stored any more, so a put begins behind the last of them.
        """
        first = min(self.stored_blocks, blocks)
        if has_null and 0 in (there := self.block_ids[first:blocks]):
            first = blocks - there[::-1].index(0)
        return first

    def begin_put(self, number: int, put: Put) -> None:
        """Record that a put has begun."""
        self.puts[number] = put
        self.stored_blocks = max(self.stored_blocks, put.last)

    def drop_puts(self) -> None:
        """Record that what its puts under way would store is wrong: the next put stores it."""
        self.stored_blocks = min(put.first for put in self.puts.values())

    def end_put(self, done: Done) -> Put:
        """Record the end of one of its puts, and return that put."""
        put = self.puts.pop(done.number)
        if done.is_stale:  # the cache was cleared since its blocks were computed
            self.is_stale |= put.generation == self.generation
        elif put.first == put.last:
            pass
        # Later blocks would lack these as parents, so the next put stores these, too.
        elif done.error or done.status != "success":
            self.stored_blocks = min(self.stored_blocks, put.first)
        elif not done.moved and put.first and not put.is_behind_gap:
            self.stored_blocks = 0
        return put


def moved_by_tier(found: Matched, blocks: int, local: int) -> dict[str, int]:
    """Return an estimate of how many blocks of all KV groups a load moves from each tier.

    Args:
        found: what it is offered.
        blocks: how many blocks of the chain it moves.
        local: how many blocks of the chain the device has.
    """
    counts = Counter(share_of(found.by_tier, blocks, found.blocks - local))
    counts.update(found.leaves)
    return dict(counts)


def share_of(by_tier: Mapping[str, int], part: int, whole: int) -> dict[str, int]:
    """Return counts of blocks by tier, reduced to `part` of `whole` blocks and rounded up."""
    if part == whole:
        return dict(by_tier)
    return {tier: -(-count * part // whole) for tier, count in by_tier.items()}


def with_leaves(ids: BlockIds, leaves: Sequence[LeafBlocks]) -> BlockIds:
    """Return the device blocks of the chain and of leaves."""
    return np.concatenate([ids, *(each.device_ids for each in leaves)]) if leaves else ids


def ids_of(ids: list[int]) -> BlockIds:
    """Return block ids as an int64 array, in a fifth of the time that numpy needs for a list."""
    return np.frombuffer(_ext.pack_int64(ids), np.int64)
