"""Tests of an instance whose devices do not answer: others are served; its blocks stay claimed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv.common.config import Settings
from flexkv.common.errors import ConfigError
from flexkv.common.request import Operation
from flexkv.io.memory.arena import Arena
from flexkv.server.client import Client
from flexkv.server.launch import LaunchedServer
from flexkv.server.operator import command
from flexkv.server.wire import Cancel, Copied, Copy, Done, Match, Matched, Start
from flexkv.testing.agent_process import AgentProcess

from .conftest import MODEL
from .serving import BLOCKS, Instance, Peer, eventually, settings_in

PUTS = 100
REQUESTS_MAX = 32


@pytest.fixture
def settings(tmp_path: Path, request: Any) -> Settings:
    """Return settings with the test's parameter as `io_deadline_s`, or 0.5 s."""
    deadline_s = getattr(request, "param", 0.5)
    return settings_in(
        tmp_path, io_deadline_s=deadline_s, num_cpu_blocks=512, requests_max=REQUESTS_MAX
    )


@pytest.fixture
def sound(instance: Instance) -> Instance:
    """Return an instance that works."""
    return instance


@pytest.fixture
def stuck(settings: Settings, launched: LaunchedServer) -> Iterator[tuple[Peer, Peer]]:
    """Yield agent and client of instance 1, whose agent takes copies and never ends them."""
    agent, client = Peer(settings, "agent", 1), Peer(settings, "client", 1)
    client.hear_ready()
    yield agent, client
    agent.close()
    client.close()


def serves(instance: Instance, rounds: int = 20) -> None:
    """Check that puts and gets of an instance all complete, with the right bytes."""
    before = instance.content(range(BLOCKS))
    for prompt in range(rounds):
        assert instance.request(Operation.PUT, prompt, range(BLOCKS)).moved == BLOCKS
        assert instance.request(Operation.GET, prompt, range(20, 20 + BLOCKS)).moved == BLOCKS
        np.testing.assert_array_equal(instance.content(range(20, 20 + BLOCKS)), before)


def status(settings: Settings) -> Any:
    """Return the server's status."""
    return command(settings.server_recv_port, "status")


def is_stuck(settings: Settings) -> bool:
    """Return whether the server has noticed that instance 1 does not answer."""
    return bool(status(settings)["instances"]["1"]["stuck"])


@pytest.mark.parametrize("settings", [0.3, 60.0], indirect=True)
def test_puts_of_a_stuck_instance_starve_nobody(sound: Instance, stuck: tuple[Peer, Peer]) -> None:
    """Far more puts of a stuck instance than are admitted delay no other, whatever the deadline."""
    agent, client = stuck
    for number in range(PUTS):
        client.put(number + 1)
    agent.hear(Copy)
    serves(sound)


@pytest.mark.parametrize("settings", [0.3, 60.0], indirect=True)
def test_a_stopped_process_starves_nobody(settings: Settings, sound: Instance) -> None:
    """A worker stopped during its copies delays no other instance, and works again afterwards."""
    worker, client = AgentProcess(settings, MODEL, 64, 1), Client(settings, MODEL, 1)
    eventually(lambda: (client.poll(), client.is_ready)[1])
    ids = np.arange(BLOCKS)
    keys = [client.keys(np.arange(32) + 1_000_000 + number * 1000) for number in range(PUTS)]
    numbers = {client.start(Operation.PUT, each, 0, ids) for each in keys[: PUTS // 2]}
    client.flush()
    worker.signal(signal.SIGSTOP)
    numbers |= {client.start(Operation.PUT, each, 0, ids) for each in keys[PUTS // 2 :]}
    client.flush()
    serves(sound)
    worker.signal(signal.SIGCONT)
    ended: dict[int, Done] = {}

    def is_over() -> bool:
        ended.update({done.number: done for done in client.poll()})
        return ended.keys() == numbers

    eventually(is_over, 30.0)
    assert {done.status for done in ended.values()} <= {"success", "failed"}
    again = client.start(Operation.PUT, keys[0], 0, ids)
    numbers.add(again)
    eventually(is_over)
    assert ended[again].status == "success"
    client.close()
    worker.close()


def test_a_flush_tells_of_a_stuck_instance_and_waits_no_longer(
    settings: Settings, sound: Instance, stuck: tuple[Peer, Peer]
) -> None:
    """A flush names a stuck instance and does not wait for it; the puts of others are flushed."""
    agent, client = stuck
    client.put(1)
    agent.hear(Copy)
    assert sound.request(Operation.PUT, 1, range(BLOCKS)).moved == BLOCKS
    with pytest.raises(ConfigError, match="instance 1 do not answer"):
        command(settings.server_recv_port, "flush")
    assert status(settings)["statistics"]["tiers"]["disk"]["ready_blocks"] == BLOCKS
    agent.close()
    assert client.hear(Done).status == "failed"
    command(settings.server_recv_port, "flush")


def test_what_was_not_sent_fails_and_what_was_stays_claimed(
    settings: Settings, sound: Instance, stuck: tuple[Peer, Peer]
) -> None:
    """Unsent copies fail; blocks of sent ones stay claimed until the agent is gone."""
    agent, client = stuck
    for number in range(PUTS):
        client.put(number + 1)
    failed = [client.hear(Done)]
    assert "instance 1 do not answer" in failed[0].error
    eventually(lambda: is_stuck(settings))
    client.put(1000)
    assert "do not answer" in client.hear(Done).error or failed
    tier = status(settings)["statistics"]["tiers"]["host"]
    claimed = tier["reserved_blocks"] + tier["draining_blocks"]
    assert 0 < claimed < 512 // 4
    asked = [agent.hear(Copy) for _ in range(claimed // BLOCKS)]
    serves(sound, rounds=80)  # more than the rest of host memory
    welcome, fd = agent.connected.welcome, agent.connected.arena_fd
    assert fd is not None
    arena = Arena.attach(
        os.dup(fd), welcome.num_host_blocks, welcome.block_stride_bytes, welcome.fd_offset_bytes
    )
    before = sound.content(range(BLOCKS))
    kept = [prompt for prompt in range(80) if sound.client.match(sound.keys(prompt)).blocks]
    for copy in asked:
        arena.array[np.frombuffer(copy.host_ids, np.int64)] = 0x55  # the agent goes on copying
    arena.close()
    for prompt in kept[-20:]:
        if sound.request(Operation.GET, prompt, range(20, 20 + BLOCKS)).moved == BLOCKS:
            np.testing.assert_array_equal(sound.content(range(20, 20 + BLOCKS)), before)
    agent.close()

    def claims() -> int:
        tiers = status(settings)["statistics"]["tiers"]
        return int(tiers["host"]["reserved_blocks"] + tiers["host"]["draining_blocks"])

    eventually(lambda: not claims())


def test_an_instance_that_answers_again_is_served_again(
    settings: Settings, sound: Instance, stuck: tuple[Peer, Peer]
) -> None:
    """An instance that answers again is served again, and its late copies count."""
    agent, client = stuck
    keys = os.urandom(16 * (BLOCKS + 1))
    client.put(1, keys)
    copy = agent.hear(Copy)
    eventually(lambda: is_stuck(settings))
    client.put(2)
    assert client.hear(Done).number == 2
    agent.say(Copied(copy.op_id))
    done = client.hear(Done)
    assert (done.number, done.status, done.moved) == (1, "success", BLOCKS)
    client.say(Match(7, keys))
    assert client.hear(Matched).blocks == BLOCKS
    client.put(3)
    agent.say(Copied(agent.hear(Copy).op_id))
    assert client.hear(Done).status == "success"
    assert not is_stuck(settings)
    command(settings.server_recv_port, "flush")


def test_nobody_waits_for_blocks_that_a_stuck_instance_fills(
    settings: Settings, sound: Instance, stuck: tuple[Peer, Peer]
) -> None:
    """A get of blocks that a stuck instance fills is answered without them, noticed or not."""
    agent, client = stuck
    keys = sound.keys(5)
    client.put(1, keys)
    agent.hear(Copy)
    number = sound.client.start(Operation.GET, keys, 0, np.arange(BLOCKS))
    assert sound.end_of(number).moved == 0
    eventually(lambda: is_stuck(settings))
    assert sound.client.match(keys).blocks == 0
    number = sound.client.start(Operation.GET, keys, 0, np.arange(BLOCKS))
    assert sound.end_of(number).status == "notfound"


def test_a_put_that_waits_for_its_ranks_takes_no_place(settings: Settings, sound: Instance) -> None:
    """Puts that wait for their ranks take no room in admission from other requests."""
    ids = np.arange(BLOCKS)
    waiting = [
        sound.client.start(Operation.PUT, sound.keys(1000 + number), 0, ids, when_ready=True)
        for number in range(2 * REQUESTS_MAX)
    ]
    serves(sound, rounds=3)
    sound.client.cancel(waiting)
    assert sound.end_of(waiting[-1]).status == "cancelled"


def test_requests_that_are_given_up_while_stuck_end_with_the_connection(
    settings: Settings, sound: Instance, stuck: tuple[Peer, Peer]
) -> None:
    """A request given up while stuck takes no room; it is answered when the agent leaves."""
    agent, client = stuck
    client.say(Start(1, "put", os.urandom(16 * 9), 0, np.arange(BLOCKS).tobytes(), client.epoch))
    agent.hear(Copy)
    client.say(Cancel((1,)))
    eventually(lambda: is_stuck(settings))
    assert status(settings)["statistics"]["requests_waiting"] == 0
    agent.close()
    assert client.hear(Done).status == "cancelled"
