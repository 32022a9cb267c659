"""Only who knows the key gets through the handshake, and then only with blocks like ours."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from flexkv.cluster.handshake import (
    HELLO_BYTES,
    PROOF_BYTES,
    VERSION,
    Identity,
    check_alike,
    introduce_to_owner,
    introduce_to_reader,
    prove_to_owner,
    prove_to_reader,
    read,
)
from flexkv.cluster.secret import cluster_key
from flexkv.cluster.wire import (
    FRAMING,
    INTRODUCTION_BYTES_MAX,
    PeerId,
    PeerProtocolError,
    Ping,
    framed,
)
from flexkv.common.errors import ConfigError, PeerError
from flexkv.common.sharing import check_secrets
from flexkv.observe.logs import configure_logging
from flexkv.testing.virtual_time import run_virtual
from tests.cluster_rigs import FACTS, KEY, ClusterNode, Network, keys_of, pair

OTHER_KEY = b"o" * 32
READER = Identity(PeerId(b"r" * 16, 1), "pool", FACTS, lambda: 0)
OWNER = Identity(PeerId(b"o" * 16, 2), "pool", FACTS, lambda: 0)


async def both(
    reader: Callable[[socket.socket], Awaitable[Any]],
    owner: Callable[[socket.socket], Awaitable[Any]],
) -> tuple[Any, Any]:
    """Run both ends of a connection; return what they return or raise."""
    ends = pair()

    async def end(work: Callable[[socket.socket], Awaitable[Any]], mine: socket.socket) -> Any:
        try:
            return await work(mine)
        except (OSError, PeerProtocolError, ConfigError) as error:
            return error
        finally:
            mine.close()

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(end(work, mine))
            for work, mine in zip((reader, owner), ends, strict=True)
        ]
    return tasks[0].result(), tasks[1].result()


def with_key(
    prove: Callable[[socket.socket, bytes], Awaitable[None]], key: bytes = KEY
) -> Callable[[socket.socket], Awaitable[None]]:
    """Return a side of the handshake with a key."""
    return lambda peer: prove(peer, key)


async def recorded() -> tuple[bytes, bytes]:
    """Return everything that a reader and an owner said in a handshake that succeeded."""
    (reader, to_reader), (to_owner, owner) = pair(), pair()
    said = [bytearray(), bytearray()]

    async def relay(source: socket.socket, target: socket.socket, log: bytearray) -> None:
        loop = asyncio.get_running_loop()
        while more := await loop.sock_recv(source, 256):
            log += more
            await loop.sock_sendall(target, more)

    relays = [
        asyncio.ensure_future(relay(to_reader, to_owner, said[0])),
        asyncio.ensure_future(relay(to_owner, to_reader, said[1])),
    ]
    async with asyncio.TaskGroup() as group:
        group.create_task(prove_to_owner(reader, KEY))
        group.create_task(prove_to_reader(owner, KEY))
    for each in (*relays,):
        each.cancel()
    await asyncio.wait(relays)
    for each in (reader, to_reader, to_owner, owner):
        each.close()
    return bytes(said[0]), bytes(said[1])


def test_who_knows_the_key_gets_through() -> None:
    """Two sides with one key accept each other, and say no more than the protocol has it."""
    assert run_virtual(both(with_key(prove_to_owner), with_key(prove_to_reader))) == (None, None)
    told = run_virtual(recorded())
    assert [len(each) for each in told] == [HELLO_BYTES + PROOF_BYTES] * 2


@pytest.mark.parametrize("reader_key", [KEY, OTHER_KEY])
def test_another_key_is_refused_by_both(reader_key: bytes) -> None:
    """Neither side accepts the other with another key, whoever has the wrong one."""
    owner_key = OTHER_KEY if reader_key == KEY else KEY
    reader, owner = run_virtual(
        both(with_key(prove_to_owner, reader_key), with_key(prove_to_reader, owner_key))
    )
    assert isinstance(reader, PeerProtocolError)
    assert "are the secrets equal" in str(reader)
    assert isinstance(owner, PeerProtocolError)
    assert "does not know our secret" in str(owner)


def test_a_stranger_learns_the_version_only() -> None:
    """Before a reader has proved itself, it gets a version and a random number, and no proof."""

    async def stranger(peer: socket.socket) -> bytes:
        said, _ = await recorded()
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(peer, said[:HELLO_BYTES])
        got = await read(peer, HELLO_BYTES)
        await loop.sock_sendall(peer, b"\0" * PROOF_BYTES)
        return got + await loop.sock_recv(peer, 1)

    challenges = [run_virtual(both(stranger, with_key(prove_to_reader)))[0] for _ in range(2)]
    assert [len(each) for each in challenges] == [HELLO_BYTES] * 2
    assert challenges[0][:12] == challenges[1][:12]
    assert challenges[0][12:] != challenges[1][12:]


@pytest.mark.parametrize("is_reader", [True, False])
def test_what_was_recorded_proves_nothing_again(is_reader: bool) -> None:
    """Neither side accepts what was said in an earlier handshake, in whichever direction."""

    async def main() -> None:
        for said in await recorded():

            async def replay(peer: socket.socket, said: bytes = said) -> None:
                await asyncio.get_running_loop().sock_sendall(peer, said)
                await read(peer, HELLO_BYTES + 1)

            if is_reader:
                _, honest = await both(replay, with_key(prove_to_reader))
            else:
                honest, _ = await both(with_key(prove_to_owner), replay)
            assert isinstance(honest, PeerProtocolError)
            assert "does not know our secret" in str(honest)

    run_virtual(main())


@pytest.mark.parametrize("prove", [prove_to_owner, prove_to_reader])
def test_an_echo_proves_nothing(prove: Callable[[socket.socket, bytes], Awaitable[None]]) -> None:
    """Who sends everything back does not get through: the two roles prove different things."""

    async def echo(peer: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        if prove is prove_to_reader:  # it waits for the first word
            await loop.sock_sendall(peer, (await recorded())[0][:HELLO_BYTES])
        while more := await loop.sock_recv(peer, 256):
            await loop.sock_sendall(peer, more[-PROOF_BYTES:] if prove is prove_to_reader else more)

    _, honest = run_virtual(both(echo, with_key(prove)))
    assert isinstance(honest, PeerProtocolError)
    assert "does not know our secret" in str(honest)


def test_another_version_is_refused_by_name() -> None:
    """Each side says which versions do not fit; the owner answers with its own and no more."""
    other = b"FlexKV\xf1\n" + (VERSION + 1).to_bytes(4, "little")

    async def newer_reader(peer: socket.socket) -> bytes:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(peer, other + b"whatever it says then" * 3)
        told = await read(peer, 12)
        return told + await loop.sock_recv(peer, 1)

    async def newer_owner(peer: socket.socket) -> None:
        await asyncio.get_running_loop().sock_sendall(peer, other)
        await read(peer, HELLO_BYTES + 1)

    told, owner = run_virtual(both(newer_reader, with_key(prove_to_reader)))
    assert told == b"FlexKV\xf1\n" + VERSION.to_bytes(4, "little")
    reader, _ = run_virtual(both(with_key(prove_to_owner), newer_owner))
    for error in (reader, owner):
        assert isinstance(error, ConfigError)
        assert (error.field, error.value) == ("peer_protocol_version", VERSION + 1)
        assert f"speaks version {VERSION}" in error.why


@pytest.mark.parametrize("prove", [prove_to_owner, prove_to_reader])
def test_another_protocol_is_not_answered(
    prove: Callable[[socket.socket, bytes], Awaitable[None]],
) -> None:
    """Who does not begin as a node does gets no proof."""

    async def browser(peer: socket.socket) -> bytes:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(peer, b"GET / HTTP/1.1\r\nHost: example\r\n\r\n")
        got = b""
        while more := await loop.sock_recv(peer, 256):
            got += more
        return got

    got, honest = run_virtual(both(browser, with_key(prove)))
    assert isinstance(honest, PeerProtocolError)
    assert "not a FlexKV node" in str(honest)
    if prove is prove_to_reader:
        assert not isinstance(got, bytes) or got == b""


FIELDS = [
    ("node_id", OWNER._replace(peer_id=READER.peer_id), "is that of this node itself"),
    ("pool", OWNER._replace(pool="other"), "is 'pool' on this node"),
    ("generation", OWNER._replace(generation=lambda: 5), "is 0 on this node"),
    ("model", OWNER._replace(facts={**FACTS, "model": "big"}), "is 'tiny' on this node"),
    ("more", OWNER._replace(facts={**FACTS, "more": 1}), "is None on this node"),
    ("model", OWNER._replace(facts={"tokens_per_block": 16, "span_blocks": 8}), "is 'tiny' on"),
]


@pytest.mark.parametrize(("field", "owner", "why"), FIELDS, ids=lambda each: str(each)[:12])
def test_what_differs_is_refused_by_name(field: str, owner: Identity, why: str) -> None:
    """The reader names the field in which an owner differs, and then tells nothing of itself."""
    expected = owner.peer_id

    async def reading(peer: socket.socket) -> None:
        await introduce_to_owner(peer, READER.introduction("data"), expected)

    async def owning(peer: socket.socket) -> Any:
        return await introduce_to_reader(peer, owner.introduction("control"))

    reader, learnt = run_virtual(both(reading, owning))
    assert isinstance(reader, ConfigError)
    assert reader.field == field
    assert why in reader.why
    assert isinstance(learnt, PeerProtocolError)
    with pytest.raises(ConfigError, match=field):
        check_alike(owner.introduction("control"), READER.introduction("control"))


@pytest.mark.parametrize("wanted", [PeerId(b"o" * 16, 3), PeerId(b"x" * 16, 2)])
def test_another_node_than_wanted_is_refused(wanted: PeerId) -> None:
    """A reader introduces itself only to the life of the node that it means."""

    async def reading(peer: socket.socket) -> None:
        await introduce_to_owner(peer, READER.introduction("data"), wanted)

    async def owning(peer: socket.socket) -> Any:
        return await introduce_to_reader(peer, OWNER.introduction("control"))

    reader, learnt = run_virtual(both(reading, owning))
    assert isinstance(reader, PeerProtocolError)
    assert "has its address now" in str(reader)
    assert isinstance(learnt, PeerProtocolError)


def test_introductions_are_exchanged() -> None:
    """Both sides learn who the other one is, and what for."""

    async def reading(peer: socket.socket) -> None:
        await introduce_to_owner(peer, READER.introduction("data"), OWNER.peer_id)

    async def owning(peer: socket.socket) -> Any:
        return await introduce_to_reader(peer, OWNER.introduction("control"))

    _, learnt = run_virtual(both(reading, owning))
    assert learnt == READER.introduction("data")


@pytest.mark.parametrize(
    "told",
    [
        (INTRODUCTION_BYTES_MAX + 1).to_bytes(4, "little") + bytes(FRAMING.head_bytes - 4),
        b"\xff" * FRAMING.head_bytes,
        framed(Ping(1)),
        FRAMING.head_of(b""),
        FRAMING.head_of(b"abc") + b"abc",
        framed(READER.introduction("data")).replace(READER.peer_id.node_id, b"x" * 16),
    ],
    ids=["too long", "much too long", "a ping", "nothing", "nonsense", "damaged"],
)
def test_a_bad_introduction_is_refused(told: bytes) -> None:
    """A frame that is too long is refused by its length, and one that is nonsense as nonsense."""

    async def reading(peer: socket.socket) -> None:
        await asyncio.get_running_loop().sock_sendall(peer, told)
        await read(peer, 1 << 16)

    async def owning(peer: socket.socket) -> Any:
        return await introduce_to_reader(peer, OWNER.introduction("control"))

    _, learnt = run_virtual(both(reading, owning))
    assert isinstance(learnt, PeerProtocolError)


def test_the_key_depends_on_every_secret() -> None:
    """A cluster secret decides alone; without one, both other secrets do, and their border."""
    keys = [
        cluster_key("s"),
        cluster_key("t"),
        cluster_key("", "s", "p"),
        cluster_key("", "sp", ""),
        cluster_key("", "", "sp"),
        cluster_key(""),
    ]
    assert len(set(keys)) == len(keys)
    assert cluster_key("s", "a", "b") == cluster_key("s", "c", "d") == cluster_key("s")
    assert {len(key) for key in keys} == {32}


@pytest.mark.parametrize("ip", ["127.0.0.1", "127.9.9.9", "::1"])
def test_loopback_needs_no_secret(ip: str) -> None:
    """Nodes of one machine may share without a secret."""
    check_secrets(ip, "", "")


@pytest.mark.parametrize("ip", ["10.0.0.1", "0.0.0.0", "::", "2001:db8::1", "::ffff:127.0.0.1"])
def test_other_addresses_need_a_secret(ip: str) -> None:
    """An address that other machines reach is refused if all secrets are empty."""
    with pytest.raises(ConfigError, match="set cluster_secret"):
        check_secrets(ip, "", "", "")
    check_secrets(ip, "", "secret", "")


async def test_no_secret_is_logged(capfd: pytest.CaptureFixture[str]) -> None:
    """Logs and errors of refused connections name addresses, and neither keys nor proofs."""
    configure_logging("debug", as_json=True)
    network = Network(is_tcp=True)
    reader, owner = ClusterNode(network, 1, key=b"secret-of-reader" * 2), ClusterNode(network, 2)
    for each in (reader, owner):
        await each.start()
    reader.meet(owner)
    with pytest.raises(PeerError, match="are the secrets equal") as raised:
        await reader.peers.want(1, keys_of(1, 1), 0, 1)
    for each in (reader, owner):
        await each.stop()
    told = capfd.readouterr().err + str(raised.value) + repr(raised.value.__cause__)
    assert "does not know our secret" in told
    assert "peer_down" in told
    assert "secret-of-reader" not in told
    assert KEY.decode() not in told
