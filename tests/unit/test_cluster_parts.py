"""What a publisher tells, and how a membership numbers nodes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv.cluster import publisher as publishing
from flexkv.cluster.generations import Heard
from flexkv.cluster.membership import Membership
from flexkv.cluster.publisher import NODES_AT_ONCE, PUBLISH_S, Publisher, SpanStep
from flexkv.cluster.records import (
    ENTRY_SPANS_MAX,
    STREAMS,
    TAG_BYTES,
    Beat,
    Entry,
    NodeRecord,
    beat_from,
    encoded,
    entries_of,
    entry_from,
    tags_of,
)
from flexkv.cluster.store import BEGIN, ClusterStoreError, LogPage, Positions, Registry
from flexkv.common.errors import MalformedError
from flexkv.index.hints import HOLDERS_MAX, Hints
from flexkv.testing.cluster_simulation import Change, SimulatedSpans

OWN = NodeRecord(bytes(16), 7, "10.0.0.1:1")


class Tape:
    """A store that keeps what is appended, or fails."""

    def __init__(self) -> None:
        self.where, self.fails = "tape", False
        self.entries: list[Entry] = []

    async def append(self, stream: int, entries: Sequence[bytes]) -> None:
        """Keep entries."""
        assert stream == OWN.life % STREAMS
        if self.fails:
            raise ClusterStoreError(self.where, "append", "away")
        self.entries += map(entry_from, entries)

    async def register(self, beat: Beat, over: int | None) -> Beat | None:
        """Register nobody."""
        return None

    async def leave(self, node: NodeRecord) -> None:
        """Do nothing."""

    async def forget(self, ids: Collection[bytes]) -> None:
        """Do nothing."""

    async def registry(self) -> Registry:
        """Return nothing."""
        return Registry([], [], (BEGIN,) * STREAMS, 0)

    async def read(self, positions: Positions, wait_s: float) -> LogPage:
        """Return nothing."""
        return LogPage([()] * STREAMS, positions, [True] * STREAMS, Heard())

    async def put_back(self, generation: int) -> None:
        """Do nothing."""

    async def close_generation(self, name: int) -> None:
        """Do nothing."""

    async def begin(self, generation: int) -> None:
        """Do nothing."""

    async def advance(self, known: int) -> int:
        """Return the next number."""
        return known + 1

    async def close(self) -> None:
        """Do nothing."""


class Script:
    """A source whose changes are given."""

    def __init__(self) -> None:
        self.next: list[Change] | None = []
        self.spans: list[SpanStep] = []

    def changes(self) -> list[Change] | None:
        """Return what is given, once."""
        changes, self.next = self.next, []
        return changes

    def steps(self) -> Iterator[SpanStep]:
        """Yield what is given."""
        yield from self.spans


def key(number: int) -> bytes:
    """Return the key of a span."""
    return Random(number).randbytes(16)


def on_host(*numbers: int) -> list[Change]:
    """Return changes of spans that are now in host memory."""
    return [Change(key(number), True, False) for number in numbers]


def on_disk(*numbers: int) -> list[Change]:
    """Return changes of spans that are now only on disk."""
    return [Change(key(number), False, True) for number in numbers]


def gone(*numbers: int) -> list[Change]:
    """Return changes of spans that are gone."""
    return [Change(key(number), False, False) for number in numbers]


async def told(changes: list[Change] | None, rig: tuple[Publisher, Script, Tape]) -> list[Entry]:
    """Return the entries that tell of some changes."""
    publisher, source, tape = rig
    source.next = changes
    before = len(tape.entries)
    await publisher.publish()
    return tape.entries[before:]


@pytest.fixture
async def rig() -> tuple[Publisher, Script, Tape]:
    """Return a publisher that has sent its first entry, its source and its store."""
    tape, source = Tape(), Script()
    publisher = Publisher(tape, OWN, source, 1000)
    await publisher.publish()
    assert tape.entries == [Entry(OWN.life, 1)]
    return publisher, source, tape


Rig = tuple[Publisher, Script, Tape]


async def test_one_entry_tells_the_last_state_of_each_span(rig: Rig) -> None:
    """Changes of one interval are told together, each span where it is at the end."""
    (entry,) = await told([*on_host(1, 2), *on_disk(2, 3)], rig)
    assert (entry.seq, entry.added, entry.dropped) == (2, tags_of(key(1)), b"")
    assert entry.moved == tags_of([key(2), key(3)])


async def test_nothing_is_told_twice(rig: Rig) -> None:
    """A span that others know to be there is not told again, nor is a silence."""
    await told(on_host(1), rig)
    assert await told([], rig) == []
    assert await told([Change(key(1), True, True)], rig) == []
    (entry,) = await told(on_disk(1), rig)
    assert entry.moved == tags_of(key(1))
    assert await told(on_disk(1), rig) == []
    (entry,) = await told(on_host(1), rig)
    assert entry.added == tags_of(key(1))


async def test_that_a_span_is_gone_is_always_told(rig: Rig) -> None:
    """Others may know by a snapshot of a span of which they were never told."""
    (entry,) = await told([*on_host(1), *gone(1)], rig)
    assert entry.dropped == tags_of(key(1))
    (entry,) = await told(on_host(1), rig)
    assert entry.added == tags_of(key(1))


async def test_all_that_changes_during_a_snapshot_is_told(rig: Rig) -> None:
    """Who takes a snapshot may have missed a span of which all others were told before."""
    publisher, source, _ = rig
    await told(on_host(1), rig)
    source.spans = [SpanStep(key(1), key(2)), SpanStep(b"", b"")]
    parts = publisher.snapshot()
    assert next(parts) == (2, tags_of(key(1)), tags_of(key(2)), False)
    for _ in range(2):
        (entry,) = await told([*gone(1), *on_host(1)], rig)
        assert entry.added == tags_of(key(1))
    assert [part.is_last for part in parts] == [False, True]
    (entry,) = await told([*gone(1), *on_host(1)], rig)  # the interval in which it ended
    assert entry.added == tags_of(key(1))
    assert await told([*gone(1), *on_host(1)], rig) == []


async def test_entries_are_bounded(rig: Rig) -> None:
    """Many changes are told by several entries, with numbers that follow each other."""
    count = 2 * ENTRY_SPANS_MAX + 5
    entries = await told([*on_host(*range(count)), *gone(count)], rig)
    assert [entry.seq for entry in entries] == [2, 3, 4]
    assert [entry.spans for entry in entries] == [ENTRY_SPANS_MAX, ENTRY_SPANS_MAX, 6]
    assert b"".join(e.added for e in entries) == tags_of([key(n) for n in range(count)])


async def test_what_is_not_sent_is_sent_again(rig: Rig) -> None:
    """An entry that the store may not have is sent again as it is; others are made later."""
    publisher, _, tape = rig
    tape.fails = True
    for number in (1, 2):
        with pytest.raises(ClusterStoreError):
            await told(on_host(number), rig)
    assert (publisher.seq, publisher.sent_seq, publisher.pending_spans) == (2, 1, 1)
    tape.fails = False
    (entry,) = await told([], rig)
    assert (entry.seq, entry.added) == (2, tags_of(key(1)))
    (entry,) = await told([], rig)
    assert (entry.seq, entry.added) == (3, tags_of(key(2)))
    assert publisher.sent_seq == 3


async def test_too_much_to_keep_is_dropped_with_a_gap(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the store is away for too long, a number is skipped, so that readers notice."""
    monkeypatch.setattr(publishing, "PENDING_MAX", 3)
    publisher, _, tape = rig
    await told(on_host(1), rig)
    tape.fails = True
    for number in range(2, 12):
        with pytest.raises(ClusterStoreError):
            await told(on_host(number), rig)
    tape.fails = False
    seqs = [entry.seq for entry in await told([], rig)]
    assert publisher.gaps >= 2
    assert publisher.pending_spans <= 3
    assert seqs[0] == 3
    assert seqs[-1] > 4
    await told([], rig)
    (entry,) = await told(on_host(1), rig)
    assert entry.added == tags_of(key(1))  # it is not known any more what others know


async def test_changes_that_are_not_known_make_a_gap(rig: Rig) -> None:
    """A source that has lost changes makes one number be skipped."""
    (entry,) = await told(None, rig)
    assert entry == Entry(OWN.life, 3)


@pytest.mark.parametrize(
    ("nodes", "times"), [(1, 1.0), (NODES_AT_ONCE, 1.0), (10 * NODES_AT_ONCE, 10.0)]
)
def test_many_nodes_publish_less_often(nodes: int, times: float) -> None:
    """The interval grows with the nodes, so that the store's work grows no faster than they do."""
    source = SimulatedSpans(Random(0), 1)
    publisher = Publisher(Tape(), OWN, source, 1, lambda: nodes)
    assert publisher.interval_s() == pytest.approx(PUBLISH_S * times)


@given(st.lists(st.integers(0, 2 * ENTRY_SPANS_MAX), min_size=3, max_size=3))
def test_entries_have_all_that_is_told(counts: list[int]) -> None:
    """However much there is of each kind, it is in the entries, in order, and none is too large."""
    kinds = tuple(Random(n).randbytes(TAG_BYTES * count) for n, count in enumerate(counts))
    entries = entries_of(3, 10, (kinds[0], kinds[1], kinds[2]))
    assert [entry.seq for entry in entries] == list(range(10, 10 + len(entries)))
    assert max(entry.spans for entry in entries) <= ENTRY_SPANS_MAX
    assert len(entries) == max(1, -(-sum(counts) // ENTRY_SPANS_MAX))
    joined = [[e.added for e in entries], [e.moved for e in entries], [e.dropped for e in entries]]
    assert tuple(map(b"".join, joined)) == kinds
    assert [entry_from(encoded(entry)) for entry in entries] == entries


@given(st.binary(max_size=80))
def test_no_bytes_break_a_decoder(data: bytes) -> None:
    """Whatever is in the store is decoded, or refused by the same error."""
    for decode in (entry_from, beat_from):
        with suppress(MalformedError):
            decode(data)


def test_a_cut_tag_is_refused() -> None:
    """An entry whose tags are no multiple of 8 bytes is malformed."""
    with pytest.raises(MalformedError, match="cut"):
        entry_from(encoded(Entry(1, 1, b"123456789")))


def node(life: int) -> Beat:
    """Return the beat of a node."""
    return Beat(NodeRecord(life.to_bytes(16, "big"), life, "10.0.0.1:1"))


def test_numbers_are_used_again_once_scrubbed() -> None:
    """A node gets a number that no pair has; when all are in use, it has to wait for one."""
    hints = Hints(1 << 16, 1)
    members = Membership(hints, OWN, 1.0)
    lives = [node(life) for life in range(1000, 1000 + HOLDERS_MAX - 1)]
    members.saw(lives, 0.0)
    assert sorted(m.holder for m in members.members()) == list(range(1, HOLDERS_MAX))
    members.saw([*lives, node(1)], 0.0)
    assert members.member_of(1) is None
    last = members.member_of(1000)
    assert last is not None
    hints.note(last.holder, key(1))
    members.farewell(1000)
    members.saw([*lives[1:], node(1)], 0.0)
    assert members.member_of(1) is None
    hints.scrub(1 << 20)
    members.saw([*lives[1:], node(1)], 0.0)
    new = members.member_of(1)
    assert new is not None
    assert new.holder == last.holder
    assert members.node(new.holder) == node(1).node
    assert hints.note(new.holder, key(1)) == 1


def test_the_own_node_is_no_member() -> None:
    """A node does not follow itself."""
    members = Membership(Hints(64, 1), OWN, 1.0)
    members.saw([Beat(OWN)], 0.0)
    assert not len(members)


def test_a_node_is_away_only_while_the_registry_lacks_it() -> None:
    """A node that the registry has lacked twice, but never for long, is a member still."""
    members = Membership(Hints(64, 1), OWN, 10.0)
    for now_s, beats in enumerate([[node(1)], [], [node(1)], [], [node(1)], [], [], [], [], []]):
        members.saw(beats, float(now_s))
        assert len(members) == 1, now_s
    members.saw([], 10.0)
    assert not len(members)
