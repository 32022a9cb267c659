"""Tests of managers over one and several devices, on the CPU and behind a fake CUDA driver."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from structlog.testing import capture_logs

from flexkv.common.config import ModelConfig
from flexkv.common.errors import ClosedError, ConfigError, DeadlineError, DeviceError
from flexkv.common.request import KVResponseStatus
from flexkv.common.terms import Tier
from flexkv.kvmanager import KVManager
from flexkv.testing.fake_cuda import FakeCuda, FakeTensor

from .conftest import DEVICE_BLOCKS, PER_BLOCK, cache_config, slots_of

PROMPT = np.arange(1000, 1000 + 10 * PER_BLOCK)
LAYERS = 3
BY_ENGINE: dict[str, Any] = {"use_ce_transfer_d2h": True, "use_ce_transfer_h2d": True}
SHAPE = {"num_layers": LAYERS, "head_size": 8, "dtype": "float16"}
GROUPS = [
    {"num_layers": 1, "num_kv_heads": 4, "head_size": 16, "dtype": "int8"},
    {"num_layers": 2, "num_kv_heads": 8, "head_size": 8, "compress_ratio": 2},
]
MODELS: dict[str, dict[str, Any]] = {
    "heads": {"num_kv_heads": 4},
    "few heads": {"num_kv_heads": 2},
    "mla": {"num_kv_heads": 1, "use_mla": True},
    "groups": {"num_kv_heads": 4, "layer_groups": GROUPS},
}


class Ranks:
    """The KV caches of every rank; ranks of one part have the same bytes."""

    def __init__(self, model: ModelConfig, is_cuda: bool, patch: pytest.MonkeyPatch) -> None:
        self.model = model
        (space,) = model.spaces(PER_BLOCK)
        self.caches: list[list[NDArray[np.uint8]]] = []
        self.drivers: list[FakeCuda] = []
        self.tensors: list[list[Any]] = []
        for rank in range(model.tp_size):
            random = np.random.default_rng(space.part_of(rank).number)
            layers = []
            for shape in space.shapes:
                size = (shape.tokens, shape.heads, shape.head_size * shape.item_bytes)
                size = (DEVICE_BLOCKS, *size) if model.kv_dim == 1 else (2, DEVICE_BLOCKS, *size)
                layers.append(random.integers(0, 256, size, np.uint8))
            self.caches.append(layers)
            typed = [
                layer.view(np.int8 if shape.item_bytes == 1 else np.float16)
                for layer, shape in zip(layers, space.shapes, strict=True)
            ]
            self.tensors.append([FakeTensor(t, rank) for t in typed] if is_cuda else typed)
        registered: dict[int, int] = {}

        def opened(ordinal: int) -> FakeCuda:
            memory: list[NDArray[Any]] = [*self.caches[ordinal]]
            self.drivers.append(FakeCuda(memory, ordinal, registered=registered))
            return self.drivers[-1]

        patch.setattr("flexkv.tiers.backend.BoundDriver", opened)
        patch.setattr("flexkv.io.cuda.copier.MEASURED_BYTES", 4096)

    def register(self, manager: KVManager) -> None:
        """Register the KV caches of all ranks."""
        for rank, tensors in enumerate(self.tensors):
            manager.register_kv_caches(tensors, tp_rank=rank)

    def content(self, blocks: Any) -> list[NDArray[np.uint8]]:
        """Return a copy of blocks, of each layer of each rank."""
        axis = 0 if self.model.kv_dim == 1 else 1
        return [layer.take(list(blocks), axis) for layers in self.caches for layer in layers]

    def wipe(self, blocks: Any) -> None:
        """Overwrite blocks with zeros."""
        for layers in self.caches:
            for layer in layers:
                (layer if self.model.kv_dim == 1 else layer.swapaxes(0, 1))[list(blocks)] = 0


def same(left: list[NDArray[np.uint8]], right: list[NDArray[np.uint8]]) -> bool:
    """Return whether all bytes are equal."""
    return all(np.array_equal(*pair) for pair in zip(left, right, strict=True))


every_kind = pytest.mark.parametrize("is_cuda", [False, True], ids=["cpu", "fake-cuda"])


@every_kind
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
async def test_the_bytes_of_every_rank_come_back(
    name: str, tp_size: int, is_cuda: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank's bytes come back from host memory, SSD and after a restart, in other slots."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = ModelConfig(**{**SHAPE, **MODELS[name]}, tp_size=tp_size)
    ranks = Ranks(model, is_cuda, monkeypatch)
    sources, targets = range(10), list(range(40, 20, -2))
    expected = ranks.content(sources)
    preference = None if tp_size == 1 else True
    cache = cache_config(tmp_path, use_ce_transfer_h2d=True, use_ce_transfer_d2h=preference)
    async with KVManager(model, cache) as manager:
        ranks.register(manager)
        put = await manager.put(PROMPT, slots_of(sources))
        assert put.return_mask.all()
        got = await manager.get(PROMPT, slots_of(targets))
        assert got.return_mask.all()
        assert same(ranks.content(targets), expected)
        await manager.flush()
        manager.clear(Tier.HOST)
        ranks.wipe(targets)
        got = await manager.get(PROMPT, slots_of(targets))
        assert got.return_mask.all()
        assert same(ranks.content(targets), expected)
    ranks.wipe(targets)
    async with KVManager(model, cache) as manager:
        ranks.register(manager)
        got = await manager.get(PROMPT, slots_of(targets))
        assert got.return_mask.all()
        assert same(ranks.content(targets), expected)
        assert manager.statistics().corrupt_blocks == 0
    assert [driver.left for driver in ranks.drivers] == [0] * len(ranks.drivers)


async def test_requests_wait_for_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests are UNREADY until all ranks are registered; repeated or unknown ones are refused."""
    model = ModelConfig(**SHAPE, num_kv_heads=2, tp_size=2)
    ranks = Ranks(model, False, monkeypatch)
    async with KVManager(model, cache_config(tmp_path)) as manager:
        manager.register_kv_caches(ranks.tensors[1], tp_rank=1)
        put = await manager.put(PROMPT, slots_of(range(10)))
        assert (put.status, manager.is_ready()) == (KVResponseStatus.UNREADY, False)
        assert "1 of 2 ranks" in str(put.error)
        with pytest.raises(ConfigError, match="tp_rank=1: has already registered KV caches"):
            manager.register_kv_caches(ranks.tensors[1], tp_rank=1)
        with pytest.raises(ConfigError, match="tp_rank=2: must be from 0 to"):
            manager.register_kv_caches(ranks.tensors[1], tp_rank=2)
        manager.register_kv_caches(ranks.tensors[0])
        assert manager.is_ready()
        assert (await manager.put(PROMPT, slots_of(range(10)))).return_mask.all()


async def test_another_tp_degree_or_other_groups_share_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another TP degree shares no blocks, except under MLA, where all ranks have one latent."""
    for shape, shares in (({"num_kv_heads": 2}, False), (MODELS["mla"], True)):
        directory = tmp_path / str(shares)
        directory.mkdir()
        models = [ModelConfig(**SHAPE, **shape, tp_size=tp_size) for tp_size in (1, 2)]
        for model in models:
            ranks = Ranks(model, False, monkeypatch)
            async with KVManager(model, cache_config(directory)) as manager:
                ranks.register(manager)
                found = manager.match(PROMPT).tokens
                assert found == (len(PROMPT) if shares and model is models[1] else 0)
                if model is models[0]:
                    await manager.put(PROMPT, slots_of(range(10)))
                    await manager.flush()


@every_kind
async def test_a_device_that_sleeps_lets_go_of_its_memory(
    is_cuda: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sleeping device frees its memory after running requests; new tensors wake it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = ModelConfig(**SHAPE, num_kv_heads=2)
    ranks = Ranks(model, is_cuda, monkeypatch)
    expected = ranks.content(range(10))
    async with KVManager(model, cache_config(tmp_path)) as manager:
        with pytest.raises(ClosedError, match="KV caches are missing: 0 of"):
            await manager.suspend_device()
        ranks.register(manager)
        with pytest.raises(ConfigError, match="tp_rank=0: is not suspended"):
            manager.resume_device(ranks.tensors[0])
        put = asyncio.create_task(manager.put(PROMPT, slots_of(range(10))))
        await asyncio.sleep(0)
        await manager.suspend_device()
        assert (await put).return_mask.all()
        for each in ranks.drivers:
            each._memory.clear()  # any copy from or to the device would break it now
        got = await manager.get(PROMPT, slots_of(range(20, 30)))
        assert got.status is KVResponseStatus.UNREADY
        assert str(got.error) == "the device is suspended: call resume_device first"
        assert manager.match(PROMPT).tokens == len(PROMPT)
        with pytest.raises(ClosedError, match="suspended"):
            await manager.suspend_device()
        ranks.caches[0][:] = [np.zeros_like(layer) for layer in ranks.caches[0]]
        for each in ranks.drivers:
            each._held = ranks.caches[0]  # type: ignore[assignment]
            each._memory |= {a.ctypes.data: a.nbytes for a in ranks.caches[0]}
        typed = [layer.view(np.float16) for layer in ranks.caches[0]]
        manager.resume_device([FakeTensor(t) for t in typed] if is_cuda else typed)
        assert (await manager.get(PROMPT, slots_of(range(20, 30)))).return_mask.all()
        assert same(ranks.content(range(20, 30)), expected)


async def test_a_sleep_that_takes_too_long_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A suspension past its deadline raises, and the device goes on."""
    model = ModelConfig(**SHAPE, num_kv_heads=2)
    ranks = Ranks(model, True, monkeypatch)
    cache = cache_config(tmp_path, **BY_ENGINE, io_deadline_s=0.05)
    async with KVManager(model, cache) as manager:
        ranks.register(manager)
        ranks.drivers[0].takes_s = {"cuMemcpyBatchAsync": 0.3}
        put = asyncio.create_task(manager.put(PROMPT, slots_of(range(10))))
        await asyncio.sleep(0)
        with pytest.raises(DeadlineError, match="1 requests did not end"):
            await manager.suspend_device()
        assert (await put).return_mask.all()
        assert manager.is_ready()


async def test_a_put_waits_for_what_the_callers_stream_has_queued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A put waits for the calling thread's stream, which the manager looks up in that thread."""
    model = ModelConfig(**SHAPE, num_kv_heads=2)
    ranks = Ranks(model, True, monkeypatch)
    cache = cache_config(tmp_path, **BY_ENGINE)
    async with KVManager(model, cache) as manager:
        ranks.register(manager)
        driver = ranks.drivers[0]
        stream = driver.current = driver.open_stream(urgent=False)
        driver._streams[stream].work.put(lambda: ranks.wipe(range(10)))
        await manager.put(PROMPT, slots_of(range(10)))
        driver.current = 0
        await manager.get(PROMPT, slots_of(range(20, 30)))
        assert not any(layer.any() for layer in ranks.content(range(20, 30)))
        driver.close_stream(stream)


async def test_a_device_that_breaks_is_down_and_the_other_tiers_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a broken device touched fails, later requests are UNREADY, and prefetch still works."""
    monkeypatch.setattr("flexkv.io.cuda.port.CHECK_S", 0.01)
    model = ModelConfig(**SHAPE, num_kv_heads=2, tp_size=2)
    ranks = Ranks(model, True, monkeypatch)
    cache = cache_config(tmp_path, **BY_ENGINE)
    async with KVManager(model, cache) as manager:
        ranks.register(manager)
        await manager.put(PROMPT, slots_of(range(10)))
        await manager.flush()
        manager.clear(Tier.HOST)
        ranks.drivers[1].breaks_at = "cuMemcpyBatchAsync", 719
        got = await manager.get(PROMPT, slots_of(range(20, 30)))
        assert got.status is KVResponseStatus.FAILED
        assert isinstance(got.error, DeviceError)
        assert got.error.code == 719
        got = await manager.get(PROMPT, slots_of(range(20, 30)))
        assert got.status is KVResponseStatus.UNREADY
        assert isinstance(got.error, DeviceError)
        assert not manager.is_ready()
        manager.clear(Tier.HOST)
        assert (await manager.prefetch(PROMPT)).return_mask.all()


async def test_a_stream_that_cannot_be_waited_for_takes_the_device_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a stream cannot be waited for, nothing is copied, and the device is down."""
    model = ModelConfig(**SHAPE, num_kv_heads=2)
    ranks = Ranks(model, True, monkeypatch)
    cache = cache_config(tmp_path, **BY_ENGINE)
    async with KVManager(model, cache) as manager:
        ranks.register(manager)
        ranks.drivers[0].refuses = {"cuStreamWaitEvent": 400}
        put = await manager.put(PROMPT, slots_of(range(10)))
        assert put.status is KVResponseStatus.UNREADY
        assert isinstance(put.error, DeviceError)
        assert manager.match(PROMPT).tokens == 0


async def test_direct_storage_is_refused_by_name_and_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Direct storage is refused with a warning that says why; blocks go through host memory."""
    ranks = Ranks(ModelConfig(**SHAPE, num_kv_heads=2), False, monkeypatch)
    with capture_logs() as lines:
        async with KVManager(ranks.model, cache_config(tmp_path, enable_gds=True)) as manager:
            ranks.register(manager)
            assert (await manager.put(PROMPT, slots_of(range(10)))).return_mask.all()
    (line,) = [each for each in lines if each["event"] == "gds_not_used"]
    assert "cuFile" in line["reason"]
