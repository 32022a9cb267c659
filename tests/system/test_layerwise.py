"""Tests of gets and puts layer by layer, over real memory and SSD, and a fake CUDA driver."""

from __future__ import annotations

import asyncio
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv.common.config import ModelConfig
from flexkv.common.errors import ConfigError
from flexkv.common.request import KVResponseStatus
from flexkv.common.terms import Tier
from flexkv.front.layerwise import LayerProgress
from flexkv.kvmanager import KVManager

from .conftest import DEVICE_BLOCKS, PER_BLOCK, cache_config, slots_of
from .test_devices import BY_ENGINE, Ranks, every_kind, same

LAYERS = 20
PROMPT = np.arange(1000, 1000 + 40 * PER_BLOCK)
SOURCES, TARGETS = range(40), list(range(63, 23, -1))


def model_of(tp_size: int = 1) -> ModelConfig:
    """Return a model with many layers, for which a prompt has several hundred KiB."""
    return ModelConfig(
        num_layers=LAYERS, num_kv_heads=4, head_size=64, dtype="float16", tp_size=tp_size
    )


class Watched:
    """The slots of a get and the bytes that they should have, layer by layer."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.expected = ranks.content(SOURCES)

    def has(self, layer: int) -> bool:
        """Return whether a layer's bytes have arrived on every rank."""
        found = self.ranks.content(TARGETS)
        return same(found[layer::LAYERS], self.expected[layer::LAYERS])


@every_kind
@pytest.mark.parametrize("tp_size", [1, 2])
async def test_layers_come_one_after_the_other(
    tp_size: int, is_cuda: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that is reported as arrived has its bytes, from host memory and from SSD."""
    model = model_of(tp_size)
    ranks = Ranks(model, is_cuda, monkeypatch)
    watched = Watched(ranks)
    cache = cache_config(tmp_path, **BY_ENGINE, num_cpu_blocks=96)
    async with KVManager(model, cache) as manager:
        ranks.register(manager)
        await manager.put(PROMPT, slots_of(SOURCES))
        await manager.flush()
        for evicted in (False, True):
            ranks.wipe(TARGETS)
            if evicted:
                manager.clear(Tier.HOST)
            get = manager.get_layerwise(PROMPT, slots_of(TARGETS))
            for layer in range(LAYERS):
                assert await get.layer(layer)
                assert watched.has(layer)
            response = await get
            assert response.return_mask.all()
        with pytest.raises(ConfigError, match="layer=20: must be from 0 to 19"):
            await get.layer(20)


@every_kind
def test_a_thread_waits_for_layers(
    is_cuda: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread can wait for layers; a wait that takes too long raises TimeoutError."""
    model = model_of()
    ranks = Ranks(model, is_cuda, monkeypatch)
    watched = Watched(ranks)
    manager = KVManager(model, cache_config(tmp_path, **BY_ENGINE, num_cpu_blocks=96))
    manager.start()
    try:
        ranks.register(manager)
        put = manager.put_async(PROMPT, slots_of(SOURCES))
        manager.wait(put)
        get = manager.get_layerwise(PROMPT, slots_of(TARGETS))
        for layer in (0, 3, LAYERS - 1):
            assert get.wait_for_layer(layer)
            assert watched.has(layer)
        assert manager.wait(get.task_id)[get.task_id].return_mask.all()
        missing = manager.get_layerwise(PROMPT + 50_000, slots_of(TARGETS))
        assert not missing.wait_for_layer(0)
        late = manager.put_layerwise(PROMPT + 70_000, slots_of(SOURCES))
        with pytest.raises(TimeoutError, match="layer 0 did not arrive within"):
            late._progress.wait(0, 0.01)
        manager.cancel(late.task_id)
        assert manager.wait(late.task_id)[late.task_id].status is KVResponseStatus.CANCELLED
        assert manager.match(PROMPT + 70_000).tokens == 0
    finally:
        manager.shutdown()


@every_kind
async def test_a_put_takes_layers_as_they_are_written(
    is_cuda: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A put stores its blocks when the last layer is reported, with the right bytes and sums."""
    model = model_of(2)
    ranks = Ranks(model, is_cuda, monkeypatch)
    written = [[layer.copy() for layer in layers] for layers in ranks.caches]
    expected = ranks.content(SOURCES)
    ranks.wipe(range(DEVICE_BLOCKS))
    cache = cache_config(tmp_path, **BY_ENGINE, num_cpu_blocks=96)
    async with KVManager(model, cache) as manager:
        ranks.register(manager)
        put = manager.put_layerwise(PROMPT, slots_of(SOURCES))
        for layer in range(LAYERS):
            for of_rank, content in zip(ranks.caches, written, strict=True):
                of_rank[layer][:] = content[layer]
            if layer != 4:  # the report of the next layer covers both
                put.layer_written(layer)
            await asyncio.sleep(0.001)
            assert layer == LAYERS - 1 or not manager.match(PROMPT).tokens_by_tier[Tier.HOST]
        response = await put
        assert response.return_mask.all()
        await manager.flush()
        manager.clear(Tier.HOST)
        assert (await manager.get(PROMPT, slots_of(TARGETS))).return_mask.all()
        assert same(ranks.content(TARGETS), expected)
        assert manager.statistics().corrupt_blocks == 0


async def test_others_go_ahead_of_a_put_that_waits_for_its_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others overtake a put that waits for its layers; cancelling the put leaves nothing."""
    model = model_of()
    ranks = Ranks(model, False, monkeypatch)
    async with KVManager(model, cache_config(tmp_path, num_cpu_blocks=96)) as manager:
        ranks.register(manager)
        waits = manager.put_layerwise(PROMPT, slots_of(SOURCES))
        waits.layer_written(2)
        async with asyncio.timeout(5):
            assert (await manager.put(PROMPT + 9000, slots_of(SOURCES))).return_mask.all()
        awaited = asyncio.create_task(_awaited(waits))
        await asyncio.sleep(0.01)
        awaited.cancel()
        with pytest.raises(asyncio.CancelledError):
            await awaited
        assert manager.match(PROMPT).tokens == 0
        await manager.flush()
        statistics = manager.statistics()
        assert (statistics.claims, statistics.runs_in_flight) == (0, 0)


async def _awaited(request: Any) -> Any:
    return await request


async def test_a_stream_waits_for_a_layer_and_the_thread_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work queued behind a stream's wait finds the layer there, on each rank; no thread waits."""
    model = model_of(2)
    ranks = Ranks(model, True, monkeypatch)
    watched = Watched(ranks)
    cache = cache_config(tmp_path, **BY_ENGINE, num_cpu_blocks=96)
    manager = KVManager(model, cache)
    await asyncio.to_thread(manager.start)
    try:
        ranks.register(manager)
        await manager.put(PROMPT, slots_of(SOURCES))
        found: list[list[bool]] = [[], []]
        over = threading.Barrier(3)
        streams = [driver.open_stream(urgent=False) for driver in ranks.drivers]
        for driver in ranks.drivers:
            driver.takes_s = {"cuMemcpyBatchAsync": 0.005}
        get = manager.get_layerwise(PROMPT, slots_of(TARGETS))
        for layer in range(LAYERS):
            for rank, driver in enumerate(ranks.drivers):
                args = layer, 5.0, streams[rank], rank
                assert await asyncio.to_thread(get.wait_for_layer, *args)
                look = partial(_look, watched, rank, layer, found[rank])
                driver._streams[streams[rank]].work.put(look)
        for rank, driver in enumerate(ranks.drivers):
            driver._streams[streams[rank]].work.put(over.wait)  # type: ignore[arg-type]
        await asyncio.to_thread(over.wait, 10.0)
        assert found == [[True] * LAYERS] * 2
        assert (await get).return_mask.all()
        for stream, driver in zip(streams, ranks.drivers, strict=True):
            driver.close_stream(stream)
    finally:
        await asyncio.to_thread(manager.shutdown)
    assert [driver.left for driver in ranks.drivers] == [0, 0]


def _look(watched: Watched, rank: int, layer: int, found: list[bool]) -> None:
    at = rank * LAYERS + layer
    found.append(np.array_equal(watched.ranks.content(TARGETS)[at], watched.expected[at]))


def test_a_new_try_voids_what_the_first_one_moved() -> None:
    """A new try voids the layers that the first one moved, and closes its events."""
    closed: list[str] = []

    class Event:
        def __init__(self, name: str) -> None:
            self.name = name

        def hold_back(self, stream: int) -> None:
            """Do nothing."""

        def close(self) -> None:
            """Record that it was closed."""
            closed.append(self.name)

    progress = LayerProgress(2, 2)
    progress.expect([1, 2])
    progress.moved(1, 0, 2)
    progress.queued(0, 1, 2, Event("first"))
    assert not progress.has(0)
    progress.moved(2, 0, 1)
    assert (progress.has(0), progress.has(1)) == (True, False)
    progress.expect([7])
    assert (closed, progress.has(0)) == (["first"], False)
    progress.queued(0, 7, 1, Event("second"))
    assert progress.hold_back(5, 0, 0, 0.1)
    with pytest.raises(TimeoutError, match="layer 1 were not queued"):
        progress.hold_back(5, 0, 1, 0.01)
    progress.end()
    assert (closed, progress.wait(0, 1.0)) == (["first", "second"], False)
