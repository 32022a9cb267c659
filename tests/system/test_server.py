"""Tests of a real server in a process of its own, with clients and agents of several instances."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from flexkv.cli.main import commands
from flexkv.common.config import Settings
from flexkv.common.errors import BackendUnavailableError, ConfigError
from flexkv.common.request import Operation
from flexkv.index.keys import block_keys
from flexkv.server.backend import ServerBackend
from flexkv.server.client import Client
from flexkv.server.launch import LaunchedServer
from flexkv.server.operator import command
from flexkv.server.wire import Start
from flexkv.trace.load import load

from .conftest import DEVICE_BLOCKS, MODEL
from .forked import forked_server
from .serving import BLOCKS, Instance, eventually, settings_in

ROOT = Path(__file__).parents[2]


def test_bytes_come_back_over_processes(instance: Instance) -> None:
    """What was put comes back in other device blocks; another prompt finds nothing."""
    before = instance.content(range(BLOCKS))
    put = instance.request(Operation.PUT, 1, range(BLOCKS))
    assert (put.status, put.moved) == ("success", BLOCKS)
    assert instance.client.match(instance.keys(1)).blocks == BLOCKS
    assert instance.client.match(instance.keys(2)).blocks == 0
    got = instance.request(Operation.GET, 1, range(20, 20 + BLOCKS))
    assert (got.status, got.moved) == ("success", BLOCKS)
    np.testing.assert_array_equal(instance.content(range(20, 20 + BLOCKS)), before)
    assert instance.request(Operation.GET, 2, range(30, 30 + BLOCKS)).status == "notfound"


def test_two_instances_share_one_cache_and_ranks_have_their_heads(tmp_path: Path) -> None:
    """One instance gets what another put, rank by rank; their device blocks stay separate."""
    model = MODEL.model_copy(update={"tp_size": 2})
    settings = settings_in(tmp_path)
    server = forked_server(settings, model)
    one, two = (Instance(settings, model, number) for number in (0, 1))
    try:
        one.begin()
        two.begin()
        assert one.request(Operation.PUT, 1, range(BLOCKS)).moved == BLOCKS
        untouched = one.content(range(40, 40 + BLOCKS))
        assert two.request(Operation.GET, 1, range(40, 40 + BLOCKS)).moved == BLOCKS
        np.testing.assert_array_equal(
            two.content(range(40, 40 + BLOCKS)), one.content(range(BLOCKS))
        )
        np.testing.assert_array_equal(one.content(range(40, 40 + BLOCKS)), untouched)
    finally:
        one.close()
        two.close()
        server.close()
    assert server.exit_status == 0


def test_a_put_waits_until_its_ranks_are_ready(instance: Instance) -> None:
    """A put stores what its ranks wrote before they reported, whichever message comes first."""
    ids = np.arange(BLOCKS)
    number = instance.client.start(Operation.PUT, instance.keys(1), 0, ids, when_ready=True)
    time.sleep(0.05)
    assert instance.client.poll() == []
    for layer in instance.caches[0]:
        layer[:, :BLOCKS] = 1.5
    instance.agents[0].ready([number])
    assert instance.end_of(number).moved == BLOCKS
    instance.agents[0].settle([number])
    assert instance.request(Operation.GET, 1, range(20, 20 + BLOCKS)).moved == BLOCKS
    assert all((layer[:, 20 : 20 + BLOCKS] == 1.5).all() for layer in instance.caches[0])

    ahead = instance.client._next + 1
    instance.agents[0].ready([ahead])
    time.sleep(0.05)
    assert instance.client.start(Operation.PUT, instance.keys(2), 0, ids, True) == ahead
    assert instance.end_of(ahead).moved == BLOCKS

    waiting = instance.client.start(Operation.PUT, instance.keys(3), 0, ids, True)
    instance.client.cancel([waiting])
    assert instance.end_of(waiting).status == "cancelled"


def test_what_breaks_a_rule_is_refused_by_name(
    instance: Instance, settings: Settings, tmp_path: Path
) -> None:
    """A second server, another model and wrong device blocks are refused; nonsense ends alone."""
    with pytest.raises(ConfigError, match="is in use by another server"):
        forked_server(settings)
    wrong = np.arange(DEVICE_BLOCKS, DEVICE_BLOCKS + BLOCKS)
    number = instance.client.start(Operation.GET, instance.keys(1), 0, wrong)
    assert "is not a device block" in instance.end_of(number).error
    number = instance.client.start(Operation.GET, instance.keys(1), 0, np.arange(3))
    assert "must be one id of 8 bytes for each" in instance.end_of(number).error
    other = MODEL.model_copy(update={"num_layers": 2})
    assert Client(settings, other).match(b"x" * 32).blocks == 0
    assert not Client(settings, MODEL).poll()
    assert instance.request(Operation.PUT, 1, range(BLOCKS)).moved == BLOCKS
    for nonsense in (b"hello, world", b"\xff" * 64, b"\x04\x00\x00\x00\x93\x01\x02\x03"):
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(f"{tmp_path}/socket")
            peer.sendall(nonsense)
    assert instance.request(Operation.GET, 1, range(BLOCKS)).moved == BLOCKS


def test_a_get_may_leave_blocks_that_are_there_behind_it(instance: Instance) -> None:
    """A get that names blocks behind it, as an engine with a draft may, moves those before them."""
    keys = instance.keys(1, BLOCKS)
    instance.request(Operation.PUT, 1, range(BLOCKS))
    for first, drop in ((0, 2), (3, 1), (0, BLOCKS), (0, 0)):
        wanted = BLOCKS - drop - first
        number = instance.client.begin(
            Start(
                instance.client.number(), "get", keys, first,
                np.arange(20, 20 + wanted).tobytes(), instance.client.epoch, drop=drop,
            )
        )  # fmt: skip
        assert instance.end_of(number).moved == wanted


def test_the_cache_survives_who_uses_it(settings: Settings, launched: LaunchedServer) -> None:
    """An instance that leaves and comes back finds what it had put."""
    one = Instance(settings)
    one.begin()
    assert one.request(Operation.PUT, 1, range(BLOCKS)).moved == BLOCKS
    before = one.content(range(BLOCKS))
    one.close()
    again = Instance(settings)
    again.begin()
    assert again.request(Operation.GET, 1, range(30, 30 + BLOCKS)).moved == BLOCKS
    np.testing.assert_array_equal(again.content(range(30, 30 + BLOCKS)), before)
    again.close()


def test_a_server_that_is_killed_costs_hits_only(settings: Settings) -> None:
    """When a server is killed, requests under way fail; the next one is found, warm from SSD."""
    server = forked_server(settings)
    instance = Instance(settings)
    instance.begin()
    before = instance.content(range(BLOCKS))
    assert instance.request(Operation.PUT, 1, range(BLOCKS)).moved == BLOCKS
    command(settings.server_recv_port, "flush")
    waiting = instance.client.start(Operation.PUT, instance.keys(3), 0, np.arange(BLOCKS), True)
    os.kill(server.pid, signal.SIGKILL)
    assert instance.end_of(waiting).status == "failed"
    instance.agents[0].settle([waiting])
    assert instance.client.match(instance.keys(1)).blocks == 0
    server.close()
    assert server.exit_status == 1
    server = forked_server(settings)
    try:
        instance.wait_ready()
        assert instance.client.match(instance.keys(1)).by_tier == {"disk": BLOCKS}
        assert instance.request(Operation.GET, 1, range(20, 20 + BLOCKS)).moved == BLOCKS
        np.testing.assert_array_equal(instance.content(range(20, 20 + BLOCKS)), before)
    finally:
        instance.close()
        server.close()
    assert server.exit_status == 0
    assert list(Path(settings.server_recv_port.removeprefix("ipc://")).parent.glob("socket*")) == []


def test_an_operator_traces_a_running_server(
    instance: Instance, settings: Settings, tmp_path: Path
) -> None:
    """An operator can trace, flush, clear and query a server; without one the error says so."""
    path = str(tmp_path / "trace")
    assert command(settings.server_recv_port, "trace_start", path=path) == path
    instance.request(Operation.PUT, 1, range(BLOCKS))
    command(settings.server_recv_port, "flush")
    with pytest.raises(ConfigError, match="is already being recorded"):
        command(settings.server_recv_port, "trace_start")
    with pytest.raises(ConfigError, match="must be one of"):
        command(settings.server_recv_port, "dance")
    assert command(settings.server_recv_port, "trace_stop") == path
    assert [request.kind for request in load(Path(path)).requests] == ["put"]
    at = ["--server", settings.server_recv_port]
    for words, answer in (
        (["trace", "start", path, *at], f"recording {path}"),
        (["trace", "stop", *at], f"recorded {path}"),
        (["trace", "stop", *at], "no trace was being recorded"),
        (["server", "flush", *at], ""),
        (["server", "clear", *at], "forgot 16 blocks"),
        (["server", "status", *at], '"instances"'),
    ):
        said = CliRunner().invoke(commands, words)
        assert (said.exit_code, answer in said.output) == (0, True), said.output
    status = command(settings.server_recv_port, "status")
    assert status["instances"] == {
        "0": {"ranks": [0], "ready": True, "blocks": DEVICE_BLOCKS, "client": True, "stuck": ""}
    }
    with pytest.raises(BackendUnavailableError, match="no-such-socket"):
        command("ipc:///tmp/no-such-socket", "status")


def test_a_client_that_watches_hears_what_is_there(settings: Settings) -> None:
    """A client that watches is told each change of each tier, and that its server is lost."""
    server = forked_server(settings)
    made = Instance(settings)
    made.client.close()
    made.client = Client(settings, MODEL, watches=True)
    made.begin()
    known: set[tuple[bytes, str]] = set()

    def hear() -> bool:
        """Apply the changes that have arrived; return whether any were lost."""
        heard = made.client.changes()
        for changed in heard:
            for key, tier, there, _ in changed.changes:
                assert ((key, tier) in known) != there
                (known.add if there else known.remove)((key, tier))
        return any(changed.lost for changed in heard)

    try:
        made.request(Operation.PUT, 1, range(BLOCKS))
        keys = block_keys(made.keys(1))
        assert not hear()
        assert {(key, "host") for key in keys} <= known
        command(settings.server_recv_port, "flush")
        eventually(lambda: (made.client.poll(), hear(), len(known) == 2 * BLOCKS)[-1])
        command(settings.server_recv_port, "clear", tier="host")
        eventually(lambda: (made.client.poll(), hear(), len(known) == BLOCKS)[-1])
        assert known == {(key, "disk") for key in keys}
        known.clear()
        assert made.client.match(made.keys(1), tell=True).by_tier == {"disk": BLOCKS}
        eventually(lambda: (made.client.poll(), hear(), known)[-1])
        assert known == {(key, "disk") for key in keys}
        os.kill(server.pid, signal.SIGKILL)
        eventually(lambda: (made.client.poll(), hear())[-1])
    finally:
        made.close()
        server.close()


def test_a_server_tells_no_number_of_blocks_that_no_device_has(tmp_path: Path) -> None:
    """A server reports no number of device blocks: its device stands for those of all agents."""
    settings = settings_in(tmp_path)
    backend = ServerBackend(settings.cache_config, settings.cache_config.sized(MODEL))
    assert backend.device([], None, 0).facts == {"device": "agents", "layout": "agents"}
