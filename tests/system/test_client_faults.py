"""Tests of managers that are clients, when calls are cancelled and servers stop or vanish."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv.actors.supervisor import Supervisor
from flexkv.common.config import Settings
from flexkv.common.errors import (
    BackendUnavailableError,
    ClosedError,
    ConfigError,
    TransferError,
)
from flexkv.common.request import KVResponseStatus, Operation, Request, Span
from flexkv.common.terms import Tier
from flexkv.kvmanager import KVManager
from flexkv.process.polling import is_readable
from flexkv.server import client as client_module
from flexkv.server import engine_client
from flexkv.server.engine_client import EngineClient
from flexkv.server.handshake import connect
from flexkv.server.remote_ticket import RemoteTicket
from flexkv.server.wire import PROTOCOL_VERSION, Hello, Matched, Welcome, failed

from .caches import MODEL, PER_BLOCK, bytes_of, kv_caches, slots_of
from .clients import started_client
from .fake_server import FakeServer
from .forked import forked_server
from .serving import Peer, settings_in

PROMPT = np.arange(1000, 1000 + 10 * PER_BLOCK)
SLOTS = slots_of(range(10))


async def test_a_get_that_is_cancelled_at_once_touches_no_slots(tmp_path: Path) -> None:
    """A task that is cancelled in the step that started it never writes to its slots."""
    settings = settings_in(tmp_path, server_client_mode=True)
    server = forked_server(settings, MODEL)
    async with KVManager(MODEL, settings=settings) as manager:
        caches = kv_caches()
        manager.register_kv_caches(caches)
        assert (await manager.put(PROMPT, SLOTS)).return_mask.all()
        before = bytes_of(caches, range(20, 30)).copy()
        task = manager.get_async(PROMPT, slots_of(range(20, 30)))
        manager.cancel(task)
        assert (await manager.get(PROMPT, slots_of(range(40, 50)))).return_mask.all()
        # The get may end before the loop has turned, and the task form has no event.
        while not (ended := manager.try_wait(task)):  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert ended[task].status is KVResponseStatus.CANCELLED
        assert np.array_equal(bytes_of(caches, range(20, 30)), before)
        assert manager.statistics().requests["get"] == {"success": 1}
    server.close()


def test_a_wait_ends_soon_after_its_timeout_although_the_server_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that does not answer a cancel is lost at once, not after a silence of a minute."""
    monkeypatch.setattr(client_module, "HANG_S", 3600.0)
    settings = settings_in(tmp_path, server_client_mode=True)
    server = forked_server(settings, MODEL)
    manager = KVManager(MODEL, settings=settings)
    manager.start()
    manager.register_kv_caches(kv_caches())
    os.kill(server.pid, signal.SIGSTOP)
    task = manager.get_async(PROMPT, SLOTS)
    responses: list[Any] = []
    thread = threading.Thread(
        target=lambda: responses.append(manager.wait(task, timeout=0.1)), daemon=True
    )
    thread.start()
    thread.join(15)
    os.kill(server.pid, signal.SIGCONT)
    assert responses
    assert responses[0][task].status is KVResponseStatus.TIMEOUT
    manager.shutdown()
    server.close()


@pytest.mark.parametrize("call", ["release", "cancel"])
async def test_a_connection_that_ends_is_watched_no_more(tmp_path: Path, call: str) -> None:
    """Its descriptor's number may be another file's at once, which the loop must not confuse."""
    settings = settings_in(tmp_path, server_client_mode=True)
    server = forked_server(settings, MODEL)
    async with KVManager(MODEL, settings=settings) as manager:
        door: Any = manager._door
        door.receive()
        assert door._watched is door._client.connection is not None
        os.kill(server.pid, signal.SIGKILL)
        assert is_readable(door._client.connection.fd, 10.0)
        if call == "release":
            door.release(7)
        else:
            door._client._awaited.requests.add(7)
            door.cancel((7,))
        assert door._client.connection is None
        assert door._watched is None
    server.close()


@pytest.mark.parametrize("order", ["heads first", "divided"])
def test_a_rank_that_the_server_refuses_is_not_registered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    """The server's reason is raised, and the rank may be registered again with other tensors."""
    monkeypatch.setattr(engine_client, "READY_S", 0.5)
    with started_client(tmp_path) as manager:
        other = Peer(settings_in(tmp_path), "agent", instance=1)
        caches = [layer.swapaxes(2, 3).copy() for layer in kv_caches()]
        if order == "divided":  # [blocks, splits, kv, tokens, heads, dim]
            shape = kv_caches()[0].shape
            halves = shape[1], 2, 2, shape[2] // 2, *shape[3:]
            caches = [layer.reshape(halves) for layer in kv_caches()]
        with pytest.raises(ConfigError, match="same element order as the other ranks"):
            manager.register_kv_caches(caches)
        assert not manager.is_ready()
        manager.register_kv_caches(kv_caches())
        assert manager.is_ready()
        other.close()


@pytest.fixture
def fake(settings: Settings) -> Iterator[FakeServer]:
    """A server whose every message comes from the test."""
    server = FakeServer(settings)
    yield server
    server.close()


def manager_of(settings: Settings) -> KVManager:
    """Return a client that is not started."""
    return KVManager(MODEL, settings=settings.model_copy(update={"server_client_mode": True}))


@pytest.mark.parametrize("match", ["get_match", "put_match"])
async def test_a_match_that_connects_is_of_the_order_that_was_known_before(
    settings: Settings, match: str
) -> None:
    """Keys for another element order than that of the devices never name their blocks."""
    async with manager_of(settings) as manager:
        door: Any = manager._door
        server = FakeServer(settings)

        def answer() -> None:
            peer = server.next_peer()
            server.say(peer, Matched(server.hear(peer).number, 10, {"host": 10}))

        thread = threading.Thread(target=answer)
        thread.start()
        door._client._reconnects._due_s = 0.0
        task, _ = getattr(manager, match)(PROMPT)
        thread.join()
        assert manager.is_ready()
        manager.launch(task, SLOTS)
        response = manager.try_wait(task)[task]
        assert response.status is KVResponseStatus.UNREADY
        server.close()


def test_a_prompt_that_no_message_holds_is_named(tmp_path: Path) -> None:
    """A request too long for a message fails with a ConfigError, and the next is served."""
    with started_client(tmp_path) as manager:
        manager.register_kv_caches(kv_caches())
        task = manager.prefetch_async(np.zeros((9 << 16) * PER_BLOCK, np.int64))
        response = manager.wait(task)[task]
        assert response.status is KVResponseStatus.FAILED
        assert isinstance(response.error, ConfigError)
        assert response.error.field == "token_ids"
        task = manager.put_async(PROMPT, SLOTS)
        assert manager.wait(task)[task].return_mask.all()


def test_a_flush_that_is_not_done_in_time_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `completely`, a put whose flush has not ended has an error."""

    async def flush(_: EngineClient) -> None:
        await asyncio.Event().wait()

    with started_client(tmp_path) as manager:
        manager.register_kv_caches(kv_caches())
        task = manager.put_async(PROMPT, SLOTS)
        monkeypatch.setattr(EngineClient, "flush", flush)
        response = manager.wait(task, timeout=0.5, completely=True)[task]
        assert response.status is KVResponseStatus.SUCCESS
        assert isinstance(response.error, TransferError)


async def test_a_flush_is_cancelled_while_the_server_does_not_answer(
    settings: Settings, fake: FakeServer
) -> None:
    """A flush takes as long as the server needs, unless it is cancelled."""
    async with manager_of(settings) as manager:
        fake.next_peer()
        flushing = asyncio.ensure_future(manager.flush())
        control = await asyncio.to_thread(fake.next_peer)
        assert fake.hear(control).verb == "flush"
        flushing.cancel()
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(10):
                await flushing


def test_a_server_that_ends_during_a_command_is_not_available(
    settings: Settings, fake: FakeServer
) -> None:
    """A command without an answer is a BackendUnavailableError: the manager is not closed."""
    manager = manager_of(settings)
    manager.start()
    fake.next_peer()

    def hang_up() -> None:
        peer = fake.next_peer()
        fake.hear(peer)
        peer.close()

    thread = threading.Thread(target=hang_up)
    thread.start()
    with pytest.raises(BackendUnavailableError):
        manager.statistics()
    thread.join()
    manager.shutdown()


def test_a_tier_that_this_version_does_not_know_is_not_counted(
    settings: Settings, fake: FakeServer
) -> None:
    """A match counts the tiers that both sides know."""
    fake.welcome = Welcome(PROTOCOL_VERSION, os.getpid(), tiers=("host", "tape"))
    manager = manager_of(settings)
    manager.start()
    try:
        peer = fake.next_peer()

        def answer() -> None:
            fake.say(peer, Matched(fake.hear(peer).number, 2, {"host": 1, "tape": 2}))

        thread = threading.Thread(target=answer)
        thread.start()
        match = manager.match(PROMPT)
        thread.join()
        assert match.tokens == 2 * PER_BLOCK
        assert match.tokens_by_tier == {Tier.HOST: PER_BLOCK}
    finally:
        manager.shutdown()


class Door:
    """What a ticket needs of a door; the devices settle when the test says so."""

    epoch, orders_all = 1, True

    def __init__(self) -> None:
        self.supervisor = Supervisor(lambda _: None)
        self.settled, self.settling = asyncio.Event(), asyncio.Event()

    def send(self, ticket: RemoteTicket, start: Any) -> None:
        """Lose the connection at once."""
        ticket.ended(failed(start.number, ClosedError("disconnected")))

    async def settle(self, _: int) -> None:
        """Wait for the test."""
        self.settling.set()
        await self.settled.wait()


async def test_a_cancel_while_devices_settle_is_not_lost() -> None:
    """A request that is cancelled while it asks the devices ends as cancelled, after them."""
    door: Any = Door()
    await door.supervisor.start()
    request = Request(
        Operation.GET, 1, 4, 4, Span(0, 1, 0, 4), bytes(32), np.zeros(1, np.int64), "", None, 0
    )
    running = asyncio.ensure_future(RemoteTicket(door, request, "").run())
    await door.settling.wait()
    running.cancel()
    await asyncio.sleep(0)
    assert not running.done()
    door.settled.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    await door.supervisor.stop()


def test_a_client_that_is_closed_while_it_connects_has_no_connection(
    settings: Settings, fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing from a signal handler, amid an attempt to connect, ends the attempt, too."""
    client = client_module.Client(settings, MODEL)
    sockets = []

    def interrupted(address: str, hello: Hello, answer_s: float) -> Any:
        connected = connect(address, hello, answer_s)
        client.close()
        sockets.append(connected.socket)
        return connected

    monkeypatch.setattr("flexkv.server.reconnect.connect", interrupted)
    client.poll()
    assert client.connection is None
    assert [each.fileno() for each in sockets] == [-1]
    with pytest.raises(ClosedError):
        client.connect()
    assert client.poll() == []
