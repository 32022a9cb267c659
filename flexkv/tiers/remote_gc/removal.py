"""Deletes spans that are old by a listing, unless they were touched or written since.

    listed: old ──▶ head: as old as listed? ──no──▶ spared
                              └──yes──▶ delete

A touch between the head and the delete does not save the span. That is a matter of milliseconds,
and whoever wants the span next computes it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable

import msgspec
import numpy as np
from numpy.typing import NDArray

from flexkv.common.errors import RemoteError
from flexkv.common.terms import BlockKey
from flexkv.io.remote.names import Pool
from flexkv.io.remote.requests import Requests
from flexkv.io.remote.until import Until
from flexkv.observe.logs import get_logger
from flexkv.process.spawning import Spawn
from flexkv.tiers.remote_gc.rules import ShardListing
from flexkv.tiers.remote_gc.turns import Pacer, side_by_side

log = get_logger(__name__)

AT_ONCE = 32
"""How many spans are looked at and deleted side by side: each takes two requests."""


class RemovalCounts(msgspec.Struct, frozen=True):
    """What was removed since the engine started.

    Attributes:
        expired: spans that were older than the TTL.
        evicted: spans that the budget had no room for.
        garbage: objects of older generations.
        leftovers: what killed puts had left behind.
        spared: spans that were touched or written between the listing and the deletion.
        gone: spans that others had deleted meanwhile.
        failed: spans whose deletion failed; a later listing finds them again.
    """

    expired: int = 0
    evicted: int = 0
    garbage: int = 0
    leftovers: int = 0
    spared: int = 0
    gone: int = 0
    failed: int = 0


class Removal:
    """Deletes objects at a bounded rate.

    Attributes:
        counting: the fields of `RemovalCounts`, as they are now.
        spawn: starts tasks; to be set before anything is deleted.
    """

    def __init__(
        self, requests: Requests, per_s: float, forget: Callable[[BlockKey], object]
    ) -> None:
        """Take the store's requests, how many objects to delete in a second, and who is told."""
        self.counting = Counter[str]()
        self.spawn: Spawn | None = None
        self._requests, self._forget = requests, forget
        self._pacer = Pacer(per_s)

    def counts(self) -> RemovalCounts:
        """Return the counts as they are now."""
        return RemovalCounts(**self.counting)

    async def spans(
        self,
        pool: Pool,
        listing: ShardListing,
        chosen: NDArray[np.bool_],
        expired_before_s: float,
    ) -> NDArray[np.bool_]:
        """Delete spans of a shard; return which are left.

        Args:
            pool: names them.
            listing: the shard's.
            chosen: which of them to delete: bool[n].
            expired_before_s: spans older than that are counted as expired.
        """
        left = ~chosen

        async def remove(row: int, until: Until) -> None:
            key, listed_s = listing.keys[row].tobytes(), float(listing.modified_s[row])
            is_gone = await self._span(pool, key, listed_s, until)
            left[row] = is_gone is None
            if is_gone:
                self.counting["expired" if listed_s < expired_before_s else "evicted"] += 1

        rows = deque(np.flatnonzero(chosen).tolist())
        assert self.spawn is not None
        await side_by_side(self.spawn, AT_ONCE, rows, self._pacer, remove)
        return left

    async def _span(self, pool: Pool, key: BlockKey, listed_s: float, until: Until) -> bool | None:
        """Return True if a span was deleted, False if others did that, None if it stays."""
        name = pool.object_name(key)
        try:
            found = await self._requests.head(name, until)
            if found.modified_s > listed_s:
                self.counting["spared"] += 1
                return None
            await self._requests.delete(name, until)
        except FileNotFoundError:
            self.counting["gone"] += 1
            self._forget(key)
            return False
        except RemoteError as error:
            self.counting["failed"] += 1
            log.debug("remote_span_not_deleted", error=str(error))
            return None
        self._forget(key)
        return True

    async def garbage(self, names: deque[str]) -> None:
        """Delete objects of pools that are not in use, without looking at them first."""

        async def remove(name: str, until: Until) -> None:
            try:
                await self._requests.delete(name, until)
            except RemoteError as error:
                self.counting["failed"] += 1
                log.debug("remote_object_not_deleted", error=str(error))
            else:
                self.counting["garbage"] += 1

        assert self.spawn is not None
        await side_by_side(self.spawn, AT_ONCE, names, self._pacer, remove)
