"""Tests of the end of requests to a store: nothing of a library enters Python after it."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import obstore
import pytest

from flexkv.io.remote.object_store import ObjectStore
from flexkv.io.remote.open import open_store
from flexkv.io.remote.options import RemoteOptions

from .remote_exits import CASES, REQUESTS, begun
from .test_remote import Node

ROOT = Path(__file__).parents[2]
RUNS = 6
"""Without the wait for requests, each run crashes with a probability of a third."""


@pytest.fixture
def silent() -> Iterator[dict[str, Any]]:
    """Yield the keys of an engine whose store never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=500) as server:
        yield {
            "remote_cache_path": "s3://bucket/kv/",
            "remote_config_custom": {
                "endpoint": f"http://127.0.0.1:{server.getsockname()[1]}", "region": "r",
                "access_key_id": "k", "secret_access_key": "s",
            },
        }  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_program_may_exit_with_requests_in_flight(name: str) -> None:
    """Whether its store was closed or not, the process ends by itself, with status 0."""
    command = [sys.executable, "-m", "tests.system.remote_exits", name]
    for _ in range(RUNS):
        ended = subprocess.run(command, capture_output=True, cwd=ROOT, check=False)
        assert (ended.returncode, ended.stderr) == (0, b""), ended


async def drop(requests: list[asyncio.Future[object]]) -> None:
    """Let requests be sent, and cancel them."""
    await asyncio.sleep(0)
    for request in requests:
        request.cancel()
    requests.clear()


async def test_a_store_that_was_left_holds_nothing(
    silent: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a store was left, obstore has dropped every future and every buffer of its requests."""
    refs: list[weakref.ref[Any]] = []

    def watched(name: str) -> None:
        call = getattr(obstore, name)

        def calling(client: Any, path: str, *lent: Any, **options: Any) -> Any:
            future = call(client, path, *lent, **options)
            refs.extend(map(weakref.ref, [future, *(view for views in lent for view in views)]))
            return future

        monkeypatch.setattr(obstore, name, calling)

    watched("get_async")
    watched("put_async")
    store = open_store(silent["remote_cache_path"], silent["remote_config_custom"], RemoteOptions())
    await drop(begun(store))
    assert len(refs) == REQUESTS + 2 * REQUESTS // 4  # each put lends one buffer
    await store.leave()
    assert not [ref() for ref in refs if ref() is not None]
    store.close()


async def test_an_engine_leaves_its_store_before_it_is_closed(
    silent: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A close waits for cancelled requests once all tasks are over, and before memory is freed."""
    said: list[str] = []
    leave, close = ObjectStore.leave, ObjectStore.close

    async def leaving(store: ObjectStore) -> None:
        said.append("left")
        assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("flexkv r")]
        await leave(store)
        assert not store._calls.held

    def closing(store: ObjectStore) -> None:
        said.append("closed")
        close(store)

    monkeypatch.setattr(ObjectStore, "leave", leaving)
    monkeypatch.setattr(ObjectStore, "close", closing)
    async with Node(silent, shutdown_flush_s=0.1):
        pass
    assert said == ["left", "closed"]


def test_a_forked_child_does_not_wait_for_the_requests_of_its_parent(
    silent: dict[str, Any],
) -> None:
    """Nothing is held in a child: the library's threads are not there."""

    async def main() -> int:
        custom = silent["remote_config_custom"]
        store = open_store(silent["remote_cache_path"], custom, RemoteOptions())
        assert isinstance(store, ObjectStore)
        requests = begun(store)
        assert store._calls.held
        child = os.fork()
        if not child:
            os._exit(store._calls.held > 0)
        await drop(requests)
        await store.leave()
        return child

    _, status = os.waitpid(asyncio.run(main()), 0)
    assert os.waitstatus_to_exitcode(status) == 0
