"""Claims: what one transfer op holds of the tiers, from planning until its end.

A claim is a pin on the blocks that the op reads and a lease on the blocks that it fills. It ends
exactly once, by `settle`, on an event that reached the core: with commit when the bytes are
there, else with abort. The claims of each owner (a run, a prepared match) are counted: an owner
that has ended must have none left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flexkv._ext import BlockIndex
from flexkv.common.errors import InvariantError
from flexkv.common.terms import BlockIds, Tier
from flexkv.index.guests import Guests


class Holding(NamedTuple):
    """Some blocks of one tier."""

    tier: Tier
    block_ids: BlockIds


class Claim(NamedTuple):
    """What one op holds: pins on `pinned`, and the lease on `leased`."""

    owner: int
    pinned: Holding | None
    leased: Holding | None
    source: Tier | None = None
    """Where the op reads, if it is known; also a tier whose blocks are not pinned."""


class Claims:
    """Every open claim, by the id of its op."""

    def __init__(self, table: BlockIndex, tier_numbers: Mapping[Tier, int]) -> None:
        self.guests: Guests | None = None
        """Is told of what arrives in host memory from other nodes."""
        self._table = table
        self._number = tier_numbers
        self._open: dict[int, Claim] = {}
        self._next_hold = -1
        self._owned: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._open)

    def open(self, op_id: int, claim: Claim) -> None:
        """Pin what the op reads, and record the op as the filler of its reserved places."""
        if op_id in self._open:
            raise InvariantError(f"op {op_id} already has a claim: {self._open[op_id]}")
        owner, pinned, leased, _ = claim
        if leased is not None:
            self._table.lease(self._number[leased.tier], leased.block_ids, op_id)
        if pinned is not None:
            self._table.pin(self._number[pinned.tier], pinned.block_ids)
        self._open[op_id] = claim
        self._owned[owner] = self._owned.get(owner, 0) + 1

    def hold(self, holding: Holding) -> int:
        """Pin blocks until `settle` is called with the returned id."""
        op_id, self._next_hold = self._next_hold, self._next_hold - 1
        self.open(op_id, Claim(op_id, holding, None))
        return op_id

    def settle(self, op_id: int, filled: bool, leading: int = 0) -> None:
        """End a claim: commit or abort its lease, and remove its pins.

        Args:
            op_id: the claim's op.
            filled: whether all blocks were filled.
            leading: if not, how many of the leading ones were, which are committed.

        Raises:
            InvariantError: no such claim is open.
        """
        claim = self._open.pop(op_id, None)
        if claim is None:
            raise InvariantError(f"op {op_id} has no open claim")
        owner, pinned, leased, source = claim
        if self._owned[owner] == 1:
            del self._owned[owner]
        else:
            self._owned[owner] -= 1
        if leased is not None:
            tier, block_ids = self._number[leased.tier], leased.block_ids
            if filled:
                self._table.commit(tier, block_ids)
            else:
                if leading:
                    self._table.commit(tier, block_ids[:leading])
                self._table.abort(tier, block_ids[leading:])
            if source is Tier.PEER and self.guests is not None:
                self.guests.arrived(block_ids if filled else block_ids[:leading])
        if pinned is not None:
            self._table.unpin(self._number[pinned.tier], pinned.block_ids)

    def fillers(self, tier: Tier, block_ids: BlockIds) -> NDArray[np.int64]:
        """Return the id of the op that is filling each RESERVED block."""
        return np.frombuffer(self._table.fillers(self._number[tier], block_ids), np.int64)

    def sources(self, tier: Tier, block_ids: BlockIds) -> list[Tier | None]:
        """Return the tier from which each RESERVED block is being filled; None if unknown."""
        claims = [self._open.get(op_id) for op_id in self.fillers(tier, block_ids).tolist()]
        return [None if claim is None else claim.source for claim in claims]

    def filling_from_others(self) -> frozenset[int]:
        """Return the ops that fill host memory from tiers which are not this engine's own."""
        own = {None, Tier.DEVICE, *self._number}
        return frozenset([op_id for op_id, claim in self._open.items() if claim.source not in own])

    def of_owner(self, owner: int) -> int:
        """Return the number of open claims of an owner."""
        return self._owned.get(owner, 0)

    def stories(self) -> list[str]:
        """Return a description of every open claim, for a report of what is left."""
        return [f"{op_id}: {claim}" for op_id, claim in self._open.items()]
