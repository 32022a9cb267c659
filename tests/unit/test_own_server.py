"""A server that an engine has launched is launched again when it ends, but not for ever."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from flexkv.common.config import ModelConfig, Settings
from flexkv.common.errors import BackendUnavailableError, ConfigError
from flexkv.integration.common import own_server
from flexkv.integration.common.own_server import RELAUNCH_S, YOUNG_MAX, YOUNG_S, OwnServer

MODEL = ModelConfig(num_layers=1, num_kv_heads=1, head_size=8, dtype="float16")


class World:
    """A clock, and the servers that were launched so far."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s, self.servers = 0.0, list[Server]()
        self.refusals: list[Exception] = []
        """The errors of the next launches."""
        self.refused_s: list[float] = []
        monkeypatch.setattr(own_server.time, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(own_server, "LaunchedServer", self._launch)

    def _launch(self, *_: Any, waits: bool = True, is_awaited: bool = True) -> Server:
        assert waits is is_awaited  # a scheduler's step waits for neither
        if self.refusals:
            self.refused_s.append(self.now_s)
            raise self.refusals.pop(0)
        self.servers.append(Server(len(self.servers)))
        return self.servers[-1]

    def passes(self, own: OwnServer, seconds: float) -> None:
        """Advance the clock, with one look per second, as steps look."""
        for _ in range(int(seconds)):
            self.now_s += 1.0
            own.look()


class Server:
    """A fake launched server."""

    def __init__(self, pid: int) -> None:
        self.pid, self.has_ended, self.closed = pid, False, 0
        self.refusal: Exception | None = None

    def look(self) -> bool:
        """Return True if the server listens, or raise why it does not."""
        if self.refusal is not None:
            raise self.refusal
        return True

    def close(self) -> None:
        """Count the call."""
        self.closed += 1


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """Return a clock without servers so far."""
    return World(monkeypatch)


@pytest.mark.parametrize("ends", ["ended", "refused", "killed"])
def test_a_server_that_ends_young_is_launched_a_few_times(world: World, ends: str) -> None:
    """A server that ends young is launched YOUNG_MAX times, with growing pauses, then no more."""
    own, launched_s = OwnServer(MODEL, Settings()), list[float]()
    for _ in range(3600):
        newest = world.servers[-1]
        newest.has_ended = True
        if ends == "refused":
            newest.refusal = ConfigError("cpu_cache_gb", 1000, "is beyond this machine")
        elif ends == "killed":
            newest.refusal = BackendUnavailableError("server", "it ended before it listened")
        count = len(world.servers)
        world.passes(own, 1)
        if len(world.servers) > count:
            launched_s.append(world.now_s)
    assert len(world.servers) == YOUNG_MAX
    pauses = [b - a for a, b in zip([0.0, *launched_s], launched_s, strict=False)]
    assert pauses[0] >= RELAUNCH_S
    assert pauses == sorted(pauses)
    assert [each.closed for each in world.servers[:-1]] == [1] * (YOUNG_MAX - 1)
    own.close()
    assert world.servers[-1].closed == 1


def test_a_server_that_lived_long_is_launched_again_each_time(world: World) -> None:
    """A server that lived long is launched again soon, any number of times."""
    own = OwnServer(MODEL, Settings())
    for count in range(1, 3 * YOUNG_MAX):
        world.passes(own, YOUNG_S)
        assert len(world.servers) == count
        world.servers[-1].has_ended = True
        world.passes(own, 2)
    assert own.pid == len(world.servers) - 1


def test_a_server_that_runs_is_left_alone(world: World) -> None:
    """A running server is neither closed nor launched again."""
    own = OwnServer(MODEL, Settings())
    world.passes(own, 1000)
    assert len(world.servers) == 1
    assert not world.servers[0].closed


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
        OSError(errno.EMFILE, "Too many open files"),
        ValueError("filedescriptor out of range"),
        BackendUnavailableError("server", "it is made to fail"),
    ],
)
def test_a_launch_that_fails_concerns_no_step(world: World, error: Exception) -> None:
    """A failed launch raises in no step; it counts as a young end and doubles the pause."""
    own = OwnServer(MODEL, Settings())
    world.refusals = [error] * 2
    world.servers[0].has_ended = True
    world.passes(own, 1000)
    assert world.refused_s == [RELAUNCH_S, 3 * RELAUNCH_S]
    assert len(world.servers) == 2
    world.servers[1].has_ended = True
    world.refusals = [error] * YOUNG_MAX
    world.passes(own, 10_000)
    assert len(world.servers) == 2
    own.close()


def test_launches_that_always_fail_are_given_up(world: World) -> None:
    """Launches that always fail are given up, and the engine goes on without a server."""
    own = OwnServer(MODEL, Settings())
    world.servers[0].has_ended = True
    world.refusals = [OSError(errno.ENOMEM, "Cannot allocate memory")] * 100
    world.passes(own, 10_000)
    assert len(world.refused_s) == YOUNG_MAX - 1
    own.close()


def test_a_server_that_cannot_be_looked_at_is_looked_at_again(world: World) -> None:
    """A look that fails, such as for lack of descriptors, proves nothing and is repeated."""
    own = OwnServer(MODEL, Settings())
    world.servers[0].refusal = OSError(errno.EMFILE, "Too many open files")
    world.passes(own, 100)
    world.servers[0].refusal = None
    world.passes(own, 100)
    assert len(world.servers) == 1
    assert not world.servers[0].closed
