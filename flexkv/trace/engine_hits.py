"""Hit rates of several engines on one request trace, each alone or with one store for all.

The store is a set of spans; all else is as in an engine: its table (`Residency`), what it owes to
the store (`OwedSpans`), and what it knows of the store (`Hints`), by its own writes and by listing.

    request ──▶ some engine: blocks in its table │ spans that its hints name │ the rest is computed
                                ▲                       fetched ──┘                       │
                                └── all of it is in its table now; whole spans ──▶ store ◀┘

A fetch and a write take no time here, the store has no limit, and nobody deletes anything there. So
the rates say what the rules of the tier make of a trace, not what a slow store does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import count, cycle
from random import Random
from typing import NamedTuple

import numpy as np

from flexkv.common.terms import BLOCK_KEY_BYTES, BlockIds, BlockKey, Positions, Tier
from flexkv.index.claims import Holding
from flexkv.index.eviction import Eviction
from flexkv.index.hints import STORE, HintedCatalogue, Hints
from flexkv.index.owed_spans import OwedSpans
from flexkv.index.residency import PREFIX, WORTHY, Residency
from flexkv.io.remote.names import SHARDS
from flexkv.trace.hits import Prompt

ROUTINGS = ("random", "round-robin")
PAGE_SPANS = 1000
"""How many spans an answer to a listing has at most, as of S3."""
SPARE_SPANS = 1024
"""How many more spans an engine remembers than there are."""


class Fleet(NamedTuple):
    """Some engines, and how requests come to them."""

    engines: int = 1
    routing: str = "random"
    """One of ROUTINGS."""
    seed: int = 0
    """Of random routing."""


class Sharing(NamedTuple):
    """What engines that share a store know of it."""

    span_blocks: int
    """How many blocks a span has: the store has whole spans only."""
    list_per_s: float
    """Requests of each engine that list the store; 0: it knows its own spans only."""


class EngineHits(NamedTuple):
    """What all engines together hit on a trace, in blocks."""

    own_blocks: int
    """Hits in host memory of the engine that was asked."""
    far_blocks: int
    """Hits behind those, in the store."""
    asked_blocks: int
    stored_spans: int
    """Spans in the store at the end."""

    @property
    def rate(self) -> float:
        """Return the share of the requested blocks that were hits."""
        hits = self.own_blocks + self.far_blocks
        return hits / self.asked_blocks if self.asked_blocks else 0.0


class Store:
    """The spans that engines have written, by the shard in which a listing finds them."""

    def __init__(self) -> None:
        self._keys: set[BlockKey] = set()
        self._shards = [bytearray() for _ in range(SHARDS)]

    def __len__(self) -> int:
        return len(self._keys)

    def put(self, key: BlockKey) -> None:
        """Store a span, unless it is there."""
        if key not in self._keys:
            self._keys.add(key)
            self._shards[key[0]] += key

    def pages(self, seen: list[int]) -> Iterator[bytes]:
        """Yield the keys of each page of one listing, as the store is when that is asked for.

        Keys that are in `seen`, the bytes of each shard that an earlier listing had, are left out:
        to note them once more would change nothing. Pages are counted as if they had all keys.
        """
        step = PAGE_SPANS * BLOCK_KEY_BYTES
        for number, shard in enumerate(self._shards):
            for end in range(step, max(len(shard), 1) + step, step):
                first, seen[number] = seen[number], max(seen[number], min(end, len(shard)))
                yield bytes(shard[first : seen[number]])


class _Engine:
    """One engine: its host memory, and what it knows of the store."""

    def __init__(
        self, capacity_blocks: int, eviction: Eviction, hints: Hints, store: Store | None
    ) -> None:
        self._index, self._store = Residency({Tier.HOST: capacity_blocks}, eviction), store
        self._hints, self._catalogue = hints, HintedCatalogue(hints)
        far = self._catalogue.has
        self._owed = OwedSpans(self._index, Tier.REMOTE, hints.span_blocks, far)
        self._pages: Iterator[bytes] = iter(())
        self._seen = [0] * SHARDS

    def list(self, requests: int) -> None:
        """Make some requests that list the store, round after round."""
        assert self._store is not None
        for _ in range(min(requests, SHARDS)):
            page = next(self._pages, None)
            if page is None:
                self._pages = self._store.pages(self._seen)
                page = next(self._pages)
            self._hints.note(STORE, page)

    def serve(self, prompt: Prompt, now_s: int) -> tuple[int, int]:
        """Serve a request; return how many blocks of it the engine had, and how many were far."""
        index, blocks = self._index, len(prompt.ids)
        index.tick(now_s)
        found = index.find(prompt.keys, use=True)
        runs = self._catalogue.far(prompt.keys, found.last, blocks, frozenset())
        far = sum(len(run.block_ids) for run in runs)
        with index.holding(found.holdings):
            fetched = self._fill(prompt, found.last, found.last + far, PREFIX)
        near = found.last + len(fetched)
        with index.holding([*found.holdings, Holding(Tier.HOST, fetched)]):
            self._fill(prompt, near, blocks, WORTHY)
        self._write_behind()
        return found.last, len(fetched)

    def _fill(self, prompt: Prompt, first: int, last: int, how: int) -> BlockIds:
        """Bring blocks to host memory as far as they fit, and owe whole spans to the store."""
        if first >= last:
            return np.zeros(0, np.int64)
        ids = self._index.reserve(Tier.HOST, prompt.keys, Positions(first, last - first), how)
        self._index.commit(Tier.HOST, ids)
        if self._store is not None:
            self._owed.add(ids, 0)
        return ids

    def _write_behind(self) -> None:
        while self._owed.blocks:
            taken = self._owed.take()
            if taken is not None:
                assert self._store is not None
                key = taken.keys[-BLOCK_KEY_BYTES:]
                self._store.put(key)
                self._hints.note(STORE, key)
                self._owed.ended(taken)
                assert taken.hold is not None
                self._index.claims.settle(taken.hold, filled=False)


def replay_engines(
    prompts: Sequence[Prompt],
    capacity_blocks: int,
    eviction: Eviction,
    fleet: Fleet,
    sharing: Sharing | None = None,
) -> EngineHits:
    """Return the hits of engines, each alone or with one store for all.

    Args:
        prompts: the requests of a trace.
        capacity_blocks: how many blocks the host memory of each engine holds.
        eviction: its policy.
        fleet: the engines.
        sharing: how they share a store; None if there is none.
    """
    store = None if sharing is None else Store()
    span_blocks, list_per_s = sharing or Sharing(1, 0.0)
    distinct = 1 + max((max(prompt.ids, default=0) for prompt in prompts), default=0)
    spans_max = distinct // span_blocks + SPARE_SPANS
    engines = [
        _Engine(capacity_blocks, eviction, Hints(spans_max, span_blocks), store)
        for _ in range(fleet.engines)
    ]
    own = far = asked = now_s = listed = 0
    begin_s = prompts[0].at_s if prompts else 0
    for prompt, number in zip(prompts, _routes(fleet), strict=False):
        now_s = max(now_s, prompt.at_s)
        due = int((now_s - begin_s) * list_per_s)
        if due > listed:
            for engine in engines:
                engine.list(due - listed)
            listed = due
        here, there = engines[number].serve(prompt, now_s)
        own, far, asked = own + here, far + there, asked + len(prompt.ids)
    return EngineHits(own, far, asked, 0 if store is None else len(store))


def _routes(fleet: Fleet) -> Iterable[int]:
    """Yield the number of the engine to which each request goes."""
    if fleet.routing == "round-robin":
        return cycle(range(fleet.engines))
    random = Random(fleet.seed)
    return (random.randrange(fleet.engines) for _ in count())
