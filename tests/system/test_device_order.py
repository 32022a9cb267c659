"""Tests of the order of device work: streams, captured graphs, layouts, sleep and failures."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv.common.config import ModelConfig
from flexkv.common.errors import ClosedError, ConfigError, DeviceError, InternalError
from flexkv.common.request import KVResponseStatus
from flexkv.common.terms import Tier
from flexkv.kvmanager import KVManager
from flexkv.testing.fake_cuda import FakeCuda, FakeTensor

from .conftest import PER_BLOCK, cache_config, slots_of
from .test_devices import BY_ENGINE, MODELS, PROMPT, SHAPE, Ranks, every_kind, same

LAYERS, TARGETS = 3, range(20, 30)


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Yield a function that starts threaded managers over fake GPUs; stop them afterwards."""
    opened = []

    def start(tp_size: int = 1, **changes: Any) -> tuple[KVManager, Ranks]:
        model = ModelConfig(**SHAPE, num_kv_heads=2, tp_size=tp_size)
        ranks = Ranks(model, True, monkeypatch)
        manager = KVManager(model, cache_config(tmp_path, **{**BY_ENGINE, **changes}))
        manager.start()
        opened.append(manager)
        ranks.register(manager)
        return manager, ranks

    yield start
    for manager in opened:
        manager.shutdown()


class Writers:
    """Streams of the calling thread that will write the blocks of the slots later."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.expected = ranks.content(range(10))
        self._content = [[layer.copy() for layer in layers] for layers in ranks.caches]
        ranks.wipe(range(64))
        for driver in ranks.drivers:
            driver.current = driver.open_stream(urgent=False)

    def queue(self, *numbers: int) -> None:
        """Queue the writing of some layers on every rank's stream."""
        for rank, driver in enumerate(self.ranks.drivers):
            for number in numbers:
                target, content = self.ranks.caches[rank][number], self._content[rank][number]
                driver._streams[driver.current].work.put(partial(_write, target, content))


def _write(layer: Any, content: Any) -> None:
    time.sleep(0.02)
    layer[:] = content


def closed(ranks: Ranks) -> None:
    """Close the streams of the calling thread."""
    for driver in ranks.drivers:
        stream, driver.current = driver.current, 0
        driver.close_stream(stream)


def put_whole(manager: KVManager, slots: Any, writers: Writers) -> Any:
    """Put by one call."""
    writers.queue(*range(LAYERS))
    task = manager.put_async(PROMPT, slots)
    return manager.wait(task)[task]


def put_launched(manager: KVManager, slots: Any, writers: Writers) -> Any:
    """Put by match and launch."""
    task, _ = manager.put_match(PROMPT)
    writers.queue(*range(LAYERS))
    manager.launch(task, slots)
    return manager.wait(task)[task]


def put_by_layers(manager: KVManager, slots: Any, writers: Writers) -> Any:
    """Put layer by layer, while the loop's thread runs and the driver is asked to wait."""
    put = manager.put_layerwise(PROMPT, slots)
    for layer in range(LAYERS):
        writers.queue(layer)
        _post_soon(manager)
        put.layer_written(layer)
    return manager.wait(put.task_id)[put.task_id]


def _post_soon(manager: KVManager) -> None:
    """Make the device's actor run again in a millisecond."""
    thread = manager._bridge.thread
    assert thread is not None
    loop = thread._loop
    assert loop is not None
    loop.call_soon_threadsafe(loop.call_later, 0.001, manager.engine.nudge_device)


@pytest.mark.parametrize("put", [put_whole, put_launched, put_by_layers])
@pytest.mark.parametrize("tp_size", [1, 2])
def test_puts_wait_for_the_streams_of_the_calling_thread(
    started: Any, put: Callable[[KVManager, Any, Writers], Any], tp_size: int
) -> None:
    """On each rank's device a put reads blocks after the calling thread's stream wrote them."""
    manager, ranks = started(tp_size)
    writers = Writers(ranks)
    for driver in ranks.drivers:
        driver.calls_take_s = {"cuStreamWaitEvent": 0.003}
    assert put(manager, slots_of(range(10)), writers).return_mask.all()
    closed(ranks)
    get = manager.get_async(PROMPT, slots_of(TARGETS))
    assert manager.wait(get)[get].return_mask.all()
    assert same(ranks.content(TARGETS), writers.expected)


def test_a_get_waits_for_who_still_reads_its_slots(started: Any) -> None:
    """A get overwrites its slots only after earlier work of the caller's stream has read them."""
    manager, ranks = started()
    before = ranks.content(TARGETS)
    put = manager.put_async(PROMPT, slots_of(range(10)))
    assert manager.wait(put)[put].return_mask.all()
    driver = ranks.drivers[0]
    driver.current = driver.open_stream(urgent=False)
    seen: list[Any] = []

    def look() -> None:
        time.sleep(0.05)
        seen.extend(ranks.content(TARGETS))

    driver._streams[driver.current].work.put(look)
    get = manager.get_async(PROMPT, slots_of(TARGETS))
    assert manager.wait(get)[get].return_mask.all()
    assert same(seen, before)
    closed(ranks)


def test_layers_that_cannot_wait_are_not_copied(started: Any) -> None:
    """If a stream cannot wait for a written layer, the put is cancelled and nothing is stored."""
    manager, ranks = started()
    put = manager.put_layerwise(PROMPT, slots_of(range(10)))
    ranks.drivers[0].refuses = {"cuStreamWaitEvent": 901}
    with pytest.raises(DeviceError, match="code 901"):
        put.layer_written(0)
    assert manager.wait(put.task_id)[put.task_id].status is KVResponseStatus.CANCELLED
    assert manager.match(PROMPT).tokens == 0
    assert ranks.drivers[0].moved_bytes == 0


async def test_ranks_of_one_part_share_the_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under MLA with four ranks each rank writes some of the blocks, and each reads all of them."""
    model = ModelConfig(**SHAPE, **MODELS["mla"], tp_size=4)
    ranks = Ranks(model, True, monkeypatch)
    async with KVManager(model, cache_config(tmp_path, **BY_ENGINE)) as manager:
        ranks.register(manager)
        await manager.put(PROMPT, slots_of(range(10)))
        block = model.spaces(PER_BLOCK)[0].block_bytes
        assert sorted(d.moved_bytes // block for d in ranks.drivers) == [2, 2, 3, 3]
        await manager.get(PROMPT, slots_of(TARGETS))
        assert sum(d.moved_bytes // block for d in ranks.drivers) == 10 + 4 * 10


def test_while_a_graph_is_captured_from_its_stream_a_thread_cannot_ask(started: Any) -> None:
    """While a thread's stream is captured in a graph, its requests are refused; later ones work."""
    manager, ranks = started()
    slots, driver = slots_of(range(10)), ranks.drivers[0]
    written = manager.put_layerwise(PROMPT[: 4 * PER_BLOCK], slots_of(range(20, 24)))
    driver.captured = {driver.current}
    for ask in (manager.put_async, manager.get_async, manager.put_layerwise):
        with pytest.raises(ConfigError, match="a CUDA graph is being captured on it"):
            ask(PROMPT, slots)
    with pytest.raises(ConfigError, match="a CUDA graph is being captured on it"):
        written.layer_written(0)
    driver.captured.clear()
    for layer in range(LAYERS):
        written.layer_written(layer)
    assert manager.wait(written.task_id)[written.task_id].return_mask.all()
    put = manager.put_async(PROMPT, slots)
    assert manager.wait(put)[put].status is KVResponseStatus.SUCCESS


@pytest.mark.parametrize("tp_size", [1, 2])
async def test_layers_may_be_staged(
    tp_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of layers of different shapes may be staged, a few blocks at a time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("flexkv.io.cuda.choice.WAYS", _staged_only())
    monkeypatch.setattr("flexkv.io.cuda.copier.STAGED_BYTES_MIN", 0)
    monkeypatch.setattr("flexkv.io.cuda.stage.Stage.size", 2048)  # a few blocks at a time
    model = ModelConfig(**{**SHAPE, **MODELS["groups"]}, tp_size=tp_size)
    ranks = Ranks(model, True, monkeypatch)
    expected = ranks.content(range(10))
    async with KVManager(model, cache_config(tmp_path)) as manager:
        ranks.register(manager)
        put = manager.put_layerwise(PROMPT, slots_of(range(10)))
        for layer in range(LAYERS):
            put.layer_written(layer)
        assert (await put).return_mask.all()
        assert (await manager.get_layerwise(PROMPT, slots_of(TARGETS))).return_mask.all()
        assert same(ranks.content(TARGETS), expected)
        assert all("cuLaunchKernel" in driver.calls for driver in ranks.drivers)


def _staged_only() -> tuple[Any, ...]:
    from flexkv.io.cuda.choice import Choice, CopyMethod

    return (Choice(CopyMethod.STAGED, 16),)


@pytest.mark.parametrize("refused", ["register", "stage"])
async def test_without_device_memory_the_engine_copies(
    refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without device memory for measurements or for the stage, the copy engine copies."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("flexkv.io.cuda.choice.WAYS", _staged_only())
    model = ModelConfig(**SHAPE, num_kv_heads=2)
    ranks = Ranks(model, True, monkeypatch)
    limits = {"register": 0, "stage": 1}  # the measurement's scratch memory succeeds

    real, allocated = FakeCuda.allocate, []

    def allocate(driver: FakeCuda, size: int) -> int:
        if len(allocated) >= limits[refused]:
            raise DeviceError("cuMemAlloc", 2)
        allocated.append(size)
        return real(driver, size)

    monkeypatch.setattr(FakeCuda, "allocate", allocate)
    async with KVManager(model, cache_config(tmp_path)) as manager:
        ranks.register(manager)
        assert (await manager.put(PROMPT, slots_of(range(10)))).return_mask.all()
    assert "cuMemcpyBatchAsync" in ranks.drivers[0].calls


# -- sleep ---------------------------------------------------------------------------------------


@every_kind
async def test_what_was_launched_is_finished_before_the_device_sleeps(
    is_cuda: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launched request ends before the device sleeps; resuming before that is refused."""
    model = ModelConfig(**SHAPE, num_kv_heads=2)
    ranks = Ranks(model, is_cuda, monkeypatch)
    async with KVManager(model, cache_config(tmp_path, **BY_ENGINE)) as manager:
        ranks.register(manager)
        await manager.put(PROMPT, slots_of(range(10)))
        task = manager.get_async(PROMPT, slots_of(TARGETS))
        asleep = asyncio.create_task(manager.suspend_device())
        await asyncio.sleep(0)
        with pytest.raises(ConfigError, match="is not suspended"):
            manager.resume_device(ranks.tensors[0])
        await asleep
        assert manager.try_wait(task)[task].return_mask.all()
        manager.resume_device(ranks.tensors[0])
        assert (await manager.get(PROMPT, slots_of(TARGETS))).return_mask.all()


async def test_a_cancelled_sleep_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancelled suspension changes nothing, even if the last request ends in the same turn."""
    model = ModelConfig(**SHAPE, num_kv_heads=2)
    ranks = Ranks(model, False, monkeypatch)
    async with KVManager(model, cache_config(tmp_path)) as manager:
        ranks.register(manager)
        use = manager.engine.devices.use
        use.enter()
        asleep = asyncio.create_task(manager.suspend_device())
        await asyncio.sleep(0.01)
        use.leave()
        asleep.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asleep
        assert manager.is_ready()
        assert (await manager.put(PROMPT, slots_of(range(10)))).return_mask.all()


@every_kind
async def test_memory_of_every_rank_is_let_go_of_whatever_a_driver_says(
    is_cuda: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Suspended tensors are freed even if a driver fails; more blocks may take their place."""
    model = ModelConfig(**SHAPE, num_kv_heads=2, tp_size=2)
    ranks = Ranks(model, is_cuda, monkeypatch)
    async with KVManager(model, cache_config(tmp_path, **BY_ENGINE)) as manager:
        ranks.register(manager)
        await manager.put(PROMPT, slots_of(range(10)))
        held = [weakref.ref(layer) for layers in ranks.tensors for layer in layers]
        ranks.tensors.clear()
        if is_cuda:
            ranks.drivers[0].refuses = {"cuMemFree": 1}
            with pytest.raises(DeviceError):
                await manager.suspend_device()
            ranks.drivers[0].refuses = {}
        else:
            await manager.suspend_device()
        gc.collect()
        assert [ref() for ref in held] == [None] * len(held)
        for rank in range(2):
            more = [np.zeros((2, 128, PER_BLOCK, 1, 8), np.float16) for _ in range(LAYERS)]
            if is_cuda:
                memory = {layer.ctypes.data: layer.nbytes for layer in more}
                ranks.drivers[rank]._memory |= memory
                ranks.drivers[rank]._held = [*ranks.drivers[rank]._held, *more]
            tensors = [FakeTensor(t, rank) for t in more] if is_cuda else more
            manager.resume_device(tensors, tp_rank=rank)
        got = await manager.get(PROMPT, slots_of(range(100, 110)))
        assert got.return_mask.all()


# -- order ---------------------------------------------------------------------------------------


def caches_in(order: str, seed: int = 0) -> list[Any]:
    """Return caches [2, blocks, …] with tokens before heads, or heads before tokens."""
    random = np.random.default_rng(seed)
    inner = (PER_BLOCK, 2) if order == "tokens heads" else (2, PER_BLOCK)
    shape = (2, 64, *inner, 8)
    return [random.integers(0, 9, shape, np.uint16).view(np.float16) for _ in range(LAYERS)]


async def test_blocks_of_another_order_are_other_blocks(tmp_path: Path) -> None:
    """Blocks of another element order are not found after a restart, and are refused on resume."""
    model = ModelConfig(**SHAPE, num_kv_heads=2)
    found = []
    for order in ("tokens heads", "heads tokens", "tokens heads", "heads tokens"):
        caches = caches_in(order)
        async with KVManager(model, cache_config(tmp_path)) as manager:
            manager.register_kv_caches(caches)
            found.append(manager.match(PROMPT).tokens)
            await manager.put(PROMPT, slots_of(range(10)))
            await manager.flush()
            await manager.suspend_device()
            other = "heads tokens" if order == "tokens heads" else "tokens heads"
            with pytest.raises(ConfigError, match="element order as before: kv " + order):
                manager.resume_device(caches_in(other))
            manager.resume_device(caches)
    assert found == [0, 0, len(PROMPT), len(PROMPT)]


async def test_ranks_of_other_orders_are_refused(tmp_path: Path) -> None:
    """A rank whose element order differs from that of the others is refused."""
    model = ModelConfig(**SHAPE, num_kv_heads=4, tp_size=2)
    async with KVManager(model, cache_config(tmp_path)) as manager:
        manager.register_kv_caches(caches_in("tokens heads"))
        with pytest.raises(ConfigError, match="same element order as the other ranks"):
            manager.register_kv_caches(caches_in("heads tokens"), tp_rank=1)
        manager.register_kv_caches(caches_in("tokens heads"), tp_rank=1)
        assert manager.is_ready()


async def test_what_was_matched_before_the_order_was_known_is_not_loaded(tmp_path: Path) -> None:
    """A match from before the element order was known is not loaded: its keys name other blocks."""
    model = ModelConfig(**SHAPE, num_kv_heads=2)
    async with KVManager(model, cache_config(tmp_path)) as manager:
        task, _ = manager.get_match(PROMPT)
        manager.register_kv_caches(caches_in("heads tokens"))
        manager.launch(task, slots_of(range(0)))
        response = manager.try_wait(task)[task]
        assert response.status is KVResponseStatus.UNREADY
        assert "before the device was registered" in str(response.error)


# -- failures ------------------------------------------------------------------------------------


def test_an_engine_that_fails_tells_everybody(started: Any) -> None:
    """If the engine fails, whoever waits by task id, for a layer or for a response is answered."""
    manager, _ = started()
    put = manager.put_layerwise(PROMPT, slots_of(range(10)))
    get = manager.get_layerwise(PROMPT + 9000, slots_of(TARGETS))
    manager.wait(get.task_id)

    def boom(transfer: object) -> None:
        raise RuntimeError("boom")

    manager.engine._actors[Tier.DEVICE]._port.submit = boom  # type: ignore[method-assign]
    put.layer_written(0)
    response = manager.wait(put.task_id, timeout=5)[put.task_id]
    assert response.status is KVResponseStatus.FAILED
    assert isinstance(response.error, InternalError)
    assert not put._progress.wait(1, 1.0)
    with pytest.raises(InternalError, match="boom"):
        manager.match(PROMPT)


def test_a_callers_loop_that_is_closed_harms_nobody(started: Any) -> None:
    """If the loop of a coroutine that awaits a layer is closed, the request goes on."""
    manager, _ = started()
    put = manager.put_layerwise(PROMPT, slots_of(range(10)))
    loop = asyncio.new_event_loop()
    waiter = loop.create_task(put._progress.reached(2))
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()
    for layer in range(LAYERS):
        put.layer_written(layer)
    assert manager.wait(put.task_id, timeout=5)[put.task_id].return_mask.all()
    waiter._log_destroy_pending = False  # type: ignore[attr-defined]


async def test_who_asks_for_what_is_being_computed_does_not_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A get waits for blocks of a layerwise put only once all their layers are written."""
    model = ModelConfig(**SHAPE, num_kv_heads=2)
    ranks = Ranks(model, False, monkeypatch)
    async with KVManager(model, cache_config(tmp_path)) as manager:
        ranks.register(manager)
        put = manager.put_layerwise(PROMPT, slots_of(range(10)))
        put.layer_written(0)
        await asyncio.sleep(0.01)
        async with asyncio.timeout(5):
            got = await manager.get(PROMPT, slots_of(TARGETS))
            assert got.status is KVResponseStatus.NOTFOUND
            put.layer_written(LAYERS - 1)
            got = await manager.get(PROMPT, slots_of(TARGETS))
            assert got.return_mask.all()
            assert (await put).return_mask.all()


async def test_layers_are_written_from_any_thread_while_the_manager_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the manager is open, any thread may report layers as written; later calls fail."""
    model = ModelConfig(**SHAPE, num_kv_heads=2)
    ranks = Ranks(model, True, monkeypatch)
    async with KVManager(model, cache_config(tmp_path, **BY_ENGINE)) as manager:
        ranks.register(manager)
        put = manager.put_layerwise(PROMPT, slots_of(range(10)))
        for layer in range(LAYERS):
            await asyncio.to_thread(put.layer_written, layer)
        assert (await put).return_mask.all()
    with pytest.raises(ClosedError):
        await manager.put(PROMPT, slots_of(range(10)))


def test_who_is_cancelled_after_another_has_collected_is_cancelled(started: Any) -> None:
    """A waiter that is cancelled after its task was collected gets CancelledError, nothing else."""
    manager, _ = started()
    put = manager.put_layerwise(PROMPT, slots_of(range(10)))
    told: list[BaseException] = []

    async def wait() -> None:
        waiter = asyncio.create_task(_awaited(put))
        await asyncio.sleep(0.05)
        manager._bridge.tasks._tasks.pop(put.task_id)
        waiter.cancel()
        try:
            await waiter
        except BaseException as error:  # noqa: BLE001
            told.append(error)

    thread = threading.Thread(target=lambda: asyncio.run(wait()))
    thread.start()
    thread.join(10)
    assert [type(error) for error in told] == [asyncio.CancelledError]


async def _awaited(request: Any) -> Any:
    return await request
