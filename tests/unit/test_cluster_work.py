"""What one node may have another one do, however fast it asks."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from flexkv.cluster import sessions
from flexkv.cluster.allowance import Account, Allowance
from flexkv.cluster.link import control_link
from flexkv.cluster.records import SpanTags
from flexkv.cluster.sessions import MESSAGE_KEYS, UNREAD_KEYS, WORK
from flexkv.cluster.wire import (
    FROM_OWNER,
    Busy,
    FromOwner,
    Grant,
    PeerId,
    Ping,
    Pong,
    Release,
    SnapshotPart,
    SnapshotWanted,
    Want,
)
from flexkv.links.link import Link
from tests.cluster_rigs import ClusterNode, keys_of, turns
from tests.unit.test_cluster_listener import STRANGER, greeted, with_node

BLOCKS = 4095
"""With the root, these are 4096 keys."""
WANT_KEYS = 2 * MESSAGE_KEYS + (BLOCKS + 1) * (1 + 1 / UNREAD_KEYS)
"""What a Want and its Release take of an allowance."""
AT_ONCE = int(WORK.burst // WANT_KEYS)


async def linked(node: ClusterNode, number: int = 9) -> Link[FromOwner]:
    """Return a control link to a node."""
    who = STRANGER._replace(peer_id=PeerId(bytes([number]) * 16, 1))
    mine: socket.socket = await greeted(node, "control", who)
    return await control_link(mine, FROM_OWNER)


async def answers(link: Link[FromOwner], count: int) -> list[FromOwner]:
    """Return the next answers, as many as `count`."""
    told = [await link.receive() for _ in range(count)]
    assert None not in told
    return [each for each in told if each is not None]


def working(work: Callable[[ClusterNode, bytes], Coroutine[Any, Any, None]]) -> None:
    """Run a test on a virtual clock, with a node that has a prompt."""

    async def main(node: ClusterNode) -> None:
        keys = keys_of(1, BLOCKS)
        node.owner.put(keys, 0, 4)
        await work(node, keys)
        await turns()

    with_node(main)


def test_who_asks_too_much_is_told_when_to_ask_again() -> None:
    """Wants beyond the allowance are put off, held by nobody, and granted after the time told."""

    async def work(node: ClusterNode, keys: bytes) -> None:
        link = await linked(node)
        told: list[FromOwner] = []
        for number in range(AT_ONCE + 3):
            link.send(Want(number, keys, 0, 4))
            told += await answers(link, 1)
            link.send(Release(number))
        assert [type(each) for each in told] == [Grant] * AT_ONCE + [Busy] * 3
        assert node.grants.counts.busy == 3
        last = told[-1]
        assert isinstance(last, Busy)
        assert 0 < last.after_ms <= math.ceil(2 * WANT_KEYS / WORK.per_s * 1000)
        await turns()
        assert not node.owner.holds
        await asyncio.sleep(last.after_ms / 1000 + MESSAGE_KEYS / WORK.per_s)  # for the Release
        link.send(Want(1000, keys, 0, 4))
        assert isinstance((await answers(link, 1))[0], Grant)
        link.abort()

    working(work)


@pytest.mark.parametrize("kind", ["ping", "release and ping", "want", "refused"])
def test_a_flood_is_taken_no_faster_than_allowed(kind: str) -> None:
    """Whatever a node sends, in any interval it uses its allowance at most; others are served."""
    count = 4000

    async def work(node: ClusterNode, keys: bytes) -> None:
        loop, begin_s = asyncio.get_running_loop(), asyncio.get_running_loop().time()
        flooding, other = await linked(node, 8), await linked(node, 7)
        messages = {
            "ping": lambda n: Ping(n),
            "release and ping": lambda n: Ping(n) if n % 2 else Release(n),
            "want": lambda n: Want(n, keys_of(2, 1), 0, 1),
            "refused": lambda n: Want(n, keys_of(2, 1), 0, 1, generation=5),
        }
        for number in range(count):
            flooding.send(messages[kind](number))
        flooding.send(Ping(count))
        other.send(Want(1, keys, 0, 4))
        assert isinstance((await answers(other, 1))[0], Grant)
        assert loop.time() == begin_s
        while True:
            told = (await answers(flooding, 1))[0]
            if isinstance(told, Pong) and told.number == count:
                break
        least_s = (count * MESSAGE_KEYS - WORK.burst) / WORK.per_s
        assert least_s <= loop.time() - begin_s <= 1.1 * least_s + 0.1
        flooding.abort()
        other.abort()

    working(work)


def test_a_new_link_has_no_new_allowance() -> None:
    """A node that has used up its allowance is put off over its next link, too."""

    async def work(node: ClusterNode, keys: bytes) -> None:
        link = await linked(node)
        for number in range(AT_ONCE):
            link.send(Want(number, keys, 0, 4))
            await answers(link, 1)
            link.send(Release(number))
        link.abort()
        link = await linked(node)
        link.send(Want(1, keys, 0, 4))
        assert isinstance((await answers(link, 1))[0], Busy)
        link.abort()

    working(work)


def test_snapshots_count_by_their_tags() -> None:
    """The parts of a large snapshot come no faster than a node may have work done."""
    tags, count = 65_536, 40

    async def work(node: ClusterNode, keys: bytes) -> None:
        loop, begin_s = asyncio.get_running_loop(), asyncio.get_running_loop().time()
        node.parts = [
            SpanTags(7, bytes(tags * 4), bytes(tags * 4), n == count - 1) for n in range(count)
        ]
        link = await linked(node)
        for _ in range(count):
            link.send(SnapshotWanted(1))
            assert isinstance((await answers(link, 1))[0], SnapshotPart)
        link.send(Ping(2))
        await answers(link, 1)
        asked = count * (MESSAGE_KEYS + tags / UNREAD_KEYS)
        least_s = (asked - WORK.burst) / WORK.per_s
        assert least_s <= loop.time() - begin_s <= 1.1 * least_s + 0.1
        link.abort()

    working(work)


def test_accounts_of_nodes_that_owe_nothing_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered of nodes is bounded, and what they owe is not forgotten."""
    monkeypatch.setattr(sessions, "ACCOUNTS_MAX", 4)

    async def work(node: ClusterNode, keys: bytes) -> None:
        owing = await linked(node, 1)
        for number in range(2 * AT_ONCE):
            owing.send(Want(number, keys, 0, 4))
            await answers(owing, 1)
            owing.send(Release(number))
        for number in range(2, 40):
            link = await linked(node, number)
            link.send(Ping(1))
            await answers(link, 1)
            link.abort()
            await asyncio.sleep(0.001)
            assert len(node.sessions._work) <= 4
        assert bytes([1]) * 16 in node.sessions._work
        owing.abort()

    working(work)


def test_an_account_is_what_is_left_of_an_allowance() -> None:
    """An account refills by the second up to its burst, and what is owed has to be paid first."""
    account = Account(Allowance(10, 2.0), 100.0)
    account.take(12, 100.0)
    assert account.lacks_s(0, 100.0) == pytest.approx(1.0)
    assert account.lacks_s(4, 101.0) == pytest.approx(2.0)
    assert account.lacks_s(4, 103.0) == 0
    assert not account.is_full(105.9)
    assert account.is_full(106.0)
    assert account.lacks_s(11, 1000.0) == pytest.approx(0.5)
    account.take(10, 1000.0)
    account.give_back(3)
    assert account.lacks_s(3, 1000.0) == 0
