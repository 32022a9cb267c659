"""Tests of a server's peers that stop, leave at any moment, or send what they may not."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv.common.config import Settings
from flexkv.common.errors import ConfigError
from flexkv.common.request import Operation
from flexkv.index.keys import block_identity, block_keys
from flexkv.io.memory.arena import Arena
from flexkv.links.link import Link
from flexkv.server.agent import Agent
from flexkv.server.client import Client
from flexkv.server.handshake import connect
from flexkv.server.launch import LaunchedServer
from flexkv.server.listen import Listener
from flexkv.server.operator import command
from flexkv.server.wire import (
    FRAMING,
    FROM_SERVER,
    PROTOCOL_VERSION,
    Changed,
    Copied,
    Copy,
    Done,
    Hello,
    Match,
    Matched,
    Settle,
    Settled,
    Start,
    State,
    framed,
)
from flexkv.tiers.backend import LocalBackend

from .conftest import MODEL, PER_BLOCK
from .forked import forked_server
from .serving import BLOCKS, ORDER, Instance, Peer, eventually, settings_in

TWO_RANKS = MODEL.model_copy(update={"tp_size": 2})


def is_sound(settings: Settings) -> bool:
    """Return whether the server's engine takes requests."""
    return "statistics" in command(settings.server_recv_port, "status")


def test_a_put_that_its_client_has_given_up_is_not_believed(
    settings: Settings, launched: LaunchedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A put that its client gave up while the server was stopped stores nothing."""
    answer_s = settings.server_answer_ms / 1e3
    copy, delay_s = Agent._copy, [2.4 * answer_s]

    def slow(self: Agent, asked: Copy) -> None:
        time.sleep(delay_s[0])
        copy(self, asked)

    monkeypatch.setattr(Agent, "_copy", slow)
    instance = Instance(settings)
    instance.begin()
    for layer in instance.caches[0]:
        layer[:, :BLOCKS] = 1.0
    number = instance.client.start(Operation.PUT, instance.keys(1), 0, np.arange(BLOCKS))
    instance.client.flush()
    time.sleep(0.1)
    os.kill(launched.pid, signal.SIGSTOP)
    instance.client.match(instance.keys(99))
    assert instance.end_of(number).status == "failed"
    for layer in instance.caches[0]:
        layer[:, :BLOCKS] = 7.0
    time.sleep(4 * answer_s)
    os.kill(launched.pid, signal.SIGCONT)
    delay_s[0] = 0.0
    instance.wait_ready()
    time.sleep(0.3)
    assert instance.client.match(instance.keys(1)).blocks == 0
    instance.close()


def test_what_is_settled_before_it_came_is_refused(
    settings: Settings, launched: LaunchedServer
) -> None:
    """A request that was settled before its start arrived, on another socket, is refused."""
    agent, client = Peer(settings, "agent"), Peer(settings, "client")
    client.hear_ready()
    agent.say(Settle(1, (42,)))
    agent.hear(Settled)
    client.put(42)
    assert "gave it up before it arrived" in client.hear(Done).error
    agent.close()
    client.close()


def test_a_start_for_other_devices_is_refused(settings: Settings, launched: LaunchedServer) -> None:
    """A start with an earlier epoch is refused, since its ids were made for other devices."""
    agent, client = Peer(settings, "agent"), Peer(settings, "client")
    client.hear_ready()
    before = client.epoch
    agent.close()
    again = Peer(settings, "agent")
    client.hear_ready()
    client.epoch, now = before, client.epoch
    assert now != before
    client.put(1)
    assert "have reconnected since" in client.hear(Done).error
    again.close()
    client.close()


def test_a_client_that_comes_back_uses_devices_that_still_copy_for_it(
    settings: Settings, launched: LaunchedServer
) -> None:
    """A client that reconnects can use devices that still copy for its earlier connection."""
    agent, client = Peer(settings, "agent"), Peer(settings, "client")
    client.hear_ready()
    client.put(1)
    before = agent.hear(Copy)
    client.close()
    client = Peer(settings, "client")
    client.hear_ready()
    client.put(2)
    agent.say(Copied(agent.hear(Copy).op_id))
    assert client.hear(Done).status == "success"
    agent.say(Copied(before.op_id))
    client.put(3)
    agent.say(Copied(agent.hear(Copy).op_id))
    assert client.hear(Done).status == "success"
    assert is_sound(settings)
    agent.close()
    client.close()


def test_blocks_stay_lent_until_an_agent_that_errs_has_ended(
    settings: Settings, launched: LaunchedServer
) -> None:
    """Blocks stay claimed while an agent that broke the protocol may still copy."""
    agent, client = Peer(settings, "agent"), Peer(settings, "client")
    client.hear_ready()
    client.put(1)
    ids = np.frombuffer(agent.hear(Copy).host_ids, np.int64)
    agent.say(Copied(999_999))
    time.sleep(0.2)
    tier = command(settings.server_recv_port, "status")["statistics"]["tiers"]["host"]
    assert tier["reserved_blocks"] + tier["draining_blocks"] == BLOCKS
    other = Instance(settings, number=1)
    other.begin()
    for prompt in range(4):
        assert other.request(Operation.PUT, prompt, range(BLOCKS)).moved == BLOCKS
    welcome, fd = agent.connected.welcome, agent.connected.arena_fd
    assert fd is not None
    arena = Arena.attach(
        os.dup(fd), welcome.num_host_blocks, welcome.block_stride_bytes, welcome.fd_offset_bytes
    )
    arena.array[ids] = 0x55  # its copy ends only now
    arena.close()
    agent.close()
    before = other.content(range(BLOCKS))
    for prompt in range(4):
        other.request(Operation.GET, prompt, range(20, 20 + BLOCKS))
        np.testing.assert_array_equal(other.content(range(20, 20 + BLOCKS)), before)
    assert client.hear(Done).status == "failed"
    other.close()
    client.close()


async def test_a_settle_that_ends_with_its_connection_leaves_no_other(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A settle that times out in the turn in which its connection ends spares the next one."""
    monkeypatch.setattr("flexkv.server.agent.SETTLE_S", 0.0)
    agent, loop = Agent("unix:///nowhere", MODEL, settings.cache_config), asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    link = agent._link = await Link.over(ours, FRAMING, FROM_SERVER)
    settling = loop.create_task(agent._settle((1,)))
    await asyncio.sleep(0)
    loop.call_soon(agent._forget)
    await settling
    assert not agent._leaving
    assert link.is_open
    link.close()
    await link.wait_closed()
    theirs.close()


@pytest.mark.parametrize("launched", [TWO_RANKS], indirect=True)
def test_a_rank_that_comes_back_waits_for_the_other_to_drain(
    settings: Settings, launched: LaunchedServer
) -> None:
    """After rank 1 died while rank 0 copied, the instance is ready once both connected anew."""
    agents = [Peer(settings, "agent", 0, rank, model=TWO_RANKS) for rank in range(2)]
    client = Peer(settings, "client", model=TWO_RANKS)
    client.hear_ready()
    client.put(1)
    asked = [agent.hear(Copy) for agent in agents]
    agents[1].close()
    assert client.hear(State).ready is False
    back = Peer(settings, "agent", 0, 1, model=TWO_RANKS)
    client.put(2)
    assert client.hear(Done).number == 2

    def instance() -> Any:
        return command(settings.server_recv_port, "status")["instances"]["0"]

    assert eventually(lambda: (seen := instance())["ranks"] == [0, 1] and seen)["ready"] is False
    agents[0].say(Copied(asked[0].op_id))
    agents[0].close()
    assert client.hear(Done).number == 1
    fresh = Peer(settings, "agent", 0, 0, model=TWO_RANKS)
    client.hear_ready()
    client.put(3)
    for agent in (back, fresh):
        agent.say(Copied(agent.hear(Copy).op_id))
    done = client.hear(Done)
    assert (done.number, done.status, done.moved) == (3, "success", BLOCKS)
    for peer in (back, fresh, client):
        peer.close()


def test_one_instance_that_does_not_answer_stalls_no_other(
    tmp_path: Path,
) -> None:
    """An instance that does not answer gets no new copies after a while, and delays no other."""
    settings = settings_in(tmp_path, io_deadline_s=0.5, num_cpu_blocks=256)
    server = forked_server(settings)
    stuck, client = Peer(settings, "agent", 1), Peer(settings, "client", 1)
    client.hear_ready()
    client.put(1)
    stuck.hear(Copy)
    time.sleep(0.7)
    client.put(2)
    assert "do not answer" in client.hear(Done).error
    sound = Instance(settings)
    sound.begin()
    assert sound.request(Operation.PUT, 1, range(BLOCKS)).moved == BLOCKS
    assert sound.request(Operation.GET, 1, range(20, 20 + BLOCKS)).moved == BLOCKS
    for peer in (stuck, client, sound):
        peer.close()
    server.close()
    assert server.exit_status == 0


def test_nonsense_ends_its_connection_only(settings: Settings, launched: LaunchedServer) -> None:
    """Malformed keys and frames, impossible sizes and messages of other roles harm nobody else."""
    for keys in (b"", b"x", b"x" * 17, b"x" * 40):
        peer = Peer(settings, "client")
        peer.say(Match(1, keys))
        with pytest.raises(Exception, match="closed"):
            peer.hear(Matched)
        peer.close()
        eventually(lambda: "0" not in command(settings.server_recv_port, "status")["instances"])
    for role, words in (
        ("control", b"\x95\xa7command\x01\xa6status" + b"\x91" * 100_000),
        ("agent", b"\x93\xa6copied\x05\xa0"),
        ("client", b"\x93\xa6copied\x05\xa0"),
    ):
        peer = Peer(settings, role)
        peer.say_bytes(words)
        with pytest.raises(Exception, match="closed"):
            peer.hear(Done)
        peer.close()
    with socket.socket(socket.AF_UNIX) as deep:
        deep.connect(settings.server_recv_port.removeprefix("ipc://"))
        deep.sendall(b"\xa0\x86\x01\x00" + b"\x91" * 100_000)
    with pytest.raises(ConfigError, match="null"):
        command(settings.server_recv_port, "trace_start", path="a\0b")
    with pytest.raises(ConfigError, match="num_blocks"):
        connect_agent_of(settings, 1 << 50)
    assert is_sound(settings)


@pytest.mark.parametrize("keys", [b"", b"x" * 15, b"x" * 37])
def test_a_put_of_what_are_no_keys_fails(
    settings: Settings, launched: LaunchedServer, keys: bytes
) -> None:
    """A put with malformed keys fails, also for a client that watches."""
    agent, client = Peer(settings, "agent"), Peer(settings, "client", watches=True)
    client.hear_ready()
    for epoch in (client.epoch, client.epoch + 1):
        client.say(Start(1, "put", keys, 0, b"", epoch))
        assert client.hear(Done).status == "failed"
    assert is_sound(settings)
    agent.close()
    client.close()


def connect_agent_of(settings: Settings, num_blocks: int) -> None:
    """Connect an agent whose device has this many blocks."""
    facts = block_identity(MODEL.spaces(PER_BLOCK), "")
    hello = Hello(PROTOCOL_VERSION, "agent", 1, facts, 5, 0, num_blocks, ORDER)
    connect(settings.server_recv_port, hello)


def test_what_a_client_held_is_let_go_when_it_leaves(
    settings: Settings, launched: LaunchedServer
) -> None:
    """All that a client held is released when it leaves, however often it held under one number."""
    instance = Instance(settings)
    instance.begin()
    assert instance.request(Operation.PUT, 1, range(BLOCKS)).moved == BLOCKS
    keys = instance.keys(1)
    instance.close()
    eventually(lambda: not command(settings.server_recv_port, "status")["instances"])
    command(settings.server_recv_port, "flush")
    client = Peer(settings, "client")
    for _ in range(5):
        client.say(Match(1, keys, hold=True))
        assert client.hear(Matched).blocks == BLOCKS
    statistics = command(settings.server_recv_port, "status")["statistics"]
    assert statistics["tiers"]["host"]["pinned_blocks"] == BLOCKS
    client.close()
    eventually(lambda: not command(settings.server_recv_port, "status")["statistics"]["claims"])


def test_two_clients_of_one_instance_at_once(settings: Settings, launched: LaunchedServer) -> None:
    """If several clients of one instance connect at once, one is accepted; others do no harm."""
    path = settings.server_recv_port.removeprefix("ipc://")
    Peer(settings, "control").close()  # returns once the server is there
    hello = framed(
        Hello(PROTOCOL_VERSION, "client", 1, block_identity(MODEL.spaces(PER_BLOCK), ""))
    )
    os.kill(launched.pid, signal.SIGSTOP)
    sockets = [socket.socket(socket.AF_UNIX) for _ in range(4)]
    for each in sockets:
        each.connect(path)
        each.sendall(hello)
    os.kill(launched.pid, signal.SIGCONT)
    time.sleep(0.3)
    assert is_sound(settings)
    for each in sockets:
        each.close()
    time.sleep(0.2)
    assert is_sound(settings)


def test_a_server_ends_soon_whoever_is_connected(settings: Settings) -> None:
    """A server ends soon, even with an idle client and a peer that never greets."""
    server = forked_server(settings)
    client = Peer(settings, "client")
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(settings.server_recv_port.removeprefix("ipc://"))
        begin = time.monotonic()
        server.close()
        assert time.monotonic() - begin < 8
    client.close()
    assert server.exit_status == 0


def test_an_address_that_is_a_file_is_left_alone(tmp_path: Path) -> None:
    """A file at the address is left alone."""
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="is not a socket"):
        Listener(path)
    assert path.read_text() == "mine"


def test_a_stopped_server_costs_the_scheduler_little(
    settings: Settings, launched: LaunchedServer
) -> None:
    """A stopped server delays a scheduler only briefly, and is used again when it goes on."""
    instance = Instance(settings.model_copy(update={"server_answer_ms": 250}))
    instance.begin()
    os.kill(launched.pid, signal.SIGSTOP)
    begin = time.monotonic()
    for _ in range(100):
        assert instance.client.match(instance.keys(1)).blocks == 0
        instance.client.poll()
    took_s = time.monotonic() - begin
    os.kill(launched.pid, signal.SIGCONT)
    assert took_s < 2.0
    instance.wait_ready()
    instance.close()


def test_a_client_never_waits_for_a_server_that_reads_late(
    settings: Settings, launched: LaunchedServer
) -> None:
    """A client never waits for a slow reader: what exceeds the socket's buffer is sent later."""
    instance = Instance(settings)
    instance.begin()
    keys = instance.client.keys(np.arange(4096 * PER_BLOCK))
    ids = np.zeros(0, np.int64)
    os.kill(launched.pid, signal.SIGSTOP)
    numbers = []
    for _ in range(64):  # 4 MiB
        numbers.append(instance.client.start(Operation.GET, keys, 4096, ids))
        assert instance.client.poll() == []
    os.kill(launched.pid, signal.SIGCONT)
    assert {instance.end_of(number).status for number in numbers} <= {"notfound", "success"}
    instance.close()


def test_a_long_question_has_its_time_from_when_the_server_reads_on(
    settings: Settings, launched: LaunchedServer
) -> None:
    """A long question's deadline counts from when the server reads on, not from its first bytes."""
    agent, client = Peer(settings, "agent"), Client(settings, MODEL)
    eventually(lambda: (client.poll(), client.is_ready)[1])
    os.kill(launched.pid, signal.SIGSTOP)
    number = client.ask(os.urandom(1 << 20))
    os.kill(launched.pid, signal.SIGCONT)
    time.sleep(settings.server_answer_ms / 1e3 + 0.05)  # a long step
    os.kill(launched.pid, signal.SIGSTOP)
    assert client.answer(number) is None
    os.kill(launched.pid, signal.SIGCONT)
    assert eventually(lambda: client.answer(number)).blocks == 0
    assert client.is_ready
    os.kill(launched.pid, signal.SIGSTOP)
    number = client.ask(os.urandom(1 << 20))
    assert eventually(lambda: client.answer(number)).blocks == 0
    assert not client.is_ready
    os.kill(launched.pid, signal.SIGCONT)
    client.close()
    agent.close()


def test_a_rank_is_there_once_its_device_is_set_up(
    settings: Settings, launched: LaunchedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank counts as connected only once its device is set up, so that no report is lost."""
    device = LocalBackend.device

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.4)
        return device(*arguments)

    monkeypatch.setattr(LocalBackend, "device", slowly)
    instance = Instance(settings)
    instance.begin()
    ids = np.arange(BLOCKS)
    put = instance.client.start(Operation.PUT, instance.keys(1), 0, ids, when_ready=True)
    instance.client.flush()
    instance.agents[0].ready([put])
    assert instance.end_of(put).status == "success"
    instance.close()


def test_a_client_that_watches_and_does_not_read_loses_track(
    settings: Settings, launched: LaunchedServer
) -> None:
    """A client that watches and does not read is told that it has missed changes."""
    idle, busy = Peer(settings, "client", 1, watches=True), Instance(settings)
    busy.begin()
    for prompt in range(1500):
        busy.request(Operation.PUT, prompt, range(BLOCKS))
    while not idle.hear(Changed).lost:
        pass
    busy.request(Operation.PUT, 5000, range(BLOCKS))
    keys = set(block_keys(busy.keys(5000)))
    while not keys & {key for key, _, there, _ in idle.hear(Changed).changes if there}:
        pass
    idle.close()
    busy.close()
