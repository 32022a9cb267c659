"""What operators see of a cluster and do to it: two servers that share blocks over a real Redis."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from flexkv.cli.main import commands
from flexkv.cluster.generations import RANDOM_BITS
from flexkv.cluster.store import ClusterStoreError
from flexkv.common.config import Settings
from flexkv.common.errors import ConfigError
from flexkv.common.request import Operation
from flexkv.kvmanager import KVManager
from flexkv.server.operator import command
from flexkv.testing.redis_server import RedisServer

from .caches import MODEL
from .forked import forked_server
from .serving import Instance, eventually, settings_in

SPAN = 64
"""A span has 256 tokens, of 4 to a block."""
PATIENCE_S = 30.0


class Node(NamedTuple):
    """A server, and what connects to it."""

    settings: Settings
    pid: int
    engines: tuple[Instance, ...]

    @property
    def engine(self) -> Instance:
        """Return the engine that is connected."""
        return self.engines[0]

    @contextmanager
    def client(self) -> Iterator[KVManager]:
        """Yield a manager that is the server's client, while no other engine is connected."""
        settings = self.settings.model_copy(update={"server_client_mode": True})
        manager = KVManager(MODEL, settings=settings)
        manager.start()
        try:
            yield manager
        finally:
            manager.shutdown()

    @property
    def address(self) -> str:
        """Return the address of the server."""
        return self.settings.server_recv_port

    def told(self) -> Any:
        """Return what `flexkv cluster status --json` prints."""
        return json.loads(run("status", self, "--json"))


def run(verb: str, node: Node, *options: str, status: int = 0, answer: str = "") -> str:
    """Run a command of `flexkv cluster`, and return what it prints."""
    line = ["cluster", verb, "--server", node.address, *options]
    told = CliRunner().invoke(commands, line, input=answer, env={"COLUMNS": "150"})
    assert told.exit_code == status, told.output
    return told.stdout


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    """Yield a running Redis with a password."""
    server = RedisServer(password="of the tests")
    server.start()
    yield server
    server.close()


Make = Callable[..., Node]


@pytest.fixture
def make(tmp_path: Path, redis: RedisServer) -> Iterator[Make]:
    """Yield a function that starts a server in a folder of its own, and an engine with it."""
    with ExitStack() as undo:

        def made(name: str, has_engine: bool = True, **keys: Any) -> Node:
            folder = tmp_path / name
            folder.mkdir(mode=0o700)
            shared = {
                "enable_p2p_cpu": True, "redis_port": redis.port, "redis_password": redis.password,
                "num_cpu_blocks": 256, "num_ssd_blocks": 0, "node_ttl_seconds": 3.0,
            }  # fmt: skip
            settings = settings_in(folder, **{**shared, **keys})
            server = forked_server(settings)
            undo.callback(server.close)
            if not has_engine:
                return Node(settings, server.pid, ())
            engine = Instance(settings)
            undo.callback(engine.close)
            engine.begin()
            return Node(settings, server.pid, (engine,))

        yield made


def test_an_operator_sees_the_nodes_and_what_was_read_of_them(make: Make) -> None:
    """The status names each other node, what it is said to have, and what came from it."""
    first, second = make("first"), make("second")
    assert first.engine.request(Operation.PUT, 1, range(SPAN)).moved == SPAN
    eventually(lambda: [node["spans"] for node in second.told()["state"]["nodes"]] == [1])
    got = second.engine.request(Operation.GET, 1, range(SPAN))
    assert (got.status, got.moved) == ("success", SPAN)
    told, owner = second.told(), first.told()
    assert told["read"][owner["address"]]["blocks"] == told["read_in_all"]["blocks"] == SPAN
    assert owner["lent_bytes"] == told["read_in_all"]["bytes"] > 0
    assert (owner["grants"]["granted"], told["down"], told["shared_generation"]) == (1, [], 0)
    shown = run("status", second)
    (line,) = [each for each in shown.splitlines() if each.strip().startswith(owner["address"])]
    assert line.split()[1:3] == [owner["state"]["life"][:8], "1"]
    assert line.split()[4:] == ["up", str(SPAN), f"{told['read_in_all']['bytes'] / 1e6:.1f}",
                                "0", "0"]  # fmt: skip
    assert "1 granted" in run("status", first)


def test_a_node_that_does_not_answer_is_down(make: Make) -> None:
    """A node that was killed is named as down until its registration ends, and then forgotten."""
    killed = make("killed", has_engine=False, node_ttl_seconds=4.0)
    node = make("other", has_engine=False, node_ttl_seconds=4.0)
    for each in (killed, node):  # a link is made when it is first used: for a snapshot here

        def has_snapshot() -> bool:
            return [n["is_behind"] for n in each.told()["state"]["nodes"]] == [False]  # noqa: B023

        eventually(has_snapshot)
    address = killed.told()["address"]
    os.kill(killed.pid, signal.SIGKILL)
    eventually(lambda: node.told()["down"] == [address], PATIENCE_S)
    assert re.search(rf"{address} .* down ", run("status", node))
    eventually(lambda: node.told()["state"]["nodes"] == [], PATIENCE_S)
    assert node.told()["down"] == []
    assert "no other node is known" in run("status", node)


def test_a_node_that_was_cleared_alone_is_apart_until_a_reset(make: Make) -> None:
    """The status says so and fails; a reset asks first, and then all nodes share again."""
    first, second = make("first"), make("second")
    first.engine.request(Operation.PUT, 1, range(SPAN))
    eventually(lambda: sum(node["spans"] for node in second.told()["state"]["nodes"]) == 1)
    command(second.address, "clear")
    assert "apart" in run("status", second, status=1)
    run("reset", second, status=1, answer="n\n")
    assert first.told()["shared_generation"] == 0
    generation = json.loads(run("reset", second, "--yes", "--json"))["generation"]
    assert generation >> RANDOM_BITS in (1, 2)
    for node in (first, second):
        eventually(lambda: node.told()["shared_generation"] == generation)  # noqa: B023
        assert node.engine.client.match(node.engine.keys(1, SPAN)).blocks == 0
    again = re.search(r"generation (\d+)", run("reset", first, answer="y\n"))
    assert again is not None
    assert int(again[1]) > generation


def test_a_client_of_a_server_resets_the_cluster(make: Make) -> None:
    """A manager that is a client does so through its server, and waits until Redis has done it."""
    node = make("only", has_engine=False)
    with node.client() as manager:
        first = manager.reset(cluster=True)
        assert first > 0
        assert manager.reset(cluster=True) > first


def test_redis_that_is_down_is_named_without_its_password(make: Make, redis: RedisServer) -> None:
    """The status says that Redis is down and since what; a reset fails and says why."""
    node = make("only", has_engine=False)
    eventually(lambda: node.told()["state"]["is_registered"])
    redis.kill()
    eventually(lambda: not node.told()["state"]["is_store_up"], PATIENCE_S)
    shown = run("status", node)
    assert f"redis 127.0.0.1:{redis.port}: down" in shown
    assert "no other node is known: Redis does not answer" in shown
    line = ["cluster", "reset", "--yes", "--server", node.address]
    failed = CliRunner().invoke(commands, line)
    assert isinstance(failed.exception, ConfigError)
    assert "redis 127.0.0.1" in str(failed.exception)
    assert redis.password not in shown + str(failed.exception)
    with node.client() as manager, pytest.raises(ClusterStoreError, match="redis"):
        manager.reset(cluster=True)


def test_a_server_that_shares_nothing_says_so(make: Make) -> None:
    """Both commands name the keys that would make it share."""
    node = make("alone", has_engine=False, enable_p2p_cpu=False)
    for verb in ("status", "reset"):
        failed = CliRunner().invoke(commands, ["cluster", verb, "--server", node.address])
        assert isinstance(failed.exception, ConfigError)
        assert "enable_p2p_cpu" in str(failed.exception)
