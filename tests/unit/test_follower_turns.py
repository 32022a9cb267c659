"""A follower lets other tasks of the loop run, however much the other nodes tell at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from typing import Any, cast

import numpy as np
import pytest

from flexkv.cluster import follower as following
from flexkv.cluster.follower import ENTRY_SPANS, SPANS_A_TURN, Feed, Follower
from flexkv.cluster.generations import Heard
from flexkv.cluster.membership import Membership
from flexkv.cluster.records import (
    ENTRY_SPANS_MAX,
    STREAMS,
    TAG_BYTES,
    Beat,
    Entry,
    NodeRecord,
    SpanTags,
    encoded,
)
from flexkv.cluster.store import BEGIN, ClusterStore, LogPage, Positions
from flexkv.index.hints import HintCounts, Hints
from flexkv.testing.virtual_time import run_virtual
from tests.cluster_rigs import turns

SPANS = 100_000
LIFE = 5
OWN, NODE = NodeRecord(bytes(16), 1, "10.0.0.1:1"), NodeRecord(b"n" * 16, LIFE, "10.0.0.2:1")
TAGS = np.random.default_rng(3).bytes(SPANS * TAG_BYTES)


def tags(first: int, last: int) -> bytes:
    """Return the tags of some spans."""
    return TAGS[first * TAG_BYTES : last * TAG_BYTES]


class CountedHints:
    """Hints that count how many spans are noted and dropped in each turn of the loop.

    Attributes:
        turns: the counts; 0 for turns in which other tasks ran alone.
    """

    def __init__(self) -> None:
        self.hints, self.turns = Hints(4 * SPANS, 1), [0]

    def note(self, holder: int, keys: bytes, on_disk: bool, size: int) -> int:
        """Note spans."""
        self.turns[-1] += len(keys) // size
        return self.hints.note(holder, keys, on_disk, size)

    def drop(self, holder: int, keys: bytes, size: int) -> int:
        """Drop spans."""
        self.turns[-1] += len(keys) // size
        return self.hints.drop(holder, keys, size)

    def begin_round(self, holder: int) -> None:
        """Begin a round."""
        self.hints.begin_round(holder)

    def end_round(self, holder: int) -> None:
        """End a round."""
        self.hints.end_round(holder)

    def retire(self, holder: int) -> None:
        """Retire a holder."""
        self.hints.retire(holder)

    def scrubbing(self) -> Iterator[None]:
        """Remove dead pairs, in steps."""
        return self.hints.scrubbing()

    def counts(self) -> HintCounts:
        """Return how many pairs there are."""
        return self.hints.counts()

    def tick(self) -> None:
        """Count turns, in a callback of each."""
        self.turns.append(0)
        asyncio.get_running_loop().call_soon(self.tick)


class Log:
    """A store that has one page of the log to read."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    async def read(self, positions: Positions, wait_s: float) -> LogPage:
        """Return the entries of one stream."""
        page: Sequence[Sequence[bytes]] = [[encoded(each) for each in self.entries]]
        self.entries = []
        return LogPage(page, positions, [True], Heard(1))


class Rig:
    """A follower of one node, which is not behind.

    Attributes:
        snapshot: the parts of that of the node.
    """

    def __init__(self) -> None:
        self.counted, self.log = CountedHints(), Log()
        self.snapshot: list[SpanTags] = []
        hints = cast("Hints", self.counted)
        self.membership = Membership(hints, OWN, 30.0)
        self.follower = Follower(cast("ClusterStore", self.log), self.membership, hints, self)
        self.follower.positions = (BEGIN,) * STREAMS
        self.membership.saw([Beat(NODE)], 0.0)
        self.feed: Feed = self.follower._feeds[LIFE]
        self.feed.behind_since_s = self.feed.due_s = None
        self.holder = self.feed.member.holder

    async def parts(self, node: NodeRecord) -> AsyncGenerator[SpanTags, None]:
        """Yield a snapshot."""
        for part in self.snapshot:
            yield part

    def knows(self, first: int, last: int) -> int:
        """Return how many of some spans the node is said to have."""
        keys = np.zeros((last - first, 2 * TAG_BYTES), np.uint8)
        keys[:, :TAG_BYTES] = np.frombuffer(tags(first, last), np.uint8).reshape(-1, TAG_BYTES)
        return int(self.counted.hints.known(self.holder, keys.tobytes()).sum())


def with_follower(work: Callable[[Rig], Coroutine[Any, Any, None]]) -> None:
    """Run a test; in no turn of the loop a task may have taken too much."""

    async def main() -> None:
        rig = Rig()
        rig.counted.tick()
        await work(rig)
        assert max(rig.counted.turns) <= SPANS_A_TURN

    run_virtual(main())


def entries(first_seq: int, spans: int, each: int = ENTRY_SPANS_MAX) -> list[Entry]:
    """Return entries that tell of the first spans, so many in each."""
    edges = range(0, spans, each)
    return [
        Entry(LIFE, first_seq + number, tags(begin, min(begin + each, spans)))
        for number, begin in enumerate(edges)
    ]


@pytest.mark.parametrize("each", [1, 100, ENTRY_SPANS_MAX])
def test_a_page_of_the_log_is_taken_in_many_turns(each: int) -> None:
    """All spans of a page get into the hints, whether its entries are large or many and small."""
    spans = min(SPANS, 1000 * each)

    async def work(rig: Rig) -> None:
        rig.log.entries = entries(1, spans, each)
        count = len(rig.log.entries)
        await rig.follower.read()
        assert rig.knows(0, spans) == spans
        assert rig.feed.seq == count
        busy = sum(map(bool, rig.counted.turns))
        assert busy >= (spans + ENTRY_SPANS * count) // SPANS_A_TURN

    with_follower(work)


def test_a_snapshot_is_noted_in_many_turns() -> None:
    """Other tasks run between the steps, and the hints have all of the snapshot in the end."""

    async def work(rig: Rig) -> None:
        half = SPANS // 2
        rig.snapshot = [
            SpanTags(7, tags(0, half), b"", False),
            SpanTags(7, b"", tags(half, SPANS), True),
        ]
        rig.follower._fall_behind(rig.feed)
        await rig.follower._snapshot(rig.feed)
        assert rig.knows(0, SPANS) == SPANS
        assert (rig.feed.seq, rig.feed.behind_since_s) == (7, None)

    with_follower(work)


def kept(rig: Rig, seq: int, spans: int) -> list[Entry]:
    """Let a snapshot be the first span alone; return what is read of the log before it is there."""
    rig.snapshot = [SpanTags(seq, tags(SPANS - 1, SPANS), b"", True)]
    rig.follower._fall_behind(rig.feed)
    told = entries(seq - 1, spans)
    for entry in told:
        rig.follower._follow(rig.feed, entry)
    return told


def test_what_came_during_a_snapshot_is_taken_in_many_turns() -> None:
    """Entries that come meanwhile are applied in order; those that the snapshot has are skipped."""

    async def work(rig: Rig) -> None:
        told = kept(rig, 7, SPANS - 1)
        taking = asyncio.ensure_future(rig.follower._snapshot(rig.feed))
        while rig.feed.seq < 12:
            await turns(1)
        assert rig.feed.behind_since_s is not None
        rig.log.entries = [Entry(LIFE, told[-1].seq + 1, b"", b"", tags(SPANS - 2, SPANS - 1))]
        await rig.follower.read()
        await taking
        assert rig.feed.seq == told[-1].seq + 1
        assert rig.feed.behind_since_s is None
        skipped = 2 * ENTRY_SPANS_MAX
        assert rig.knows(0, skipped) == 0
        assert rig.knows(skipped, SPANS - 2) == SPANS - 2 - skipped
        assert (rig.knows(SPANS - 2, SPANS - 1), rig.knows(SPANS - 1, SPANS)) == (0, 1)
        assert (len(rig.feed.kept), rig.feed.kept_spans) == (0, 0)

    with_follower(work)


def test_a_gap_in_what_came_during_a_snapshot_needs_another_one() -> None:
    """Entries behind the gap are kept for the next snapshot, and not noted before it."""

    async def work(rig: Rig) -> None:
        told = kept(rig, 7, 10 * ENTRY_SPANS_MAX)
        del rig.feed.kept[5]
        await rig.follower._snapshot(rig.feed)
        assert rig.feed.behind_since_s is not None
        assert rig.feed.due_s is not None
        assert rig.feed.seq == told[4].seq
        assert list(rig.feed.kept) == told[6:]
        assert rig.knows(5 * ENTRY_SPANS_MAX, 10 * ENTRY_SPANS_MAX) == 0

    with_follower(work)


def test_entries_that_become_too_many_while_some_are_taken_are_missed_at_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No entry is applied out of its order."""

    async def work(rig: Rig) -> None:
        told = kept(rig, 7, 10 * ENTRY_SPANS_MAX)
        taking = asyncio.ensure_future(rig.follower._snapshot(rig.feed))
        while rig.feed.seq < 9:
            await turns(1)
        monkeypatch.setattr(following, "KEPT_SPANS_MAX", 100)
        rig.follower._follow(rig.feed, Entry(LIFE, told[-1].seq + 1, tags(0, 1)))
        await taking
        assert rig.feed.behind_since_s is None
        seq = rig.feed.seq
        assert seq < told[-1].seq
        rig.follower._follow(rig.feed, Entry(LIFE, told[-1].seq + 2, tags(0, 1)))
        assert rig.feed.behind_since_s is not None
        assert rig.feed.seq == seq

    with_follower(work)


@pytest.mark.parametrize("is_noting", [True, False])
def test_a_node_that_leaves_meanwhile_is_not_noted_any_more(is_noting: bool) -> None:
    """Nothing is noted of a node that has left, since its number may be another node's by then."""

    async def work(rig: Rig) -> None:
        kept(rig, 7, SPANS)
        if is_noting:
            rig.snapshot = [SpanTags(7, TAGS, b"", True)]
        taking = asyncio.ensure_future(rig.follower._snapshot(rig.feed))
        before = sum(rig.counted.turns)
        while sum(rig.counted.turns) < before + 3 * SPANS_A_TURN:
            await turns(1)
        noted = sum(rig.counted.turns)
        rig.membership.farewell(LIFE)
        await taking
        assert sum(rig.counted.turns) == noted

    with_follower(work)
