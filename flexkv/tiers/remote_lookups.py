"""Hints of a store that cannot be listed: it is asked for the spans of prompts.

    a match or load ends, and no hint says what follows ──▶ Lookups: is it there? ──▶ hints
    how far the chain reaches is known ─────▶ Lookups: are the leaves there, too? ──▶ hints
    a fetch misses a span ───────────────────────▶ Lookups: are the others there? ──▶ hints

Leaves are spans, too. Of a model that has some, the next match or load does not have to come before
they are asked for: they follow when the answer for the chain is there (see `graph.leaf_search`).

A match does not wait for the answer: the next match knows it. A load waits, but only for a moment.
Spans that this engine has stored are known without a lookup. An answer counts for some seconds,
so a prompt that is matched in every step costs little.

An answer that comes late is heard all the same, since asking again would only take as long. If
answers take long, later lookups have fewer spans, so that even a store that needs a long time for
each span answers before its mover counts as hung.
"""

from __future__ import annotations

import asyncio
from asyncio import Future
from collections import OrderedDict
from collections.abc import Awaitable, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from flexkv.actors.supervisor import Bell
from flexkv.common.errors import RemoteError, TransferError
from flexkv.common.space import GroupRule
from flexkv.common.terms import BLOCK_KEY_BYTES, BlockKey, Tier, Transfer
from flexkv.graph.leaf_search import LeafSearch
from flexkv.index.catalogue import FarRun, Sought
from flexkv.index.hints import STORE, HintedCatalogue, Hints
from flexkv.index.keys import key_list, leaf_keys_at
from flexkv.index.spans import rows_of
from flexkv.io.remote.names import CurrentPool, Pool
from flexkv.io.remote.requests import Requests
from flexkv.io.remote.until import Until
from flexkv.observe.logs import get_logger

log = get_logger(__name__)

ANSWER_SHARE, SLOW_SHARE, FAST_SHARE = 4.0, 0.5, 0.1
"""Shares of the time after which a silent store counts as hung. Its mover is ended then, and its
lookups with it, so they may take longer. After an answer that has taken more than the second
share, lookups have half as many spans; after one of less than the third, twice as many."""
WAIT_S = 0.1
"""How long a load waits for an answer. It loads what is known by then."""
COUNTS_S = 5.0
"""How long an answer counts. Spans that others store within that time are found after it."""
SPANS_MAX = 1000
"""The most spans of one lookup; a longer prompt is asked for in parts."""
WAITING_MAX = 256
"""The most lookups that wait to be made."""
ANSWERED_MAX = 1 << 14
"""How many answered lookups are remembered."""


class LookupStore(Protocol):
    """A store that is asked for objects by their names."""

    async def exist(self, names: Sequence[str]) -> list[bool]:
        """Return which objects are there."""
        ...


@dataclass(eq=False, slots=True)
class _Lookup:
    """What the store is to be asked for.

    Attributes:
        key: what it is known by while it waits.
        spans: the keys of spans.
        answered: done once the answers are there.
        sought: the prefixes whose leaves are asked for once the answer for the spans is there;
            None for none.
        search: chooses the leaves; None as long as the spans are asked for.
    """

    key: bytes
    spans: list[BlockKey]
    answered: Future[None]
    sought: Sought | None = None
    search: LeafSearch | None = None

    def wanted(self, room: int) -> list[BlockKey]:
        """Return the keys to ask for next, at most `room`: of the spans only the leading ones."""
        return self.spans[:room] if self.search is None else self.search.wanted(room)


class Lookups:
    """Asks a store for spans, and keeps hints up to date by its answers."""

    def __init__(
        self,
        store: LookupStore,
        requests: Requests,
        pool: CurrentPool,
        hints: Hints,
        silent_s: float,
        rules: Sequence[GroupRule] = (),
    ) -> None:
        """Take what is asked; nothing is sent.

        Args:
            store: the store.
            requests: its requests.
            pool: the pool in use.
            hints: of the pool.
            silent_s: a store that is silent for so long counts as hung.
            rules: of the KV groups whose blocks are leaves.
        """
        self._store, self._requests, self._pool, self._hints = store, requests, pool, hints
        self._silent_s, self._rules = silent_s, rules
        self._waiting: OrderedDict[bytes, _Lookup] = OrderedDict()
        """Lookups without an answer."""
        self._answered_s: OrderedDict[bytes, float] = OrderedDict()
        self._bell = Bell()
        self._is_slow = False
        """Whether a load has waited in vain, and no answer has come since."""
        self._spans_max = SPANS_MAX
        """The most spans of one request now."""

    @property
    def leaf_groups(self) -> list[int]:
        """Return the KV groups of the model whose blocks are leaves."""
        return [rule.group for rule in self._rules]

    def ask(self, sought: Sought) -> Future[None] | None:
        """Ask for what is unknown of some prefixes, unless that was done lately.

        First come the spans behind what is known of the chain. Once they are known, the leaves
        follow that the longest of the prefixes need.

        Returns:
            A future that is done once the answers are there; None if there is none to wait for.
        """
        known, size = self._known(sought), self._hints.span_blocks
        ends = range((known // size + 1) * size, sought.last + sought.drop + 1, size)[:SPANS_MAX]
        key = _key_at(sought.keys, ends[0]) if ends else b""
        if (lookup := self._waiting.get(key)) is not None:
            return lookup.answered
        if ends and not self._is_answered(key):
            spans = [_key_at(sought.keys, end) for end in ends]
            return self._wait(_Lookup(key, spans, _future(), sought))
        lookup = self._leaves_of(sought, known)
        return None if lookup is None else self._wait(lookup)

    def ask_again(self, spans: list[BlockKey]) -> None:
        """Ask for some spans, even if there was an answer lately."""
        if spans:
            self._wait(_Lookup(spans[0], spans[:SPANS_MAX], _future()))

    def _known(self, sought: Sought) -> int:
        """Return where what is known of the chain ends, if it is known up to `sought.chain`."""
        keys, at, end = sought.keys, sought.chain, sought.last + sought.drop
        runs = self._hints.far_runs(keys, at, end, frozenset())
        return at + sum(len(run.block_ids) for run in runs)

    def _is_answered(self, key: bytes) -> bool:
        """Return whether there was an answer lately."""
        answered_s = self._answered_s.get(key)
        return answered_s is not None and _now_s() - answered_s < COUNTS_S

    def _wait(self, lookup: _Lookup) -> Future[None] | None:
        """Let a lookup wait to be made; return what is done once it is answered, if it may wait."""
        if (same := self._waiting.get(lookup.key)) is not None:
            return same.answered
        if len(self._waiting) >= WAITING_MAX:
            return None
        self._waiting[lookup.key] = lookup
        self._bell.ring()
        return lookup.answered

    def _leaves_of(self, sought: Sought, known: int) -> _Lookup | None:
        """Return the lookup of the leaves that some prefixes need, whose chain is known.

        It may be waiting already. If that was done lately, or there is nothing to ask for, return
        None.
        """
        last = min(sought.last, known - sought.drop)
        if not self._rules or last <= sought.first:
            return None
        key = _key_at(sought.keys, last) + sought.first.to_bytes(8, "little")
        if (lookup := self._waiting.get(key)) is not None:
            return lookup
        if self._is_answered(key):
            return None
        search = LeafSearch(self._rules, sought._replace(chain=known), self._are_known)
        if search.is_over:
            self._answer(key)
            return None
        return _Lookup(key, [], _future(), None, search)

    def _are_known(self, keys: bytes) -> NDArray[np.bool_]:
        """Return which leaves somebody is said to have."""
        return self._hints.known(STORE, keys) | (self._hints.nodes(keys) >= 0)

    def look_up(self, sought: Sought) -> Awaitable[None] | None:
        """Ask as `ask` does; return what ends with the answer, or after a moment without it.

        Loads do not wait for a store that is slow, or that has not answered yet.
        """
        answered = self.ask(sought)
        if answered is None or self._is_slow or self._pool.current is None:
            return None
        return self._moment(answered)

    async def _moment(self, answered: Future[None]) -> None:
        done, _ = await asyncio.wait([answered], timeout=WAIT_S)
        self._is_slow = not done

    async def run(self) -> None:
        """Ask, until cancelled."""
        while True:
            await self._bell.wait()
            while self._waiting:
                pool = await self._pool.joined()
                lookups = self._next()
                try:
                    there = await self._send(pool, [key for _, keys in lookups for key in keys])
                except RemoteError as error:
                    self._is_slow = True
                    log.warning("remote_lookup_failed", error=str(error))
                    for lookup, _ in lookups:
                        self._end(lookup, [lookup.key])
                else:
                    for lookup, keys in lookups:
                        self._hear(lookup, keys, there)

    def _next(self) -> list[tuple[_Lookup, list[BlockKey]]]:
        """Return the lookups to make in one request, and what each asks for.

        They are the oldest, as many as it has room for.
        """
        chosen, room = list[tuple[_Lookup, list[BlockKey]]](), self._spans_max
        for lookup in self._waiting.values():
            keys = lookup.wanted(self._spans_max)
            if chosen and room < len(keys):
                break
            chosen.append((lookup, keys))
            room -= len(keys)
        return chosen

    async def _send(self, pool: Pool, spans: Sequence[BlockKey]) -> Set[BlockKey]:
        """Ask for some spans, note or drop them, and return which are there.

        Raises:
            RemoteError: the store failed, or did not answer in time.
        """
        names = [pool.object_name(key) for key in spans]
        loop = asyncio.get_running_loop()
        begin_s = loop.time()
        until = Until(begin_s + ANSWER_SHARE * self._silent_s)
        try:
            answers = await self._requests.once("exist", lambda: self._store.exist(names), until)
        finally:
            if (took_s := loop.time() - begin_s) > SLOW_SHARE * self._silent_s:
                self._spans_max = max(1, len(spans) // 2)
        if took_s < FAST_SHARE * self._silent_s:
            self._spans_max = min(SPANS_MAX, 2 * self._spans_max)
        self._is_slow = False
        there = {key for key, is_there in zip(spans, answers, strict=True) if is_there}
        if pool is self._pool.current:
            self._hints.note(STORE, b"".join(there))
            self._hints.drop(STORE, b"".join(key for key in spans if key not in there))
        return there

    def _hear(self, lookup: _Lookup, keys: Sequence[BlockKey], there: Set[BlockKey]) -> None:
        """Take the answer to a lookup: which spans are there. It may have more to ask for."""
        if lookup.search is not None:
            lookup.search.heard(there)
            if lookup.search.is_over:
                self._end(lookup, [lookup.key])
            return
        # The lookup that would follow the spans found there is answered as well.
        lacking = next((key for key in keys if key not in there), keys[0])
        leaves = None
        if lookup.sought is not None:
            leaves = self._leaves_of(lookup.sought, self._known(lookup.sought))
        if leaves is None or leaves.key in self._waiting:
            self._end(lookup, [keys[0], lacking])
            return
        self._answer(keys[0], lacking)
        del self._waiting[lookup.key]
        leaves.answered = lookup.answered
        self._waiting[leaves.key] = leaves

    def _end(self, lookup: _Lookup, keys: Sequence[bytes]) -> None:
        """End a lookup, and remember it as answered by these keys."""
        del self._waiting[lookup.key]
        self._answer(*keys)
        if not lookup.answered.done():
            lookup.answered.set_result(None)

    def _answer(self, *keys: bytes) -> None:
        """Remember lookups as answered."""
        for key in keys:
            self._answered_s[key] = _now_s()
            self._answered_s.move_to_end(key)
        while len(self._answered_s) > ANSWERED_MAX:
            self._answered_s.popitem(last=False)


def _key_at(keys: bytes, end: int) -> BlockKey:
    """Return the key of the span that ends before position `end`."""
    return keys[BLOCK_KEY_BYTES * end : BLOCK_KEY_BYTES * (end + 1)]


def _future() -> Future[None]:
    return asyncio.get_running_loop().create_future()


def _now_s() -> float:
    return asyncio.get_running_loop().time()


class LookupCatalogue(HintedCatalogue):
    """A catalogue that asks the store for what its hints do not know."""

    def __init__(self, hints: Hints, lookups: Lookups) -> None:
        """Answer from `hints`, which `lookups` keep up to date."""
        super().__init__(hints)
        self._lookups = lookups

    @property
    def is_empty(self) -> bool:
        """Return False: what nobody has asked for yet may be there."""
        return False

    def far(self, keys: bytes, first: int, last: int, avoid: Set[Tier]) -> Sequence[FarRun]:
        """Return which tiers are said to have the blocks from `first` on; ask for what follows.

        Of a model with leaves, `ask` tells what is sought.
        """
        runs = super().far(keys, first, last, avoid)
        if not self._lookups.leaf_groups:
            self.ask(Sought(keys, first, first, last), avoid)
        return runs

    def ask(self, sought: Sought, avoid: Set[Tier]) -> None:
        """Ask the store for what no hint names."""
        if Tier.REMOTE not in avoid:
            self._lookups.ask(sought)

    def doubt(self, transfer: Transfer, error: TransferError) -> None:
        """Drop the span that is missing, and ask for all that was to come: it may be gone, too.

        Leaves of blocks of the chain that were to come are asked for as well, if hints name them.
        """
        super().doubt(transfer, error)
        if error.is_miss and transfer.names is not None:
            keys = b"".join([keys for _, keys in self._spans(transfer)])
            for group in () if transfer.group else self._lookups.leaf_groups:
                of_group = leaf_keys_at(transfer.names.keys, group, transfer.positions.array)
                known = self._hints.known(STORE, of_group)
                keys += rows_of(of_group)[known].tobytes()
            self._lookups.ask_again(key_list(keys))
