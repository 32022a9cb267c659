"""Tests that what one peer can make a server keep is bounded, and others are still served."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import psutil
import pytest

from flexkv.common.config import Settings
from flexkv.common.errors import ClosedError, ConfigError
from flexkv.common.request import Operation
from flexkv.server.connections import CONTROLS_MAX, INSTANCES_MAX, STRANGERS_MAX
from flexkv.server.launch import LaunchedServer
from flexkv.server.operator import command
from flexkv.server.wire import (
    Answer,
    Cancel,
    Command,
    Copied,
    Copy,
    Done,
    Match,
    Matched,
    Ready,
    Release,
    Settle,
    Settled,
    Start,
    framed,
)

from .serving import BLOCKS, Instance, Peer, eventually

GROWTH_BYTES_MAX = 24 << 20
FLOOD = 100_000


@pytest.fixture
def pair(settings: Settings, launched: LaunchedServer) -> Iterator[tuple[Peer, Peer]]:
    """Yield agent and client of instance 1."""
    agent, client = Peer(settings, "agent", 1), Peer(settings, "client", 1)
    client.hear_ready()
    yield agent, client
    agent.close()
    client.close()


def memory_of(server: LaunchedServer) -> int:
    """Return the bytes that a server has in memory."""
    return int(psutil.Process(server.pid).memory_info().rss)


def serves(settings: Settings, number: int = 0) -> None:
    """Check that an instance that connects now is served."""
    instance = Instance(settings, number=number)
    instance.begin()
    try:
        before = instance.content(range(BLOCKS))
        prompt = 100 + number
        assert instance.request(Operation.PUT, prompt, range(BLOCKS)).status == "success"
        assert instance.request(Operation.GET, prompt, range(20, 20 + BLOCKS)).moved == BLOCKS
        np.testing.assert_array_equal(instance.content(range(20, 20 + BLOCKS)), before)
    finally:
        instance.close()


def flood(peer: Peer, said: Any) -> bool:
    """Send a message FLOOD times without reading; return whether the server took it all."""
    frames = framed(said) * 64
    peer.connected.socket.settimeout(1.0)
    try:
        for _ in range(FLOOD // 64):
            peer.connected.socket.sendall(frames)
    except OSError:
        return False
    return True


def _hear_for_ever(peer: Peer) -> None:
    while True:
        peer.hear(Settled)


def _is_cut_off(peer: Peer, said: bytes) -> bool:
    """Return whether the server ends a peer's connection after these bytes."""
    try:
        peer.connected.socket.sendall(said)
        peer.hear(Done)
    except (ClosedError, OSError):
        return True
    return False


# -- questions -----------------------------------------------------------------------------------


def test_questions_that_wait_for_an_answer_are_bounded(
    launched: LaunchedServer, pair: tuple[Peer, Peer]
) -> None:
    """The connection of an agent that asks about a request over and over ends; nothing is kept."""
    agent, client = pair
    client.put(1)
    agent.hear(Copy)
    before = memory_of(launched)
    flood(agent, Settle(1, (1,)))
    assert memory_of(launched) - before < GROWTH_BYTES_MAX
    agent.connected.socket.settimeout(10)
    with pytest.raises((ClosedError, OSError)):
        _hear_for_ever(agent)
    agent.close()
    assert client.hear(Done).status == "failed"


def test_an_agent_that_does_not_read_is_not_heard(
    settings: Settings, pair: tuple[Peer, Peer]
) -> None:
    """The server reads no more from an agent that does not read the answers to its questions."""
    agent, _ = pair
    assert not flood(agent, Settle(1, tuple(range(20))))
    serves(settings)


def test_copies_for_an_agent_that_does_not_read_are_bounded(
    settings: Settings, launched: LaunchedServer, pair: tuple[Peer, Peer]
) -> None:
    """Copies queued for an agent that does not read take bounded memory; others are served."""
    _, client = pair
    before = memory_of(launched)
    for number in range(3000):
        client.put(number + 1)
    serves(settings)
    assert memory_of(launched) - before < GROWTH_BYTES_MAX


@pytest.mark.parametrize("kind", [Release, Cancel, Ready])
def test_a_message_with_a_million_numbers_ends_its_connection(
    settings: Settings, pair: tuple[Peer, Peer], kind: Any
) -> None:
    """A message with a million numbers ends its connection; peers have to split such lists."""
    peer = pair[0] if kind is Ready else pair[1]
    numbers = b"\xdd" + (1_000_000).to_bytes(4, "big") + b"\x01" * 1_000_000
    name = kind.__name__.lower().encode()
    body = b"\x92" + bytes([0xA0 + len(name)]) + name + numbers
    assert _is_cut_off(peer, len(body).to_bytes(4, "little") + body)
    serves(settings)


def test_a_question_of_very_many_blocks_is_answered_soon(
    settings: Settings, pair: tuple[Peer, Peer]
) -> None:
    """Keys beyond the size of all tiers are ignored; too long a frame ends the connection."""
    agent, client = pair
    keys = os.urandom(16 * (BLOCKS + 1))
    client.put(1, keys)
    agent.say(Copied(agent.hear(Copy).op_id))
    client.hear(Done)
    client.say(Match(2, keys + os.urandom(7 << 20), tell=True))
    assert client.hear(Matched).blocks == BLOCKS
    assert _is_cut_off(client, (64 << 20).to_bytes(4, "little") + bytes(64 << 20))
    serves(settings)


# -- requests that cannot be ----------------------------------------------------------------------


def start(client: Peer, number: int, keys: bytes, ids: Any, **more: Any) -> Done:
    """Start a put, and return its end."""
    blob = np.array(ids, np.int64).tobytes()
    words = {"operation": "put", "first": 0, **more}
    client.say(
        Start(number, words["operation"], keys, words["first"], blob, client.epoch)
    )  # fmt: skip
    done: Done = client.hear(Done)
    return done


def test_a_request_that_names_a_block_twice_is_refused(
    settings: Settings, pair: tuple[Peer, Peer]
) -> None:
    """A request that names a device block or a key twice is refused: it would break the index."""
    _, client = pair
    root, one, two = (bytes([number]) * 16 for number in (1, 2, 3))
    for operation in ("put", "get"):
        done = start(client, 1, root + one + two, [5, 5], operation=operation)
        assert (done.status, "device_ids" in done.error) == ("failed", True)
        for keys in (root + one + one, root + root + one, root + one + root):
            done = start(client, 2, keys, [0, 1], operation=operation)
            assert (done.status, "named twice" in done.error) == ("failed", True)
    serves(settings)


def test_a_block_under_another_parent_is_refused(
    settings: Settings, pair: tuple[Peer, Peer]
) -> None:
    """A put of blocks under another parent is refused: no prompt has such keys."""
    agent, client = pair
    keys = [bytes([number]) * 16 for number in range(6)]
    client.say(Start(1, "put", b"".join(keys[:4]), 0, np.arange(3).tobytes(), client.epoch))
    agent.say(Copied(agent.hear(Copy).op_id))
    assert client.hear(Done).moved == 3
    for number, order in enumerate(([0, 1, 5, 3], [5, 1, 4, 3], [1, 0, 2, 3]), 2):
        done = start(client, number, b"".join(keys[each] for each in order), [0, 1, 2])
        assert (done.status, "another parent" in done.error) == ("failed", True), order
    serves(settings)


@pytest.mark.parametrize(
    ("ids", "more"),
    [
        ([0, 64], {}),
        ([-1, 0], {}),
        ([0], {}),
        ([0, 1, 2], {}),
        ([0, (1 << 63) - 1], {}),
        ([0, 1], {"first": 3}),
        ([0, 1], {"first": (1 << 63) - 1}),
        ([0, 1], {"operation": "clear"}),
    ],
)
def test_a_request_of_what_there_is_not_fails_by_itself(
    pair: tuple[Peer, Peer], ids: list[int], more: dict[str, Any]
) -> None:
    """Wrong device blocks, counts, positions and operations fail; the client stays connected."""
    agent, client = pair
    done = start(client, 1, os.urandom(48), ids, **more)
    assert (done.status, done.moved) == ("failed", 0)
    client.put(2)
    agent.say(Copied(agent.hear(Copy).op_id))
    assert client.hear(Done).status == "success"


# -- who is there ---------------------------------------------------------------------------------


def test_nothing_is_kept_of_instances_that_are_gone(
    settings: Settings, launched: LaunchedServer
) -> None:
    """Nothing is kept of instances that are gone, so any number of them may come and go."""
    Peer(settings, "control").close()
    for number in range(INSTANCES_MAX + 40):
        client = Peer(settings, "client", number)
        client.say(Match(1, bytes(32), hold=True))
        client.hear(Matched)
        client.close()
        if number % 2:
            agent = Peer(settings, "agent", 10_000 + number)
            agent.say(Ready((1,)))
            agent.say(Settle(1, (2,)))
            agent.hear(Settled)
            agent.close()
    serves(settings)


def test_the_instances_that_are_there_are_bounded(
    settings: Settings, launched: LaunchedServer
) -> None:
    """One instance too many is refused by name, and accepted once another one has gone."""
    with ExitStack() as stack:
        clients = [Peer(settings, "client", number + 1) for number in range(INSTANCES_MAX)]
        for client in clients:
            stack.callback(client.close)
        with pytest.raises(ConfigError, match=r"instance_id.*one too many"):
            Peer(settings, "client", 5000)
        clients[0].close()
        eventually(lambda: "1" not in command(settings.server_recv_port, "status")["instances"])
        stack.callback(Peer(settings, "client", 5000).close)


@pytest.mark.parametrize("number", [-1, -(1 << 63), 1 << 63, (1 << 64) - 1])
def test_an_instance_has_a_number_that_can_be(
    settings: Settings, launched: LaunchedServer, number: int
) -> None:
    """Instance numbers out of range are refused by name."""
    for role in ("client", "agent"):
        with pytest.raises(ConfigError, match="instance_id"):
            Peer(settings, role, number)


def test_many_connections_keep_nobody_out(settings: Settings, launched: LaunchedServer) -> None:
    """Engines and operators connect beside many idle operators, strangers and agents."""
    path = settings.server_recv_port.removeprefix("ipc://")
    Peer(settings, "control").close()
    with ExitStack() as stack:
        for number in range(STRANGERS_MAX + 60):
            silent = stack.enter_context(socket.socket(socket.AF_UNIX))
            silent.settimeout(10)
            silent.connect(path)
            if number % 6 == 0:
                stack.callback(Peer(settings, "control").close)
            if number % 6 == 1:
                stack.callback(IdleAgent(settings, "agent", number + 100).close)
        serves(settings)
        assert "statistics" in command(settings.server_recv_port, "status")
        connections = psutil.Process(launched.pid).num_fds()
        assert connections < STRANGERS_MAX + CONTROLS_MAX + 60


def test_the_operator_that_is_idle_longest_makes_room(
    settings: Settings, launched: LaunchedServer
) -> None:
    """The connections of the operators that are idle longest end; later ones are served."""
    with ExitStack() as stack:
        operators = [Peer(settings, "control") for _ in range(CONTROLS_MAX + 2)]
        for each in operators:
            stack.callback(each.close)
        for each in operators[:2]:
            with pytest.raises((ClosedError, ConnectionError)):
                each.hear(Answer)
        for each in operators[2:]:
            each.say(Command(1, "status"))
            assert each.hear(Answer).error == ""


class IdleAgent(Peer):
    """An agent that connects and never lends its device."""

    def say(self, said: Any) -> None:
        """Send nothing."""


def test_too_few_descriptors_keep_nobody_out(settings: Settings, launched: LaunchedServer) -> None:
    """A server that runs out of descriptors cuts useless connections in favour of useful ones."""
    instance = Instance(settings)
    instance.begin()
    process = psutil.Process(launched.pid)
    limit = process.num_fds() + 40
    _, most = resource.prlimit(launched.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(launched.pid, resource.RLIMIT_NOFILE, (limit, most))
    before = instance.content(range(BLOCKS))
    with ExitStack() as stack:
        for number in range(200):
            silent = stack.enter_context(socket.socket(socket.AF_UNIX))
            silent.settimeout(10)
            silent.connect(settings.server_recv_port.removeprefix("ipc://"))
            if number % 4 == 0:
                stack.callback(Peer(settings, "control").close)
        assert instance.request(Operation.PUT, 1, range(BLOCKS)).status == "success"
        assert instance.request(Operation.GET, 1, range(20, 20 + BLOCKS)).moved == BLOCKS
        np.testing.assert_array_equal(instance.content(range(20, 20 + BLOCKS)), before)
        assert process.num_fds() <= limit - 8
        assert "statistics" in command(settings.server_recv_port, "status")
        serves(settings, 7)
    instance.close()


# -- holds ----------------------------------------------------------------------------------------


def test_a_client_that_releases_nothing_leaves_room_for_others(
    settings: Settings, launched: LaunchedServer
) -> None:
    """A client that never releases what it holds leaves half of host memory for puts."""
    instance = Instance(settings)
    instance.begin()
    for prompt in range(4):
        assert instance.request(Operation.PUT, prompt, range(BLOCKS)).moved == BLOCKS
    command(settings.server_recv_port, "flush")
    keys = [instance.keys(prompt) for prompt in range(4)]
    holder = Peer(settings, "client", 1)
    for number, each in enumerate(keys):
        holder.say(Match(number, each, hold=True))
        assert holder.hear(Matched).blocks == BLOCKS
    host = command(settings.server_recv_port, "status")["statistics"]["tiers"]["host"]
    assert host["pinned_blocks"] == 16
    done = instance.request(Operation.PUT, 9, range(BLOCKS))
    assert (done.status, done.moved) == ("success", BLOCKS)
    holder.close()
    instance.close()


def test_a_request_may_name_a_hold_that_has_ended(
    settings: Settings, pair: tuple[Peer, Peer]
) -> None:
    """A request may name a hold that has ended or never was; it gets what is resident by then."""
    agent, client = pair
    keys = os.urandom(16 * (BLOCKS + 1))
    client.put(1, keys)
    agent.say(Copied(agent.hear(Copy).op_id))
    client.hear(Done)
    ids = np.arange(BLOCKS).tobytes()
    client.say(Match(5, keys, hold=True))
    client.say(Release((5, 5, 77)))
    for number, held in ((2, 5), (3, 99)):
        client.say(Start(number, "get", keys, 0, ids, client.epoch, held=held))
        agent.say(Copied(agent.hear(Copy).op_id))
        assert client.hear(Done).moved == BLOCKS
