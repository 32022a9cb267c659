"""A listener serves who belongs to the cluster, and keeps nothing of anybody else."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv.cluster import tcp
from flexkv.cluster.handshake import (
    HANDSHAKE_S,
    Identity,
    introduce_to_owner,
    prove_to_owner,
    read,
)
from flexkv.cluster.link import control_link
from flexkv.cluster.listener import (
    ACCEPT_PAUSE_S,
    DATA_CONNECTIONS_MAX,
    UNPROVED_MAX,
    Listener,
    ListenerHooks,
)
from flexkv.cluster.wire import (
    FRAME_BYTES_MAX,
    FRAMING,
    FROM_OWNER,
    Introduction,
    PeerId,
    Ping,
    Purpose,
    Refused,
    Want,
    framed,
    length_of,
    understood,
)
from flexkv.testing.virtual_time import run_virtual
from tests.cluster_rigs import (
    FACTS,
    KEY,
    ClusterNode,
    Network,
    keys_of,
    open_descriptors,
    pair,
    tasks_of,
    turns,
)

STRANGER = Identity(PeerId(b"s" * 16, 9), "pool", FACTS, lambda: 0)


def with_node(work: Callable[[ClusterNode], Coroutine[Any, Any, None]]) -> None:
    """Run a test on a virtual clock against one node, of which nothing may be left."""

    async def main() -> None:
        node = ClusterNode(Network(), 1)
        await node.start()
        await work(node)
        await node.stop()
        await turns()

    before = open_descriptors()
    run_virtual(main())
    assert open_descriptors() == before


async def greeted(node: ClusterNode, purpose: Purpose, who: Identity = STRANGER) -> socket.socket:
    """Return a connection to a node, which has accepted us."""
    mine = await node.network.dial(node.listener.address)
    await prove_to_owner(mine, KEY)
    await introduce_to_owner(mine, who.introduction(purpose), node.id)
    await turns()
    return mine


async def rest_of(peer: socket.socket) -> bytes:
    """Return what comes before the end of a connection."""
    got = b""
    with suppress(ConnectionResetError):
        while more := await asyncio.get_running_loop().sock_recv(peer, 4096):
            got += more
    return got


def hello() -> bytes:
    """Return what a reader says first."""

    async def main() -> bytes:
        ours, theirs = pair()
        task = asyncio.ensure_future(prove_to_owner(ours, KEY))
        said = await read(theirs, 44)
        task.cancel()
        await asyncio.wait([task])
        ours.close()
        theirs.close()
        return said

    return run_virtual(main())


HELLO = hello()
SCRIPTS = st.lists(
    st.one_of(
        st.binary(max_size=300),
        st.sampled_from([HELLO, HELLO[:12], HELLO[:20], HELLO[12:], bytes(32), bytes(1000)]),
        st.floats(0, 3),
        st.just("end"),
    ),
    max_size=6,
)


@given(SCRIPTS)
def test_what_a_stranger_says_reaches_nobody(script: list[bytes | float | str]) -> None:
    """Nothing that is said without the key reaches a session, or leaves anything behind."""

    async def work(node: ClusterNode) -> None:
        loop, idle = asyncio.get_running_loop(), tasks_of(node.supervisor)
        mine = await node.network.dial(node.listener.address)
        for step in script:
            with suppress(OSError):
                if isinstance(step, float):
                    await asyncio.sleep(step)
                elif isinstance(step, bytes):
                    await loop.sock_sendall(mine, step)
                else:
                    mine.shutdown(socket.SHUT_WR)
        await asyncio.sleep(HANDSHAKE_S)
        assert len(await rest_of(mine)) <= len(HELLO)
        mine.close()
        await turns()
        assert len(node.listener) == len(node.sessions) == len(node.data) == 0
        assert tasks_of(node.supervisor) == idle

    with_node(work)


def test_a_slow_stranger_is_cut_off() -> None:
    """A stranger that sends a byte now and then has 5 seconds altogether."""

    async def work(node: ClusterNode) -> None:
        loop = asyncio.get_running_loop()
        mine = await node.network.dial(node.listener.address)
        begin_s = loop.time()
        with suppress(BrokenPipeError, ConnectionResetError):
            for byte in HELLO:
                await loop.sock_sendall(mine, bytes([byte]))
                await asyncio.sleep(1.0)
        assert HANDSHAKE_S <= loop.time() - begin_s <= HANDSHAKE_S + 2
        assert len(node.listener) == 0
        mine.close()

    with_node(work)


def test_who_proves_itself_and_then_says_nothing_is_cut_off() -> None:
    """The introduction has 5 seconds, too."""

    async def work(node: ClusterNode) -> None:
        mine = await node.network.dial(node.listener.address)
        await prove_to_owner(mine, KEY)
        begin_s = asyncio.get_running_loop().time()
        await rest_of(mine)
        assert asyncio.get_running_loop().time() - begin_s == pytest.approx(HANDSHAKE_S)
        mine.close()

    with_node(work)


def test_many_strangers_displace_each_other_and_nobody_else() -> None:
    """At most 64 connections are unproved, the latest ones; nodes of the cluster stay."""

    async def work(node: ClusterNode) -> None:
        friend = await greeted(node, "control")
        strangers = [
            await node.network.dial(node.listener.address) for _ in range(3 * UNPROVED_MAX)
        ]
        await turns()
        assert len(node.listener) == UNPROVED_MAX + 1
        loop = asyncio.get_running_loop()
        for gone in strangers[:-UNPROVED_MAX]:
            assert await loop.sock_recv(gone, 1) == b""
        late = await greeted(node, "data", STRANGER._replace(peer_id=PeerId(b"l" * 16, 1)))
        assert len(node.sessions) == len(node.data) == 1
        for each in (friend, late, *strangers):
            each.close()

    with_node(work)


@pytest.mark.parametrize("bound", [("CONNECTIONS_MAX", 3), ("limit", lambda: 7)])
def test_connections_are_bounded_altogether(
    monkeypatch: pytest.MonkeyPatch, bound: tuple[str, object]
) -> None:
    """Beyond the most connections, or half of all descriptors, a new one is closed; others stay."""
    monkeypatch.setattr(f"flexkv.cluster.listener.{bound[0]}", bound[1])

    async def work(node: ClusterNode) -> None:
        mine = [await greeted(node, "data") for _ in range(3)]
        late = await node.network.dial(node.listener.address)
        assert await rest_of(late) == b""
        assert len(node.listener) == len(node.data) == 3
        for each in (*mine, late):
            each.close()

    with_node(work)


def test_dismissed_strangers_count_no_more() -> None:
    """Strangers that arrive in one turn of the loop are bounded as well."""

    async def work(node: ClusterNode) -> None:
        ends = [pair() for _ in range(2 * UNPROVED_MAX)]
        for _, theirs in ends:
            node.listener.arrived(theirs, "pair")
        await turns()
        assert len(node.listener) == UNPROVED_MAX
        for mine, _ in ends:
            mine.close()

    with_node(work)


@given(st.binary(max_size=200), st.booleans())
def test_what_a_node_says_wrongly_ends_its_session(said: bytes, is_framed: bool) -> None:
    """Nonsense ends the session of whoever says it, with its grants, and nothing else."""

    async def work(node: ClusterNode) -> None:
        keys = keys_of(1, 4)
        node.owner.put(keys)
        mine = await greeted(node, "control")
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(mine, framed(Want(1, keys, 0, 4)))
        await turns()
        assert len(node.owner.holds) == 4
        head = FRAMING.head_of(said) if is_framed else b"\xff" * FRAMING.head_bytes
        await loop.sock_sendall(mine, head + said)
        await rest_of(mine)
        await turns()
        assert not node.owner.holds
        assert len(node.sessions) == 0
        mine.close()

    with_node(work)


@given(st.data())
def test_a_bit_that_flips_on_its_way_grants_nothing(data: st.DataObject) -> None:
    """A Want whose bytes have changed is not understood as another one; it ends the session.

    Otherwise its reader could get blocks of another group or grant, with the right checksums. Only
    a frame that now seems to be longer is waited for.
    """
    keys = keys_of(1, 4)
    frame = bytearray(framed(Want(1, keys, 0, 4)))
    bit = data.draw(st.integers(0, 8 * len(frame) - 1))
    frame[bit // 8] ^= 1 << bit % 8
    is_longer = bit < 32 and length_of(frame, 1 << 32) > len(frame) - FRAMING.head_bytes

    async def work(node: ClusterNode) -> None:
        node.owner.put(keys)
        mine = await greeted(node, "control")
        await asyncio.get_running_loop().sock_sendall(mine, frame)
        await turns()
        assert not node.owner.holds
        assert len(node.sessions) == (is_longer and length_of(frame, 1 << 32) <= FRAME_BYTES_MAX)
        mine.close()

    with_node(work)


def test_a_want_that_makes_no_sense_ends_the_session() -> None:
    """A reader that uses a number twice at once loses its link and its grants."""

    async def work(node: ClusterNode) -> None:
        keys = keys_of(1, 4)
        node.owner.put(keys)
        mine = await greeted(node, "control")
        want = framed(Want(1, keys, 0, 4))
        await asyncio.get_running_loop().sock_sendall(mine, want + want)
        await rest_of(mine)
        await turns()
        assert len(node.sessions) == 0
        assert not node.owner.holds
        mine.close()

    with_node(work)


def test_the_longest_frame_is_understood() -> None:
    """The keys of 65,536 blocks fit in a Want, and a longer frame is refused by its length."""

    async def work(node: ClusterNode) -> None:
        keys = keys_of(1, 1 << 16)
        node.owner.put(keys, 0, 3)
        mine = await greeted(node, "control")
        link = await control_link(mine, FROM_OWNER)
        link.send(Want(1, keys, 0, 1 << 16))
        grant = await link.receive()
        assert getattr(grant, "count", None) == 3
        too_long = (FRAME_BYTES_MAX + 1).to_bytes(4, "little")
        link._writer.write(too_long.ljust(FRAMING.head_bytes, b"\0"))
        assert await link.receive() is None
        link.abort()

    with_node(work)


def test_a_reader_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that nobody takes do not pile up."""
    monkeypatch.setattr("flexkv.cluster.link.UNSENT_BYTES_MAX", 1 << 16)

    async def work(node: ClusterNode) -> None:
        mine = await greeted(node, "control")
        mine.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        loop = asyncio.get_running_loop()
        pings = b"".join(framed(Ping(number)) for number in range(1000))
        with suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(1000):
                await loop.sock_sendall(mine, pings)
        await turns()
        assert len(node.sessions) == 0
        mine.close()

    with_node(work)


def test_a_silent_reader_loses_its_grants() -> None:
    """A reader from which nothing is heard for some seconds is taken for dead."""

    async def work(node: ClusterNode) -> None:
        keys = keys_of(1, 4)
        node.owner.put(keys)
        mine = await greeted(node, "control")
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(mine, framed(Want(1, keys, 0, 4)))
        for _ in range(20):
            await asyncio.sleep(1.0)
            await loop.sock_sendall(mine, framed(Ping(5)))
        assert len(node.owner.holds) == 4
        begin_s = loop.time()
        await rest_of(mine)
        assert 4.0 <= loop.time() - begin_s <= 5.5
        assert not node.owner.holds
        mine.close()

    with_node(work)


def test_a_node_has_one_session() -> None:
    """The second control link of a node ends the first one and its grants, of whichever life."""

    async def work(node: ClusterNode) -> None:
        keys = keys_of(1, 4)
        node.owner.put(keys)
        loop = asyncio.get_running_loop()
        first = await greeted(node, "control")
        await loop.sock_sendall(first, framed(Want(1, keys, 0, 2)))
        await turns()
        assert len(node.owner.holds) == 2
        second = await greeted(node, "control", STRANGER._replace(peer_id=PeerId(b"s" * 16, 10)))
        await rest_of(first)
        assert not node.owner.holds
        await loop.sock_sendall(second, framed(Want(1, keys, 0, 4)))
        third = await greeted(node, "control", STRANGER._replace(peer_id=PeerId(b"s" * 16, 10)))
        await rest_of(second)
        await loop.sock_sendall(third, framed(Want(1, keys, 0, 3)))
        await turns()
        assert len(node.owner.holds) == 3
        assert len(node.sessions) == 1
        for each in (first, second, third):
            each.close()

    with_node(work)


def test_data_connections_of_a_node_are_bounded() -> None:
    """A node has at most 8 data connections; another node still gets one."""

    async def work(node: ClusterNode) -> None:
        mine = [await greeted(node, "data") for _ in range(DATA_CONNECTIONS_MAX + 1)]
        assert len(node.data) == DATA_CONNECTIONS_MAX
        assert await rest_of(mine[-1]) == b""
        mine.append(await greeted(node, "data", STRANGER._replace(peer_id=PeerId(b"t" * 16, 1))))
        assert len(node.data) == DATA_CONNECTIONS_MAX + 1
        mine[0].close()
        await turns()
        mine.append(await greeted(node, "data"))
        assert len(node.data) == DATA_CONNECTIONS_MAX + 2
        for each in mine:
            each.close()

    with_node(work)


def test_a_reader_that_differs_is_told_the_field() -> None:
    """A reader that introduces itself although its blocks differ is told why it is refused."""

    async def work(node: ClusterNode) -> None:
        mine = await node.network.dial(node.listener.address)
        await prove_to_owner(mine, KEY)
        other = STRANGER._replace(pool="other").introduction("control")
        await asyncio.get_running_loop().sock_sendall(mine, framed(other))
        told = await rest_of(mine)
        refused = Refused(0, "pool", "other", "is 'pool' on this node: such nodes share no blocks")
        assert told.endswith(framed(refused))
        assert len(node.sessions) == 0
        mine.close()

    with_node(work)


def test_long_facts_are_told_and_refused() -> None:
    """Facts may be long, as those of models with many layers are; a refusal is cut."""

    async def work(node: ClusterNode) -> None:
        loop = asyncio.get_running_loop()
        mine = await node.network.dial(node.listener.address)
        await prove_to_owner(mine, KEY)
        other = STRANGER._replace(facts={**FACTS, "group_1": "x" * 10_000}).introduction("control")
        await loop.sock_sendall(mine, framed(other))
        ours = framed(node.identity.introduction("control"))
        told = (await rest_of(mine))[len(ours) :]
        refusal = understood(FROM_OWNER, told[FRAMING.head_bytes :])
        assert isinstance(refusal, Refused)
        assert (refusal.field, len(refusal.value)) == ("group_1", 512)
        mine.close()

    with_node(work)


@pytest.mark.parametrize("error", [OSError(5, "gone"), EOFError("short"), TimeoutError("slow")])
def test_a_data_connection_that_breaks_ends_alone(error: Exception) -> None:
    """What goes wrong on a data connection closes it, and ends nothing else."""

    async def work(node: ClusterNode) -> None:
        async def breaks(connected: socket.socket, introduction: Introduction) -> None:
            raise error

        node.listener._hooks = node.listener._hooks._replace(data=breaks)
        mine = await greeted(node, "data")
        assert await rest_of(mine) == b""
        mine.close()

    with_node(work)


class Exhausted(socket.socket):
    """A listening socket of a process that has no descriptors left, for a while."""

    failures = 1

    def accept(self) -> tuple[socket.socket, Any]:
        """Fail at first."""
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EMFILE, "too many open files")
        return super().accept()


async def test_without_descriptors_the_port_pauses() -> None:
    """A process without descriptors tries again later, and does not turn in circles meanwhile."""
    bound = tcp.listening("127.0.0.1", 0, 16)
    listening = Exhausted(fileno=bound.detach())
    listening.setblocking(False)
    node = ClusterNode(Network(is_tcp=True), 1)
    await node.start()
    arrived: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def serve(connected: socket.socket, introduction: Introduction) -> None:
        arrived.set_result(None)

    hooks = ListenerHooks(serve, serve, node.supervisor.spawn)
    listener = Listener(listening, KEY, node.identity, hooks)
    listener.listen()
    peer = await tcp.connected(listener.address)
    begin_s = asyncio.get_running_loop().time()
    await prove_to_owner(peer, KEY)
    assert asyncio.get_running_loop().time() - begin_s >= ACCEPT_PAUSE_S / 2
    await introduce_to_owner(peer, STRANGER.introduction("data"), node.id)
    await arrived
    peer.close()
    listener.close()
    listener.close()
    await listener.wait_closed()
    await node.stop()
