"""Tests that a server that hangs or sends nonsense costs clients hits, and agents a connection."""

from __future__ import annotations

import asyncio
import os
import queue
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from flexkv.common.config import Settings
from flexkv.common.request import Operation
from flexkv.server import changes as changes_module
from flexkv.server import client as client_module
from flexkv.server.agent import Agent
from flexkv.server.client import Client
from flexkv.server.wire import (
    PROTOCOL_VERSION,
    Answer,
    Changed,
    Copied,
    Copy,
    DeviceReady,
    Done,
    Match,
    Matched,
    Settled,
    State,
    Welcome,
    framed,
)

from .conftest import MODEL, kv_caches
from .fake_server import FakeServer
from .serving import eventually, settings_in

KEYS = bytes(range(48))  # a root and two blocks
IDS = np.arange(2)
NOT_TEXT = b"\x91\xa5\xff\xfe\xfd\xfc\xfb"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Return settings for 16 host blocks."""
    return settings_in(tmp_path, num_cpu_blocks=16)


@pytest.fixture
def client(settings: Settings, server: FakeServer) -> Iterator[Client]:
    """Yield a client that is connected."""
    made = Client(settings, MODEL)
    eventually(lambda: (made.poll(), made.is_ready)[1])
    yield made
    made.close()


# -- clients --------------------------------------------------------------------------------------


def test_a_silent_server_is_lost_while_requests_are_under_way(
    client: Client, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests under way fail after HANG_S of silence; without any, a server may be silent."""
    now = [1e6]
    monkeypatch.setattr(client_module.time, "monotonic", lambda: now[0])
    peer = server.next_peer()
    client._heard_s = now[0]
    now[0] += 10 * client_module.HANG_S
    assert client.poll() == []
    assert client.is_ready
    number = client.start(Operation.PUT, KEYS, 0, IDS)
    for _ in range(3):
        now[0] += client_module.HANG_S - 1
        server.say(peer, State(True, 64, "kv tokens heads dim", 1))
        assert client.poll() == []
    now[0] += client_module.HANG_S + 1
    (done,) = client.poll()
    assert (done.number, done.status) == (number, "failed")
    assert not client.is_ready


def test_a_server_that_does_not_read_is_lost(
    client: Client, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unsent bytes are bounded: with a server that does not read, requests fail."""
    monkeypatch.setattr(client_module, "UNSENT_BYTES_MAX", 1 << 20)
    numbers = []
    for _ in range(200):
        numbers.append(client.start(Operation.PUT, KEYS + os.urandom(16 << 10), 0, IDS))
        client.flush()
        if not client.is_ready:
            break
        assert client._socket is not None
        assert len(client._socket.unsent) <= 1 << 20
    assert not client.is_ready
    assert client._socket is None
    assert {done.number for done in client.poll()} >= set(numbers[:-1])


def test_the_numbers_of_a_client_are_not_those_of_the_one_before(
    settings: Settings, server: FakeServer
) -> None:
    """Clients use different request numbers, so that late messages for others are ignored."""
    firsts = []
    for _ in range(2):
        one = Client(settings, MODEL)
        eventually(lambda one=one: (one.poll(), one.is_ready)[1])
        one.ask(KEYS)
        heard = server.hear(server.next_peer())
        assert isinstance(heard, Match)
        firsts.append(heard.number)
        one.close()
    assert abs(firsts[0] - firsts[1]) >= 1 << 32


def nonsense(number: int) -> dict[str, Any]:
    """Return messages that no server sends to a client whose request has this number."""
    done = ["done", number, "success", 1, "", float("nan"), False]
    return {
        "a name that is not text": NOT_TEXT,
        "nothing": b"",
        "deep": b"\x91" * 60_000,
        "no message": b"\xc1",
        "an absurd length": b"\x92\xa7settled\xdd\xff\xff\xff\xff",
        "a number that is none": b"\x94\xa7matched\xa1x\x01\x80",
        "a negative number": b"\x94\xa7matched\xff\x01\x80",
        "NaN": msgspec.msgpack.encode(done),
        "an agent's word": Copy(1, True, b"", b""),
        "an operator's word": Answer(1),
        "settled": Settled(1),
        "a second welcome": Welcome(PROTOCOL_VERSION, 1),
        "more blocks than asked for": Matched(number, 4, {"host": 4}),
        "more blocks in a tier than asked for": Matched(number, 1, {"host": 1 << 40}),
        "more far blocks than asked for": Matched(number, 1, {}, far={"remote": 3}),
        "more moved than asked for": Done(number, "success", 4),
        "an end that there is not": Done(number, "excellent", 0),
        "changes that nobody watches": Changed(()),
    }


@pytest.mark.parametrize("kind", nonsense(0))
def test_a_server_that_talks_nonsense_is_lost(
    client: Client, server: FakeServer, kind: str
) -> None:
    """Nonsense from a server raises in no step: requests under way fail; the client reconnects."""
    peer = server.next_peer()
    put = client.start(Operation.PUT, KEYS, 0, IDS)
    asked = client.ask(KEYS)
    number = put if "moved" in kind or "end" in kind or kind == "NaN" else asked
    server.say(peer, nonsense(number)[kind])
    ended = eventually(client.poll)
    assert [(done.number, done.status) for done in ended] == [(put, "failed")]
    assert client.answer(asked) == Matched(asked, 0, {})
    assert not client.is_ready
    client._reconnects._due_s = 0.0
    eventually(lambda: (client.poll(), client.is_ready)[1])


def test_a_frame_that_is_too_long_or_never_ends_is_no_reason_to_wait(
    client: Client, server: FakeServer
) -> None:
    """A frame that never ends is not waited for, and one that is too long ends the connection."""
    peer = server.next_peer()
    peer.sendall(b"\x40\x00\x00\x00only this")
    assert client.poll() == []
    assert client.match(KEYS).blocks == 0
    client._reconnects._due_s = 0.0
    eventually(lambda: (client.poll(), client.is_ready)[1])
    server.next_peer().sendall(b"\xff\xff\xff\xff")
    eventually(lambda: (client.poll(), not client.is_ready)[1])


@pytest.mark.parametrize("behind", range(6))
def test_a_frame_that_comes_in_pieces_is_understood(
    client: Client, server: FakeServer, behind: int
) -> None:
    """A frame that arrives in pieces is understood, also behind a whole frame in one packet."""
    peer = server.next_peer()
    first, second = client.ask(KEYS), client.ask(KEYS)
    frames = [framed(Matched(number, 2, {})) for number in (first, second)]
    peer.sendall(frames[0] + frames[1][:behind])
    eventually(lambda: (client.poll(), client.answer(first))[1])
    assert client.answer(second) is None
    peer.sendall(frames[1][behind:])
    eventually(lambda: (client.poll(), client.answer(second))[1])
    assert client.is_ready


def test_a_server_that_never_stops_talking_holds_no_step(
    client: Client, server: FakeServer
) -> None:
    """A step reads a bounded part of what a server sends without end."""
    peer, over = server.next_peer(), threading.Event()
    said = framed(State(True, 64, "kv tokens heads dim", 1)) * 4096

    def talk() -> None:
        peer.settimeout(0.5)
        while not over.is_set():
            try:
                peer.sendall(said)
            except OSError:
                return

    talking = threading.Thread(target=talk)
    talking.start()
    steps = threading.Thread(target=lambda: [client.poll() for _ in range(20)], daemon=True)
    steps.start()
    steps.join(30)
    hung = steps.is_alive()
    over.set()
    talking.join()
    assert not hung


@pytest.mark.parametrize("others", [0, 2000], ids=["alone", "behind much else"])
def test_an_engine_that_got_no_cpu_takes_the_answer_that_has_come(
    client: Client, server: FakeServer, monkeypatch: pytest.MonkeyPatch, others: int
) -> None:
    """A server that answered while the engine did not run is not lost, whatever came before."""
    now = [1e6]
    monkeypatch.setattr(client_module.time, "monotonic", lambda: now[0])
    peer, receive = server.next_peer(), client._receive
    news = framed(State(True, 64, "kv tokens heads dim", 1)) * others
    number = client.ask(KEYS)

    def starved(wait_s: float) -> bool:
        heard = receive(wait_s)
        monkeypatch.setattr(client, "_receive", receive)
        peer.sendall(news + framed(Matched(number, 2, {"host": 2})))
        now[0] += 3600.0
        return heard

    monkeypatch.setattr(client, "_receive", starved)
    found = client.answer(number, 0.4e-3)
    found = found or client.answer(number, 0.4e-3)  # the first may have waited long enough
    assert found is not None
    assert found.blocks == 2
    assert client.is_ready


def test_a_request_that_is_longer_than_a_frame_fails_by_itself(
    client: Client, server: FakeServer
) -> None:
    """A request longer than a frame fails alone, and a match of that length finds nothing."""
    keys = bytes(9 << 20)
    number = client.start(Operation.GET, keys, 0, IDS)
    (done,) = client.poll()
    assert (done.number, done.status) == (number, "failed")
    assert client.match(keys).blocks == 0
    assert client.is_ready


def kept_by(client: Client) -> int:
    """Return how many items a client keeps in its collections."""
    return sum(len(each) for each in vars(client).values() if isinstance(each, dict | set | list))


@pytest.mark.parametrize("released", [True, False], ids=["released", "lost"])
def test_a_client_keeps_nothing_of_what_nobody_waits_for(
    client: Client, server: FakeServer, released: bool
) -> None:
    """A client keeps nothing of questions that were released, or that were lost with a server."""
    before = kept_by(client)
    numbers = [client.ask(KEYS) for _ in range(5)]
    if released:
        client.release(numbers)
    else:
        client.start(Operation.PUT, KEYS, 0, IDS)
        client.give_up("a test")
        assert len(client.poll()) == 1
    assert kept_by(client) == before


def test_a_question_asks_for_no_more_than_it_is_told_to(client: Client, server: FakeServer) -> None:
    """A question asks for a hold or for news of each block only if it is told to."""
    peer = server.next_peer()
    for named in ({}, {"hold": True}, {"tell": True}):
        client.ask(KEYS, **named)
        heard = server.hear(peer)
        assert {"hold": heard.hold, "tell": heard.tell} == {"hold": False, "tell": False, **named}


def test_a_server_that_has_hung_up_is_lost_with_the_next_question(
    client: Client, server: FakeServer
) -> None:
    """A server that has hung up is noticed with the next question."""
    server.next_peer().close()
    client.ask(KEYS)
    assert not client.is_ready


def test_many_numbers_go_in_several_messages(client: Client, server: FakeServer) -> None:
    """Many numbers go in several messages, each as long as a server accepts."""
    peer = server.next_peer()
    client.release(range(10_000))
    client.flush()
    heard: list[int] = []
    while len(heard) < 10_000:
        heard += server.hear(peer).numbers
    assert heard == list(range(10_000))


def test_changes_that_nobody_fetches_are_bounded(
    settings: Settings, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changes that nobody fetches are bounded; then the client only reports that some are lost."""
    monkeypatch.setattr(changes_module, "CHANGES_MAX", 10)
    client = Client(settings, MODEL, watches=True)
    eventually(lambda: (client.poll(), client.is_ready)[1])
    peer = server.next_peer()
    for number in range(8):
        server.say(peer, Changed(((bytes([number]) * 16, "host", True, 0),) * 3))
    server.say(peer, State(False, 0, ""))
    eventually(lambda: (client.poll(), not client.is_ready)[1])
    changes = client.changes()
    assert sum(len(each.changes) for each in changes) <= 10
    assert changes[0].lost
    client.close()


# -- agents ---------------------------------------------------------------------------------------


@pytest.fixture
def agent(settings: Settings, server: FakeServer) -> Iterator[Agent]:
    """Yield an agent that has begun to connect."""
    made = Agent(settings.server_recv_port, MODEL, settings.cache_config)
    made.start(kv_caches())
    yield made
    made.close()


def ids(*numbers: int) -> bytes:
    """Return ids as they are sent."""
    return np.array(numbers, np.int64).tobytes()


AGENT_NONSENSE: dict[str, Any] = {
    "a name that is not text": NOT_TEXT,
    "nothing": b"",
    "deep": b"\x91" * 60_000,
    "a negative token": b"\x95\xa4copy\xff\xc3\xc4\x00\xc4\x00",
    "ids that are none": Copy(1, True, b"1234567", b"12345678"),
    "a client's word": State(True, 64, ""),
    "a match": Matched(1, 1, {}),
}


def lent(server: FakeServer) -> socket.socket:
    """Return the next agent's connection, once it has lent its device."""
    peer = server.next_peer()
    assert isinstance(server.hear(peer), DeviceReady)
    return peer


@pytest.mark.parametrize("kind", AGENT_NONSENSE)
def test_an_agent_that_hears_nonsense_connects_again(
    agent: Agent, server: FakeServer, kind: str
) -> None:
    """An agent that gets nonsense ends its copies, hangs up, and lends its device anew."""
    peer = lent(server)
    server.say(peer, Copy(7, False, ids(0, 1), ids(0, 1)))
    server.say(peer, AGENT_NONSENSE[kind])
    assert server.hear(peer) == Copied(7)
    with pytest.raises(Exception, match="closed"):
        server.hear(peer)
    peer = lent(server)
    server.say(peer, Copy(8, True, ids(3), ids(3)))
    assert server.hear(peer) == Copied(8)


def test_an_agent_hangs_up_when_its_last_copy_has_ended(
    agent: Agent, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent ends a connection once no copy is left, and then lends its device anew."""
    peer, reap, wait = lent(server), Agent._reap, Agent._wait_drained

    async def reap_and_wait(agent: Agent) -> None:
        asyncio.get_running_loop().call_soon(reap, agent)
        await wait(agent)

    # Copies end only when the agent waits for them already.
    monkeypatch.setattr(Agent, "_reap", lambda _: None)
    monkeypatch.setattr(Agent, "_wait_drained", reap_and_wait)
    server.say(peer, Copy(7, False, ids(0, 1), ids(0, 1)))
    server.say(peer, b"")
    assert server.hear(peer) == Copied(7)
    with pytest.raises(Exception, match="closed"):
        server.hear(peer)
    lent(server)


@pytest.mark.parametrize(
    ("host", "device", "group"),
    [
        (ids(99), ids(0), 0),
        (ids(0), ids(99), 0),
        (ids(-1), ids(0), 0),
        (ids(0, 1), ids(0), 0),
        (ids(0), ids(0), 1),
    ],
)
def test_a_copy_that_cannot_be_is_answered_with_an_error(
    agent: Agent, server: FakeServer, host: bytes, device: bytes, group: int
) -> None:
    """A copy with unknown blocks, an unknown group or unequal counts is answered by an error.

    The next one works.
    """
    peer = lent(server)
    server.say(peer, Copy(1, True, host, device, group))
    assert server.hear(peer).error
    server.say(peer, Copy(2, True, ids(0), ids(0)))
    assert server.hear(peer) == Copied(2)


def test_an_agent_leaves_a_server_alone_whose_memory_it_cannot_map(
    settings: Settings, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent that cannot map a server's memory does not connect to it again for a while."""
    monkeypatch.setattr("flexkv.server.agent.RETRY_REFUSED_S", 60.0)
    server.gives_memory = False
    agent = Agent(settings.server_recv_port, MODEL, settings.cache_config)
    agent.start(kv_caches())
    server.next_peer().close()
    with pytest.raises(queue.Empty):
        server.next_peer(within_s=0.3)
    agent.close()


@pytest.mark.parametrize(
    "welcome",
    [
        Welcome(PROTOCOL_VERSION, 1, None, (), 0, 0, 0),
        Welcome(PROTOCOL_VERSION, 1, None, (), 1 << 62, 1 << 62, 0),
        Welcome(PROTOCOL_VERSION, 1, None, (), 1 << 30, 4096, 0),
        Welcome(PROTOCOL_VERSION, 1, None, (), 16, 4096, (1 << 63) - 1),
    ],
)
def test_an_agent_asks_again_when_host_memory_cannot_be(
    settings: Settings, server: FakeServer, welcome: Welcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a descriptor or valid sizes of host memory an agent retries, and leaks nothing."""
    monkeypatch.setattr("flexkv.server.agent.RETRY_REFUSED_S", 0.05)
    server.welcome = welcome
    before = len(os.listdir("/proc/self/fd"))
    agent = Agent(settings.server_recv_port, MODEL, settings.cache_config)
    agent.start(kv_caches())
    for _ in range(3):
        server.next_peer().close()
    server.welcome, server.gives_memory = None, False
    for _ in range(3):
        server.next_peer().close()
    server.gives_memory = True
    for _ in range(4):
        peer = server.next_peer()
        if peer.recv(1):
            break
        peer.close()
    else:
        pytest.fail("the device was not lent")
    peer.close()
    agent.close()
    assert len(os.listdir("/proc/self/fd")) <= before
