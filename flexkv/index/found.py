"""What a search of the index returns: the blocks of a prompt, and where they are."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from flexkv.common.terms import BLOCK_KEY_BYTES, BlockIds, BlockKey, Positions, Tier
from flexkv.index.claims import Holding


class PrefixMatch(msgspec.Struct, frozen=True):
    """How much of a prompt a get would find, each block counted at its nearest tier.

    `tokens` includes `pending_tokens`: those being filled right now, which a get waits for. It does
    not include `far_tokens_by_tier`: those behind them that a far tier is said to have. A get
    fetches these, too, as far as they are really there. With several KV groups, tokens whose leaves
    lie far count there as well, under the tier that has their blocks of the chain.
    """

    tokens: int
    tokens_by_tier: dict[Tier, int]
    pending_tokens: int
    far_tokens_by_tier: dict[Tier, int] = {}

    def __repr__(self) -> str:
        parts = [f"{tier.label} {count}" for tier, count in self.tokens_by_tier.items() if count]
        parts += [f"{self.pending_tokens} pending"] if self.pending_tokens else []
        far = [f"{count} more in {tier.label}" for tier, count in self.far_tokens_by_tier.items()]
        here = f"{self.tokens} tokens{': ' if parts else ''}{', '.join(parts)}"
        return f"PrefixMatch({'; '.join([here, *far])})"


class Placement(msgspec.Struct, frozen=True):
    """Some blocks of a prompt, and where they are in one tier."""

    positions: Positions
    block_ids: BlockIds

    @property
    def block_count(self) -> int:
        """Return the number of blocks."""
        return self.positions.block_count

    def before(self, last: int) -> Placement:
        """Return the part before a position."""
        count = self.positions.number_before(last)
        if count == self.positions.block_count:
            return self
        return Placement(self.positions.part(0, count), self.block_ids[:count])

    def behind(self, first: int) -> Placement:
        """Return the part from a position on."""
        count, before = self.block_count, self.positions.number_before(first)
        return Placement(self.positions.part(before, count), self.block_ids[before:])


class AlikeBlocks(NamedTuple):
    """Blocks of one KV group of a prompt that have the same state in each tier.

    `states` and `block_ids` are by tier, nearest first. Positions may have gaps.
    """

    states: tuple[int, ...]
    positions: Positions
    block_ids: tuple[BlockIds | None, ...]


class Limits(NamedTuple):
    """What a search must not use.

    Attributes:
        tiers: those whose blocks cannot be loaded.
        fillers: ops whose blocks must not be waited for; None: no op may be waited for.
        device: bool[groups - 1, n], whether there is a device block for the leaf of each group but
            the chain's at each position; there is none from position n on. A leaf without one
            cannot be loaded. None if nothing is loaded to a device.
    """

    tiers: Set[Tier] = frozenset()
    fillers: Set[int] | None = frozenset()
    device: NDArray[np.bool_] | None = None


NO_LIMITS, READY_ONLY = Limits(), Limits(fillers=None)


class LeafFound(msgspec.Struct, frozen=True):
    """The leaves of one KV group that a prefix needs, by nearest tier."""

    group: int
    ready: dict[Tier, Placement]
    """Only tiers that are the nearest one of some leaf; positions are those of the chain."""
    pending: Placement | None = None
    """Those that are on their way to host memory."""

    @property
    def block_count(self) -> int:
        """Return the number of leaves."""
        pending = self.pending.block_count if self.pending else 0
        return pending + sum(placed.block_count for placed in self.ready.values())


class Found(msgspec.Struct, frozen=True):
    """The resident run of a prompt from `first` to `last` (exclusive), by nearest tier.

    For a load, `graph.far.with_far` adds what is said to lie far behind it, and with several KV
    groups `graph.far_prefixes` what is said to lie far anywhere in the prefix.

    If the model has leaves, all that the prefix up to `last` needs of every KV group is there, or
    on its way to host memory.
    """

    first: int
    last: int
    ready: dict[Tier, Placement]
    """Only tiers that are the nearest one of some block."""
    pending: Placement | None = None
    """Host blocks that are being filled."""
    leaves: tuple[LeafFound, ...] = ()
    """The needed leaves from `first` on, without groups that need none."""
    chain: int = 0
    """Where the chain's run of ready blocks from `first` on ends, whatever leaves are there."""
    dropped: dict[Tier, Placement] = {}
    """Far blocks of the chain from `last` on. A prefetch brings them, too: see `Request.drop`."""

    @property
    def host_only(self) -> bool:
        """Return whether every block found, of the chain and of the leaves, is in host memory."""
        host = self.ready.get(Tier.HOST)
        if (host.positions.block_count if host else 0) != self.last - self.first:
            return False
        return all(of.ready.keys() == {Tier.HOST} and not of.pending for of in self.leaves)

    @property
    def in_host(self) -> BlockIds:
        """Return the places of the ready blocks in host memory, of the chain and of the leaves."""
        ready = [self.ready, *[of.ready for of in self.leaves]]
        ids = [each[Tier.HOST].block_ids for each in ready if Tier.HOST in each]
        return ids[0] if len(ids) == 1 else np.concatenate(ids) if ids else np.zeros(0, np.int64)

    @property
    def leaves_by_tier(self) -> Counter[Tier]:
        """Return how many of the leaves each tier has."""
        counts = Counter[Tier]()
        for leaf in self.leaves:
            counts.update({tier: placed.block_count for tier, placed in leaf.ready.items()})
        return counts

    def before(self, last: int) -> Found:
        """Return the part of the run before a position.

        A run with leaves can only be cut to nothing: a shorter prefix needs other leaves, so it
        must be searched for.
        """
        if last >= self.last:
            return self
        assert not self.leaves or last <= self.first, "the leaves are those of a longer prefix"
        ready = {tier: placed.before(last) for tier, placed in self.ready.items()}
        pending = self.pending and self.pending.before(last)
        return Found(
            self.first,
            last,
            {tier: placed for tier, placed in ready.items() if placed.block_count},
            pending if pending and pending.block_count else None,
            chain=self.chain,
        )

    def furthest(self, last: int) -> int:
        """Return how far the run can reach if the host blocks behind its end give up their places.

        Places were found for the blocks before `last`, while all host blocks of the run were kept.
        """
        host, pending = self.ready.get(Tier.HOST), self.pending
        places = sum(
            placement.before(last).block_count
            for tier, placement in self.ready.items()
            if tier is not Tier.HOST
        )
        room = places + (host.block_count if host else 0)

        def wanted(end: int) -> int:
            return end - self.first - (pending.positions.number_before(end) if pending else 0)

        return last + bisect_right(range(last + 1, self.last + 1), room, key=wanted)

    @property
    def holdings(self) -> list[Holding]:
        """Return the ready blocks, tier by tier, the leaves after the chain."""
        placed = [*self.ready.items()]
        for leaf in self.leaves:
            placed += leaf.ready.items()
        return [Holding(tier, place.block_ids) for tier, place in placed]


def prefix_match(
    found: Found, tiers: Sequence[Tier], tokens_per_block: int, far: Mapping[Tier, int]
) -> PrefixMatch:
    """Return what was found, and how many blocks behind it lie far, counted in tokens."""
    pending = found.pending.block_count if found.pending else 0
    by_tier = dict.fromkeys(tiers, 0)
    for tier, placement in found.ready.items():
        by_tier[tier] = placement.block_count * tokens_per_block
    tokens = (found.last - found.first) * tokens_per_block
    far_tokens = {tier: count * tokens_per_block for tier, count in far.items()}
    return PrefixMatch(tokens, by_tier, pending * tokens_per_block, far_tokens)


class ReadySpan(NamedTuple):
    """The consecutive blocks of a prompt that make up a span, all READY in one tier; or a leaf.

    Attributes:
        block_ids: their places in that tier: int64[blocks].
        keys: the key of the block before them (or the root; for a leaf, its parent's), and then
            their own: 16 bytes each.
        group: their KV group.
    """

    block_ids: BlockIds
    keys: bytes
    group: int = 0

    @property
    def block_count(self) -> int:
        """Return the number of blocks."""
        return len(self.block_ids)

    @property
    def key(self) -> BlockKey:
        """Return the key of the span: that of its last block."""
        return self.keys[-BLOCK_KEY_BYTES:]
