"""Tests of CUDA devices on a real GPU, by the laws of every device. `make gpu` runs them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv.common.config import CacheConfig, ModelConfig
from flexkv.common.errors import ConfigError
from flexkv.common.layout import infer_layout
from flexkv.common.terms import Route, Tier, Transfer
from flexkv.io.cuda.choice import Choices, CopyMethod, CopyPreference
from flexkv.io.cuda.driver import BoundDriver
from flexkv.io.cuda.pinned import Pinned
from flexkv.io.cuda.port import CudaDevicePort
from flexkv.io.cuda.stage import Stage
from flexkv.io.device.tensors import spec_of
from flexkv.io.memory.arena import Arena
from flexkv.kvmanager import KVManager

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

BLOCKS, HOST_BLOCKS, LAYERS = 64, 48, 6
DTYPES = ["bfloat16", "float16", "float32", "int8", "float8_e4m3fn"]
SHAPES: dict[str, Any] = {
    "kv-blocks": lambda tokens, heads: (2, BLOCKS, tokens, heads, 64),
    "blocks-kv": lambda tokens, heads: (BLOCKS, 2, tokens, heads, 64),
    "blocks-heads": lambda tokens, heads: (BLOCKS, heads, tokens, 128),
    "fused": lambda tokens, heads: (BLOCKS, tokens, heads, 128),
    "mla": lambda tokens, heads: (BLOCKS, tokens, 256),
}
ENGINE = CopyPreference(use_engine=True)
every_way = pytest.mark.parametrize("method", CopyMethod)


def model_of(shape: str, dtype: str, tp_size: int = 1) -> ModelConfig:
    """Return the model whose ranks have tensors of this shape and dtype."""
    mla = shape == "mla"
    heads, size = (1, 256) if mla else (4, 64)
    return ModelConfig(
        num_layers=LAYERS, num_kv_heads=heads, head_size=size, dtype=dtype, use_mla=mla,
        tp_size=tp_size,
    )  # fmt: skip


def named(shape: str) -> str | None:
    """Return the layout's name, or None where the shape alone determines the layout."""
    return None if shape == "mla" else shape


def tensors_of(shape: str, model: ModelConfig, tokens: int, seed: int = 0) -> list[Any]:
    """Return a rank's tensors of random bytes, on the GPU."""
    heads = max(1, model.num_kv_heads // model.tp_size)
    *outer, inner = SHAPES[shape](tokens, heads)
    dtype = getattr(torch, model.dtype)
    random = torch.Generator(device="cuda").manual_seed(seed)
    size = (*outer, inner * dtype.itemsize)
    return [
        torch.randint(
            0, 256, size, dtype=torch.uint8, device="cuda", generator=random
        ).view(dtype)
        for _ in range(LAYERS)
    ]  # fmt: skip


def blocks_first(shape: str, layers: list[Any]) -> list[Any]:
    """Return a copy of each layer's bytes on the CPU, with blocks as the first axis."""
    torch.cuda.synchronize()
    arrays = [layer.view(torch.uint8).cpu().numpy().copy() for layer in layers]
    return [np.moveaxis(array, 1, 0) if shape == "kv-blocks" else array for array in arrays]


class Rig:
    """A port over the real driver, and tensors of known bytes."""

    def __init__(
        self, shape: str, dtype: str, tokens: int, method: CopyMethod = CopyMethod.ENGINE
    ) -> None:
        model = model_of(shape, dtype)
        self.layers = tensors_of(shape, model, tokens)
        specs = [spec_of(layer) for layer in self.layers]
        layout = infer_layout(specs, model.spaces(tokens)[0].shapes, named(shape))
        self.block_bytes = layout.block_bytes
        self.arena = Arena.open(HOST_BLOCKS, -(-layout.block_bytes // 4096) * 4096)
        torch.cuda.synchronize()
        preferences = (ENGINE, ENGINE)
        self.port = CudaDevicePort(
            [layout], Pinned(self.arena), self.layers, BoundDriver(0), preferences
        )
        for way in self.port._streams:
            way.choose(Choices.always(method))
        self.woken = asyncio.Event()
        self.port.connect(self.woken.set)

    async def run(self, *transfers: Transfer) -> None:
        """Run transfers to their ends, and check that all succeeded."""
        for transfer in transfers:
            self.port.submit(transfer)
        ended = self.port.reap()
        async with asyncio.timeout(30):
            while len(ended) < len(transfers):
                await self.woken.wait()
                self.woken.clear()
                ended += self.port.reap()
        assert [error for _, error, *_ in ended if error is not None] == []

    def close(self) -> None:
        """Close the port and free the arena."""
        self.port.close()
        self.arena.close()


@pytest.fixture
def opened() -> Iterator[Callable[..., Rig]]:
    """Yield a function that opens rigs, and close them all afterwards."""
    rigs: list[Rig] = []

    def open_rig(*arguments: Any) -> Rig:
        rigs.append(Rig(*arguments))
        return rigs[-1]

    yield open_rig
    for rig in rigs:
        rig.close()


@every_way
@pytest.mark.parametrize("tokens", [1, 16, 64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
async def test_bytes_come_back(
    opened: Callable[..., Rig], shape: str, dtype: str, tokens: int, method: CopyMethod
) -> None:
    """Scattered blocks that went to the host and came back elsewhere have the same bytes."""
    rig = opened(shape, dtype, tokens, method)
    random = np.random.default_rng(tokens)
    device, host, back = (random.permutation(n)[:20] for n in (BLOCKS, HOST_BLOCKS, BLOCKS))
    before = blocks_first(shape, rig.layers)
    await rig.run(Transfer(1, 1, Route(Tier.DEVICE, Tier.HOST), device, host))
    await rig.run(Transfer(2, 1, Route(Tier.HOST, Tier.DEVICE), host, back))
    for old, new in zip(before, blocks_first(shape, rig.layers), strict=True):
        expected = old.copy()
        expected[back] = old[device]
        assert np.array_equal(new, expected)


@pytest.mark.parametrize("shape", SHAPES)
async def test_slots_of_the_stage_are_used_in_turn(
    opened: Callable[..., Rig], shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages of three blocks move many blocks, also in both directions at once, and mix none up."""
    rig = opened(shape, "bfloat16", 64, CopyMethod.STAGED)
    monkeypatch.setattr(Stage, "size", 3 * rig.block_bytes)
    random = np.random.default_rng(0)
    device, host, back = (random.permutation(n)[:40] for n in (BLOCKS, HOST_BLOCKS, BLOCKS))
    for number in range(10):
        before = blocks_first(shape, rig.layers)
        await rig.run(Transfer(1, 1, Route(Tier.DEVICE, Tier.HOST), device, host))
        await rig.run(
            Transfer(2, 1, Route(Tier.HOST, Tier.DEVICE), host[:20], back[:20]),
            Transfer(3, 1, Route(Tier.DEVICE, Tier.HOST), back[20:], host[20:]),
        )
        for old, new in zip(before, blocks_first(shape, rig.layers), strict=True):
            expected = old.copy()
            expected[back[:20]] = old[device[:20]]
            assert np.array_equal(new, expected), number
        device, back = back, device


@every_way
async def test_both_directions_at_once(opened: Callable[..., Rig], method: CopyMethod) -> None:
    """Many transfers on both streams at once all move their blocks completely."""
    rig = opened("kv-blocks", "bfloat16", 16, method)
    before = blocks_first("kv-blocks", rig.layers)
    to_host = [
        Transfer(n, 1, Route(Tier.DEVICE, Tier.HOST), np.arange(8), np.arange(8)) for n in range(20)
    ]
    to_device = [
        Transfer(100 + n, 1, Route(Tier.HOST, Tier.DEVICE), np.arange(8, 16), np.arange(8, 16))
        for n in range(20)
    ]
    await rig.run(*(each for pair in zip(to_host, to_device, strict=True) for each in pair))
    for number, (old, new) in enumerate(
        zip(before, blocks_first("kv-blocks", rig.layers), strict=True)
    ):
        others = np.r_[0:8, 16:BLOCKS]
        assert np.array_equal(new[others], old[others])
        size = old[0].size
        host = rig.arena.array[:8, number * size : (number + 1) * size]
        assert np.array_equal(host, old[:8].reshape(8, -1))


async def test_old_drivers_copy_grids(opened: Callable[..., Rig]) -> None:
    """Without a batch call in the driver, 2-D copies move the same bytes."""
    rig = opened("kv-blocks", "bfloat16", 16)
    rig.port._driver._batch = rig.port._driver._copy_each
    before = blocks_first("kv-blocks", rig.layers)
    every = np.arange(0, 40, 2)
    await rig.run(Transfer(1, 1, Route(Tier.DEVICE, Tier.HOST), every, every + 1))
    await rig.run(Transfer(2, 1, Route(Tier.HOST, Tier.DEVICE), every + 1, every + 20))
    for old, new in zip(before, blocks_first("kv-blocks", rig.layers), strict=True):
        expected = old.copy()
        expected[every + 20] = old[every]
        assert np.array_equal(new, expected)


def kept_choices(folder: Path) -> int:
    """Count the measurements that were stored on disk."""
    return len(list(folder.rglob("choices-*.json")))


async def test_what_is_faster_is_measured_once(
    opened: Callable[..., Rig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first port measures and stores the choices; the second reads them. No KV byte changes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rig = opened("kv-blocks", "bfloat16", 16)
    before = blocks_first("kv-blocks", rig.layers)
    specs = [spec_of(layer) for layer in rig.layers]
    layout = infer_layout(specs, model_of("kv-blocks", "bfloat16").spaces(16)[0].shapes)
    found = []
    for _ in range(2):
        arena = Arena.open(HOST_BLOCKS, layout.block_bytes)
        port = CudaDevicePort([layout], Pinned(arena), rig.layers, BoundDriver(0))
        found.append(port.choices)
        port.close()
        arena.close()
    assert found[0] == found[1]
    assert kept_choices(tmp_path) == 1
    for old, new in zip(before, blocks_first("kv-blocks", rig.layers), strict=True):
        assert np.array_equal(old, new)


# -- through the manager -------------------------------------------------------------------------


def slots_of(blocks: Any, tokens: int) -> Any:
    """Return the slots of whole blocks."""
    return (np.asarray(list(blocks))[:, None] * tokens + np.arange(tokens)).ravel()


def cache_of(folder: Path, tokens: int) -> CacheConfig:
    """Return a configuration with a small SSD tier."""
    return CacheConfig(
        tokens_per_block=tokens, num_cpu_blocks=96, num_ssd_blocks=96, ssd_cache_dir=str(folder)
    )


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
async def test_every_rank_gets_its_bytes(
    shape: str, dtype: str, tp_size: int, tmp_path: Path
) -> None:
    """Several ranks on one GPU get their bytes from host memory, from SSD and layer by layer."""
    tokens, prompt = 16, np.arange(20 * 16)
    model = model_of(shape, dtype, tp_size)
    (space,) = model.spaces(tokens)
    ranks = [
        tensors_of(shape, model, tokens, space.part_of(rank).number) for rank in range(tp_size)
    ]
    before = [[each[:20] for each in blocks_first(shape, layers)] for layers in ranks]
    async with KVManager(model, cache_of(tmp_path, tokens)) as manager:
        for rank, layers in enumerate(ranks):
            manager.register_kv_caches(layers, named(shape), rank)
        assert (await manager.put(prompt, slots_of(range(20), tokens))).return_mask.all()
        await manager.flush()
        for name in ("host", "SSD", "layers"):
            for layers in ranks:
                for layer in layers:
                    layer.view(torch.uint8).zero_()
            if name == "SSD":
                manager.clear(Tier.HOST)
            slots = slots_of(range(40, 60), tokens)
            if name == "layers":
                response = await manager.get_layerwise(prompt, slots)
            else:
                response = await manager.get(prompt, slots)
            assert response.return_mask.all()
            for old, layers in zip(before, ranks, strict=True):
                for one, new in zip(old, blocks_first(shape, layers), strict=True):
                    assert np.array_equal(new[40:60], one), name


async def test_a_put_reads_what_the_callers_stream_has_queued(tmp_path: Path) -> None:
    """A put first waits for a long kernel of the caller's stream that writes the blocks."""
    tokens, prompt = 16, np.arange(8 * 16)
    model = model_of("kv-blocks", "float32")
    layers = tensors_of("kv-blocks", model, tokens)
    async with KVManager(model, cache_of(tmp_path, tokens)) as manager:
        manager.register_kv_caches(layers)
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
            layers[0].fill_(3.0)
            await manager.put(prompt, slots_of(range(8), tokens))
        await manager.get(prompt, slots_of(range(20, 28), tokens))
        assert (layers[0][:, 20:28] == 3.0).all()


def test_a_stream_waits_for_layers(tmp_path: Path) -> None:
    """Work queued behind the wait for a layer sees that layer; the thread waits for no copy."""
    tokens, prompt = 16, np.arange(20 * 16)
    model = model_of("kv-blocks", "float32")
    layers = tensors_of("kv-blocks", model, tokens)
    manager = KVManager(model, cache_of(tmp_path, tokens))
    manager.start()
    try:
        manager.register_kv_caches(layers)
        put = manager.put_layerwise(prompt, slots_of(range(20), tokens))
        for number in range(LAYERS):
            torch.cuda._sleep(1_000_000)
            layers[number][:, :20] = float(number + 1)
            put.layer_written(number)
        assert manager.wait(put.task_id)[put.task_id].return_mask.all()
        stream = torch.cuda.Stream()
        get = manager.get_layerwise(prompt, slots_of(range(40, 60), tokens))
        seen = []
        with torch.cuda.stream(stream):
            for number in range(LAYERS):
                assert get.wait_for_layer(number, stream=stream.cuda_stream)
                seen.append((layers[number][:, 40:60] == float(number + 1)).all())
        stream.synchronize()
        assert manager.wait(get.task_id)[get.task_id].return_mask.all()
        assert all(bool(each) for each in seen)
    finally:
        manager.shutdown()


async def test_a_graph_that_is_captured_meanwhile_is_left_alone(tmp_path: Path) -> None:
    """A put and a get succeed while another thread captures a graph, and the graph is right."""
    tokens, prompt = 16, np.arange(20 * 16)
    model = model_of("kv-blocks", "float32")
    layers = tensors_of("kv-blocks", model, tokens)
    value = torch.zeros(1000, device="cuda")
    graph, ready, go_on = torch.cuda.CUDAGraph(), asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def capture() -> None:
        with torch.cuda.graph(graph):
            value.add_(1.0)
            loop.call_soon_threadsafe(ready.set)
            asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(20)
            value.add_(1.0)

    async with KVManager(model, cache_of(tmp_path, tokens)) as manager:
        manager.register_kv_caches(layers)
        captured = asyncio.create_task(asyncio.to_thread(capture))
        await ready.wait()
        assert (await manager.put(prompt, slots_of(range(20), tokens))).return_mask.all()
        assert (await manager.get(prompt, slots_of(range(40, 60), tokens))).return_mask.all()
        go_on.set()
        await captured
        graph.replay()
        torch.cuda.synchronize()
        assert (value == 2.0).all()


async def test_a_thread_that_captures_a_graph_cannot_put_or_get(tmp_path: Path) -> None:
    """A thread that captures a graph cannot put or get; the graph and the device stay usable."""
    tokens, prompt = 16, np.arange(20 * 16)
    layers = tensors_of("kv-blocks", model_of("kv-blocks", "float32"), tokens)
    value = torch.zeros(1000, device="cuda")
    graph = torch.cuda.CUDAGraph()
    slots = slots_of(range(20), tokens)
    async with KVManager(model_of("kv-blocks", "float32"), cache_of(tmp_path, tokens)) as manager:
        manager.register_kv_caches(layers)
        with torch.cuda.graph(graph):
            value.add_(1.0)
            for request in (manager.put, manager.get):
                with pytest.raises(ConfigError, match="a CUDA graph is being captured"):
                    await request(prompt, slots)
            value.add_(1.0)
        assert (await manager.put(prompt, slots)).return_mask.all()
        graph.replay()
        torch.cuda.synchronize()
        assert (value == 2.0).all()


async def test_memory_is_given_back_while_the_device_sleeps(tmp_path: Path) -> None:
    """Tensors may be freed while the device sleeps; new ones take their place on resume."""
    tokens, prompt = 16, np.arange(20 * 16)
    model = model_of("kv-blocks", "bfloat16")
    layers = tensors_of("kv-blocks", model, tokens)
    before = [each[:20] for each in blocks_first("kv-blocks", layers)]
    async with KVManager(model, cache_of(tmp_path, tokens)) as manager:
        manager.register_kv_caches(layers)
        await manager.put(prompt, slots_of(range(20), tokens))
        await manager.suspend_device()
        held = torch.cuda.memory_allocated()
        del layers[:]
        assert torch.cuda.memory_allocated() < held
        layers = tensors_of("kv-blocks", model, tokens, seed=5)
        manager.resume_device(layers)
        await manager.get(prompt, slots_of(range(40, 60), tokens))
        for one, new in zip(before, blocks_first("kv-blocks", layers), strict=True):
            assert np.array_equal(new[40:60], one)
