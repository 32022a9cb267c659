"""Engines that share their blocks, each on a machine of its own, and a Redis on another one."""

from __future__ import annotations

import json
import os
import select
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from flexkv.testing.namespaces import Host, Network, missing
from flexkv.testing.redis_server import RedisServer
from flexkv.testing.wire import Quality, Wire
from tests.system.forked import Program

PATIENCE_S = 60.0
DEADLINE_S = 4.0
"""`io_deadline_s` of the engines."""
SECRET, PASSWORD = "the secret of these nodes", "redis-password"
TTL_S = 3.0

Answer = dict[str, Any]


class BedNode:
    """The process of one engine."""

    def __init__(self, host: Host, log: Path, keys: dict[str, Any]) -> None:
        """Start it, without waiting."""
        self.host, self.log = host, log
        self._program = Program(
            "tests.machine.sharing_node", "main", host.pid, json.dumps(keys), log
        )
        self.pid = self._program.pid
        self._numbers = count(1)
        self._answers: dict[int, Answer] = {}
        self._read = b""

    def begin(self, what: str, **words: Any) -> int:
        """Tell it to do something, and return the number of the request."""
        number = next(self._numbers)
        self._program.say(json.dumps([number, what, words]))
        return number

    def answer(self, number: int, within_s: float = PATIENCE_S) -> Answer:
        """Return the answer to a request."""
        until_s = time.monotonic() + within_s
        output = self._program.stdout.fileno()
        while number not in self._answers:
            left_s = until_s - time.monotonic()
            assert left_s > 0, f"silent: {self.log.read_text()[-3000:]}"
            if not select.select([output], [], [], left_s)[0]:
                continue
            told = os.read(output, 1 << 16)
            assert told, f"it has ended: {self.log.read_text()[-3000:]}"
            *lines, self._read = (self._read + told).split(b"\n")
            for line in lines:
                answer = json.loads(line)
                self._answers[answer.pop("number")] = answer
        return self._answers.pop(number)

    def ready(self) -> Self:
        """Wait until it takes requests."""
        self.answer(0)
        return self

    def do(self, what: str, **words: Any) -> Answer:
        """Have something done, and return the answer."""
        return self.answer(self.begin(what, **words))

    def until(
        self,
        what: str,
        condition: Callable[[Answer], bool],
        within_s: float = PATIENCE_S,
        **words: Any,
    ) -> Answer:
        """Ask again and again until a condition is met."""
        until_s = time.monotonic() + within_s
        while not condition(answer := self.do(what, **words)):
            assert time.monotonic() < until_s, (what, answer, self.log.read_text()[-3000:])
            time.sleep(0.02)
        return answer

    def is_free(self, within_s: float = PATIENCE_S) -> Answer:
        """Wait until nothing of its host memory is held, and return the facts."""
        held = "claims", "runs", "waiting", "pinned", "reserved", "draining"
        return self.until("facts", lambda facts: not any(facts[name] for name in held), within_s)

    def signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    @property
    def is_running(self) -> bool:
        """Return whether it was not killed."""
        return self._program.is_running

    def kill(self) -> None:
        """Send SIGKILL, and wait until it has ended."""
        self._program.kill()

    def end(self) -> int:
        """Let it close, and return its exit status."""
        self._program.stdin.close()
        return self._program.wait(PATIENCE_S)

    def close(self) -> None:
        """Kill it if it has not ended."""
        self._program.close()


class Bed:
    """Machines with an engine each, and one with a Redis; a context manager.

    Attributes:
        hosts: of the engines.
        nodes: the engines.
        redis_host: the machine of the Redis.
        redis: the Redis.
    """

    def __init__(
        self,
        folder: Path,
        nodes: int,
        wire: Quality | None = None,
        has_mooncake: bool = False,
        **keys: Any,
    ) -> None:
        """Start everything; with a wire, the first two nodes reach each other by it alone."""
        self._folder, self._keys, self._starts = folder, keys, count(1)
        self._has_mooncake = has_mooncake
        self.nodes: list[BedNode] = []
        self._opened = ExitStack()
        with ExitStack() as undo:
            self.network = undo.enter_context(Network(nodes + 1))
            *self.hosts, self.redis_host = self.network.hosts
            self._addresses = [host.address for host in self.hosts]
            if wire is not None:
                ends = undo.enter_context(Wire((self.hosts[0], self.hosts[1]), wire)).addresses
                self._addresses[:2] = ends
            place = self.redis_host
            self.redis = RedisServer(PASSWORD, place.address, place.command, place.connect)
            undo.callback(self.redis.close)
            self.redis.start()
            undo.callback(self._close_nodes)
            for number in range(nodes):
                self.nodes.append(self._start(number))
            for node in self.nodes:
                node.ready()
            self._opened = undo.pop_all()

    def _start(self, number: int) -> BedNode:
        keys = {
            "enable_p2p_cpu": True, "redis_host": self.redis_host.address,
            "redis_port": self.redis.port, "redis_password": PASSWORD,
            "local_ip": self._addresses[number], "cluster_secret": SECRET,
            "io_deadline_s": DEADLINE_S, "node_ttl_seconds": TTL_S, "p2p_publish_ms": 10.0,
            **self._keys,
        }  # fmt: skip
        if self._has_mooncake:
            address = self._addresses[number]
            path = self._folder / f"mooncake-{address}.json"
            path.write_text(json.dumps({"engine_ip": address}))
            keys["mooncake_config_path"] = str(path)
        return BedNode(self.hosts[number], self._folder / f"node-{next(self._starts)}.log", keys)

    def start_again(self, number: int) -> BedNode:
        """Start an engine in place of one that has ended, and wait until it takes requests."""
        self.nodes[number].close()
        self.nodes[number] = self._start(number)
        return self.nodes[number].ready()

    def until_delivered(self) -> None:
        """Wait until no connection between machines has bytes under way."""
        until_s = time.monotonic() + PATIENCE_S
        while any(_queued(host) for host in self.hosts):
            assert time.monotonic() < until_s, [_queued(host) for host in self.hosts]
            time.sleep(0.02)

    def restart_redis(self) -> None:
        """Start the Redis again, empty."""
        self.redis.kill()
        self.redis.start()

    def redis_says(self, *command: str) -> None:
        """Send a command to the Redis from its own machine."""
        said = f"AUTH {PASSWORD}\r\n{' '.join(command)}\r\n".encode()
        with self.redis_host.connect(self.redis_host.address, self.redis.port) as connection:
            connection.sendall(said)
            answers = connection.makefile("rb")
            assert [answers.readline() for _ in range(2)] == [b"+OK\r\n"] * 2

    def _close_nodes(self) -> None:
        for node in self.nodes:
            node.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._opened.close()


def _queued(host: Host) -> list[str]:
    """Return the connections of a host with bytes that nobody has read or acknowledged yet."""
    lines = host.run("ss", "-Htn").splitlines()
    return [line for line in lines if line.split()[1:3] != ["0", "0"]]


def check_machine() -> None:
    """Skip a test where no machines can be had."""
    if lacking := missing():
        pytest.skip(lacking)
