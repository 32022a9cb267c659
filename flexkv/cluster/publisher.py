"""Tells the other nodes which spans this one has.

    changes ──▶ pending, by span ──▶ entries, numbered ──▶ the node's stream
                    │                     └── sent again until the store has them
                    └── too many while the store is away: all are dropped and a number is skipped,
                        so that readers notice the gap and ask for a snapshot

What others were told is remembered, so that nothing is told twice. That a span is gone is always
told: those who took a snapshot may know of it. While a snapshot is made, all that changes is told,
since the snapshot may miss what is there in between. What came and went within one interval is left
out by the source.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from random import Random
from typing import NamedTuple, Protocol

from flexkv.cluster.records import (
    FAREWELL,
    Entry,
    NodeRecord,
    SpanTags,
    Told,
    encoded,
    entries_of,
    tags_of,
)
from flexkv.cluster.store import ClusterStore, ClusterStoreError
from flexkv.index.hints import Hints

PUBLISH_S = 0.05
"""The shortest time between two entries of a node."""
NODES_AT_ONCE = 100
"""With more nodes, each publishes less often, so that the store's work grows no faster."""
PENDING_MAX = 1 << 17
"""For how many spans changes are kept while the store is away: about 20 MB."""
RETRY_S, RETRY_MAX_S = 0.1, 2.0
"""The first and the longest pause before an entry is sent again."""

_GONE, _ON_HOST, _ON_DISK = range(3)
_TOLD_ON_HOST, _TOLD_ON_DISK = 1, 2
"""Holders in the table of what was told."""


class SpanChange(Protocol):
    """Where a span is now, after a change."""

    @property
    def key(self) -> bytes:
        """Return the span's key, 16 bytes."""
        ...

    @property
    def on_host(self) -> bool:
        """Return whether it is in host memory."""
        ...

    @property
    def on_disk(self) -> bool:
        """Return whether it is on disk."""
        ...


class SpanStep(NamedTuple):
    """Some spans that this node has: their keys, 16 bytes each, joined."""

    on_host: bytes
    on_disk: bytes
    """Of spans that are only on disk."""


class SpanSource(Protocol):
    """What this node has, and how it changes."""

    def changes(self) -> Iterable[SpanChange] | None:
        """Return what changed since the last call, in order; None if that is not known.

        A span that came and went since then may be left out, unless a walk is under way.
        """
        ...

    def steps(self) -> Iterator[SpanStep]:
        """Walk through all spans in short steps; changes between two steps are not lost."""
        ...


class Publisher:
    """The publisher of a node life.

    Attributes:
        sent_seq: of the latest entry that the store has.
        gaps: how often pending changes were dropped.
        may_send: returns whether others may hear of this life.
    """

    def __init__(
        self,
        store: ClusterStore,
        own: NodeRecord,
        source: SpanSource,
        spans_max: int,
        nodes: Callable[[], int] = lambda: 1,
    ) -> None:
        """Publish nothing yet.

        Args:
            store: has the log.
            own: who this node is.
            source: what it has.
            spans_max: how many spans it may have, about. Each costs 9.4 bytes here.
            nodes: returns how many nodes there are.
        """
        self.sent_seq = self.gaps = 0
        self.may_send: Callable[[], bool] = lambda: True
        self._store, self._own, self._source, self._nodes = store, own, source, nodes
        self._told = Hints(max(64, spans_max), 1)
        self._seq = 0
        self._pending: dict[bytes, int] = {}
        self._unsent: list[Entry] = [self._next_entry()]  # readers learn of the life by it
        self._snapshots = 0
        self._tell_all = False
        self._random = Random(own.life)

    @property
    def seq(self) -> int:
        """Return the number of the latest entry, sent or not."""
        return self._seq

    @property
    def pending_spans(self) -> int:
        """Return for how many spans a change is not in an entry yet."""
        return len(self._pending)

    def interval_s(self) -> float:
        """Return the time between two entries."""
        return PUBLISH_S * max(1.0, self._nodes() / NODES_AT_ONCE)

    async def run(self) -> None:
        """Publish what changes until cancelled."""
        pause_s = RETRY_S
        while True:
            try:
                await self.publish()
            except ClusterStoreError:
                await self._collect_for(pause_s * self._random.uniform(0.5, 1.0))
                pause_s = min(2 * pause_s, RETRY_MAX_S)
            else:
                pause_s = RETRY_S
                await asyncio.sleep(self.interval_s())

    async def publish(self) -> None:
        """Send what changed since the last call, and what is not sent yet.

        Raises:
            ClusterStoreError: it is not sent, or not known to be; the next call sends it again.
        """
        self.collect()
        if not self.may_send():
            return
        if not self._unsent:
            self._take()
        if self._unsent:
            entries = self._unsent
            await self._store.append(self._own.stream, [encoded(each) for each in entries])
            self.sent_seq = entries[-1].seq
            self._unsent = []

    async def farewell(self) -> None:
        """Tell the others that this node leaves.

        Raises:
            ClusterStoreError: they are not told.
        """
        last = Entry(self._own.life, FAREWELL)
        await self._store.append(self._own.stream, [encoded(last)])

    async def _collect_for(self, pause_s: float) -> None:
        """Collect changes for a while: nobody else keeps them."""
        until_s = asyncio.get_running_loop().time() + pause_s
        while (left_s := until_s - asyncio.get_running_loop().time()) > 0:
            await asyncio.sleep(min(left_s, self.interval_s()))
            self.collect()

    def collect(self) -> None:
        """Take what changed from the source."""
        changes = self._source.changes()
        if changes is None:
            self._lose()
            return
        pending = self._pending
        for change in changes:
            state = _ON_HOST if change.on_host else _ON_DISK if change.on_disk else _GONE
            pending[change.key] = state
        if len(pending) > PENDING_MAX:
            self._lose()

    def _lose(self) -> None:
        """Drop what is pending, and skip a number so that readers notice."""
        self._pending.clear()
        self._told.clear()
        self._seq += 1
        self._unsent.append(self._next_entry())
        if len(self._unsent) > 2:  # what is skipped between the first and the last is noticed, too
            del self._unsent[1:-1]
        self.gaps += 1

    def _next_entry(self) -> Entry:
        self._seq += 1
        return Entry(self._own.life, self._seq)

    # -- entries --------------------------------------------------------------------------------

    def _take(self) -> None:
        """Make entries of what is pending."""
        pending, self._pending = self._pending, {}
        tell_all, self._tell_all = self._tell_all, self._snapshots > 0
        if not pending:
            return
        told = self._to_tell(pending, tell_all)
        if any(told):
            self._unsent = entries_of(self._own.life, self._seq + 1, told)
            self._seq = self._unsent[-1].seq

    def _to_tell(self, pending: dict[bytes, int], tell_all: bool) -> Told:
        """Return what others must be told, and remember that they are."""
        keys: tuple[list[bytes], ...] = ([], [], [])
        for key, state in pending.items():
            keys[state].append(key)
        on_host = self._untold(keys[_ON_HOST], _TOLD_ON_HOST, tell_all)
        on_disk = self._untold(keys[_ON_DISK], _TOLD_ON_DISK, tell_all)
        dropped = b"".join(keys[_GONE])
        for holder, added, removed in (
            (_TOLD_ON_HOST, on_host, on_disk + dropped),
            (_TOLD_ON_DISK, on_disk, on_host + dropped),
        ):
            self._told.drop(holder, removed)
            self._told.note(holder, added)
        return tags_of(on_host), tags_of(on_disk), tags_of(dropped)

    def _untold(self, keys: Sequence[bytes], holder: int, tell_all: bool) -> bytes:
        """Return those keys of spans, joined, that others do not know to be there already."""
        joined = b"".join(keys)
        if tell_all or not joined:
            return joined
        known = self._told.known(holder, joined)
        return b"".join(key for key, is_known in zip(keys, known, strict=True) if not is_known)

    # -- snapshots ------------------------------------------------------------------------------

    def snapshot(self) -> Iterator[SpanTags]:
        """Walk through all spans in parts; close the iterator if it is not exhausted."""
        self._snapshots += 1
        self._tell_all = True
        try:
            seq = self._seq
            for step in self._source.steps():
                yield SpanTags(seq, tags_of(step.on_host), tags_of(step.on_disk), False)
            yield SpanTags(seq, b"", b"", True)
        finally:
            self._snapshots -= 1
