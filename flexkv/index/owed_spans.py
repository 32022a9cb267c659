"""The spans in host memory that a far tier is not known to have: they are owed to it.

    add ──▶ span, span, … (the oldest first, each once) ──take──▶ a transfer of one whole span

A leaf is a span of its own. All leaves in host memory are owed, since it takes only those that some
prefix needs.

Spans that wait are not kept from eviction, since a far tier may be slow for long. The keys of a
span's blocks show whether they were evicted when its turn comes. As for `OwedBlocks`, every block
that is never written is counted in `given_up`, with the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from flexkv.common.terms import BLOCK_KEY_BYTES, BlockIds, BlockKey, Tier
from flexkv.index.claims import Holding
from flexkv.index.found import ReadySpan
from flexkv.index.owed import EVICTED, EpochCounts, Taken
from flexkv.index.residency import Residency


class _Owed(NamedTuple):
    span: ReadySpan
    attempts: int
    epoch: int


class OwedSpans:
    """The spans that one far tier is owed.

    Attributes:
        blocks: how many wait.
        kept_blocks: 0, since none of them is kept from eviction.
        scan_blocks: as for `OwedBlocks`, but fewer, since each span is an object here.
        epochs: counts what is unfinished, by when it was owed.
        given_up: how many blocks will never be written, by the reason.
    """

    kept_blocks, scan_blocks = 0, 1 << 12

    def __init__(
        self,
        residency: Residency,
        tier: Tier,
        span_blocks: int,
        is_far: Callable[[Tier, BlockKey], bool],
    ) -> None:
        """Owe nothing yet; `is_far` returns whether a tier is said to have a span."""
        self.tier, self.epochs = tier, EpochCounts()
        self.given_up: Counter[str] = Counter()
        self._residency, self._span_blocks, self._is_far = residency, span_blocks, is_far
        self._waiting: dict[BlockKey, _Owed] = {}
        self._being_written: dict[BlockKey, int | None] = {}
        """The spans that were taken, each with the hold that tells its writes apart."""
        self.blocks = 0

    def add(
        self, host_ids: BlockIds, room_blocks: int, attempts: int = 0, epoch: int | None = None
    ) -> None:
        """Owe the spans that blocks of host memory belong to, where all their blocks are there.

        Spans are left out that the tier is said to have, or that are owed already.

        Args:
            host_ids: int64[n].
            room_blocks: is not used: see `OwedBlocks.add`.
            attempts: how often writing them has failed.
            epoch: the epoch in which they were first owed; None for the current one.
        """
        is_new = epoch is None
        for span in self._spans(host_ids):
            key = span.key
            if is_new and key in self._being_written:
                continue
            if key not in self._waiting and not self._is_far(self.tier, key):
                owed = _Owed(span, attempts, self.epochs.epoch if epoch is None else epoch)
                self._waiting[key] = owed
                self.blocks += span.block_count
                self.epochs.add(owed.epoch, span.block_count)

    def take(self) -> Taken | None:
        """Remove the oldest span, and keep its blocks; None if they were evicted, or are far."""
        key = next(iter(self._waiting))
        span, attempts, epoch = self._waiting[key]
        if not self._is_here(span):
            self._drop(key, EVICTED)
            return None
        if self._is_far(self.tier, key):
            self._drop(key)
            return None
        del self._waiting[key]
        self.blocks -= span.block_count
        hold = self._residency.claims.hold(Holding(Tier.HOST, span.block_ids))
        self._being_written[key] = hold
        nowhere = np.zeros(span.block_count, np.int64)
        return Taken(
            self.tier, span.block_ids, nowhere, attempts, epoch, hold, span.keys, span.group
        )

    def ended(self, taken: Taken) -> None:
        """Note that a taken span is now written, owed again, or given up."""
        key = taken.keys[-BLOCK_KEY_BYTES:]
        if self._being_written.get(key) == taken.hold:
            del self._being_written[key]
        self.epochs.add(taken.epoch, -len(taken.host_ids))

    def lacking(self, first: int, last: int) -> BlockIds:
        """Return the places of blocks whose spans the tier lacks and is not owed.

        These are the spans that have blocks at host places from `first` to `last`, exclusive.
        """
        under_way = self._waiting.keys() | self._being_written.keys()
        spans = self._near_spans(first, last)
        return _joined([ids for key, ids in spans.items() if key not in under_way])

    def count_unwritten(self, first: int, last: int) -> int:
        """Return how many host blocks in a range belong to whole spans that the tier lacks."""
        ids = _joined(list(self._near_spans(first, last).values()))
        return int(np.count_nonzero((first <= ids) & (ids < last)))

    def _near_spans(self, first: int, last: int) -> dict[BlockKey, BlockIds]:
        """Return the spans that the tier lacks and that have blocks in a range of host places."""
        near = self._spans(np.arange(first, last))
        return {span.key: span.block_ids for span in near if not self._is_far(self.tier, span.key)}

    def _spans(self, host_ids: BlockIds) -> list[ReadySpan]:
        """Return the whole spans to which blocks of host memory belong, and the leaves there."""
        spans = self._residency.spans(Tier.HOST, host_ids, self._span_blocks)
        if self._residency.groups > 1:
            spans += self._leaves(host_ids)
        return spans

    def _leaves(self, host_ids: BlockIds) -> list[ReadySpan]:
        """Return the leaves among some blocks of host memory, if they are READY."""
        records = self._residency.export(Tier.HOST, host_ids)
        groups = np.ascontiguousarray(records[:, 2 * BLOCK_KEY_BYTES :]).view("<u4")[:, 0] >> 8
        which = np.flatnonzero(groups)
        return [
            ReadySpan(
                host_ids[at : at + 1],
                record[BLOCK_KEY_BYTES : 2 * BLOCK_KEY_BYTES].tobytes()
                + record[:BLOCK_KEY_BYTES].tobytes(),
                int(groups[at]),
            )
            for at, record in zip(which.tolist(), records[which], strict=True)
        ]

    def unkeep(self, block_count: int) -> None:
        """Do nothing: no block is kept."""

    def drop_gone(self, reason: str | None = None) -> None:
        """Forget spans that host memory no longer holds; with a reason, count them as given up."""
        for key in [key for key, owed in self._waiting.items() if not self._is_here(owed.span)]:
            self._drop(key, reason)

    def give_up_next(self, reason: str) -> None:
        """Drop the oldest span, and count it as given up."""
        self._drop(next(iter(self._waiting)), reason)

    def forget_writes(self) -> None:
        """Owe spans that are being written again if they come again: these writes will not count.

        The tier has been left for a new generation.
        """
        self._being_written.clear()

    def clear(self) -> None:
        """Forget everything that is owed."""
        for key in list(self._waiting):
            self._drop(key)

    def _drop(self, key: BlockKey, reason: str | None = None) -> None:
        owed = self._waiting.pop(key)
        blocks = owed.span.block_count
        self.blocks -= blocks
        self.epochs.add(owed.epoch, -blocks)
        if reason is not None:
            self.given_up[reason] += blocks

    def _is_here(self, span: ReadySpan) -> bool:
        """Return whether host memory still holds a span's blocks at the same places."""
        records = self._residency.export(Tier.HOST, span.block_ids)
        return records[:, :BLOCK_KEY_BYTES].tobytes() == span.keys[BLOCK_KEY_BYTES:]


def _joined(some: Sequence[BlockIds]) -> BlockIds:
    return np.concatenate(some) if some else np.zeros(0, np.int64)
