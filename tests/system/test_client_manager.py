"""Tests of what is particular to a manager whose engine is in a server's process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv.common import errors
from flexkv.common.config import ModelConfig, Settings
from flexkv.common.errors import (
    BackendUnavailableError,
    ClosedError,
    ConfigError,
    FlexKVError,
    cause_of,
    error_from,
)
from flexkv.common.request import KVResponseStatus
from flexkv.common.terms import Tier
from flexkv.engine.engine import Engine
from flexkv.kvmanager import KVManager
from flexkv.server import engine_client
from flexkv.server.engine_client import EngineClient

from .caches import MODEL, PER_BLOCK, bytes_of, cache_config, kv_caches, slots_of
from .clients import started_client
from .forked import forked_server
from .serving import eventually, settings_in

PROMPT = np.arange(1000, 1000 + 10 * PER_BLOCK)
SLOTS = slots_of(range(10))


def client_of(settings: Settings, model: ModelConfig = MODEL) -> KVManager:
    """Return a started client of a server, with KV caches."""
    manager = KVManager(model, settings=settings)
    manager.start()
    manager.register_kv_caches(kv_caches())
    return manager


@pytest.mark.parametrize("way", ["file", "environment"])
def test_the_file_or_the_environment_makes_a_client(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `server_client_mode` in the file or the environment, a manager is a client."""
    address = f"ipc://{tmp_path}/socket"
    if way == "file":
        file = tmp_path / "flexkv.json"
        cache = {"tokens_per_block": PER_BLOCK}
        keys = {"server_client_mode": True, "server_recv_port": address, "cache_config": cache}
        file.write_text(json.dumps(keys))
        monkeypatch.setenv("FLEXKV_CONFIG_PATH", str(file))
    else:
        monkeypatch.setenv("FLEXKV_SERVER_CLIENT_MODE", "1")
        monkeypatch.setenv("FLEXKV_SERVER_RECV_PORT", address)
    for manager in (KVManager(MODEL, cache_config(tmp_path)), KVManager(MODEL)):
        assert isinstance(manager._door, EngineClient)
        assert manager._door._settings.server_recv_port == address
    monkeypatch.setenv("FLEXKV_SERVER_CLIENT_MODE", "0")
    monkeypatch.delenv("FLEXKV_CONFIG_PATH", raising=False)
    assert isinstance(KVManager(MODEL, cache_config(tmp_path))._door, Engine)


def test_a_client_may_start_before_its_server(settings: Settings) -> None:
    """Without a server a match finds nothing, and requests are UNREADY; later they are served."""
    settings = settings.model_copy(update={"server_client_mode": True})
    manager = client_of(settings)
    try:
        assert not manager.is_ready()
        assert manager.match(PROMPT).tokens == 0
        task = manager.put_async(PROMPT, SLOTS)
        response = manager.wait(task)[task]
        assert response.status is KVResponseStatus.UNREADY
        assert isinstance(response.error, BackendUnavailableError)
        with pytest.raises(BackendUnavailableError):
            manager.statistics()
        server = forked_server(settings, MODEL)
        eventually(manager.is_ready)
        task = manager.put_async(PROMPT, SLOTS)
        assert manager.wait(task)[task].return_mask.all()
    finally:
        manager.shutdown()
    server.close()


def test_a_server_that_ends_costs_hits_and_nothing_else(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed server's requests FAIL or are UNREADY; its successor serves what is on SSD."""
    monkeypatch.setattr(engine_client, "LOOK_S", 0.01)
    settings = settings.model_copy(update={"server_client_mode": True})
    server = forked_server(settings, MODEL)
    manager = client_of(settings)
    try:
        task = manager.put_async(PROMPT, SLOTS)
        assert manager.wait(task, completely=True)[task].error is None
        os.kill(server.pid, signal.SIGKILL)
        for _ in range(3):
            task = manager.get_async(PROMPT, SLOTS)
            status = manager.wait(task)[task].status
            assert status in (KVResponseStatus.FAILED, KVResponseStatus.UNREADY)
        eventually(lambda: not manager.is_ready())
        server.close()
        server = forked_server(settings, MODEL)
        eventually(manager.is_ready)
        task = manager.get_async(PROMPT, slots_of(range(20, 30)))
        assert manager.wait(task)[task].return_mask.all()
    finally:
        manager.shutdown()
    server.close()


def test_a_server_of_another_model_refuses(settings: Settings) -> None:
    """A client with other facts than the server's is told at the start which one differs."""
    settings = settings.model_copy(update={"server_client_mode": True})
    server = forked_server(settings, MODEL)
    other = MODEL.model_copy(update={"num_layers": MODEL.num_layers + 1})
    manager = KVManager(other, settings=settings)
    with pytest.raises(ConfigError) as caught:
        manager.start()
    assert caught.value.field == "num_layers"
    manager.shutdown()
    server.close()


def test_ranks_of_one_process_are_lent_together(tmp_path: Path) -> None:
    """With two ranks here, a put and a get move both ranks' slices."""
    model = MODEL.model_copy(update={"tp_size": 2})
    heads = model.num_kv_heads // 2
    with started_client(tmp_path, model) as manager:
        ranks = [[layer[:, :, :, :heads].copy() for layer in kv_caches(seed)] for seed in (1, 2)]
        for rank, caches in enumerate(ranks):
            manager.register_kv_caches(caches, tp_rank=rank)
        assert manager.is_ready()
        before = [bytes_of(caches, range(10)) for caches in ranks]
        for start, blocks in ((manager.put_async, range(10)), (manager.get_async, range(20, 30))):
            task = start(PROMPT, slots_of(blocks))
            assert manager.wait(task)[task].return_mask.all()
        for caches, expected in zip(ranks, before, strict=True):
            assert np.array_equal(bytes_of(caches, range(20, 30)), expected)
        for rank, why in ((1, "already"), (2, "from 0 to 1")):
            with pytest.raises(ConfigError, match=why):
                manager.register_kv_caches(ranks[0], tp_rank=rank)


async def test_cancelling_ends_when_no_device_is_touched(tmp_path: Path) -> None:
    """A cancelled get raises CancelledError, and what it used serves the next request."""
    settings = settings_in(tmp_path, server_client_mode=True)
    server = forked_server(settings, MODEL)
    async with KVManager(MODEL, settings=settings) as manager:
        manager.register_kv_caches(kv_caches())
        assert (await manager.put(PROMPT, SLOTS)).return_mask.all()
        for waits in range(4):
            getting = asyncio.ensure_future(manager.get(PROMPT, SLOTS))
            for _ in range(waits):
                await asyncio.sleep(0)
            if not getting.cancel():  # the server was fast
                assert (await getting).return_mask.all()
                continue
            with pytest.raises(asyncio.CancelledError):
                await getting
        assert (await manager.get(PROMPT, SLOTS)).return_mask.all()
        eventually(lambda: manager.statistics().claims == 0)
    server.close()


def test_a_prepared_get_keeps_what_it_found(tmp_path: Path) -> None:
    """What a match by task id found stays resident until the task is cancelled."""
    with started_client(tmp_path, enable_ssd=False, num_cpu_blocks=10) as manager:
        manager.register_kv_caches(kv_caches())
        task = manager.put_async(PROMPT[: 4 * PER_BLOCK], SLOTS[: 4 * PER_BLOCK])
        manager.wait(task)
        held, mask = manager.get_match(PROMPT)
        assert mask.tolist() == [True] * 16 + [False] * 24
        task = manager.put_async(PROMPT + 5000, SLOTS)
        assert manager.wait(task)[task].return_mask.sum() < 40
        assert manager.match(PROMPT).tokens == 16
        manager.cancel(held)
        assert manager.wait(held)[held].status is KVResponseStatus.CANCELLED
        eventually(lambda: manager.statistics().tiers["host"].pinned_blocks == 0)
        task = manager.put_async(PROMPT + 9000, SLOTS)
        assert manager.wait(task)[task].return_mask.all()


def test_a_put_that_was_prepared_before_a_clear_stores_nothing(tmp_path: Path) -> None:
    """A put that was prepared before a clear ends as CANCELLED; a later one stores."""
    with started_client(tmp_path) as manager:
        manager.register_kv_caches(kv_caches())
        task, _ = manager.put_match(PROMPT)
        assert manager.clear() == 0
        manager.launch(task, SLOTS)
        response = manager.wait(task)[task]
        assert response.status is KVResponseStatus.CANCELLED
        assert isinstance(response.error, errors.ClearedError)
        task = manager.put_async(PROMPT, SLOTS)
        assert manager.wait(task)[task].return_mask.all()
        assert manager.clear(namespace="other") == 0
        assert manager.clear(Tier.HOST) == 10
        with pytest.raises(ConfigError) as caught:
            manager.clear("host")  # type: ignore[arg-type]
        assert caught.value.field == "tier"


def test_a_put_tells_which_blocks_it_stored(tmp_path: Path) -> None:
    """The mask of a put begins behind the blocks that host memory has already."""
    with started_client(tmp_path) as manager:
        manager.register_kv_caches(kv_caches())
        task = manager.put_async(PROMPT[: 3 * PER_BLOCK], SLOTS[: 3 * PER_BLOCK])
        manager.wait(task)
        task, mask = manager.put_match(PROMPT)
        assert mask.tolist() == [False] * 12 + [True] * 28
        manager.cancel(task)
        task = manager.put_async(PROMPT, SLOTS)
        assert manager.wait(task)[task].return_mask.tolist() == [False] * 12 + [True] * 28


def test_what_only_the_engine_can_do_is_refused_by_name(tmp_path: Path) -> None:
    """Calls for the engine's own process are refused by a client, and say where to make them."""
    with started_client(tmp_path) as manager:
        for call in (
            lambda: manager.resize(Tier.HOST, 5), lambda: manager.pin(PROMPT),
            lambda: manager.explain("get", PROMPT), lambda: manager.resume_device(kv_caches()),
            lambda: manager.namespace_blocks("a"), manager.suspend_device_blocking,
        ):  # fmt: skip
            with pytest.raises(ConfigError, match="client of a server"):
                call()


def test_a_client_traces_and_counts_at_the_server(tmp_path: Path) -> None:
    """A trace is recorded by the server, at a path relative to the client."""
    with started_client(tmp_path) as manager:
        manager.register_kv_caches(kv_caches())
        with manager.trace(tmp_path / "trace.jsonl"):
            task = manager.put_async(PROMPT, SLOTS, namespace="tenant")
            manager.wait(task)
        assert '"put"' in (tmp_path / "trace.jsonl").read_text()
        assert manager.statistics().requests["put"]["success"] == 1


def test_a_closed_client_is_closed(tmp_path: Path) -> None:
    """After the end, and before the start, every call is a ClosedError."""
    with started_client(tmp_path) as manager:
        manager.register_kv_caches(kv_caches())
    for call in (
        lambda: manager.match(PROMPT), lambda: manager.get_async(PROMPT, SLOTS),
        manager.statistics, lambda: manager.wait(1), manager.clear,
    ):  # fmt: skip
        with pytest.raises(ClosedError):
            call()
    assert not manager.is_ready()
    manager.shutdown()


def kinds_of(kind: type[FlexKVError]) -> list[type[FlexKVError]]:
    """Return an error class and all classes under it."""
    return [kind, *(each for under in kind.__subclasses__() for each in kinds_of(under))]


ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "ConfigError": ("field", object(), "why"),
    "CapacityError": ("host", 3, 2, 1),
    "StorageError": ("/path", 4096, 5, 7),
    "ShortTransferError": ("/path", 4096, 512, 100),
    "DeviceError": ("call", 700),
    "CorruptBlockError": ("/path", 4096, [1, 2, 3]),
    "MalformedError": (100, "why"),
    "BackendUnavailableError": ("cuda", "why"),
    "InvalidTransition": ("state", "event", ["story"]),
    "ClearedError": (),
    "ClusterStoreError": ("redis", "XADD", "no answer in time"),
}


@pytest.mark.parametrize("kind", kinds_of(FlexKVError), ids=lambda kind: kind.__name__)
def test_errors_keep_their_class_and_fields(kind: type[FlexKVError]) -> None:
    """An error that travels has its class, its message and its fields afterwards."""
    is_transfer = issubclass(kind, errors.TransferError)
    default: tuple[Any, ...] = (5, "host→disk", 3, "why") if is_transfer else ("why",)
    error = kind(*ARGUMENTS.get(kind.__name__, default))
    name, fields = cause_of(error)
    again = error_from((name, json.loads(json.dumps(fields))), str(error))
    assert type(again) is kind
    assert str(again) == str(error)
    for field, value in error.__dict__.items():
        assert getattr(again, field) in (value, repr(value))


def test_an_unknown_error_is_one_of_ours() -> None:
    """An error of a class that this version does not have is still a FlexKVError."""
    error = error_from(("NewError", {"field": 1}), "what happened")
    assert type(error) is FlexKVError
    assert str(error) == "what happened"
    assert str(error_from(None, "what happened")) == "what happened"
