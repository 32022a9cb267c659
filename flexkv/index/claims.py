"""Claims: what one transfer op holds of the tiers, from planning until its end.

A claim is a pin on the blocks that the op reads and a lease on the blocks that it fills. It ends
exactly once, by `settle`, on an event that reached the core: with commit when the bytes are
there, else with abort. The claims of each owner (a run, a prepared match) are counted: an owner
that ends has none left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from flexkv.common.errors import InvariantError
from flexkv.common.terms import Tier
from flexkv.index.tier import TierIndex


class Holding(NamedTuple):
    """Some blocks of one tier."""

    tier: Tier
    block_ids: list[int]


class Claim(NamedTuple):
    """What one op holds: it pins `pinned`, and has the lease of `leased`."""

    owner: int
    pinned: Holding | None
    leased: Holding | None


class Claims:
    """Every open claim, by the token of its op."""

    def __init__(self, tiers: Mapping[Tier, TierIndex]) -> None:
        self._tiers = tiers
        self._open: dict[int, Claim] = {}
        self._owned: dict[int, int] = {}
        self._filler: dict[tuple[Tier, int], int] = {}

    def __len__(self) -> int:
        return len(self._open)

    def open(self, token: int, claim: Claim) -> None:
        """Pin what the op reads, and note who fills what it fills (reserved already)."""
        if token in self._open:
            raise InvariantError(f"token {token} has a claim already: {self._open[token]}")
        self._open[token] = claim
        self._owned[claim.owner] = self._owned.get(claim.owner, 0) + 1
        if claim.pinned is not None:
            self._tiers[claim.pinned.tier].pin(claim.pinned.block_ids)
        if claim.leased is not None:
            tier, filler = claim.leased.tier, self._filler
            for block_id in claim.leased.block_ids:
                filler[tier, block_id] = token

    def settle(self, token: int, filled: bool) -> None:
        """End a claim: commit or abort its lease, take its pins off.

        Raises:
            InvariantError: no such claim is open.
        """
        claim = self._open.pop(token, None)
        if claim is None:
            raise InvariantError(f"token {token} has no open claim")
        self._owned[claim.owner] -= 1
        if not self._owned[claim.owner]:
            del self._owned[claim.owner]
        if claim.leased is not None:
            tier = claim.leased.tier
            for block_id in claim.leased.block_ids:
                del self._filler[tier, block_id]
            index = self._tiers[tier]
            (index.commit if filled else index.abort)(claim.leased.block_ids)
        if claim.pinned is not None:
            self._tiers[claim.pinned.tier].unpin(claim.pinned.block_ids)

    def filler(self, tier: Tier, block_id: int) -> int:
        """Give the token of the op that is filling a RESERVED block."""
        return self._filler[tier, block_id]

    def of_owner(self, owner: int) -> int:
        """Count the open claims of an owner."""
        return self._owned.get(owner, 0)

    def stories(self) -> list[str]:
        """Describe every open claim, for a report of what is left."""
        return [f"{token}: {claim}" for token, claim in self._open.items()]
