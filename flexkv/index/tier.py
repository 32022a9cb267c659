"""One tier's blocks: which key is where, and in which of four states each place is.

    FREE ──reserve──▶ RESERVED ──commit──▶ READY ──evict, forget──▶ FREE
      ▲                  │ abort             │ forget while pinned
      │                  ▼                   ▼
      └──last unpin── DRAINING ◀─────────────┘

A RESERVED or READY block is found under its key. A DRAINING block is found under none: nobody
wants it, but a pin says that hardware still reads it. Batches are all-or-nothing unless they say
otherwise. Shaped so that the whole class can become one C table: ids and keys cross in batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum

from flexkv.common.errors import CapacityError, InvariantError
from flexkv.common.terms import BlockKey, Tier
from flexkv.index.eviction import EvictionPolicy


class BlockState(IntEnum):
    """Who may touch a block."""

    FREE = 0
    RESERVED = 1
    READY = 2
    DRAINING = 3


class TierIndex:
    """The places of one tier, the keys they hold, and their states."""

    def __init__(
        self, tier: Tier, capacity_blocks: int, policy: EvictionPolicy, evict_ratio: float = 0.0
    ) -> None:
        self.tier = tier
        self.capacity_blocks = capacity_blocks
        self.evicted_blocks = 0
        self.reserved_blocks = 0
        self._evict_batch_blocks = int(capacity_blocks * evict_ratio)
        self._policy = policy
        self._id_of: dict[BlockKey, int] = {}
        self._key_of: list[BlockKey | None] = [None] * capacity_blocks
        self._state = bytearray(capacity_blocks)
        self._pins = [0] * capacity_blocks
        self._free = list(range(capacity_blocks - 1, -1, -1))

    # -- looking --------------------------------------------------------------------------------

    def find(self, key: BlockKey) -> int | None:
        """Give the place that holds, or is being filled with, the block of `key`."""
        return self._id_of.get(key)

    def is_ready(self, block_id: int) -> bool:
        """Tell whether the block's bytes are all there."""
        return self._state[block_id] == BlockState.READY

    @property
    def free_blocks(self) -> int:
        """Count the places that hold nothing."""
        return len(self._free)

    @property
    def evictable_blocks(self) -> int:
        """Count the blocks that could be evicted now."""
        return len(self._policy)

    def count(self, state: BlockState) -> int:
        """Count the blocks in one state."""
        return self._state.count(state)

    @property
    def pinned_blocks(self) -> int:
        """Count the blocks that somebody pins."""
        return sum(1 for pins in self._pins if pins)

    # -- filling --------------------------------------------------------------------------------

    def reserve(self, keys: Sequence[BlockKey]) -> list[int]:
        """Take a place for each key, evicting what must go; the places become RESERVED.

        Raises:
            CapacityError: there are not that many places free or evictable; nothing has changed.
        """
        wanted = len(keys)
        if wanted > len(self._free):
            self._evict_for(wanted)
        id_of, key_of, state = self._id_of, self._key_of, self._state
        block_ids = self._free[: -wanted - 1 : -1] if wanted else []
        for key, block_id in zip(keys, block_ids, strict=True):
            if key in id_of:
                raise InvariantError(f"{self.tier.label}: {key.hex()} has a place already")
            id_of[key] = block_id
            key_of[block_id] = key
            state[block_id] = BlockState.RESERVED
        del self._free[len(self._free) - wanted :]
        self.reserved_blocks += wanted
        return block_ids

    def room(self) -> int:
        """Count the places that `reserve` could give now."""
        return len(self._free) + len(self._policy)

    def commit(self, block_ids: Iterable[int]) -> None:
        """The bytes are there: RESERVED becomes READY, or goes when its key was forgotten."""
        for block_id in reversed(list(block_ids)):
            self._expect(block_id, BlockState.RESERVED)
            self.reserved_blocks -= 1
            if self._key_of[block_id] is None:
                self._retire(block_id)
                continue
            self._state[block_id] = BlockState.READY
            if not self._pins[block_id]:
                self._policy.add((block_id,))

    def abort(self, block_ids: Iterable[int]) -> None:
        """The bytes are not there and will not come: RESERVED goes."""
        for block_id in block_ids:
            self._expect(block_id, BlockState.RESERVED)
            self.reserved_blocks -= 1
            self._unname(block_id)
            self._retire(block_id)

    # -- holding --------------------------------------------------------------------------------

    def pin(self, block_ids: Iterable[int]) -> None:
        """Forbid eviction of RESERVED or READY blocks, until as many `unpin`."""
        pins, state, discard = self._pins, self._state, self._policy.discard
        for block_id in block_ids:
            if state[block_id] == BlockState.FREE:
                raise InvariantError(f"{self.tier.label}: pin of free block {block_id}")
            if not pins[block_id]:
                discard(block_id)
            pins[block_id] += 1

    def unpin(self, block_ids: Sequence[int]) -> None:
        """Take one pin off each block, leaf first, which also counts as its use."""
        pins, state = self._pins, self._state
        for block_id in reversed(block_ids):
            if pins[block_id] < 1:
                raise InvariantError(f"{self.tier.label}: unpin of unpinned block {block_id}")
            pins[block_id] -= 1
            if pins[block_id]:
                continue
            if state[block_id] == BlockState.READY:
                self._policy.add((block_id,))
            elif state[block_id] == BlockState.DRAINING:
                self._free_place(block_id)

    def touch(self, block_ids: Sequence[int]) -> None:
        """Count a use of the blocks, given from root to leaf."""
        pins, state = self._pins, self._state
        self._policy.add(
            block_id
            for block_id in reversed(block_ids)
            if not pins[block_id] and state[block_id] == BlockState.READY
        )

    # -- dropping -------------------------------------------------------------------------------

    def forget(self, block_ids: Iterable[int]) -> None:
        """Make blocks unfindable now; their places are freed once no hardware uses them."""
        for block_id in block_ids:
            self._unname(block_id)
            if self._state[block_id] == BlockState.READY:
                self._retire(block_id)

    def clear(self) -> int:
        """Forget every block, and count them."""
        block_ids = list(self._id_of.values())
        self.forget(block_ids)
        return len(block_ids)

    def validate(self) -> None:
        """Check every law of the tier.

        Raises:
            InvariantError: one does not hold.
        """
        for block_id in range(self.capacity_blocks):
            key, state = self._key_of[block_id], self._state[block_id]
            named = key is not None
            if key is not None and (self._id_of.get(key) != block_id or state not in (1, 2)):
                raise InvariantError(f"{self.tier.label}: block {block_id} is under a wrong key")
            if state == BlockState.READY and not named:
                raise InvariantError(f"{self.tier.label}: READY block {block_id} has no key")
            if state == BlockState.DRAINING and not self._pins[block_id]:
                raise InvariantError(f"{self.tier.label}: block {block_id} drains for nobody")
            if state == BlockState.FREE and self._pins[block_id]:
                raise InvariantError(f"{self.tier.label}: free block {block_id} is pinned")
        evictable = sum(
            1 for i, s in enumerate(self._state) if s == BlockState.READY and not self._pins[i]
        )
        if evictable != len(self._policy):
            raise InvariantError(
                f"{self.tier.label}: {evictable} evictable, policy has {len(self._policy)}"
            )
        if len(self._free) != self.count(BlockState.FREE):
            raise InvariantError(f"{self.tier.label}: free list and states differ")
        if self.reserved_blocks != self.count(BlockState.RESERVED):
            raise InvariantError(f"{self.tier.label}: count of reserved blocks and states differ")
        if len(self._id_of) != sum(1 for key in self._key_of if key is not None):
            raise InvariantError(f"{self.tier.label}: key table and places differ")

    # -- inside ---------------------------------------------------------------------------------

    def _evict_for(self, wanted: int) -> None:
        free, evictable = len(self._free), len(self._policy)
        if wanted > free + evictable:
            raise CapacityError(self.tier.label, wanted, free, evictable)
        victims = self._policy.victims(max(wanted - free, self._evict_batch_blocks))
        self.forget(victims)
        self.evicted_blocks += len(victims)

    def _expect(self, block_id: int, state: BlockState) -> None:
        if self._state[block_id] != state:
            found = BlockState(self._state[block_id]).name
            raise InvariantError(
                f"{self.tier.label}: block {block_id} is {found}, not {state.name}"
            )

    def _unname(self, block_id: int) -> None:
        key = self._key_of[block_id]
        if key is not None:
            del self._id_of[key]
            self._key_of[block_id] = None

    def _retire(self, block_id: int) -> None:
        """Free a nameless block, or let it drain while it is pinned."""
        if self._pins[block_id]:
            self._state[block_id] = BlockState.DRAINING
        else:
            self._policy.discard(block_id)
            self._free_place(block_id)

    def _free_place(self, block_id: int) -> None:
        self._state[block_id] = BlockState.FREE
        self._free.append(block_id)
