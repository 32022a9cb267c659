"""Which peers are read from: those that fail are left out, for longer and longer, and tried."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from flexkv.actors.health import BACKOFF_MIN_S
from flexkv.cluster.membership import Membership
from flexkv.cluster.records import NodeRecord
from flexkv.cluster.wire import Busy, Message, ToOwner, Want
from flexkv.common.errors import PeerError
from flexkv.index.hints import Hints
from flexkv.io.peer.port import Wish
from flexkv.testing.virtual_time import run_virtual
from flexkv.tiers.peer_health import PAUSE_MAX_S, HolderHealth
from flexkv.tiers.peer_reader import PeerReader
from flexkv.tiers.peer_times import reader_times
from tests.unit.scripted_owner import KEYS, Reading, pongs, reading

HOLDER, OTHER = 1, 2


class Own:
    """The health of holders, and when each was left out or used again.

    Attributes:
        changes: the time, and whether the holder may be used from then on.
    """

    def __init__(self) -> None:
        self.changes: list[tuple[float, bool]] = []
        self.health = HolderHealth(self._changed)

    def _changed(self, holder: int) -> None:
        assert holder == HOLDER
        change = asyncio.get_running_loop().time(), self.health.is_usable(HOLDER)
        if not self.changes or self.changes[-1][1] != change[1]:
            self.changes.append(change)


def with_health(work: Callable[[Own], Coroutine[Any, Any, None]]) -> None:
    """Run a test on a virtual clock; afterwards no timer may be left."""

    async def main() -> None:
        own = Own()
        await work(own)
        own.health.close()
        own.health.failed(HOLDER)
        timers = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]
        assert all(timer.cancelled() for timer in timers)

    run_virtual(main())


def test_pauses_grow_while_trials_fail() -> None:
    """One failure leaves a holder out for a second; each failed trial doubles that, up to 30 s."""

    async def work(own: Own) -> None:
        for request in range(8):
            if request:
                own.health.begin(HOLDER, request)
            own.health.failed(HOLDER)
            own.health.failed(HOLDER)  # the request had several reads under way
            await asyncio.sleep(PAUSE_MAX_S)
        since = [at_s for at_s, is_usable in own.changes if not is_usable]
        until = [at_s for at_s, is_usable in own.changes if is_usable]
        pauses = [end_s - begin_s for begin_s, end_s in zip(since, until, strict=True)]
        assert pauses[0] == pytest.approx(BACKOFF_MIN_S)
        for before, after in pairwise(pauses):
            assert after == pytest.approx(min(2 * before, PAUSE_MAX_S))
        assert pauses[-1] == pytest.approx(PAUSE_MAX_S)
        assert own.health.is_usable(OTHER)

    with_health(work)


def test_a_success_makes_the_next_pause_short_again() -> None:
    """A holder whose blocks arrive is used by all at once, and its failures are forgotten."""

    async def work(own: Own) -> None:
        for request in range(4):
            if request:
                own.health.begin(HOLDER, request)
            own.health.failed(HOLDER)
            await asyncio.sleep(PAUSE_MAX_S)
        own.health.begin(HOLDER, 9)
        own.health.arrived(HOLDER)
        assert own.changes[-1][1]
        for request in (10, 11):
            own.health.begin(HOLDER, request)
        begin_s = asyncio.get_running_loop().time()
        own.health.failed(HOLDER)
        await asyncio.sleep(PAUSE_MAX_S)
        assert own.changes[-1] == (pytest.approx(begin_s + BACKOFF_MIN_S), True)

    with_health(work)


def test_one_request_at_a_time_tries_a_holder() -> None:
    """All reads of the request that is the trial go on; others fail at once, and do not count."""

    async def work(own: Own) -> None:
        own.health.begin(HOLDER, 1)
        own.health.failed(HOLDER)
        with pytest.raises(PeerError, match="failed a moment ago"):
            own.health.begin(HOLDER, 1)
        own.health.begin(OTHER, 2)
        await asyncio.sleep(BACKOFF_MIN_S)
        assert own.health.is_usable(HOLDER)
        own.health.begin(HOLDER, 3)
        own.health.begin(HOLDER, 3)
        assert not own.health.is_usable(HOLDER)
        with pytest.raises(PeerError, match="failed a moment ago"):
            own.health.begin(HOLDER, 4)
        await asyncio.sleep(BACKOFF_MIN_S)  # the trial has no outcome: it was cancelled
        assert own.health.is_usable(HOLDER)
        own.health.begin(HOLDER, 4)
        own.health.failed(HOLDER)
        with pytest.raises(PeerError, match="failed a moment ago"):
            own.health.begin(HOLDER, 4)

    with_health(work)


def test_what_is_forgotten_has_not_failed() -> None:
    """The number of a node that has left begins anew, and so do all after a reset."""

    async def work(own: Own) -> None:
        for forget in (lambda: own.health.forget(HOLDER), own.health.clear):
            own.health.failed(HOLDER)
            assert not own.health.is_usable(HOLDER)
            forget()
            assert own.health.is_usable(HOLDER)

    with_health(work)


def reader_of(rig: Reading) -> tuple[PeerReader, Hints]:
    """Return a reader whose one member is the scripted owner, and the hints."""
    hints = Hints(100, 1)
    hints.note(HOLDER, KEYS[16:32])
    node = NodeRecord(rig.owner.node.id, rig.owner.node.life, rig.owner.node.address)
    member = SimpleNamespace(holder=HOLDER, node=node)
    members = SimpleNamespace(
        members=lambda: iter([member]),
        member_of=lambda life: member if life == node.life else None,
        node=lambda holder: node,
    )
    reader = PeerReader(cast("Membership", members), hints, lambda: False, reader_times(10.0))
    rig.peers._shared = rig.peers._shared._replace(changed=reader.link_changed)
    reader.peers = rig.peers
    return reader, hints


def is_asked(hints: Hints) -> bool:
    """Return whether the hints name the holder."""
    return bool(np.all(hints.nodes(KEYS[16:32]) == HOLDER))


WISH = Wish(KEYS, 0, 4, 0)


def busy(message: ToOwner) -> list[Message]:
    """Return the answers of an owner that lends nothing now."""
    return [Busy(message.number, 10)] if isinstance(message, Want) else pongs(message)


def test_hints_avoid_a_holder_whose_reads_fail() -> None:
    """Hints name a failed holder again for its trial, and at once when its blocks have arrived."""

    async def work(rig: Reading) -> None:
        reader, hints = reader_of(rig)
        assert is_asked(hints)
        reader.blame(HOLDER, PeerError("it", "reading", "nothing moved"))
        assert not is_asked(hints)
        assert not reader.is_up(HOLDER)
        await asyncio.sleep(BACKOFF_MIN_S)
        assert is_asked(hints)
        reader.begin(HOLDER, 1)
        assert not is_asked(hints)
        reader.arrived(HOLDER)
        assert is_asked(hints)
        for forget in (lambda: reader.joined(HOLDER), reader.forget_failures):
            reader.blame(HOLDER, PeerError("it", "reading", "nothing moved"))
            forget()
            assert is_asked(hints)
            assert reader.is_up(HOLDER)
        await reader.close()

    reading(work)


def test_a_question_without_an_answer_is_a_failure_and_a_busy_answer_is_none() -> None:
    """A failed link counts only once: its own breaker decides when it is there again."""

    async def work(rig: Reading) -> None:
        reader, hints = reader_of(rig)
        await reader.want(HOLDER, WISH)
        rig.owner.answer = busy
        with pytest.raises(PeerError, match="busy"):
            await reader.want(HOLDER, WISH)
        assert is_asked(hints)
        await asyncio.sleep(1.0)
        rig.owner.answer = pongs
        with pytest.raises(PeerError, match="no answer"):
            await reader.want(HOLDER, WISH)
        assert not is_asked(hints)
        reader.forget_failures()
        rig.owner.links[-1].abort()
        with pytest.raises(PeerError):
            await reader.want(HOLDER, WISH)
        assert not is_asked(hints)
        await asyncio.sleep(BACKOFF_MIN_S / 2)
        assert rig.peers.is_up(HOLDER)
        assert is_asked(hints)
        await reader.close()

    reading(work)
