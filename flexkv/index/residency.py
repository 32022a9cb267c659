"""Where the blocks of a prompt are: the prefix match across tiers, and every claim on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import msgspec

from flexkv.common.errors import InvariantError
from flexkv.common.terms import BlockKey, Tier
from flexkv.index.claims import Claims, Holding
from flexkv.index.tier import TierIndex


class PrefixMatch(msgspec.Struct, frozen=True):
    """How much of a prompt a get would find, each block counted at its nearest tier.

    `tokens` includes `pending_tokens`: those being filled right now, which a get waits for.
    """

    tokens: int
    tokens_by_tier: dict[Tier, int]
    pending_tokens: int


class Placement(NamedTuple):
    """Some positions of a prompt, and the block ids that they have in one tier."""

    positions: list[int]
    block_ids: list[int]


class Found(NamedTuple):
    """The resident run of a prompt from `first` to `last` (exclusive), by nearest tier."""

    first: int
    last: int
    ready: dict[Tier, Placement]
    pending: Placement
    """Host blocks that are being filled."""

    @property
    def host_only(self) -> bool:
        """Tell whether every block found is ready in host memory."""
        return len(self.ready[Tier.HOST].positions) == self.last - self.first

    @property
    def holdings(self) -> list[Holding]:
        """Give the ready blocks, tier by tier."""
        return [Holding(tier, place.block_ids) for tier, place in self.ready.items()]


class Residency:
    """Every tier's index, nearest first, and the claims on them. The one source of truth."""

    def __init__(self, tiers: Iterable[TierIndex]) -> None:
        self.tiers = {index.tier: index for index in sorted(tiers, key=lambda index: index.tier)}
        self.claims = Claims(self.tiers)

    def find(self, keys: Sequence[BlockKey], first: int = 0) -> Found:
        """Give the longest resident run that starts at position `first`. Changes nothing."""
        ready = {tier: Placement([], []) for tier in self.tiers}
        pending = Placement([], [])
        last = first
        for position in range(first, len(keys)):
            place = self._place(keys[position])
            if place is None:
                break
            tier, block_id, is_ready = place
            positions, block_ids = ready[tier] if is_ready else pending
            positions.append(position)
            block_ids.append(block_id)
            last = position + 1
        return Found(first, last, ready, pending)

    def _place(self, key: BlockKey) -> tuple[Tier, int, bool] | None:
        """Give the nearest tier that has a block, its place, and whether it is ready.

        Below the host only what is ready counts: what is being written there is in host memory.
        """
        for tier, index in self.tiers.items():
            block_id = index.find(key)
            if block_id is not None:
                is_ready = index.is_ready(block_id)
                if is_ready or tier is Tier.HOST:
                    return tier, block_id, is_ready
        return None

    def touch(self, found: Found) -> None:
        """Count one use of every block found."""
        for tier, placement in found.ready.items():
            self.tiers[tier].touch(placement.block_ids)

    @contextmanager
    def holding(self, holdings: Iterable[Holding]) -> Iterator[None]:
        """Keep blocks from eviction while something is planned; counts as their use."""
        held = [(self.tiers[tier], block_ids) for tier, block_ids in holdings]
        for index, block_ids in held:
            index.pin(block_ids)
        try:
            yield
        finally:
            for index, block_ids in held:
                index.unpin(block_ids)

    def clear(self) -> int:
        """Forget every block of every tier, and count them."""
        return sum(index.clear() for index in self.tiers.values())

    def validate(self) -> None:
        """Check the laws of every tier, and that what is reserved or pinned has a claim.

        Raises:
            InvariantError: one does not hold.
        """
        for index in self.tiers.values():
            index.validate()
        if not self.claims:
            for index in self.tiers.values():
                reserved, pinned = index.reserved_blocks, index.pinned_blocks
                if reserved or pinned:
                    raise InvariantError(
                        f"{index.tier.label}: no claim is open, yet {reserved} blocks are "
                        f"reserved and {pinned} pinned"
                    )


def prefix_match(found: Found, tokens_per_block: int) -> PrefixMatch:
    """Give what was found in tokens."""
    pending_tokens = len(found.pending.positions) * tokens_per_block
    by_tier = {
        tier: len(placement.positions) * tokens_per_block for tier, placement in found.ready.items()
    }
    return PrefixMatch((found.last - found.first) * tokens_per_block, by_tier, pending_tokens)
