"""What `flexkv doctor` says of sharing between nodes, over a real Redis."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flexkv.cli import doctor_peers
from flexkv.cli.doctor_peers import _memory, peers
from flexkv.cli.doctor_tiers import Finding
from flexkv.cli.main import commands
from flexkv.common.config import CacheConfig
from flexkv.testing.redis_server import RedisServer

SECRETS = {"redis_password": "of-redis", "key_secret": "of-keys", "cluster_secret": "of-nodes"}


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    """Yield a running Redis with a password."""
    server = RedisServer(password=SECRETS["redis_password"])
    server.start()
    yield server
    server.close()


def found(redis: RedisServer, **keys: Any) -> dict[str, Finding]:
    """Return the findings of a configuration, by name."""
    base = {"enable_p2p_cpu": True, "redis_port": redis.port, "redis_password": redis.password}
    findings = list(peers(CacheConfig(num_cpu_blocks=8, enable_ssd=False, **{**base, **keys})))
    for secret in SECRETS.values():
        assert secret not in str(findings)
    return {each.name: each for each in findings}


def test_what_works_is_said(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis takes what nodes write, and nothing of that stays; address and secret are fine."""
    monkeypatch.setattr("flexkv.cli.doctor_peers.SLOW_MS", 60_000.0)  # this machine may be busy
    said = found(redis, cluster_secret=SECRETS["cluster_secret"])
    assert all(each.good for each in said.values()), said
    assert "ms a round trip" in said["Redis"].found
    assert said["sharing: secret"].found == "cluster_secret is set"
    assert "set local_ip" in said["sharing: address"].advice, "it is of this machine alone"
    with socket.create_connection(("127.0.0.1", redis.port)) as peer:
        peer.sendall(f"AUTH {redis.password}\r\nDBSIZE\r\n".encode())
        answer = b""
        while answer.count(b"\r\n") < 2:
            answer += peer.recv(100)
    assert answer == b"+OK\r\n:0\r\n"


def test_a_redis_that_is_slow_could_be_better(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long round trip is told, and does not fail."""
    monkeypatch.setattr("flexkv.cli.doctor_peers.SLOW_MS", 0.0)
    said = found(redis)["Redis"]
    assert (said.good, said.fatal) == (False, False)


def test_a_redis_that_cannot_be_used_is_fatal(redis: RedisServer) -> None:
    """A wrong password, and a port where nothing listens, are named with the keys to look at."""
    for keys in ({"redis_password": "wrong"}, {"redis_port": 1}):
        said = found(redis, **keys)["Redis"]
        assert (said.good, said.fatal) == (False, True)
        assert "redis_password" in said.advice
        assert "wrong" not in said.found


def test_a_client_of_redis_that_is_not_installed_is_named(
    redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The finding says which extra brings it, and does not blame the address of Redis."""
    monkeypatch.setitem(sys.modules, "redis", None)
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    said = found(redis)["Redis"]
    assert (said.good, said.fatal) == (False, True)
    assert "pip install 'flexkv[cluster]'" in said.found
    assert said.advice == "install what is missing"


def test_an_address_of_another_machine_or_in_use_is_fatal(redis: RedisServer) -> None:
    """The node must be able to listen at local_ip and p2p_port."""
    other = found(redis, local_ip="192.0.2.1")["sharing: address"]
    assert (other.good, other.fatal) == (False, True)
    assert "local_ip='192.0.2.1': is no address of this machine" in other.found
    with socket.create_server(("127.0.0.1", 0)) as taken:
        used = found(redis, p2p_port=taken.getsockname()[1])["sharing: address"]
    assert (used.good, used.fatal) == (False, True)
    assert "p2p_port" in used.advice


def test_it_says_what_the_secret_is_made_of(redis: RedisServer) -> None:
    """The secret is derived from others if it is not set; none at all could be better."""
    said = found(redis, key_secret=SECRETS["key_secret"])["sharing: secret"]
    assert (said.found, said.good) == ("derived from key_secret and redis_password", True)
    said = found(redis, redis_password="")["sharing: secret"]
    assert not said.good


def test_a_configuration_of_mooncake_is_tried(redis: RedisServer, tmp_path: Path) -> None:
    """A right file is said to be one; a file that no engine would start with is fatal."""
    file = tmp_path / "mooncake.json"
    for text, said in (
        (None, "cannot be read: No such file"),
        ('{"engine_ip": "127.0.0.1", "protocol": "rdma"}', "needs p2p_trusted_network"),
    ):
        if text is not None:
            file.write_text(text)
        wrong = found(redis, mooncake_config_path=str(file))["sharing: Mooncake"]
        assert (wrong.good, wrong.fatal) == (False, True)
        assert said in wrong.found
    file.write_text('{"engine_ip": "127.0.0.1"}')
    right = found(redis, mooncake_config_path=str(file))["sharing: Mooncake"]
    assert (right.good, right.found) == (True, "can be loaded; tcp at 127.0.0.1")
    assert "sharing: Mooncake" not in found(redis)


def test_sharing_needs_io_uring(redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without io_uring nothing is shared, and the exit status says so."""

    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(doctor_peers, "SocketRing", refused)
    assert found(redis)["sharing: sockets"].fatal


@pytest.mark.parametrize(
    ("facts", "good"),
    [
        ({"maxmemory": "0", "maxmemory_policy": "allkeys-lru"}, True),
        ({"maxmemory": "1000", "maxmemory_policy": "noeviction"}, True),
        ({"maxmemory": "1000", "maxmemory_policy": "allkeys-lru"}, False),
        ({"maxmemory": "1000", "maxmemory_policy": "volatile-ttl"}, False),
        ({}, True),
    ],
)
def test_a_redis_that_forgets_keys_could_be_better(facts: dict[str, str], good: bool) -> None:
    """Only a Redis with a bound may evict, and only `noeviction` keeps it from that."""
    assert _memory({"used_memory": "5", **facts}).good == good


def test_keys_that_enable_nothing_are_named(tmp_path: Path, monkeypatch: Any) -> None:
    """A host alone enables nothing; a configuration without such keys is not spoken of."""
    for keys, names in (({"redis_host": "10.0.0.9"}, True), ({}, False)):
        file = tmp_path / "flexkv.json"
        file.write_text(json.dumps({"enable_ssd": False, "num_cpu_blocks": 8, **keys}))
        monkeypatch.setenv("FLEXKV_CONFIG_PATH", str(file))
        told = CliRunner().invoke(commands, ["doctor", "--json"])
        assert told.exit_code == 0, told.output
        said = json.loads(told.stdout).get("sharing between nodes")
        assert (said is not None) == names
        if said is not None:
            assert "redis_host" in said["found"]
            assert "enable_p2p_cpu" in said["advice"]
