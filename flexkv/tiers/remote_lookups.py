"""Hints of a store that cannot be listed: it is asked for the spans of prompts.

    a match or load ends, and no hint says what follows ──▶ Lookups: is it there? ──▶ hints
    a fetch misses a span ───────────────────────▶ Lookups: are the others there? ──▶ hints

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
from typing import NamedTuple, Protocol

from flexkv.actors.supervisor import Bell
from flexkv.common.errors import RemoteError, TransferError
from flexkv.common.terms import BLOCK_KEY_BYTES, BlockKey, Tier, Transfer
from flexkv.index.catalogue import FarRun
from flexkv.index.hints import STORE, HintedCatalogue, Hints
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


class _Lookup(NamedTuple):
    """A lookup in the store: which of some consecutive spans of a prompt are there.

    Attributes:
        keys: root and keys of the prompt's blocks.
        ends: the positions behind the spans.
        answered: done once the answer is there.
    """

    keys: bytes
    ends: range
    answered: Future[None]

    @property
    def spans(self) -> list[BlockKey]:
        """Return the keys of the spans."""
        return [_key_at(self.keys, end) for end in self.ends]


class Lookups:
    """Asks a store for spans, and keeps hints up to date by its answers."""

    def __init__(
        self,
        store: LookupStore,
        requests: Requests,
        pool: CurrentPool,
        hints: Hints,
        silent_s: float,
    ) -> None:
        """Take what is asked; nothing is sent.

        Args:
            store: the store.
            requests: its requests.
            pool: the pool in use.
            hints: of the pool.
            silent_s: a store that is silent for so long counts as hung.
        """
        self._store, self._requests, self._pool, self._hints = store, requests, pool, hints
        self._silent_s = silent_s
        self._waiting: OrderedDict[BlockKey, _Lookup] = OrderedDict()
        """Lookups without an answer, by the first span of each."""
        self._answered_s: OrderedDict[BlockKey, float] = OrderedDict()
        self._bell = Bell()
        self._is_slow = False
        """Whether a load has waited in vain, and no answer has come since."""
        self._spans_max = SPANS_MAX
        """The most spans of one lookup now."""

    def ask(self, keys: bytes, first: int, last: int, is_new: bool = False) -> Future[None] | None:
        """Ask for the spans of a prompt from position `first` on, unless that was done lately.

        Args:
            keys: root and keys of the prompt's blocks.
            first: where what is known ends.
            last: where the prompt ends, exclusive.
            is_new: whether to ask even if there was an answer lately.

        Returns:
            A future that is done once the answer is there; None if there is none to wait for.
        """
        size = self._hints.span_blocks
        ends = range((first // size + 1) * size, last + 1, size)[:SPANS_MAX]
        if not ends:
            return None
        key = _key_at(keys, ends[0])
        if (lookup := self._waiting.get(key)) is not None:
            return lookup.answered
        loop = asyncio.get_running_loop()
        if not is_new and loop.time() - self._answered_s.get(key, -COUNTS_S) < COUNTS_S:
            return None
        if len(self._waiting) >= WAITING_MAX:
            return None
        lookup = self._waiting[key] = _Lookup(keys, ends, loop.create_future())
        self._bell.ring()
        return lookup.answered

    def look_up(self, keys: bytes, first: int, last: int) -> Awaitable[None] | None:
        """Ask as `ask` does; return what ends with the answer, or after a moment without it.

        Loads do not wait for a store that is slow, or that has not answered yet.
        """
        answered = self.ask(keys, first, last)
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
                    there = await self._send(pool, lookups)
                except RemoteError as error:
                    self._is_slow = True
                    log.warning("remote_lookup_failed", error=str(error))
                    self._end(lookups, frozenset())
                else:
                    self._end(lookups, there)

    def _next(self) -> list[_Lookup]:
        """Return the lookups to make in one request: the oldest, as many as it has room for.

        Only the leading spans of one that is too long alone are asked for.
        """
        chosen, room = list[_Lookup](), self._spans_max
        for lookup in self._waiting.values():
            if chosen and room < len(lookup.ends):
                break
            chosen.append(lookup._replace(ends=lookup.ends[:room]))
            room -= len(lookup.ends)
        return chosen

    async def _send(self, pool: Pool, lookups: Sequence[_Lookup]) -> Set[BlockKey]:
        """Ask for the spans of some lookups, note or drop them, and return which are there.

        Raises:
            RemoteError: the store failed, or did not answer in time.
        """
        spans = [key for lookup in lookups for key in lookup.spans]
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

    def _end(self, lookups: Sequence[_Lookup], there: Set[BlockKey]) -> None:
        """Remember lookups as answered, also the one that would follow the spans found there."""
        now_s = asyncio.get_running_loop().time()
        for lookup in lookups:
            spans = lookup.spans
            first = spans[0]
            lacking = next((key for key in spans if key not in there), first)
            del self._waiting[first]
            for key in {first, lacking}:
                self._answered_s[key] = now_s
                self._answered_s.move_to_end(key)
            if not lookup.answered.done():
                lookup.answered.set_result(None)
        while len(self._answered_s) > ANSWERED_MAX:
            self._answered_s.popitem(last=False)


def _key_at(keys: bytes, end: int) -> BlockKey:
    """Return the key of the span that ends before position `end`."""
    return keys[BLOCK_KEY_BYTES * end : BLOCK_KEY_BYTES * (end + 1)]


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
        """Return which tiers are said to have the blocks from `first` on; ask for what follows."""
        runs = super().far(keys, first, last, avoid)
        if Tier.REMOTE not in avoid:
            known = first + sum(len(run.block_ids) for run in runs)
            self._lookups.ask(keys, known, last)
        return runs

    def doubt(self, transfer: Transfer, error: TransferError) -> None:
        """Drop the span that is missing, and ask for all that was to come: it may be gone, too."""
        super().doubt(transfer, error)
        if error.is_miss and transfer.names is not None:
            positions = transfer.positions.array
            first, last = int(positions[0]), int(positions[-1]) + 1
            end = -(-last // self.span_blocks) * self.span_blocks
            keys = transfer.names.keys
            end = min(end, len(keys) // BLOCK_KEY_BYTES - 1)
            self._lookups.ask(keys, first, end, is_new=True)
