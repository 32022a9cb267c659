"""The hub of the index's changes: several readers, each with its own limit, and no cost without."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flexkv.common.terms import BlockIds, Positions, Tier
from flexkv.index.change_hub import ChangeHub
from flexkv.index.residency import Residency
from flexkv.index.span_changes import SpanChange, SpanChanges
from flexkv.server.change_feed import ChangeFeed
from flexkv.server.wire import Changed

BLOCKS = 8
KEYS = np.random.default_rng(1).bytes(16 * (1 + BLOCKS))


def key(position: int) -> bytes:
    """Return the key of the prompt's block at a position."""
    return KEYS[16 * (position + 1) :][:16]


def table() -> Residency:
    """Return an empty index of two tiers."""
    return Residency({Tier.HOST: 64, Tier.DISK: 64})


def put(index: Residency, first: int, last: int, tier: Tier = Tier.HOST) -> BlockIds:
    """Store blocks of the prompt in a tier, and return their places."""
    ids = index.reserve(tier, KEYS, Positions(first, last - first))
    index.commit(tier, ids)
    return ids


def test_a_reader_that_falls_behind_learns_it_once_and_the_others_do_not() -> None:
    """Beyond its limit a reader gets None once; a reader with a higher limit gets everything."""
    index = table()
    hub = ChangeHub(index)
    few, many = hub.reader(2), hub.reader(8)
    put(index, 0, 2)
    assert [len(reader.take() or ()) for reader in (few, many)] == [2, 2]
    put(index, 2, 5)
    assert few.take() is None
    put(index, 5, 6)
    assert [change.key for change in few.take() or ()] == [key(5)]
    assert [change.key for change in many.take() or ()] == [key(n) for n in (2, 3, 4, 5)]
    assert few.take() == many.take() == []


def test_more_changes_than_any_limit_are_lost_for_all_readers() -> None:
    """What exceeds the highest limit at once is lost for every reader, once."""
    index = table()
    hub = ChangeHub(index)
    readers = [hub.reader(2), hub.reader(4)]
    put(index, 0, 5)
    assert [reader.take() for reader in readers] == [None, None]
    put(index, 5, 7)
    assert [len(reader.take() or ()) for reader in readers] == [2, 2]


def test_readers_come_and_go_without_a_loss() -> None:
    """A new reader gets only what changes from then on; none loses anything as others close."""
    index = table()
    hub = ChangeHub(index)
    first = hub.reader(4)
    put(index, 0, 1)
    second = hub.reader(8)
    put(index, 1, 2)
    third = hub.reader(2)
    assert [change.key for change in second.take() or ()] == [key(1)]
    put(index, 2, 3)
    second.close()
    second.close()
    put(index, 3, 4)
    assert [change.key for change in first.take() or ()] == [key(n) for n in range(4)]
    assert [change.key for change in third.take() or ()] == [key(2), key(3)]
    assert second.take() == []


def test_nothing_is_recorded_without_readers() -> None:
    """The table records no change before the first reader, and none after the last one."""
    index = table()
    hub = ChangeHub(index)
    put(index, 0, 1)
    assert hub.recorder.take() is not None
    reader = hub.reader(4)
    assert reader.take() == []
    put(index, 1, 2)
    reader.close()
    put(index, 2, 3)
    records = hub.recorder.take()
    assert records is not None
    assert not len(records)


def test_unread_changes_are_let_go_beyond_the_limit() -> None:
    """A reader that never reads holds no more changes than its limit, whatever others read."""
    index = table()
    hub = ChangeHub(index)
    idle, busy = hub.reader(3), hub.reader(3)
    for n in range(BLOCKS):
        put(index, n, n + 1)
        busy.take()
        assert sum(map(len, idle._unread)) == (n + 1 if n < 3 else 0)
    assert idle.take() is None


class FakeLink:
    """A link that keeps what is sent."""

    unsent_bytes = 0

    def __init__(self) -> None:
        self.sent: list[Changed] = []

    def send(self, message: Changed) -> None:
        """Keep a message."""
        self.sent.append(message)


def test_the_servers_clients_and_other_readers_all_get_the_changes() -> None:
    """The change feed is one reader of several; without clients it is none."""
    index = table()
    hub = ChangeHub(index)
    feed, other = ChangeFeed(index, hub), hub.reader(1)
    link: Any = FakeLink()
    feed.add(link)
    put(index, 0, 2)
    feed.tell()
    assert link.sent == [Changed(tuple((key(n), "host", True, 0) for n in range(2)))]
    assert other.take() is None
    feed.discard(link)
    other.close()
    put(index, 2, 3)
    feed.tell()
    assert len(link.sent) == 1
    assert hub.recorder.take() is not None
    feed.add(link)
    feed.tell()
    assert len(link.sent) == 1
    put(index, 3, 4)
    feed.tell()
    assert link.sent[1:] == [Changed(((key(3), "host", True, 0),))]


# -- spans ---------------------------------------------------------------------------------------


def test_a_span_is_told_once_as_it_is_now() -> None:
    """However a span moved between two takes, it is told where it is now, if that has changed."""
    index = table()
    spans = SpanChanges(ChangeHub(index), 4, 1000)
    host = put(index, 0, BLOCKS)
    assert spans.take() == [SpanChange(key(3), True, False), SpanChange(key(7), True, False)]
    put(index, 0, BLOCKS, Tier.DISK)
    index.forget(Tier.HOST, host)
    put(index, 0, 4)
    assert spans.take() == [SpanChange(key(3), True, True), SpanChange(key(7), False, True)]
    put(index, 4, BLOCKS)
    index.evict(Tier.HOST, BLOCKS)
    assert spans.take() == [SpanChange(key(3), False, True)]
    index.clear()
    put(index, 0, 7)
    assert spans.take() == [SpanChange(key(7), False, False), SpanChange(key(3), True, False)]
    index.clear()
    assert spans.take() == [SpanChange(key(3), False, False)]
    put(index, 0, BLOCKS)
    index.clear()
    assert spans.take() == []


def test_a_walk_tells_what_is_there_and_the_takes_beside_it_leave_nothing_out() -> None:
    """A span that comes and goes is told of while a walk is under way, and not any more later."""
    index = table()
    spans = SpanChanges(ChangeHub(index), 4, 1000)
    put(index, 0, 4)
    spans.take()

    def come_and_go() -> list[SpanChange] | None:
        index.forget(Tier.HOST, put(index, 4, 8))
        return spans.take()

    gone = [SpanChange(key(7), False, False)]
    walk = spans.walk(2)
    assert come_and_go() == [], "it has not begun"
    steps = [next(walk)]
    assert [come_and_go(), come_and_go()] == [gone, gone]
    steps += walk
    assert [come_and_go(), come_and_go()] == [gone, []]
    assert [step.keys.tobytes() for step in steps if len(step.keys)] == [key(3)]
    assert [[*step.on_host, *step.on_disk] for step in steps if len(step.keys)] == [[True, False]]
    walk = spans.walk(2)
    next(walk)
    walk.close()
    assert [come_and_go(), come_and_go()] == [gone, []], "it was abandoned"


def test_after_a_loss_changes_are_told_again() -> None:
    """Changes beyond the limit are lost, which is told once."""
    index = table()
    spans = SpanChanges(ChangeHub(index), 4, 5)
    put(index, 0, BLOCKS)
    assert spans.take() is None
    assert spans.take() == []
    index.evict(Tier.HOST, 1)
    assert spans.take() == [SpanChange(key(7), False, False)]
    spans.close()
    index.clear()
    assert spans.take() == []


@pytest.mark.parametrize(
    ("begin", "count", "size"), [(-1, 1, 1), (0, 0, 1), (0, 1, 0), (0, 1, 257), (0, 1 << 21, 1)]
)
def test_arguments_of_a_walk_are_bounded(begin: int, count: int, size: int) -> None:
    """The table refuses a walk over impossible nodes or spans."""
    with pytest.raises(ValueError, match="is outside"):
        table().recorder.ends(begin, count, size)


def test_a_tier_that_peers_cannot_read_is_not_told_of() -> None:
    """Only host memory and the SSD count; what is nowhere else is nowhere."""
    index = Residency({Tier.HOST: 64, Tier.REMOTE: 64})
    spans = SpanChanges(ChangeHub(index), 4, 1000)
    put(index, 0, 4, Tier.REMOTE)
    assert spans.take() == []
    assert [len(step.keys) for step in spans.walk()] == [0]
    spans.take()
    host = put(index, 0, 4)
    assert spans.take() == [SpanChange(key(3), True, False)]
    assert [step.on_disk.tolist() for step in spans.walk()] == [[False]]
    index.forget(Tier.HOST, host)
    assert spans.take() == [SpanChange(key(3), False, False)]
