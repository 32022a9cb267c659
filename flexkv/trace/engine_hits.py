"""Hit rates of several engines on one request trace: alone, with a store, or with each other.

The store is a set of spans; all else is as in an engine: its table (`Residency`), what it owes to
the store (`OwedSpans`), and what it knows of the store (`Hints`), by its own writes and by listing.

    request ──▶ some engine: blocks in its table │ spans that its hints name │ the rest is computed
                                ▲                       fetched ──┘                       │
                                └── all of it is in its table now; whole spans ──▶ store ◀┘

Engines that are peers tell each other of the changes of their spans (`SpanChanges`), and lend what
they still have. A fetch, a write and an announcement take no time here, the store has no limit, and
nobody deletes anything there. So the rates say what the rules of the tiers make of a trace, not
what a slow store or network does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import count, cycle, pairwise
from random import Random
from typing import NamedTuple, get_args

import numpy as np

from flexkv.common.config import CacheConfig
from flexkv.common.terms import BLOCK_KEY_BYTES, BlockIds, BlockKey, Positions, Tier
from flexkv.index.change_hub import ChangeHub
from flexkv.index.claims import Claim, Holding
from flexkv.index.eviction import Eviction
from flexkv.index.guests import GUEST_SHARE
from flexkv.index.hints import STORE, HintedCatalogue, Hints, holders_of
from flexkv.index.owed_spans import OwedSpans
from flexkv.index.residency import PREFIX, WORTHY, Residency
from flexkv.index.span_changes import SpanChanges
from flexkv.io.remote.names import SHARDS
from flexkv.trace.hits import Prompt

ROUTINGS = ("random", "round-robin")
ADMISSIONS = get_args(CacheConfig.model_fields["p2p_admit"].annotation)
PAGE_SPANS = 1000
"""How many spans an answer to a listing has at most, as of S3."""
CHANGES_MAX = 1 << 20
"""More changes than one request makes."""
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
    """What engines share, and what they know of it."""

    span_blocks: int
    """How many blocks a span has: only whole spans are shared."""
    list_per_s: float = 0.0
    """Requests of each engine that list the store; 0: it knows its own spans only."""
    has_store: bool = True
    """Whether there is a store for all."""
    has_peers: bool = False
    """Whether engines read from each other's host memory."""
    admit: str = "always"
    """How they keep what they read so: one of ADMISSIONS, as `p2p_admit`."""


class EngineHits(NamedTuple):
    """What all engines together hit on a trace, in blocks."""

    own_blocks: int
    """Hits in host memory of the engine that was asked."""
    far_blocks: int
    """Hits behind those, in the store or in other engines."""
    asked_blocks: int
    stored_spans: int
    """Spans in the store at the end."""
    peer_blocks: int = 0
    """Those of the far ones that came from other engines."""

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


class _Served(NamedTuple):
    """How many blocks of a request came from where."""

    own: int
    peers: int
    store: int


class _Engine:
    """One engine: its host memory, and what it knows of the store and of the others."""

    def __init__(
        self,
        capacity_blocks: int,
        eviction: Eviction,
        hints: Hints,
        store: Store | None,
        admit: str,
    ) -> None:
        self._index, self._store = Residency({Tier.HOST: capacity_blocks}, eviction), store
        if admit == "second_use":
            self._index.limit_guests(GUEST_SHARE)
        self._peers_how = WORTHY if admit == "policy" else PREFIX
        self._hints, self._catalogue = hints, HintedCatalogue(hints)
        far = self._catalogue.has
        self._owed = OwedSpans(self._index, Tier.REMOTE, hints.span_blocks, far)
        self._pages: Iterator[bytes] = iter(())
        self._seen = [0] * SHARDS
        self._ops = 0
        """How many have filled blocks."""
        self._spans: SpanChanges | None = None

    def list(self, requests: int) -> None:
        """Make some requests that list the store, round after round."""
        assert self._store is not None
        for _ in range(min(requests, SHARDS)):
            page = next(self._pages, None)
            if page is None:
                self._pages = self._store.pages(self._seen)
                page = next(self._pages)
            self._hints.note(STORE, page)

    def announce_from_now_on(self) -> None:
        """Record how spans change, for `announced`."""
        hub = ChangeHub(self._index)
        self._spans = SpanChanges(hub, self._hints.span_blocks, CHANGES_MAX)

    def announced(self) -> tuple[bytes, bytes]:
        """Return the keys of spans that came, and of those that went, since the last call."""
        assert self._spans is not None
        changes = self._spans.take()
        assert changes is not None, "more changes than one request makes"
        came = b"".join(change.key for change in changes if change.on_host)
        return came, b"".join(change.key for change in changes if not change.on_host)

    def hear(self, holder: int, came: bytes, went: bytes) -> None:
        """Take what another engine has announced."""
        self._hints.note(holder, came)
        self._hints.drop(holder, went)

    def lend(self, prompt: Prompt, first: int, last: int) -> int:
        """Return how many blocks of a prompt another engine may read here; their use counts."""
        return self._index.run(prompt.keys, first, last, use=True).last - first

    def serve(self, prompt: Prompt, now_s: int, others: Sequence[_Engine]) -> _Served:
        """Serve a request; return where the engine found how many blocks of it."""
        index, blocks = self._index, len(prompt.ids)
        index.tick(now_s)
        found = index.find(prompt.keys, use=True)
        at, holdings, counts = found.last, [*found.holdings], {Tier.PEER: 0, Tier.REMOTE: 0}
        for tier, wanted in self._far(prompt, at, others):
            how = self._peers_how if tier is Tier.PEER else PREFIX
            with index.holding(holdings):
                fetched = self._fill(prompt, at, at + wanted, how, tier)
            holdings.append(Holding(Tier.HOST, fetched))
            at, counts[tier] = at + len(fetched), counts[tier] + len(fetched)
            if len(fetched) < wanted:
                break
        with index.holding(holdings):
            self._fill(prompt, at, blocks, WORTHY)
        self._write_behind()
        return _Served(found.last, counts[Tier.PEER], counts[Tier.REMOTE])

    def _far(
        self, prompt: Prompt, first: int, others: Sequence[_Engine]
    ) -> Iterator[tuple[Tier, int]]:
        """Yield how many blocks from a position on other engines lend, or the store has."""
        at = first
        for tier, ids in self._catalogue.far(prompt.keys, first, len(prompt.ids), frozenset()):
            holders = holders_of(ids)
            begins = [0, *(np.flatnonzero(np.diff(holders)) + 1).tolist(), len(ids)]
            for begin, end in pairwise(begins):
                there = wanted = end - begin
                if tier is Tier.PEER:
                    there = others[int(holders[begin]) - 1].lend(prompt, at, at + wanted)
                at += there
                yield tier, there
                if there < wanted:
                    return

    def _fill(
        self, prompt: Prompt, first: int, last: int, how: int, source: Tier = Tier.DEVICE
    ) -> BlockIds:
        """Bring blocks to host memory as far as they fit, and owe whole spans to the store."""
        if first >= last:
            return np.zeros(0, np.int64)
        ids = self._index.reserve(Tier.HOST, prompt.keys, Positions(first, last - first), how)
        claims, self._ops = self._index.claims, self._ops + 1
        claims.open(self._ops, Claim(self._ops, None, Holding(Tier.HOST, ids), source))
        claims.settle(self._ops, filled=True)
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
    """Return the hits of engines, each alone, with one store for all, or with each other.

    Args:
        prompts: the requests of a trace.
        capacity_blocks: how many blocks the host memory of each engine holds.
        eviction: its policy.
        fleet: the engines.
        sharing: what they share; None if each is alone.
    """
    sharing = sharing or Sharing(1, has_store=False)
    store = Store() if sharing.has_store else None
    distinct = 1 + max((max(prompt.ids, default=0) for prompt in prompts), default=0)
    spans_max = distinct // sharing.span_blocks + SPARE_SPANS
    if sharing.has_peers:
        spans_max += fleet.engines * (capacity_blocks // sharing.span_blocks)
    engines = [
        _Engine(
            capacity_blocks, eviction, Hints(spans_max, sharing.span_blocks), store, sharing.admit
        )
        for _ in range(fleet.engines)
    ]
    if sharing.has_peers:
        for engine in engines:
            engine.announce_from_now_on()
    own = peers = stored = asked = now_s = listed = 0
    begin_s = prompts[0].at_s if prompts else 0
    for prompt, number in zip(prompts, _routes(fleet), strict=False):
        now_s = max(now_s, prompt.at_s)
        due = int((now_s - begin_s) * sharing.list_per_s)
        if due > listed and store is not None:
            for engine in engines:
                engine.list(due - listed)
            listed = due
        served = engines[number].serve(prompt, now_s, engines)
        if sharing.has_peers:
            _announce(engines, number)
        own, peers, stored = own + served.own, peers + served.peers, stored + served.store
        asked += len(prompt.ids)
    spans = 0 if store is None else len(store)
    return EngineHits(own, peers + stored, asked, spans, peers)


def _announce(engines: Sequence[_Engine], number: int) -> None:
    """Tell all engines but one how its spans have changed."""
    came, went = engines[number].announced()
    for each, engine in enumerate(engines):
        if each != number:
            engine.hear(number + 1, came, went)


def _routes(fleet: Fleet) -> Iterable[int]:
    """Yield the number of the engine to which each request goes."""
    if fleet.routing == "round-robin":
        return cycle(range(fleet.engines))
    random = Random(fleet.seed)
    return (random.randrange(fleet.engines) for _ in count())
