"""The blocks in host memory that a lower tier lacks: they are owed to it, the oldest first.

    add ──▶ [batch] [batch] … [batch] ──take──▶ places in the tier, RESERVED ──▶ a transfer
              kept from eviction, as far as there is room

A batch that is not kept may have been evicted when its turn comes: the keys of its blocks show
that. Every block that is never written is counted in `given_up`, with the reason.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from flexkv.common.terms import BLOCK_KEY_BYTES, BlockIds, Tier
from flexkv.index.claims import Holding
from flexkv.index.residency import GONE, NO_ROOM, TAKEN, Residency

EVICTED, NOT_WORTH_IT, NO_PLACE, FAILED = "evicted", "not worth it", "no place", "failed"
"""Why a block was given up."""

_KEY_WORDS = BLOCK_KEY_BYTES // 8


def _words(keys: bytes) -> NDArray[np.uint64]:
    """Return keys of 16 bytes each as numbers, uint64[n, 2], which are compared faster."""
    return np.frombuffer(keys, np.uint64).reshape(-1, _KEY_WORDS)


def _equal(some: NDArray[np.uint64], others: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return which keys are equal, row by row; this is faster than `all` over two columns."""
    equal: NDArray[np.bool_] = (some[:, 0] == others[:, 0]) & (some[:, 1] == others[:, 1])
    return equal


class _Batch(msgspec.Struct):
    block_ids: BlockIds
    keys: bytes
    attempts: int
    epoch: int
    hold: int | None = None

    def part(self, which: NDArray[np.bool_]) -> _Batch:
        """Return a batch of the selected blocks, which are not kept."""
        keys = np.frombuffer(self.keys, np.uint8).reshape(-1, BLOCK_KEY_BYTES)[which]
        return _Batch(self.block_ids[which], keys.tobytes(), self.attempts, self.epoch)


class Taken(NamedTuple):
    """Blocks that have RESERVED places in the lower tier, and are about to be written."""

    tier: Tier
    host_ids: BlockIds
    target_ids: BlockIds
    attempts: int
    """How often writing them has failed."""
    epoch: int
    hold: int | None
    """The claim that keeps the blocks: settle it once the transfer has its own."""
    keys: bytes
    """A root of zeros, and the key of each block."""
    group: int = 0
    """The KV group of a span of a far tier. Other batches have blocks of any groups."""


class EpochCounts:
    """How many blocks are neither written nor given up yet, by the epoch in which they were owed.

    Attributes:
        epoch: number of the current epoch.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self._left: Counter[int] = Counter()

    def add(self, epoch: int, blocks: int) -> None:
        """Add to the number of an epoch's unfinished blocks; forget an epoch without any."""
        self._left[epoch] += blocks
        if not self._left[epoch]:
            del self._left[epoch]

    def left_of(self, epoch: int) -> int:
        """Return how many blocks, up to an epoch, are neither written nor given up yet."""
        return sum(count for number, count in self._left.items() if number <= epoch)

    def next(self) -> int:
        """Begin another epoch, and return the previous one."""
        self.epoch += 1
        return self.epoch - 1


class OwedBlocks:
    """The blocks that one lower tier is owed.

    Attributes:
        blocks: how many wait.
        kept_blocks: how many of them are kept from eviction.
        epochs: counts what is unfinished, by when it was owed.
        given_up: how many will never be written, by the reason.
    """

    def __init__(self, residency: Residency, tier: Tier, batch_blocks_max: int) -> None:
        self.tier, self.blocks, self.kept_blocks, self.epochs = tier, 0, 0, EpochCounts()
        self.given_up: Counter[str] = Counter()
        self._residency, self._batch_blocks_max = residency, batch_blocks_max
        self._batches: deque[_Batch] = deque()
        places = residency.counts(Tier.HOST).capacity  # resizing adds none
        self._key_at = np.zeros((places, _KEY_WORDS), np.uint64)
        """The key of the block that waits at each place of host memory; zeros where none does."""

    scan_blocks = 1 << 16
    """Host places that `lacking` and `count_unwritten` may search in one step of the loop."""

    def add(
        self, host_ids: BlockIds, room_blocks: int, attempts: int = 0, epoch: int | None = None
    ) -> None:
        """Owe blocks of host memory; those that are not READY, or owed already, are left out.

        Args:
            host_ids: int64[n].
            room_blocks: how many blocks may be kept from eviction in all.
            attempts: how often writing them has failed.
            epoch: the epoch in which they were first owed; None for the current one.
        """
        records = self._residency.export(Tier.HOST, host_ids)
        keys = _words(records[:, :BLOCK_KEY_BYTES].tobytes())
        wanted = (keys[:, 0] | keys[:, 1]).astype(np.bool_) & ~_equal(keys, self._key_at[host_ids])
        ids, keys = host_ids[wanted], keys[wanted]
        epoch = self.epochs.epoch if epoch is None else epoch
        for at in range(0, len(ids), self._batch_blocks_max):
            part = slice(at, at + self._batch_blocks_max)
            batch = _Batch(ids[part], keys[part].tobytes(), attempts, epoch)
            self._count(batch, 1)
            self._batches.append(batch)
            if self.kept_blocks + len(batch.block_ids) <= room_blocks:
                self._keep(batch)

    def take(self) -> Taken | None:
        """Remove the oldest batch and reserve places for it in the tier; None if no block got one.

        Blocks for which there is no room stay in the queue, unless the tier refuses them as worth
        less than what it has.
        """
        batch = self._batches.popleft()
        self._count(batch, -1)
        ids, hold = batch.block_ids, batch.hold
        if hold is not None:
            self.kept_blocks -= len(ids)
        outcomes, target_ids = self._residency.reserve_copies(Tier.HOST, self.tier, ids, batch.keys)
        self.given_up[EVICTED] += int(np.count_nonzero(outcomes == GONE))
        refused = outcomes == NO_ROOM
        if refused.any() and self._residency.selective:
            self.given_up[NOT_WORTH_IT] += int(np.count_nonzero(refused))
        elif refused.any():
            rest = batch.part(refused)
            self._count(rest, 1)
            self._batches.appendleft(rest)
            if hold is not None:
                self._keep(rest)
        if len(target_ids):
            self.epochs.add(batch.epoch, len(target_ids))
            taken = batch.part(outcomes == TAKEN)
            keys = bytes(BLOCK_KEY_BYTES) + taken.keys
            return Taken(
                self.tier, taken.block_ids, target_ids, batch.attempts, batch.epoch, hold, keys
            )
        self._settle(hold)
        return None

    def ended(self, taken: Taken) -> None:
        """Note that the taken blocks are now written, owed again, or given up."""
        self.epochs.add(taken.epoch, -len(taken.host_ids))

    def lacking(self, first: int, last: int) -> BlockIds:
        """Return the places of READY host blocks in a range that the tier lacks and is not owed."""
        return self._not_owed(self._residency.lacking(Tier.HOST, self.tier, first, last))

    def count_unwritten(self, first: int, last: int) -> int:
        """Return how many READY host blocks in a range have no READY copy in the tier."""
        return len(self._residency.lacking(Tier.HOST, self.tier, first, last, unwritten=True))

    def _not_owed(self, host_ids: BlockIds) -> BlockIds:
        """Return those of the given places of READY host blocks whose blocks are not owed."""
        waiting = self._key_at[host_ids]
        may_wait = (waiting[:, 0] | waiting[:, 1]).astype(np.bool_)
        some = host_ids[may_wait]
        keys = _words(self._residency.keys_of(Tier.HOST, some))
        others = ~_equal(keys, waiting[may_wait])
        return np.concatenate([host_ids[~may_wait], some[others]])

    def unkeep(self, block_count: int) -> None:
        """Allow the eviction of at least this many kept blocks, beginning with the last in turn."""
        for batch in reversed(self._batches):
            if block_count <= 0:
                return
            if batch.hold is not None:
                block_count -= len(batch.block_ids)
                self.kept_blocks -= len(batch.block_ids)
                self._settle(batch.hold)
                batch.hold = None

    def drop_gone(self, reason: str | None = None) -> None:
        """Forget blocks that host memory no longer holds; with a reason, count them as given up."""
        if not self._batches:
            return
        batches, self._batches = self._batches, deque()
        ids = np.concatenate([batch.block_ids for batch in batches])
        keys = _words(b"".join([batch.keys for batch in batches]))
        records = self._residency.export(Tier.HOST, ids)
        there = _equal(_words(records[:, :BLOCK_KEY_BYTES].tobytes()), keys)
        end = 0
        for batch in batches:
            begin, end = end, end + len(batch.block_ids)
            still = there[begin:end]
            if not still.all():
                if reason is not None:
                    self.given_up[reason] += len(still) - int(np.count_nonzero(still))
                batch = self._narrowed(batch, batch.part(still))
            if len(batch.block_ids):
                self._batches.append(batch)

    def _narrowed(self, batch: _Batch, part: _Batch) -> _Batch:
        """Replace a batch by a part of it, and return the part."""
        self._count(batch, -1)
        self._count(part, 1)
        if batch.hold is not None:
            self.kept_blocks -= len(batch.block_ids)
            if len(part.block_ids):
                self._keep(part)
            self._settle(batch.hold)
        return part

    def give_up_next(self, reason: str) -> None:
        """Drop the oldest batch, and count it as given up."""
        batch = self._batches.popleft()
        self.given_up[reason] += len(batch.block_ids)
        self._narrowed(batch, batch.part(np.zeros(len(batch.block_ids), np.bool_)))

    def clear(self) -> None:
        """Forget everything that is owed."""
        for batch in self._batches:
            self.epochs.add(batch.epoch, -len(batch.block_ids))
            self._settle(batch.hold)
        self._batches.clear()
        self.blocks = self.kept_blocks = 0
        self._key_at[:] = 0

    def _count(self, batch: _Batch, sign: int) -> None:
        self.blocks += sign * len(batch.block_ids)
        self.epochs.add(batch.epoch, sign * len(batch.block_ids))
        ids, keys = batch.block_ids, _words(batch.keys)
        if sign > 0:
            self._key_at[ids] = keys
        else:  # another block may wait at the same place, since this one was evicted
            self._key_at[ids[_equal(self._key_at[ids], keys)]] = 0

    def _keep(self, batch: _Batch) -> None:
        batch.hold = self._residency.claims.hold(Holding(Tier.HOST, batch.block_ids))
        self.kept_blocks += len(batch.block_ids)

    def _settle(self, hold: int | None) -> None:
        if hold is not None:
            self._residency.claims.settle(hold, filled=False)
