"""Lets other nodes read host blocks of this engine: what they may read stays where it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flexkv.common.request import Operation, Request, Span
from flexkv.common.space import GroupRule
from flexkv.common.terms import BLOCK_KEY_BYTES, BlockIds, Tier
from flexkv.engine.core import Core
from flexkv.engine.requests import Requests
from flexkv.index.claims import Holding
from flexkv.index.clears import ClearHistory
from flexkv.index.residency import READY

_NOT_HERE = -1


class Lent(NamedTuple):
    """Host blocks that are kept in place until they are returned.

    Attributes:
        host_ids: int64[n], the leading blocks of those that were wanted.
        op_ids: what keeps them in place.
    """

    host_ids: BlockIds
    op_ids: tuple[int, ...]


_NOTHING = Lent(np.zeros(0, np.int64), ())


class Lending:
    """The blocks of one engine, as other nodes ask for them."""

    def __init__(
        self,
        core: Core,
        requests: Requests,
        clears: ClearHistory,
        tokens_per_block: int,
        rules: Sequence[GroupRule],
    ) -> None:
        """Take the parts of an open engine, and the rules of its groups but the chain's."""
        self._core, self._requests, self._clears = core, requests, clears
        self._tokens_per_block = tokens_per_block
        self._ratios = {0: 1} | {rule.group: rule.ratio for rule in rules}

    @property
    def groups(self) -> int:
        """Return how many KV groups there are."""
        return len(self._ratios)

    def lend(self, keys: bytes, first: int, last: int, group: int = 0) -> Lent:
        """Keep blocks in place for a reader, and count a use of them.

        Args:
            keys: the root and keys of a prompt's blocks.
            first: the position of the first block that is wanted.
            last: the position where they end, exclusive.
            group: the KV group; of another one than 0 the leaves with parents there are wanted.

        Returns:
            The leading ones of them that are in host memory: none if the first one is not.
        """
        last = min(last, len(keys) // BLOCK_KEY_BYTES - 1)
        if last <= first:
            return _NOTHING
        if group:
            host_ids = self._leaves(keys, first, last, group)
        else:
            host_ids = self._chain(keys, first, last)
        if not len(host_ids):
            return _NOTHING
        return Lent(host_ids, self._core.scheduler.hold([Holding(Tier.HOST, host_ids)]))

    def _chain(self, keys: bytes, first: int, last: int) -> BlockIds:
        """Return the places of the chain's leading blocks that are in host memory."""
        placed = self._core.residency.run(keys, first, last, use=True).ready.get(Tier.HOST)
        if placed is None:
            return _NOTHING.host_ids
        return placed.block_ids[: placed.positions.leading(first)]

    def _leaves(self, keys: bytes, first: int, last: int, group: int) -> BlockIds:
        """Return the places of the leading leaves of a group that are in host memory."""
        ratio = self._ratios[group]
        begin, end = first // ratio, last // ratio
        host_ids = np.full(end - begin, _NOT_HERE)
        for states, positions, ids in self._core.residency.survey(keys, first, last, group=group):
            if states[0] == READY:
                host_ids[(positions.array + 1) // ratio - 1 - begin] = ids[0]
        absent = np.flatnonzero(host_ids == _NOT_HERE)
        return host_ids[: absent[0]] if len(absent) else host_ids

    def give_back(self, lent: Lent) -> None:
        """End the reader's hold on blocks."""
        self._core.scheduler.release(lent.op_ids)

    def here(self, keys: bytes) -> int:
        """Return how many leading blocks of a prompt's chain are in any tier of this engine."""
        residency = self._core.residency
        return residency.run(keys, 0, len(keys) // BLOCK_KEY_BYTES - 1).last

    async def fetch(self, keys: bytes) -> None:
        """Bring a prompt's blocks from lower tiers of this engine into host memory.

        Raises:
            FlexKVError: the request was not admitted, or the engine is gone.
        """
        blocks, per_block = len(keys) // BLOCK_KEY_BYTES - 1, self._tokens_per_block
        span = Span(0, blocks, 0, blocks * per_block)
        request = Request(
            Operation.PREFETCH,
            self._requests.next_id(),
            blocks * per_block,
            per_block,
            span,
            keys,
            generation=self._clears.generation,
        )
        await self._requests.made(request).run()
