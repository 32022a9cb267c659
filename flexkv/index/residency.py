"""Where the blocks of a prompt are: one table for all tiers, and all claims on it.

The table is `_ext.BlockIndex` (see `ext/README.md`, "Index"): states, eviction and the laws between
tiers are there. This module wraps its calls in the core's types. Keys come as one buffer: the
namespace's root, then a key for each block. Blocks come as positions in the prompt and places in a
tier.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flexkv import _ext
from flexkv.common.errors import CapacityError, InvariantError
from flexkv.common.space import GroupRule
from flexkv.common.terms import BLOCK_KEY_BYTES, BLOCK_RECORD_BYTES, BlockIds, Positions, Tier
from flexkv.index.claims import Claims, Holding
from flexkv.index.clears import ClearHistory
from flexkv.index.eviction import Eviction
from flexkv.index.found import (
    NO_LIMITS,
    AlikeBlocks,
    Found,
    LeafFound,
    Limits,
    Placement,
    ReadySpan,
)
from flexkv.index.guests import Guests
from flexkv.index.recorder import ChangeRecorder

ABSENT, PENDING, READY = 0, 1, 2
"""State of a block in one tier: nowhere, being filled, there."""

_UNUSED, _ASKED, _STORED = 0, 1, 2
"""Which use of blocks a survey counts: none, that they were asked for, that they were stored."""

NO_QUOTA = 2**32 - 1

PREFIX, ALL, WORTHY = 0, 1, 2
"""How much `reserve` takes when room is short: what fits; all or nothing; what is worth it."""

TAKEN, GONE, THERE, NO_ROOM = 0, 1, 2, 3
"""The outcome for a block in `reserve_copies`."""


class _Held:
    """Pins blocks while it is entered."""

    __slots__ = ("_holdings", "_table")

    def __init__(self, table: _ext.BlockIndex, holdings: list[tuple[int, BlockIds]]) -> None:
        self._table, self._holdings = table, holdings

    def __enter__(self) -> None:
        for number, block_ids in self._holdings:
            self._table.pin(number, block_ids)

    def __exit__(self, *_: object) -> None:
        for number, block_ids in self._holdings:
            self._table.unpin(number, block_ids)


class TierCounts(NamedTuple):
    """The current number of places of one tier, by state."""

    capacity: int
    free: int
    reserved: int
    ready: int
    draining: int
    pinned: int
    evicted: int
    """Since the start."""


class Residency:
    """Every tier's blocks, nearest first, and the claims on them. The one source of truth.

    The blocks of KV group 0 form the prefix chains. A block of any other group is a leaf. Its
    parent is the chain's block that ends where it ends: the last one if it covers several. Calls
    name a leaf by its group and by its parent's position and key.

    Only the scheduler changes it. A call that breaks a law raises InvariantError.

    Attributes:
        groups: the number of KV groups, that of the chain included.
        recorder: records changes; `change_hub.py` passes them on to readers.
        selective: whether tiers refuse blocks that are worth less than what they hold.
    """

    def __init__(
        self,
        capacities: dict[Tier, int],
        eviction: Eviction | None = None,
        clears: ClearHistory | None = None,
        rules: Sequence[GroupRule] = (),
    ) -> None:
        """Build an empty table.

        Args:
            capacities: blocks of each tier.
            eviction: the policy of every tier.
            clears: the history of clears.
            rules: what a prefix needs of each KV group but the chain's; group n is rules[n - 1].
        """
        eviction = eviction or Eviction()
        self.groups = 1 + len(rules)
        self.clears = clears or ClearHistory()
        self.tiers = tuple(sorted(capacities))
        self._number = {tier: number for number, tier in enumerate(self.tiers)}
        self._table = _ext.BlockIndex(
            tuple(eviction.options(capacities[tier]) for tier in self.tiers),
            InvariantError,
            tuple(tuple(rule) for rule in rules),
        )
        count = len(self.tiers)
        self._states = [
            tuple(pattern // 3**number % 3 for number in range(count))
            for pattern in range(3**count)
        ]
        self._nearest = {
            state * 3**number: (number, tier, state == READY)
            for tier, number in self._number.items()
            for state in (PENDING, READY)
        }
        self.claims = Claims(self._table, self._number)
        self.recorder = ChangeRecorder(self._table, self.tiers)
        self.timed, self.selective = eviction.timed, eviction.selective
        self._begin_s: int | None = None
        self._start_threshold = eviction.start_threshold
        self._evict_ratio = eviction.evict_ratio

    # -- looking --------------------------------------------------------------------------------

    def find(self, keys: bytes, first: int = 0, use: bool = False, drop: int = 0) -> Found:
        """Return the longest resident run that starts at position `first`.

        If there are leaves, it ends where every KV group can load what the prefix needs, on a
        multiple of all groups' blocks. Blocks that are on their way to host memory count, too.

        Args:
            keys: root and keys of the prompt's blocks.
            first: where the run starts. Leaves before it are not needed.
            use: count a use of every block of the chain from the root to the end of the run, and of
                the leaves that are needed there, in every tier.
            drop: how many more blocks the chain must have behind the run.
        """
        if self.groups > 1:
            return self.reach(keys, first, use, drop)
        found = self.run(keys, first, len(keys) // BLOCK_KEY_BYTES - 1, use)
        return found.before(max(first, found.last - drop)) if drop else found

    def run(self, keys: bytes, first: int, blocks: int, use: bool = False) -> Found:
        """Return the longest resident run of the chain alone."""
        if blocks <= first:
            return Found(first, first, {}, chain=first)
        told = self._table.survey(keys, first, blocks, True, _ASKED if use else _UNUSED)
        if not told:
            return Found(first, first, {}, chain=first)
        ready, pending = self._by_tier(told)
        last = first
        for alike in told:
            last += alike[2]
        chain = pending.positions.first if pending else last
        return Found(first, last, ready, pending, chain=chain)

    def reach(
        self,
        keys: bytes,
        first: int = 0,
        use: bool = False,
        drop: int = 0,
        limits: Limits = NO_LIMITS,
    ) -> Found:
        """Return the longest run that every KV group can load, as `find` does, within limits."""
        blocks = len(keys) // BLOCK_KEY_BYTES - 1
        if blocks <= first:
            return Found(first, first, {}, chain=first)
        unusable = sum([1 << self._number[tier] for tier in limits.tiers & self._number.keys()])
        shunned = None if limits.fillers is None else _op_ids(limits.fillers)
        last, chain, told, leaves = self._table.reach(
            keys, first, blocks, drop, use, unusable, limits.device, shunned
        )
        found = [LeafFound(group, *self._by_tier(of)) for group, of in leaves]
        return Found(first, last, *self._by_tier(told), tuple(found), chain)

    def _by_tier(
        self, told: Sequence[_ext.Alike]
    ) -> tuple[dict[Tier, Placement], Placement | None]:
        """Return where blocks are ready, and those that are on their way to host memory."""
        ready: dict[Tier, Placement] = {}
        pending = None
        for pattern, begin, count, places, ids in told:
            number, tier, is_ready = self._nearest[pattern]
            block_ids = _array(ids[number])
            assert block_ids is not None, pattern
            placement = Placement(Positions(begin, count, _array(places)), block_ids)
            if is_ready:
                ready[tier] = placement
            else:
                pending = placement
        return ready, pending

    def parent(self, keys: bytes, first: int) -> list[Holding] | None:
        """Return what to pin of the block before position `first`; None if it is nowhere.

        It is an empty list if there is no such block, or it is being filled. Host memory takes no
        block whose parent is nowhere: no get could reach it.
        """
        if not first:
            return []
        found = self.run(keys, first - 1, first)
        if found.pending is not None:
            return []
        return found.holdings if found.ready else None

    def survey(
        self, keys: bytes, first: int, last: int, use: bool = True, group: int = 0
    ) -> list[AlikeBlocks]:
        """Return the blocks from `first` to `last`, grouped by where they are; count their use.

        Of a group other than 0, these are the leaves that have a parent in that range.
        """
        return [
            AlikeBlocks(
                self._states[pattern],
                Positions(begin, count, _array(places)),
                tuple([_array(blob) for blob in ids]),
            )
            for pattern, begin, count, places, ids in self._table.survey(
                keys, first, last, False, _STORED if use else _UNUSED, group
            )
        ]

    def agreeing(self, keys: bytes) -> int:
        """Return how many blocks, from the first on, `keys` chains without a contradiction.

        Keys that were derived from tokens never contradict. Keys that another process made up may
        name a block twice, or under a parent other than its own, and planning with them would break
        the index.
        """
        return self._table.agreeing(keys)

    def counts(self, tier: Tier) -> TierCounts:
        """Return the number of places of a tier, by state; a far tier has none."""
        if tier not in self._number:
            return TierCounts(0, 0, 0, 0, 0, 0, 0)
        return TierCounts(*self._table.counts(self._number[tier]))

    def group_blocks(self, tier: Tier) -> list[int]:
        """Return the number of ready places of a tier, by KV group."""
        if tier not in self._number:
            return [0] * self.groups
        return list(self._table.group_blocks(self._number[tier]))

    @property
    def evicted(self) -> list[int]:
        """Return the number of blocks evicted since the start, by tier in the order of `tiers`."""
        return [self._table.counts(number)[-1] for number in self._number.values()]

    def shortfall(self, tier: Tier, wanted_blocks: int) -> CapacityError:
        """Return the error that says that a tier has no room for this many blocks."""
        counts = self.counts(tier)
        evictable = max(0, counts.ready - counts.pinned)
        return CapacityError(tier.label, wanted_blocks, counts.free, evictable)

    def keys_of(self, tier: Tier, block_ids: BlockIds) -> bytes:
        """Return the keys of blocks of a tier, 16 bytes each."""
        return self._table.keys_of(self._number[tier], block_ids)

    def export(self, tier: Tier, block_ids: BlockIds) -> NDArray[np.uint8]:
        """Return what places hold, for `restore`: uint8[n, 36], zeros for those that are not READY.

        A row is the block's key, its parent's key (the root's for the first of a prompt), and a
        uint32: bit 0 is set for the first of a prompt, and bits 8 and up are the KV group.
        """
        blob = self._table.export(self._number[tier], block_ids)
        return np.frombuffer(blob, np.uint8).reshape(len(block_ids), BLOCK_RECORD_BYTES)

    def spans(self, tier: Tier, block_ids: BlockIds, size: int) -> list[ReadySpan]:
        """Return the spans of `size` blocks to which blocks of a tier belong, if READY as a whole.

        A span may be there several times.
        """
        ids, keys = self._table.spans(self._number[tier], block_ids, size)
        rows, step = np.frombuffer(ids, np.int64).reshape(-1, size), (size + 1) * BLOCK_KEY_BYTES
        return [ReadySpan(row, keys[n * step : (n + 1) * step]) for n, row in enumerate(rows)]

    def restore(
        self, tier: Tier, blocks: NDArray[np.uint8], parents: BlockIds, block_ids: BlockIds
    ) -> None:
        """Fill a tier that was never used with blocks of an earlier run, parents before children.

        Args:
            tier: the tier to fill.
            blocks: as `export` returns them.
            parents: int64[n], which of the blocks is the parent; -1 for the first of a prompt.
            block_ids: their places.
        """
        self._table.restore(self._number[tier], blocks, parents, block_ids)

    def namespace_blocks(self, root: bytes) -> dict[Tier, int]:
        """Return the number of blocks of a namespace, by tier."""
        return dict(zip(self.tiers, self._table.root_blocks(root), strict=True))

    def set_quota(self, root: bytes, tier: Tier, blocks: int | None) -> None:
        """Limit how many places of a tier a namespace may have; None removes the limit.

        Blocks beyond it are evicted as far as they may be; new ones then replace its own blocks.

        Raises:
            ValueError: too many namespaces have quotas.
        """
        bound = NO_QUOTA if blocks is None else blocks
        self._table.set_quota(self._number[tier], root, bound)

    def namespace_holdings(self, root: bytes) -> list[Holding]:
        """Return every ready block of a namespace, tier by tier."""
        return [
            Holding(tier, np.frombuffer(self._table.root_ids(number, root), np.int64))
            for tier, number in self._number.items()
        ]

    # -- filling --------------------------------------------------------------------------------

    def reserve(
        self, tier: Tier, keys: bytes, positions: Positions, how: int = PREFIX, group: int = 0
    ) -> BlockIds:
        """Reserve places for blocks whose parents are there, evicting others as needed.

        Return the places, int64[n]: for as many of the first blocks as `how` allows.
        """
        last = len(keys) // BLOCK_KEY_BYTES - 1
        begin, places = 0, positions.places
        if places is None:
            begin, last = positions.first, positions.first + positions.block_count
        number = self._number[tier]
        return np.frombuffer(
            self._table.reserve(number, keys, begin, last, places, how, group), np.int64
        )

    def make_room(self, tier: Tier, keys: bytes, blocks: int) -> bool:
        """Evict until a namespace can get this many places; or evict nothing and return False."""
        return self._table.make_room(self._number[tier], keys, blocks)

    def reserve_copies(
        self, source: Tier, target: Tier, block_ids: BlockIds, keys: bytes
    ) -> tuple[NDArray[np.uint8], BlockIds]:
        """Reserve places for blocks that another tier has, unless they are worth too little.

        Args:
            source: the tier that has them.
            target: the tier that lacks them.
            block_ids: int64[n], their places in `source`, which may hold other blocks by now.
            keys: 16 bytes each, by which the blocks are recognised.

        Returns:
            The outcome for each block, uint8[n]: TAKEN, GONE, THERE or NO_ROOM; and the places of
            the TAKEN ones, int64, which are RESERVED.
        """
        numbers = self._number
        outcomes, ids = self._table.reserve_copies(
            numbers[source], numbers[target], block_ids, keys, WORTHY
        )
        return np.frombuffer(outcomes, np.uint8), np.frombuffer(ids, np.int64)

    def lacking(
        self, source: Tier, target: Tier, first: int, last: int, unwritten: bool = False
    ) -> BlockIds:
        """Return the places of `source` in a range whose READY blocks `target` lacks.

        With `unwritten`, blocks for which it has only a RESERVED place count as lacking.
        """
        numbers = self._number
        blob = self._table.lacking(numbers[source], numbers[target], first, last, unwritten)
        return np.frombuffer(blob, np.int64)

    def limit_guests(self, share: float) -> None:
        """Evict next what was fetched from other nodes and not asked for again: see `Guests`."""
        self.claims.guests = Guests(self._table, self._number[Tier.HOST], share)

    def commit(self, tier: Tier, block_ids: BlockIds) -> None:
        """Make RESERVED places READY, as their bytes are there; free those with forgotten keys."""
        self._table.commit(self._number[tier], block_ids)

    def abort(self, tier: Tier, block_ids: BlockIds) -> None:
        """Free RESERVED places whose bytes will not come, and blocks that continue theirs."""
        self._table.abort(self._number[tier], block_ids)

    # -- holding --------------------------------------------------------------------------------

    def holding(self, holdings: Sequence[Holding]) -> AbstractContextManager[None]:
        """Return a context that pins blocks while something is planned; far ones need no pin."""
        numbers = self._number
        return _Held(
            self._table, [(numbers[tier], ids) for tier, ids in holdings if tier in numbers]
        )

    # -- dropping -------------------------------------------------------------------------------

    def tick(self, now_s: int) -> None:
        """Set the time, in seconds from any start; it must never go back."""
        if self._begin_s is None:
            self._begin_s = now_s
        self._table.tick(now_s - self._begin_s)

    def evict_ahead(self) -> None:
        """Evict blocks of each tier that is fuller than the start threshold of eviction allows."""
        if self._start_threshold >= 1.0:
            return
        for tier, number in self._number.items():
            counts = self.counts(tier)
            allowed = int(counts.capacity * self._start_threshold)
            if (over := counts.capacity - counts.free - allowed) > 0:
                batch = int(counts.capacity * self._evict_ratio)
                self._table.evict(number, max(over, batch))

    def evict(self, tier: Tier, blocks: int) -> int:
        """Evict up to this many blocks of a tier, and return how many."""
        return self._table.evict(self._number[tier], blocks)

    def forget(self, tier: Tier, block_ids: BlockIds) -> None:
        """Make blocks unfindable in a tier, and what continues them if no other tier has a copy."""
        self._table.forget(self._number[tier], block_ids)

    def clear(self, tier: Tier | None = None, root: bytes | None = None) -> int:
        """Forget the blocks of a tier, of a namespace, or all; return how many places they had.

        Puts that began before will store nothing.
        """
        self.clears.note(root)
        if root is not None:
            return self._table.clear_root(root)
        tiers = self.tiers if tier is None else (tier,)
        return sum(self._table.clear(self._number[tier]) for tier in tiers)

    def resize(self, tier: Tier, capacity_blocks: int) -> int:
        """Change how many blocks a tier may hold, up to its first capacity; return the new number.

        It is more than asked for when too many blocks are pinned or being filled.
        """
        return self._table.resize(self._number[tier], capacity_blocks)

    def validate(self) -> None:
        """Check every law of the table, and that what is reserved or pinned has a claim.

        Raises:
            InvariantError: a law does not hold.
        """
        self._table.validate()
        if self.claims:
            return
        for tier in self.tiers:
            counts = self.counts(tier)
            if counts.reserved or counts.pinned:
                raise InvariantError(
                    f"{tier.label}: no claim is open, yet {counts.reserved} blocks are "
                    f"reserved and {counts.pinned} pinned"
                )


def _op_ids(fillers: Set[int]) -> NDArray[np.int64]:
    """Return ids of ops as int64[n]."""
    return np.array([*fillers], np.int64) if fillers else _NO_OPS


_NO_OPS = np.zeros(0, np.int64)


def _array(blob: bytes | None) -> BlockIds | None:
    """Return the table's bytes as int64[n]."""
    return None if blob is None else np.frombuffer(blob, np.int64)
