"""A listener at real ports: who is shut out costs it nothing, and others reach it."""

from __future__ import annotations

import asyncio
import errno
import json
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import pytest

from flexkv.cluster import strangers, syn_filter, tcp
from flexkv.cluster.allowance import Allowance
from flexkv.cluster.handshake import introduce_to_owner, prove_to_owner
from flexkv.cluster.strangers import ShutOut, StrangerLimits, source_of
from flexkv.observe.logs import configure_logging
from tests.cluster_rigs import KEY, ClusterNode, Network, turns
from tests.unit.test_cluster_listener import HELLO, STRANGER

FEW = Allowance(4, 1e-3)
ESTABLISHED = 1
FRIEND, HOSTILE = "127.0.0.1", "127.0.0.2"


@contextmanager
def port(ip: str) -> Iterator[socket.socket]:
    """Yield a listening socket."""
    with tcp.listening(ip, 0, 64) as listening:
        yield listening


def reaches(listening: socket.socket, source: str) -> bool:
    """Return whether the kernel connects an address to a port; over loopback it does so at once."""
    with socket.socket(listening.family) as connecting:
        connecting.setblocking(False)
        connecting.bind((source, 0))
        connecting.connect_ex(listening.getsockname())
        return connecting.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO) == ESTABLISHED


def shut(*ips: str, is_all: bool = False) -> ShutOut:
    """Return that these are shut out, or all others."""
    return ShutOut(frozenset(map(source_of, ips)), is_all)


@pytest.mark.parametrize("number", [0, 1, 300])
def test_the_kernel_drops_whom_it_is_told_to(number: int) -> None:
    """Those that are listed cannot connect, or only those, however many there are."""
    many = [f"10.1.{n // 250}.{n % 250}" for n in range(number)]
    many += [f"2001:db8:{n}::1" for n in range(number)]
    with port(FRIEND) as listening:
        assert reaches(listening, HOSTILE)
        syn_filter.apply(listening, shut(HOSTILE, "127.0.0.3", *many))
        ips = FRIEND, HOSTILE, "127.0.0.3", "127.0.0.4"
        assert [reaches(listening, ip) for ip in ips] == [True, False, False, True]
        syn_filter.apply(listening, shut(FRIEND, "127.0.0.4", *many, is_all=True))
        assert [reaches(listening, ip) for ip in ips] == [True, False, False, True]
        syn_filter.apply(listening, shut(is_all=True))
        assert not any(reaches(listening, ip) for ip in ips)
        syn_filter.apply(listening, shut())
        assert all(reaches(listening, ip) for ip in ips)


def test_the_kernel_drops_networks_of_ipv6() -> None:
    """All of a network of 64 bits is shut out, and none of another one."""
    with port("::1") as listening:
        for others in ("fd00::1", "::2:0:0:0:0", "0:1::1"):
            syn_filter.apply(listening, shut(others))
            assert reaches(listening, "::1")
            syn_filter.apply(listening, shut(others, is_all=True))
            assert not reaches(listening, "::1")
        syn_filter.apply(listening, shut("fd00::1", "::2"))
        assert not reaches(listening, "::1")
        syn_filter.apply(listening, shut("fd00::1", "::2", is_all=True))
        assert reaches(listening, "::1")


def test_connections_that_are_open_go_on() -> None:
    """A filter drops no byte of a connection that was accepted, before it was set or after."""
    with port(FRIEND) as listening:
        for _ in range(2):
            with socket.create_connection(listening.getsockname()) as one:
                other, _ = listening.accept()
                syn_filter.apply(listening, shut(FRIEND))
                with other:
                    for sender, receiver in ((one, other), (other, one)):
                        sender.sendall(b"something")
                        assert receiver.recv(9, socket.MSG_WAITALL) == b"something"
                syn_filter.apply(listening, shut(HOSTILE))


@pytest.fixture
async def node(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ClusterNode]:
    """Yield a node that lets each address, and all together, fail 4 times."""
    monkeypatch.setattr(strangers, "LIMITS", StrangerLimits(FEW, Allowance(8, 1e-3), FEW))
    node = ClusterNode(Network(is_tcp=True), 1)
    await node.start()
    yield node
    await node.stop()


async def arrive(node: ClusterNode, ip: str) -> socket.socket:
    """Return a connection from an address, over which nothing was said."""
    mine = socket.socket()
    mine.setblocking(False)
    mine.bind((ip, 0))
    await asyncio.get_running_loop().sock_connect(mine, tcp.parts_of(node.listener.address))
    return mine


async def hears(node: ClusterNode, ip: str, said: bytes) -> bytes:
    """Return what a node answers to something from an address."""
    with await arrive(node, ip) as mine:
        try:
            await asyncio.get_running_loop().sock_sendall(mine, said)
            return await asyncio.get_running_loop().sock_recv(mine, 100)
        except OSError:  # it was closed before
            return b""


async def fail(node: ClusterNode, ip: str, times: int) -> None:
    """Connect from an address, and say what proves nothing."""
    for _ in range(times):
        assert await hears(node, ip, bytes(12)) == b""


async def joins(node: ClusterNode) -> None:
    """Connect as a node of the cluster does."""
    peer = await tcp.connected(node.listener.address)
    await prove_to_owner(peer, KEY)
    await introduce_to_owner(peer, STRANGER.introduction("data"), node.id)
    peer.close()


async def test_who_fails_too_often_does_not_get_through_any_more(node: ClusterNode) -> None:
    """After its allowance a stranger's packets are dropped; a node elsewhere is served."""
    node.listener._strangers._limits = StrangerLimits(FEW, FEW, Allowance(100, 1.0))
    await fail(node, HOSTILE, FEW.burst)
    assert not reaches(node.listener._listening, HOSTILE)
    assert reaches(node.listener._listening, FRIEND)
    await joins(node)


async def test_a_known_address_gets_through_while_all_others_are_shut_out(
    node: ClusterNode,
) -> None:
    """Strangers at many addresses shut out those that are not known; nodes connect again."""
    await joins(node)
    for number in range(FEW.burst):
        await fail(node, f"127.0.1.{number + 1}", 1)
    assert not reaches(node.listener._listening, "127.0.9.9")
    await joins(node)


async def test_a_stranger_at_the_address_of_a_node_does_not_shut_it_out(node: ClusterNode) -> None:
    """Where the secret was proved, more may fail before the address is shut out."""
    await joins(node)
    await fail(node, FRIEND, FEW.burst + 1)
    await joins(node)
    assert reaches(node.listener._listening, FRIEND)


async def test_who_was_shut_out_is_let_in_later(
    node: ClusterNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once half of an allowance is there again, the kernel drops nothing any more."""
    quick = Allowance(4, 40.0)
    node.listener._strangers._limits = StrangerLimits(quick, quick, quick)
    applied: list[ShutOut] = []
    let_in = asyncio.Event()
    apply = syn_filter.apply

    def watched(listening: socket.socket, shut_out: ShutOut) -> None:
        apply(listening, shut_out)
        applied.append(shut_out)
        if shut_out == ShutOut():
            let_in.set()

    monkeypatch.setattr(syn_filter, "apply", watched)
    await asyncio.gather(*[fail(node, HOSTILE, 1) for _ in range(quick.burst)])
    async with asyncio.timeout(10):
        await let_in.wait()
    assert applied[0] != ShutOut()
    assert reaches(node.listener._listening, HOSTILE)


async def test_without_a_filter_who_is_shut_out_is_closed_at_once(
    node: ClusterNode, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where the kernel takes no filter, such connections are accepted, and hear nothing."""

    def refuse(listening: socket.socket, shut_out: ShutOut) -> None:
        raise OSError(errno.EPERM, "not permitted")

    configure_logging("warning", as_json=True)
    monkeypatch.setattr(syn_filter, "apply", refuse)
    await joins(node)
    assert len(await hears(node, HOSTILE, HELLO)) == len(HELLO)
    await fail(node, HOSTILE, FEW.burst - 1)
    assert await hears(node, HOSTILE, HELLO) == b""
    await joins(node)
    await fail(node, FRIEND, 8)
    assert await hears(node, FRIEND, HELLO) == b""
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [line["event"] for line in lines].count("peer_filter_refused") == 1
    told = [line["address"] for line in lines if "prove nothing" in line.get("reason", "")]
    assert told[0] == "all but 1 known ones"


async def test_a_filter_that_cannot_be_changed_is_removed(
    node: ClusterNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the kernel takes no other program, it drops nobody for ever by the one that it has."""
    apply = syn_filter.apply

    def apply_once(listening: socket.socket, shut_out: ShutOut) -> None:
        if len(shut_out.sources) > 1:
            raise OSError(errno.ENOMEM, "no memory")
        apply(listening, shut_out)

    node.listener._strangers._limits = StrangerLimits(FEW, FEW, Allowance(100, 1.0))
    monkeypatch.setattr(syn_filter, "apply", apply_once)
    await fail(node, HOSTILE, FEW.burst)
    assert not reaches(node.listener._listening, HOSTILE)
    await fail(node, "127.0.0.3", FEW.burst)
    assert reaches(node.listener._listening, HOSTILE)


async def test_a_proof_opens_the_port_again_at_once(node: ClusterNode) -> None:
    """Nodes that connect all at once are let in again as soon as the first has proved itself."""
    unproved = [await arrive(node, FRIEND) for _ in range(FEW.burst)]
    await turns()
    assert not reaches(node.listener._listening, FRIEND)
    await prove_to_owner(unproved[0], KEY)
    assert reaches(node.listener._listening, FRIEND)
    assert not reaches(node.listener._listening, HOSTILE)
    for each in unproved:
        each.close()
