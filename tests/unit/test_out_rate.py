"""How many bytes a node grants and sends to others in a time."""

from __future__ import annotations

import asyncio
from itertools import combinations
from math import inf
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv.cluster.grants import BUSY_MS, READS_EACH, GrantLimits, Grants, ReadStatus
from flexkv.cluster.wire import Busy, Grant
from flexkv.testing.virtual_time import run_virtual
from flexkv.tiers.out_rate import AHEAD_S, OutRate
from flexkv.tiers.peer_times import reader_times
from tests.cluster_rigs import keys_of
from tests.unit.grants_rig import A, B, Rig, lent, with_grants

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


class Message(NamedTuple):
    """A message that a reader asks for.

    Attributes:
        after_s: when it is asked for, after the one before.
        nbytes: of it.
        sent_bytes: how many are sent; the rest is given back, and all of it if its reader has gone.
        ends_s: how long after its begin it ends early.
        leaves_s: how long after it was asked for its reader gives up waiting.
    """

    after_s: float
    nbytes: int
    sent_bytes: int
    ends_s: float
    leaves_s: float


def messages() -> st.SearchStrategy[Message]:
    """Return messages: whole ones, some that end early, and some of readers that do not wait."""
    nbytes = st.integers(1, 9000)
    whole, leaving = st.just(9000), st.one_of(st.just(1e9), st.floats(0.001, 3))
    built = st.builds(
        Message,
        st.floats(0, 1),
        nbytes,
        st.one_of(whole, st.integers(0, 9000)),
        st.floats(0, 2),
        leaving,
    )
    return built.map(lambda each: each._replace(sent_bytes=min(each.sent_bytes, each.nbytes)))


def begun(asked: list[Message]) -> list[tuple[float, float, Message]]:
    """Return when each message was asked for and has begun, of those that have."""
    told = list[tuple[float, float, Message]]()

    async def read(rate: OutRate, at_s: float, message: Message) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(at_s)
        try:
            async with asyncio.timeout(message.leaves_s):
                begun_s = await rate.turn(message.nbytes)
        except TimeoutError:
            return
        told.append((at_s, begun_s, message))
        assert begun_s == loop.time()
        if message.sent_bytes < message.nbytes:
            await asyncio.sleep(message.ends_s)
            rate.unsent(begun_s, message.sent_bytes)

    async def main() -> None:
        rate, at_s = OutRate(RATE, SIZES, asyncio.get_running_loop().time), 0.0
        async with asyncio.TaskGroup() as tasks:
            for message in asked:
                at_s += message.after_s
                tasks.create_task(read(rate, at_s, message))

    run_virtual(main())
    return told


@given(st.lists(messages(), max_size=20))
def test_messages_have_turns_at_the_rate(asked: list[Message]) -> None:
    """In any interval, at most the rate and one message more begin, whatever readers do.

    They begin in the order in which they were asked for, and none waits without need: not for a
    reader that has gone, and of a message that ended early only for what was sent of it.
    """
    told, free_s = begun(asked), 0.0
    assert [at_s for at_s, _, _ in told] == sorted(at_s for at_s, _, _ in told)
    for at_s, begun_s, (_, nbytes, sent_bytes, ends_s, _) in told:
        assert begun_s == pytest.approx(max(at_s, free_s))
        ended_s = inf if sent_bytes == nbytes else begun_s + ends_s
        free_s = min(begun_s + nbytes / RATE, max(ended_s, begun_s + sent_bytes / RATE))
    for first, last in combinations(range(len(told)), 2):
        sent = sum(message.sent_bytes for _, _, message in told[first:last])
        assert sent <= RATE * (told[last][1] - told[first][1]) + 1e-3
    stay = sum(message.leaves_s > 1e6 for message in asked)
    assert len(told) >= stay


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
    assert unbounded.room(0) is None


def test_without_a_rate_nothing_waits() -> None:
    """Any number of bytes may be sent at once."""

    async def main() -> None:
        rate, loop = (
            OutRate(None, SIZES, asyncio.get_running_loop().time),
            asyncio.get_running_loop(),
        )
        assert [await rate.turn(1 << 40) for _ in range(3)] == [loop.time()] * 3
        rate.unsent(loop.time(), 0)

    run_virtual(main())


def test_what_is_granted_is_sent_before_a_reader_takes_the_answer_for_stalled() -> None:
    """With a short `io_deadline_s`, less is granted at once, so that no turn takes so long."""
    stall_s, waited_s = reader_times(2.0).stall_s, list[float]()

    async def main() -> None:
        time = asyncio.get_running_loop().time
        rate = OutRate(50 * RATE, SIZES, time, stall_s)
        async with asyncio.TaskGroup() as tasks:
            turns = list[asyncio.Task[float]]()
            while blocks := rate.room(0) or 0:
                rate.granted(0, blocks)
                turns += [tasks.create_task(rate.turn(SIZES[0])) for _ in range(blocks)]
        waited_s.extend(turn.result() for turn in turns)

    run_virtual(main())
    assert 0.4 * stall_s < max(waited_s) < 0.6 * stall_s
    patient = OutRate(50 * RATE, SIZES, Clock(), reader_times(10.0).stall_s)
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


def test_what_is_read_again_takes_its_time_from_later_grants() -> None:
    """A reader that reads its blocks twice has no more sent to it than its grants allow for."""

    async def work(rig: Rig) -> None:
        rate, keys = paced(rig), rig.stored(1, 4)
        number, rooms = rig.want(A, keys, 0, 4), [rate.room(1)]
        await asyncio.sleep(4 * SIZES[0] / RATE)
        for count in (3, 2, 3):
            lent(rig.grants.blocks(A, number, 0, count)).ended()
            rooms.append(rate.room(1))
        assert rooms == [3, 16, 13, 3], "what was granted is what is read once"
        assert READS_EACH * 4 == 8
        assert rig.grants.blocks(A, number, 0, 1) is ReadStatus.TOO_OFTEN
        assert rate.room(1) == 3
        rig.grants.close()

    with_grants(work)
