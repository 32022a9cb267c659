"""Fixtures: managers in each of their forms, and servers with connected instances."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flexkv.common.config import Settings
from flexkv.common.request import KVResponse
from flexkv.kvmanager import KVManager
from flexkv.server.launch import LaunchedServer
from flexkv.testing.redis_server import RedisServer

from .caches import (
    DEVICE_BLOCKS,
    MODEL,
    PER_BLOCK,
    bytes_of,
    cache_config,
    kv_caches,
    open_fds,
    slots_of,
)
from .fake_server import FakeServer
from .forked import forked_server
from .serving import Instance, settings_in

__all__ = [
    "DEVICE_BLOCKS",
    "MODEL",
    "PER_BLOCK",
    "bytes_of",
    "cache_config",
    "kv_caches",
    "open_fds",
    "slots_of",
]


class Rig:
    """A manager, its device, and requests in one of the three forms."""

    def __init__(self, manager: KVManager, form: str) -> None:
        self.manager = manager
        self.form = form
        self.caches = kv_caches()
        manager.register_kv_caches(self.caches)

    async def request(self, operation: str, *args: Any, **named: Any) -> KVResponse:
        """Run a get, put or prefetch in the rig's form, and return its response."""
        if "task" not in self.form:
            response: KVResponse = await getattr(self.manager, operation)(*args, **named)
            return response
        task_id = getattr(self.manager, f"{operation}_async")(*args, **named)
        waited = await asyncio.to_thread(self.manager.wait, [task_id])
        return waited[task_id]


FORMS = ["loop", "thread", "task"]
CLIENT_FORMS = [f"client's {form}" for form in FORMS]
"""The same forms of a manager whose engine is in a server's process."""


@pytest.fixture(params=[*FORMS, *CLIENT_FORMS])
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    """Yield a rig in each form, and check that closing it leaves no descriptor open."""
    form, settings = request.param, settings_in(tmp_path, server_client_mode=True)
    server = forked_server(settings, MODEL) if form in CLIENT_FORMS else None
    before = open_fds()
    manager = KVManager(MODEL, cache_config(tmp_path), settings=settings if server else None)
    if "loop" in form:
        async with manager:
            yield Rig(manager, form)
    else:
        manager.start()
        try:
            yield Rig(manager, form)
        finally:
            manager.shutdown()
    assert open_fds() <= before + ("task" in form)  # the executor of to_thread stays open
    if server is not None:
        server.close()
        assert server.exit_status == 0


MakeManager = Callable[..., KVManager]


@pytest.fixture
def make_manager(tmp_path: Path) -> MakeManager:
    """Return a function that makes managers over one SSD directory, with configuration changes."""
    return lambda **changes: KVManager(MODEL, cache_config(tmp_path, **changes))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Return the settings of a server in the test's folder."""
    return settings_in(tmp_path)


@pytest.fixture
def server(settings: Settings) -> Iterator[FakeServer]:
    """Yield a server whose messages come from the test."""
    made = FakeServer(settings)
    yield made
    made.close()


@pytest.fixture
def launched(settings: Settings, request: Any) -> Iterator[LaunchedServer]:
    """Yield a running server, and check afterwards that it ended well, with nothing left in it.

    The test's parameter is the model that it serves. A test that kills its server starts its own.
    """
    server = forked_server(settings, getattr(request, "param", MODEL))
    yield server
    server.close()
    assert server.exit_status == 0


@pytest.fixture
def instance(settings: Settings, launched: LaunchedServer) -> Iterator[Instance]:
    """Yield an instance that is connected to a running server."""
    made = Instance(settings)
    made.begin()
    yield made
    made.close()


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    """Return a Redis for the nodes of a module, with a password."""
    redis = RedisServer(password="of the tests")
    redis.start()
    yield redis
    redis.close()


@pytest.fixture
def shared(redis_server: RedisServer, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Return the keys of nodes that share with each other, and with no other test's nodes."""
    return {
        "enable_p2p_cpu": True,
        "redis_port": redis_server.port,
        "redis_password": redis_server.password,
        "p2p_zone": request.node.name.replace("[", "_").rstrip("]")[-60:],
    }
