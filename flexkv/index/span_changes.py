"""Which spans peers may fetch from this node, and how that changes.

A span (`spans.py`) is where its last block is READY: all blocks before that one are in the index,
too, as it has no holes. A leaf is a span of its own. Peers can fetch what is in host memory or on
the SSD.

    take   what has changed since the last take: each span once, and as it is now. A span that came
           and went in between is left out.
    walk   all that is there, in steps, between which anything may change

Whoever applies the steps of a walk, and after each step what later takes return, knows all that is
there once the walk has ended and `take` was called again. Until then takes leave nothing out: a
step may have shown a span that came and went; and one that went and came back may have a node now
that the walk has passed, so that no step shows it.
"""

from __future__ import annotations

from collections.abc import Generator
from itertools import count
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flexkv.common.terms import BLOCK_KEY_BYTES, BlockKey, Tier
from flexkv.index.change_hub import ChangeHub
from flexkv.index.recorder import Records

NODES_A_STEP = 1 << 12
"""How many nodes of the table a step looks at: it takes well under a millisecond."""


class SpanChange(NamedTuple):
    """Where a span is that was elsewhere before; nowhere if both are False."""

    key: BlockKey
    on_host: bool
    on_disk: bool


class SpanStates(NamedTuple):
    """Where some spans are, each in at least one of the two.

    Attributes:
        keys: uint8[n, 16].
        on_host: bool[n].
        on_disk: bool[n].
    """

    keys: NDArray[np.uint8]
    on_host: NDArray[np.bool_]
    on_disk: NDArray[np.bool_]


class SpanChanges:
    """Reads the changes of spans from a hub."""

    def __init__(self, hub: ChangeHub, span_blocks: int, limit: int) -> None:
        """Read all changes from now on.

        Args:
            hub: that of the index.
            span_blocks: G.
            limit: how many changes of blocks may be unread before they are lost.
        """
        self._recorder, self._reader = hub.recorder, hub.reader(limit)
        self._span_blocks = span_blocks
        self._host, self._disk = self._recorder.mask(Tier.HOST), self._recorder.mask(Tier.DISK)
        self._walks = 0
        """How many walks are under way."""
        self._has_walked = False
        """Whether one was under way at some time since the last take."""

    def take(self) -> list[SpanChange] | None:
        """Return the changes since the last call: each span once, as it is now, in any order.

        Return None if there were too many. Then everything has to be told anew by a walk that
        begins after this call; walks under way are worthless.
        """
        records, has_walked = self._reader.take_records(), self._has_walked
        self._has_walked = self._walks > 0
        if records is None:
            return None
        records = records[(records["depth"] % self._span_blocks == 0) | (records["group"] != 0)]
        if not len(records):
            return []
        firsts, lasts = _first_and_last(records["key"].tolist())
        both = self._host | self._disk
        now = records["ready"] & both
        if not has_walked:
            before = (records["ready"] ^ (1 << records["tier"])) & both
            lasts = lasts[before[firsts] != now[lasts]]
        keys, now = records["key"][lasts].tolist(), now[lasts]
        on_host, on_disk = (now & self._host) != 0, (now & self._disk) != 0
        return list(map(SpanChange, keys, on_host.tolist(), on_disk.tolist()))

    def walk(self, nodes: int = NODES_A_STEP) -> Generator[SpanStates, None, None]:
        """Yield all spans that are there, and some that come meanwhile; a step may have none.

        A walk that is not finished must be closed, since takes leave nothing out until then.

        Args:
            nodes: how many nodes of the table to look at in each step.
        """
        self._walks += 1
        self._has_walked = True
        try:
            for begin in count(0, nodes):
                records = self._recorder.ends(begin, nodes, self._span_blocks)
                if records is None:
                    return
                yield self._states(records)
        finally:
            self._walks -= 1

    def _states(self, records: Records) -> SpanStates:
        on_host = (records["ready"] & self._host) != 0
        on_disk = (records["ready"] & self._disk) != 0
        there = on_host | on_disk
        keys = np.ascontiguousarray(records["key"][there]).view(np.uint8)
        return SpanStates(keys.reshape(-1, BLOCK_KEY_BYTES), on_host[there], on_disk[there])

    def close(self) -> None:
        """Read nothing any more."""
        self._reader.close()


def _first_and_last(keys: list[BlockKey]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where each key is first, and where it is last."""
    last = dict(zip(keys, range(len(keys)), strict=True))
    lasts = np.fromiter(last.values(), np.int64, len(last))
    if len(last) == len(keys):
        return lasts, lasts
    first = dict(zip(reversed(keys), reversed(range(len(keys))), strict=True))
    return np.array([first[key] for key in last], np.int64), lasts
