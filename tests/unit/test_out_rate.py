"""How many bytes a node grants and sends to others in a time."""

from __future__ import annotations

import asyncio
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv.cluster.grants import BUSY_MS, GrantLimits, Grants
from flexkv.cluster.wire import Busy, Grant
from flexkv.tiers.out_rate import AHEAD_S, OutRate
from flexkv.tiers.peer_times import reader_times
from tests.cluster_rigs import keys_of
from tests.unit.grants_rig import A, B, Rig, with_grants

SIZES = 1000, 300
RATE = 5000.0
"""Five blocks of group 0 a second."""
MANY = GrantLimits(1000)


class Clock:
    """A time that a test moves."""

    now_s = 100.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now_s


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 9000)), max_size=40))
def test_messages_have_turns_at_the_rate(messages: list[tuple[float, int]]) -> None:
    """In any interval, at most the rate and one message more begin; nothing waits without need."""
    clock = Clock()
    rate, begun = OutRate(RATE, SIZES, clock), list[tuple[float, int]]()
    free_s = 0.0
    for after_s, nbytes in messages:
        clock.now_s += after_s
        begins_s = clock.now_s + rate.turn_s(nbytes)
        assert begins_s == pytest.approx(max(clock.now_s, free_s))
        free_s = begins_s + nbytes / RATE
        begun.append((begins_s, nbytes))
    for first, last in combinations(range(len(begun)), 2):
        sent = sum(nbytes for _, nbytes in begun[first:last])
        assert sent <= RATE * (begun[last][0] - begun[first][0]) + 1e-3


def test_a_grant_has_what_can_be_sent_in_a_second() -> None:
    """What was granted before takes its time first; one large block may always be granted then."""
    clock = Clock()
    rate = OutRate(RATE, (*SIZES, 1 << 20), clock)
    assert [rate.room(group) for group in range(3)] == [5, 16, 1]
    rate.granted(0, 3)
    assert [rate.room(group) for group in range(3)] == [2, 6, 0]
    clock.now_s += 0.2
    assert rate.room(0) == 3
    rate.granted(2, 1)
    assert rate.room(1) == 0
    clock.now_s += (1 << 20) / RATE
    assert rate.room(1) > 0
    unbounded = OutRate(None, SIZES, clock)
    unbounded.granted(0, 1 << 30)
    assert (unbounded.room(0), unbounded.turn_s(1 << 40)) == (None, 0)


def test_what_is_granted_is_sent_before_a_reader_takes_the_answer_for_stalled() -> None:
    """With a short `io_deadline_s`, less is granted at once, so that no turn takes so long."""
    clock, stall_s = Clock(), reader_times(2.0).stall_s
    rate, waited_s = OutRate(50 * RATE, SIZES, clock, stall_s), list[float]()
    while blocks := rate.room(0) or 0:
        rate.granted(0, blocks)
        waited_s += [rate.turn_s(SIZES[0]) for _ in range(blocks)]
    assert 0.4 * stall_s < max(waited_s) < 0.6 * stall_s
    patient = OutRate(50 * RATE, SIZES, clock, reader_times(10.0).stall_s)
    assert patient.room(0) == 50 * RATE * AHEAD_S / SIZES[0]


def paced(rig: Rig, limits: GrantLimits = MANY) -> OutRate:
    """Bound what a rig grants in time, and return the rate."""
    rate = OutRate(RATE, SIZES, asyncio.get_running_loop().time)
    rig.grants = Grants(rig.owner, limits, rig.supervisor.spawn, pace=rate)
    return rate


def test_grants_are_cut_to_what_can_be_sent_soon() -> None:
    """A grant that is cut says so, the next want is put off, and the rest is granted later."""

    async def work(rig: Rig) -> None:
        paced(rig)
        keys = rig.stored(1, 12)
        rig.want(A, keys, 0, 12)
        rig.want(B, keys, 0, 12)
        first, second = rig.answers
        assert isinstance(first, Grant)
        assert (first.count, first.is_cut) == (5, True)
        assert isinstance(second, Busy)
        assert len(rig.owner.holds) == 5
        await asyncio.sleep(0.4 * AHEAD_S)
        rig.want(B, keys, 0, 2)
        assert rig.answers[-1] == Grant(3, 0, 2, is_cut=False)
        rig.want(B, keys, 2, 12)
        assert isinstance(rig.answers[-1], Busy)
        await asyncio.sleep(10 * AHEAD_S)
        rig.want(B, keys, 2, 12)
        assert rig.answers[-1] == Grant(5, 2, 5, is_cut=True)
        rig.grants.close()

    with_grants(work)


def test_leaves_count_by_their_own_size_and_positions_without_one_do_not() -> None:
    """Of a group whose blocks are smaller, more are granted; empty positions cost nothing."""

    async def work(rig: Rig) -> None:
        paced(rig)
        keys = rig.stored(1, 60)
        for position in range(0, 60, 2):
            del rig.owner.host[keys[(position + 1) * 16 : (position + 2) * 16]]
        rig.want(A, keys, 0, 60, 1)
        (told,) = rig.answers
        assert isinstance(told, Grant)
        assert (told.count // 2, told.is_cut) == (16, True)
        rig.grants.close()

    with_grants(work)


def test_the_disk_is_not_asked_for_what_cannot_be_sent() -> None:
    """A want waits for no more blocks from the disk than can be sent soon, or it is put off."""

    async def work(rig: Rig) -> None:
        paced(rig, GrantLimits(1000, prefetches=4, prefetches_per_peer=2))
        keys = keys_of(1, 12)
        rig.owner.put_on_disk(keys)
        rig.want(A, keys, 0, 12)
        rig.want(B, keys, 6, 7)
        await asyncio.sleep(2 * rig.owner.prefetch_s)
        assert rig.answers == [Grant(1, 0, 5, is_cut=True), Busy(2, BUSY_MS)]
        assert len(rig.owner.host) == 6
        rig.want(B, keys, 6, 12)
        assert isinstance(rig.answers[-1], Busy)
        assert not rig.owner.prefetching
        rig.grants.close()

    with_grants(work)
