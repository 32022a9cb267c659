"""Lets other nodes read host blocks of this engine: what they may read stays where it is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flexkv.cluster.grants import Held
from flexkv.common.request import Operation, Request, Span
from flexkv.common.space import GroupRule
from flexkv.common.terms import BLOCK_KEY_BYTES, BlockIds, Tier
from flexkv.engine.core import Core
from flexkv.engine.requests import Requests
from flexkv.index.claims import Holding
from flexkv.index.clears import ClearHistory
from flexkv.index.residency import READY

_NO_LEAF, _BELOW, _NOWHERE = -1, -2, -3
"""Where a leaf is if it is not in host memory: at a position without one, in a lower tier of this
engine, or in none."""


class Lending:
    """The blocks of one engine, as other nodes ask for them: the `Owner` of all grants."""

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
        self._ratios = {rule.group: rule.ratio for rule in rules}

    def hold(self, keys: bytes, first: int, last: int, group: int = 0) -> Held:
        """Keep blocks of a prompt that are in host memory, and count their use: see `Owner`."""
        last = min(last, len(keys) // BLOCK_KEY_BYTES - 1)
        if last <= first or group not in (0, *self._ratios):
            return Held(np.zeros(0, np.int64), 0, ())
        if group:
            host_ids, on_disk = self._leaves(keys, first, last, group)
        else:
            host_ids, on_disk = self._chain(keys, first, last)
        there = host_ids[host_ids >= 0]
        holding = [Holding(Tier.HOST, there)] if len(there) else []
        return Held(host_ids, on_disk, self._core.scheduler.hold(holding))

    def _chain(self, keys: bytes, first: int, last: int) -> tuple[BlockIds, int]:
        """Return the places of the leading blocks, and how many follow in lower tiers.

        Those that are on their way to host memory count as well: they only have to be awaited.
        """
        found = self._core.residency.run(keys, first, last, use=True)
        placed = found.ready.get(Tier.HOST)
        host_ids = np.zeros(0, np.int64)
        if placed is not None:
            host_ids = placed.block_ids[: placed.positions.leading(first)]
        return host_ids, found.last - first - len(host_ids)

    def _leaves(self, keys: bytes, first: int, last: int, group: int) -> tuple[BlockIds, int]:
        """Return the places of the leading leaves, and for how many positions others follow."""
        ratio = self._ratios[group]
        host_ids = np.full(last - first, _NO_LEAF)
        host_ids[-(first + 1) % ratio :: ratio] = _NOWHERE
        for states, positions, ids in self._core.residency.survey(keys, first, last, group=group):
            own = positions.array - first
            if states[0] == READY:
                host_ids[own] = ids[0]
            elif READY in states:
                host_ids[own] = _BELOW
        nowhere, below = (np.flatnonzero(host_ids == each) for each in (_NOWHERE, _BELOW))
        end = int(nowhere[0]) if len(nowhere) else len(host_ids)
        begin = int(below[0]) if len(below) else end
        return host_ids[: min(begin, end)], max(0, end - begin)

    def release(self, held: Held) -> None:
        """End a hold."""
        pins: tuple[int, ...] = held.pins  # type: ignore[assignment]
        self._core.scheduler.release(pins)

    async def prefetch(self, keys: bytes, first: int, last: int, group: int = 0) -> None:
        """Bring what a prompt's prefix needs from lower tiers of this engine to host memory.

        Raises:
            FlexKVError: the request was not admitted, or the engine is gone.
        """
        residency = self._core.residency
        blocks = min(last, residency.agreeing(keys))
        blocks = residency.run(keys, 0, blocks).last  # behind it, other nodes would be asked
        if blocks <= first:
            return
        per_block = self._tokens_per_block
        request = Request(
            Operation.PREFETCH,
            self._requests.next_id(),
            blocks * per_block,
            per_block,
            Span(0, blocks, 0, blocks * per_block),
            keys[: (blocks + 1) * BLOCK_KEY_BYTES],
            generation=self._clears.generation,
        )
        await self._requests.made(request).run()
