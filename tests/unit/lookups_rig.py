"""Lookups over a store in memory, which counts what it is asked."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from random import Random
from typing import Any, cast

from flexkv.actors.supervisor import Supervisor
from flexkv.common.errors import RemoteError
from flexkv.common.space import GroupRule
from flexkv.common.terms import Tier
from flexkv.index.catalogue import Sought
from flexkv.index.hints import STORE, Hints
from flexkv.io.remote.names import Pool
from flexkv.io.remote.options import RemoteOptions
from flexkv.io.remote.requests import Requests
from flexkv.testing.virtual_time import run_virtual
from flexkv.tiers.remote_lookups import LookupCatalogue, Lookups
from tests.remote_rigs import POOL, PROMPT, SPAN_BLOCKS, span_key

G = SPAN_BLOCKS
BLOCKS = 5 * G
SILENT_S = 8.0
"""How long a mover may be silent before it is ended."""
NOWHERE: frozenset[Tier] = frozenset()


class CountingStore:
    """A store that counts what it is asked."""

    kind, where = "mooncake", "a store"

    def __init__(self) -> None:
        self.there: set[str] = set()
        self.asked: list[int] = []
        self.error: RemoteError | None = None
        self.takes_s = self.each_s = 0.0
        """How long an answer takes, and how much longer for each name."""

    async def exist(self, names: Sequence[str]) -> list[bool]:
        """Return which objects are there."""
        self.asked.append(len(names))
        try:
            async with asyncio.timeout(SILENT_S):
                await asyncio.sleep(self.takes_s + len(names) * self.each_s)
        except TimeoutError:
            raise RemoteError(self.where, "exist", "its mover was silent, and was ended") from None
        if self.error is not None:
            raise self.error
        return [name in self.there for name in names]


class ChangingPool:
    """A pool that a test may change."""

    def __init__(self) -> None:
        self.current: Pool | None = POOL

    async def joined(self) -> Pool:
        """Return the pool."""
        assert self.current is not None
        return self.current


class Rig:
    """Lookups over a store in memory."""

    def __init__(self, rules: Sequence[GroupRule] = (), pairs: int = 1000) -> None:
        self.store, self.pool = CountingStore(), ChangingPool()
        self.hints = Hints(pairs, G)
        self.requests = Requests(cast("Any", self.store), RemoteOptions(), Random(1))
        self.lookups = Lookups(self.store, self.requests, self.pool, self.hints, SILENT_S, rules)
        self.catalogue = LookupCatalogue(self.hints, self.lookups)

    def has(self, *spans: int) -> None:
        """Make some spans of the prompt be all that the store has."""
        self.store.there = {POOL.object_name(span_key(span)) for span in spans}

    def known(self) -> list[int]:
        """Return the spans of the prompt that hints name."""
        return [span for span in range(5) if self.hints.known(STORE, span_key(span))[0]]

    def far(self, first: int = 0, last: int = BLOCKS) -> int:
        """Return how many blocks the catalogue promises."""
        runs = self.catalogue.far(PROMPT[: 16 * (last + 1)], first, last, NOWHERE)
        return sum(len(run.block_ids) for run in runs)


def sought(first: int = 0) -> Sought:
    """Return the prefixes of the prompt behind a position up to which all is here."""
    return Sought(PROMPT, first, first, BLOCKS)


def with_rig(work: Callable[[Rig], Awaitable[None]], rules: Sequence[GroupRule] = ()) -> None:
    """Do the work of a test while the lookups run."""

    async def main() -> None:
        rig = Rig(rules)
        tasks = Supervisor(_raise)
        await tasks.start()
        tasks.keep("lookups", rig.lookups.run())
        await work(rig)
        await tasks.stop()

    run_virtual(main())


def _raise(error: BaseException) -> None:
    raise AssertionError from error
