"""Lists a pool round after round, so that hints say what is in the store.

    round   shard 0, 1, … 255, page by page ──▶ noted; at its end, what was not seen is forgotten
    the first round is made at once, by some tasks side by side; later ones at a bounded rate

A shard that cannot be listed is tried again later in its round, which does not end without it.
If trying again cannot help, as with a name that no client accepts, its spans are forgotten.
"""

from __future__ import annotations

import asyncio
from collections import deque

from flexkv.actors.supervisor import Bell
from flexkv.common.errors import RemoteError
from flexkv.index.hints import STORE, Hints
from flexkv.io.remote.names import SHARDS, Pool
from flexkv.io.remote.requests import Requests
from flexkv.observe.logs import get_logger
from flexkv.process.spawning import Spawn
from flexkv.tiers.remote_gc.collector import Collector
from flexkv.tiers.remote_gc.rules import ShardListing
from flexkv.tiers.remote_pool import SharedPool

log = get_logger(__name__)

SIDE_BY_SIDE = 8
"""How many shards the first round lists at once."""
PAGE_S = 30.0
"""How long the store may take to answer with one page."""
RETRY_S = 2.0
"""The pause after a page that could not be listed."""


class Listing:
    """The listing of the pool in use.

    Attributes:
        rounds: how many rounds have ended, of any pool.
        spans: how many spans the last of them has found.
    """

    def __init__(
        self,
        requests: Requests,
        pool: SharedPool,
        hints: Hints,
        requests_per_s: float,
        collector: Collector,
    ) -> None:
        """Take the store's requests, the pool, its hints, and what deletes its old spans."""
        self.rounds = self.spans = 0
        self._requests, self._pool, self._hints = requests, pool, hints
        self._per_s, self._collector = requests_per_s, collector
        self._found = 0

    async def run(self, spawn: Spawn) -> None:
        """List the pool until cancelled; once only if later rounds are not wanted."""
        listed: Pool | None = None
        while True:
            pool = await self._pool.joined()
            is_first = pool is not listed
            if not is_first and not self._per_s:
                await self._pool.left(pool)
                continue
            await self._round(pool, spawn, is_first)
            listed = pool

    async def _round(self, pool: Pool, spawn: Spawn, is_first: bool) -> None:
        """List all shards of a pool, unless the engine leaves it meanwhile."""
        for _ in self._hints.scrubbing():  # of what the round before has dropped
            await asyncio.sleep(0)
        self._hints.begin_round(STORE)
        self._found, shards = 0, deque(range(SHARDS))
        if is_first:
            await self._list_side_by_side(pool, shards, spawn)
        else:
            await self._shards(pool, shards, 1 / self._per_s)
        # If the engine has left the pool, its hints were cleared: none is from before the round.
        self._hints.end_round(STORE)
        if pool is not self._pool.current:
            return
        self.rounds, self.spans = self.rounds + 1, self._found
        if is_first:
            log.info("remote_pool_listed", store=self._requests.store.where, spans=self._found)

    async def _list_side_by_side(self, pool: Pool, shards: deque[int], spawn: Spawn) -> None:
        ended = Bell()

        async def list_some() -> None:
            try:
                await self._shards(pool, shards, 0.0)
            finally:
                ended.ring()

        tasks = [spawn("remote listing", list_some()) for _ in range(SIDE_BY_SIDE)]
        try:
            while not all(task.done() for task in tasks):
                await ended.wait()
                await asyncio.sleep(0)  # the task that rang is about to be done
        finally:  # an engine that is being closed does not wait for the store
            for task in tasks:
                task.cancel()

    async def _shards(self, pool: Pool, shards: deque[int], pause_s: float) -> None:
        """List shards until none is left, or the engine leaves the pool."""
        while shards and pool is self._pool.current:
            shard = shards.popleft()
            try:
                await self._shard(pool, shard, pause_s)
            except RemoteError as error:
                log.warning("remote_pool_not_listed", shard=f"{shard:02x}", error=str(error))
                if not error.is_lasting:
                    shards.append(shard)
                await asyncio.sleep(RETRY_S)

    async def _shard(self, pool: Pool, shard: int, pause_s: float) -> None:
        listing, pages = ShardListing(), 0
        await asyncio.sleep(pause_s)  # also if there is nothing in the shard
        async for page in self._requests.pages(pool.shard(shard), PAGE_S):
            if pages:
                await asyncio.sleep(pause_s)
            pages += 1
            spans = [(each, key) for each in page if (key := pool.span_key(each.name)) is not None]
            if pool is not self._pool.current:
                return
            keys = b"".join(key for _, key in spans)
            self._hints.note(STORE, keys)
            listing.add(keys, [each.modified_s for each, _ in spans])
            self._found += len(spans)
        listing.end()
        await self._collector.listed(pool, shard, listing, is_first=not pause_s)
