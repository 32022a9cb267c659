"""A peer that is away or silent is noticed within a bounded time, and tried again by itself."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from random import Random

import pytest

from flexkv.cluster.breaker import PAUSE_MAX_S, PAUSE_MIN_S, STEADY_S, PeerBreaker
from flexkv.cluster.link import PING_S, SILENCE_S
from flexkv.cluster.wire import (
    WITHIN_MS_MAX,
    Busy,
    Grant,
    Message,
    PeerId,
    Ping,
    Refused,
    SnapshotPart,
    ToOwner,
    Want,
)
from flexkv.common.errors import ClosedError, PeerError
from tests.cluster_rigs import (
    tasks_of,
    turns,
)
from tests.unit.scripted_owner import KEYS, TIMES, Reading, answered, pongs, reading


def test_a_peer_is_connected_once_on_demand() -> None:
    """Nothing is connected before the first request, and all requests share one link."""

    async def work(rig: Reading) -> None:
        assert rig.owner.dialed_s == []
        assert rig.peers.is_up(1)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(rig.want()) for _ in range(5)]
        assert len({task.result().number for task in tasks}) == 5
        assert len(rig.owner.dialed_s) == 1
        assert len(rig.peers) == 1
        assert rig.changes == []

    reading(work)


def test_a_refused_connection_takes_the_peer_down_at_once() -> None:
    """After one refusal, requests fail without a try; trials go on until one succeeds."""

    async def work(rig: Reading) -> None:
        rig.owner.is_away = True
        with pytest.raises(PeerError, match="refused"):
            await rig.want()
        assert not rig.peers.is_up(1)
        for ask in (rig.want, lambda: rig.peers.data_socket(1)):
            with pytest.raises(PeerError, match="refused"):
                await ask()
        assert len(rig.owner.dialed_s) == 1
        assert rig.changes == [(0.0, False)]
        await asyncio.sleep(60)
        rig.owner.is_away = False
        await asyncio.sleep(1.5 * PAUSE_MAX_S)
        assert rig.peers.is_up(1)
        assert [is_up for _, is_up in rig.changes] == [False, True]
        assert (await rig.want()).count == 4
        rig.owner.is_away = True
        rig.owner.links[0].abort()
        await asyncio.sleep(60)
        assert [is_up for _, is_up in rig.changes] == [False, True, False]

    reading(work)


def trials(seed: int) -> list[float]:
    """Return when a peer that is away is tried."""
    times: list[float] = []

    async def work(rig: Reading) -> None:
        rig.owner.is_away = True
        with pytest.raises(PeerError):
            await rig.want()
        await asyncio.sleep(100)
        times.extend(rig.owner.dialed_s)

    reading(work, seed)
    return times


def test_pauses_grow_and_differ_between_nodes() -> None:
    """Each pause is about twice the one before, up to a bound, and the same for the same seed."""
    times = trials(0)
    pauses = [after - before for before, after in pairwise(times)]
    for number, pause_s in enumerate(pauses):
        wanted_s = min(PAUSE_MAX_S, PAUSE_MIN_S * 2**number)
        assert 0.5 * wanted_s <= pause_s <= 1.5 * wanted_s
    assert len(pauses) > 10
    assert trials(0) == times
    assert trials(1) != times


def test_a_link_that_ends_fails_what_waits_at_once() -> None:
    """The end of a link ends its requests with an error, in no time; then it is made again."""

    async def work(rig: Reading) -> None:
        rig.owner.answer = lambda message: []
        tasks = [asyncio.ensure_future(rig.want()) for _ in range(3)]
        await turns()
        rig.owner.links[0].abort()
        for task in tasks:
            with pytest.raises(PeerError, match="closed the connection"):
                await task
        assert rig.now_s == 0.0
        assert not rig.peers.is_up(1)
        rig.owner.answer = answered
        await asyncio.sleep(1.0)
        assert rig.peers.is_up(1)
        rig.owner.heard.clear()
        await asyncio.sleep(5 * SILENCE_S)
        pings = [message for _, message in rig.owner.heard if isinstance(message, Ping)]
        assert len(pings) == pytest.approx(5 * SILENCE_S / PING_S, abs=1)
        assert (await rig.want()).count == 4
        assert len(rig.owner.dialed_s) == 2

    reading(work)


def test_a_link_that_keeps_breaking_is_tried_less_often() -> None:
    """A link that does not live long does not make up for failures; a steady one does."""

    async def work(rig: Reading) -> None:
        await rig.want()
        for _ in range(6):
            rig.owner.links[-1].abort()
            await asyncio.sleep(1.5 * PAUSE_MAX_S)
            if rig.peers.is_up(1):
                rig.owner.links[-1].abort()
            await asyncio.sleep(0.01)
        assert len(rig.owner.dialed_s) < 20

    reading(work)
    breaker, now_s = PeerBreaker(Random(0)), 0.0
    for _ in range(8):
        breaker.connected(now_s)
        pause_s = breaker.failed(now_s + STEADY_S / 2)
        assert not breaker.is_up
        now_s += STEADY_S
    assert pause_s >= 0.5 * PAUSE_MAX_S
    breaker.connected(now_s)
    assert breaker.failed(now_s + STEADY_S) <= 1.5 * PAUSE_MIN_S


def test_a_peer_that_is_away_for_days_is_still_tried() -> None:
    """However many trials fail in a row, the pauses between them stay bounded."""
    breaker = PeerBreaker(Random(0))
    pauses_s = [breaker.failed(number) for number in range(20_000)]
    assert max(pauses_s) <= 1.5 * PAUSE_MAX_S
    assert min(pauses_s[10:]) >= 0.5 * PAUSE_MAX_S


def test_a_silent_peer_is_noticed_in_bounded_time() -> None:
    """A link on which nothing arrives any more is closed, and what waits for it fails."""

    async def work(rig: Reading) -> None:
        grant = await rig.want()
        await asyncio.sleep(30)
        begin_s = rig.now_s
        rig.owner.answer = lambda message: []
        with pytest.raises(PeerError, match="nothing was heard"):
            await rig.want()
        assert SILENCE_S - PING_S <= rig.now_s - begin_s <= SILENCE_S + PING_S
        assert [is_up for _, is_up in rig.changes] == [False]
        rig.peers.release(1, grant.number)
        pings = [at_s for at_s, message in rig.owner.heard if isinstance(message, Ping)]
        assert pings[:5] == pytest.approx([1.0, 2.0, 3.0, 4.0, 5.0])

    reading(work)


def test_questions_that_waited_for_a_slow_connection_take_no_peer_down() -> None:
    """If connecting takes most of the time for an answer, a missing answer does not count."""

    async def work(rig: Reading) -> None:
        dial = rig.owner.dial

        async def slow(address: str) -> socket.socket:
            await asyncio.sleep(0.9 * TIMES.connect_s)
            return await dial(address)

        rig.peers._shared = rig.peers._shared._replace(dial=slow)
        rig.owner.answer = pongs
        asking = [asyncio.ensure_future(rig.want()) for _ in range(5)]
        for each in asking:
            with pytest.raises(PeerError, match="no answer in 5 s"):
                await each
        await turns()
        assert rig.peers.is_up(1)

    reading(work)


def test_a_peer_that_accepts_and_says_nothing_is_given_up() -> None:
    """A handshake without an answer ends in bounded time, for links and for data connections."""

    async def work(rig: Reading) -> None:
        rig.owner.is_silent = True
        for ask, limit_s in (
            (lambda: rig.peers.data_socket(1), TIMES.data_s),
            (rig.want, TIMES.connect_s),
        ):
            begin_s = rig.now_s
            with pytest.raises(PeerError, match="no answer in time"):
                await ask()
            assert rig.now_s - begin_s == pytest.approx(limit_s)

    reading(work)


def test_requests_without_an_answer_fail_in_time_and_take_the_peer_down() -> None:
    """A peer that is alive and does not answer is down after three requests in a row."""

    async def work(rig: Reading) -> None:
        await rig.want()
        rig.owner.answer = pongs
        for _ in range(2):
            begin_s = rig.now_s
            with pytest.raises(PeerError, match="no answer in 5 s"):
                await rig.want()
            assert rig.now_s - begin_s == pytest.approx(TIMES.answer_s)
        assert rig.peers.is_up(1)
        rig.owner.answer = answered
        await rig.want()
        rig.owner.answer = pongs
        for _ in range(3):
            assert rig.peers.is_up(1)
            with pytest.raises(PeerError, match="no answer in 5 s"):
                await rig.want()
        await turns()
        assert not rig.peers.is_up(1)
        with pytest.raises(PeerError, match="does not answer"):
            await rig.want()
        _, *failed, answered_one, fourth, fifth, last = rig.owner.wanted()
        given_up = [*failed, fourth, fifth]
        # The last one ends with the link, whether or not its release still arrives.
        assert rig.owner.released() in (given_up, [*given_up, last])
        assert answered_one not in rig.owner.released()

    reading(work)


def test_a_want_says_how_long_its_reader_waits() -> None:
    """A Want names the time left until its reader gives up, and no more than a message may name."""

    async def work(rig: Reading) -> None:
        dial = rig.owner.dial

        async def slowly(address: str) -> socket.socket:
            await asyncio.sleep(1.5)
            return await dial(address)

        shared = rig.peers._shared
        rig.peers._shared = shared._replace(dial=slowly)
        await rig.want()
        times = shared.times._replace(answer_s=1000.0)
        rig.peers._shared = shared._replace(times=times)
        rig.peers.left(rig.owner.node)
        await rig.want()
        wants = [message for _, message in rig.owner.heard if isinstance(message, Want)]
        assert [want.within_ms for want in wants] == [3500, WITHIN_MS_MAX]

    reading(work)


@pytest.mark.parametrize("is_late", [False, True])
def test_a_cancelled_want_is_released(is_late: bool) -> None:
    """A Want whose caller is cancelled is released, even if its Grant has just arrived."""

    async def work(rig: Reading) -> None:
        await rig.want()
        rig.owner.answer = answered if is_late else pongs
        task = asyncio.ensure_future(rig.want())
        while len(rig.owner.wanted()) < 2:
            await turns(1)
        if is_late:
            wants = rig.peers._peers[PeerId(rig.owner.node.id, rig.owner.node.life)]._wants
            assert wants is not None
            while wants._asked:
                await turns(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await turns()
        assert rig.owner.released() == rig.owner.wanted()[1:]

    reading(work)


def test_an_answer_that_comes_too_late_is_dropped() -> None:
    """A Grant for a Want that was given up is not kept: the owner has been told already."""

    async def work(rig: Reading) -> None:
        rig.owner.answer = pongs
        with pytest.raises(PeerError):
            await rig.want()
        number = rig.owner.wanted()[0]
        rig.owner.links[0].send(Grant(number, 0, 4))
        rig.owner.links[0].send(Busy(number, 10))
        await turns()
        assert rig.peers.is_up(1)
        rig.peers.release(1, number)
        await turns()
        assert rig.owner.released() == [number]

    reading(work)


def test_grants_are_released_once() -> None:
    """A Release is sent for what was granted, once; one of nothing is not sent."""

    async def work(rig: Reading) -> None:
        grant = await rig.want()
        for number in (grant.number, grant.number, 99):
            rig.peers.release(1, number)
        rig.peers.release(2, grant.number)
        rig.owner.answer = lambda message: [Grant(message.number, 0, 0)]
        gone = await rig.want()
        rig.peers.release(1, gone.number)
        await turns()
        assert rig.owner.released() == [grant.number]

    reading(work)


def test_a_busy_peer_is_left_alone_for_as_long_as_it_says() -> None:
    """A Busy is an error that says so, and until its time is over the peer is not asked again."""

    async def work(rig: Reading) -> None:
        rig.owner.answer = lambda message: [Busy(message.number, 500)]
        for _ in range(3):
            with pytest.raises(PeerError, match="busy") as raised:
                await rig.want()
            assert raised.value.is_busy
            assert not raised.value.blames_tier
        assert len(rig.owner.wanted()) == 1
        assert rig.peers.is_up(1)
        rig.owner.answer = answered
        await asyncio.sleep(0.6)
        assert (await rig.want()).count == 4

    reading(work)


WRONG_ANSWERS: dict[str, Callable[[ToOwner], Message]] = {
    "too many": lambda message: Grant(message.number, 2, 3),
    "other blocks": lambda message: Grant(message.number, 1, 2),
    "a snapshot": lambda message: SnapshotPart(message.number, 1, b"", b"", True),
}


@pytest.mark.parametrize("answer", WRONG_ANSWERS.values(), ids=WRONG_ANSWERS)
def test_a_wrong_answer_ends_the_link(answer: Callable[[ToOwner], Message]) -> None:
    """An answer that does not fit its question is never believed."""

    async def work(rig: Reading) -> None:
        rig.owner.answer = lambda message: [answer(message)]
        with pytest.raises(PeerError, match="that answers nothing"):
            await rig.peers.want(1, KEYS, 2, 4)
        assert not rig.peers.is_up(1)

    reading(work)


def test_a_refusal_of_the_link_is_named() -> None:
    """An owner that refuses the connection after the introductions says why."""

    async def work(rig: Reading) -> None:
        rig.owner.answer = lambda message: [Refused(0, "pool", "x", "is y on this node")]
        with pytest.raises(PeerError, match="refuses pool=x: is y on this node"):
            await rig.want()

    reading(work)


def test_a_link_that_nobody_uses_is_closed() -> None:
    """After a minute without use the link ends; the next request makes a new one."""

    async def work(rig: Reading) -> None:
        grant = await rig.want()
        await asyncio.sleep(3 * TIMES.idle_s)
        assert len(rig.owner.dialed_s) == 1
        rig.peers.release(1, grant.number)
        await asyncio.sleep(TIMES.idle_s - 2)
        assert tasks_of(rig.node.supervisor) == 1
        await asyncio.sleep(5)
        assert tasks_of(rig.node.supervisor) == 0
        assert rig.peers.is_up(1)
        assert rig.changes == []
        await rig.want()
        assert len(rig.owner.dialed_s) == 2

    reading(work)


def test_a_request_while_an_unused_link_is_closed_makes_a_new_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No request fails because the link was about to be closed."""

    async def work(rig: Reading) -> None:
        rig.peers.release(1, (await rig.want()).number)
        peer = rig.peers._peers[PeerId(rig.owner.node.id, rig.owner.node.life)]
        close, tasks = peer._close, []

        def closing(why: str) -> None:
            close(why)
            tasks.append(asyncio.ensure_future(rig.want()))

        monkeypatch.setattr(peer, "_close", closing)
        await asyncio.sleep(TIMES.idle_s + 5)
        assert [(await task).count for task in tasks] == [4]
        assert len(rig.owner.dialed_s) == 2
        assert rig.changes == []

    reading(work)


def test_a_node_that_left_fails_what_waits_at_once() -> None:
    """When a node has left the cluster, requests end, its link ends, and nothing is tried again."""

    async def work(rig: Reading) -> None:
        rig.owner.answer = pongs
        task = asyncio.ensure_future(rig.want())
        await turns()
        rig.peers.left(rig.owner.node)
        with pytest.raises(PeerError, match="left"):
            await task
        await turns()
        assert tasks_of(rig.node.supervisor) == 0
        assert len(rig.peers) == 0
        rig.peers.left(rig.owner.node)
        late = rig.peers.parts(rig.owner.node)
        rig.peers.left(rig.owner.node)
        with pytest.raises(PeerError, match="left"):
            await anext(late)
        assert tasks_of(rig.node.supervisor) == 0
        with pytest.raises(PeerError, match="not in the cluster any more"):
            await rig.peers.want(2, KEYS, 0, 4)
        assert not rig.peers.is_up(2)

    reading(work)


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 10])
def test_closing_ends_what_is_under_way(steps: int) -> None:
    """Closing leaves no task and no socket, in whatever step a connection is made."""

    async def work(rig: Reading) -> None:
        task = asyncio.ensure_future(rig.want())
        data = asyncio.ensure_future(rig.peers.data_socket(1))
        await turns(steps)
        data.cancel()
        await rig.peers.close()
        with pytest.raises((PeerError, ClosedError)):
            await task
        with suppress(asyncio.CancelledError):
            (await data).close()  # it was connected already
        with pytest.raises(ClosedError):
            await rig.want()
        assert not rig.peers.is_up(1)

    reading(work)


def test_a_snapshot_without_an_answer_fails_in_time() -> None:
    """Who waits for a part of a snapshot waits for a bounded time."""

    async def work(rig: Reading) -> None:
        rig.owner.answer = pongs
        with pytest.raises(PeerError, match="no answer in 4 s"):
            async for _ in rig.peers.parts(rig.owner.node):
                pass
        assert rig.now_s == pytest.approx(TIMES.part_s)
        await turns()
        assert len(rig.owner.released()) == 1

    reading(work)
