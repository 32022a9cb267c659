"""Tests that what began before a clear stores nothing after it, wherever it waits meanwhile."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from flexkv.common.config import Settings
from flexkv.common.errors import ClearedError
from flexkv.common.request import KVResponseStatus, Operation
from flexkv.common.terms import Tier
from flexkv.index.clears import ROOTS_MAX, ClearHistory
from flexkv.kvmanager import KVManager
from flexkv.server.operator import command

from .conftest import PER_BLOCK, MakeManager, kv_caches, slots_of
from .serving import BLOCKS, Instance, eventually

TOKENS = np.arange(8 * PER_BLOCK)
SLOTS = slots_of(range(8))


def clear(manager: KVManager, what: str) -> None:
    """Clear everything, a tier, or a namespace."""
    if what == "namespace":
        manager.clear(namespace="tenant")
    else:
        manager.clear(None if what == "all" else Tier.HOST)


@pytest.mark.parametrize("what", ["all", "tier", "namespace"])
async def test_a_put_that_waits_to_be_admitted_stores_nothing(
    make_manager: MakeManager, what: str
) -> None:
    """A put that waits for admission is stale after a clear of its blocks; a later put is not."""
    async with make_manager(requests_max=1) as manager:
        manager.register_kv_caches(kv_caches())
        first = manager.put_layerwise(TOKENS + 1000, SLOTS)  # its layers are never written
        waiting = asyncio.ensure_future(manager.put(TOKENS, SLOTS, namespace="tenant"))
        await asyncio.sleep(0.01)
        clear(manager, what)
        manager.cancel(first.task_id)
        response = await waiting
        assert response.status is KVResponseStatus.CANCELLED
        assert isinstance(response.error, ClearedError)
        assert not response.return_mask.any()
        assert manager.match(TOKENS, "tenant").tokens == 0
        await manager.put(TOKENS, SLOTS, namespace="tenant")
        assert manager.match(TOKENS, "tenant").tokens == len(TOKENS)


async def test_a_clear_of_a_namespace_concerns_no_other(make_manager: MakeManager) -> None:
    """A put that was prepared before a clear of another namespace is stored."""
    async with make_manager() as manager:
        manager.register_kv_caches(kv_caches())
        task, _ = manager.put_match(TOKENS, namespace="other")
        manager.clear(namespace="tenant")
        manager.launch(task, SLOTS)
        await manager._bridge.task_response(task)
        assert manager.match(TOKENS, "other").tokens == len(TOKENS)


def test_a_put_that_was_only_matched_stores_nothing(make_manager: MakeManager) -> None:
    """A task that was prepared before a clear stores nothing if it is launched after it."""
    manager = make_manager()
    manager.start()
    try:
        manager.register_kv_caches(kv_caches())
        task, mask = manager.put_match(TOKENS)
        assert mask.all()
        assert manager.reset() == 0
        manager.launch(task, SLOTS)
        assert manager.wait(task)[task].status is KVResponseStatus.CANCELLED
        assert manager.match(TOKENS).tokens == 0
    finally:
        manager.shutdown()


def test_the_oldest_clears_of_namespaces_count_for_all() -> None:
    """The history of clears is bounded: a forgotten clear of a namespace counts as one of all."""
    history = ClearHistory(100)
    for number in range(ROOTS_MAX + 1):
        history.note(number.to_bytes(16, "big"))
    assert history.is_stale(100, b"another root")
    assert not history.is_stale(101, b"another root")
    assert history.is_stale(101, (1).to_bytes(16, "big"))


# -- a server --------------------------------------------------------------------------------------


def test_a_put_that_waits_for_its_ranks_stores_nothing(
    settings: Settings, instance: Instance
) -> None:
    """A put that waits for its ranks during a clear is answered as stale, and stores nothing."""
    ids = np.arange(BLOCKS)
    number = instance.client.start(Operation.PUT, instance.keys(1), 0, ids, when_ready=True)
    instance.client.flush()
    time.sleep(0.05)
    command(settings.server_recv_port, "clear")
    instance.agents[0].ready([number])
    done = instance.end_of(number)
    assert (done.status, done.moved, done.is_stale) == ("cancelled", 0, True)
    assert instance.client.match(instance.keys(1)).blocks == 0


def test_what_was_computed_before_a_clear_is_not_stored_by_a_put_after_it(
    settings: Settings, instance: Instance
) -> None:
    """Clients learn of a clear: blocks computed before it are refused, later ones are stored."""
    client, ids = instance.client, np.arange(BLOCKS)
    before = client.generation
    assert instance.request(Operation.PUT, 1, range(BLOCKS)).moved == BLOCKS
    command(settings.server_recv_port, "clear")
    eventually(lambda: (client.poll(), client.generation > before)[1])
    stale = client.put(instance.keys(1), 0, ids, before)
    fresh = client.put(instance.keys(2), 0, ids, client.generation)
    client.flush()
    instance.agents[0].ready([stale, fresh])
    assert instance.end_of(stale).is_stale
    assert instance.end_of(fresh).moved == BLOCKS
    assert client.match(instance.keys(1)).blocks == 0


def test_what_began_under_an_earlier_server_is_stored_until_this_one_is_cleared(
    settings: Settings, instance: Instance
) -> None:
    """Any clear at this server makes stale what was computed under an earlier server."""
    client, ids = instance.client, np.arange(BLOCKS)
    for prompt, clears in ((1, False), (2, True)):
        if clears:
            command(settings.server_recv_port, "clear")
        number = client.put(instance.keys(prompt), 0, ids, 7)
        client.flush()
        instance.agents[0].ready([number])
        assert instance.end_of(number).is_stale is clears
