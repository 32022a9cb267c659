"""The CUDA device port on a real GPU: the same laws, the same bytes. `pytest -m gpu`."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from flexkv.common.layout import infer_layout
from flexkv.common.terms import Route, Tier, Transfer
from flexkv.io.arena import Arena
from flexkv.io.cuda.choice import Choice
from flexkv.io.cuda.driver import BoundDriver
from flexkv.io.cuda.port import CudaDevicePort
from flexkv.io.tensors import spec_of

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

BLOCKS, HOST_BLOCKS = 64, 48
DTYPES = ["bfloat16", "float16", "float32", "int8", "float8_e4m3fn"]
SHAPES: dict[str, Any] = {
    "kv-blocks": lambda tokens: (2, BLOCKS, tokens, 4, 64),
    "blocks-kv": lambda tokens: (BLOCKS, 2, tokens, 4, 64),
    "mla": lambda tokens: (BLOCKS, tokens, 256),
}


class Rig:
    """A port over the real driver, and tensors of known bytes."""

    def __init__(self, shape: str, dtype: str, tokens: int, choice: Choice) -> None:
        size = SHAPES[shape](tokens)
        self.layers = [
            torch.randint(0, 256, (*size[:-1], size[-1] * getattr(torch, dtype).itemsize),
                          dtype=torch.uint8, device="cuda").view(getattr(torch, dtype))
            for _ in range(3)
        ]  # fmt: skip
        heads, dim, kv = (1, 256, 1) if shape == "mla" else (4, 64, 2)
        specs = [spec_of(layer) for layer in self.layers]
        layout = infer_layout(specs, tokens, heads, dim, kv)
        self.arena = Arena.open(HOST_BLOCKS, -(-layout.block_bytes // 4096) * 4096)
        driver = BoundDriver(0)
        self.port = CudaDevicePort(layout, self.arena, self.layers, driver, (choice, choice))
        self.woken = asyncio.Event()
        self.port.connect(self.woken.set)
        torch.cuda.synchronize()

    def bytes(self) -> Any:
        """Give a copy of all layers' bytes."""
        torch.cuda.synchronize()
        return [layer.view(torch.uint8).cpu().numpy().copy() for layer in self.layers]

    async def run(self, *transfers: Transfer) -> None:
        """Run transfers to their ends, all of them good."""
        for transfer in transfers:
            self.port.submit(transfer)
        ended = self.port.reap()
        async with asyncio.timeout(30):
            while len(ended) < len(transfers):
                await self.woken.wait()
                self.woken.clear()
                ended += self.port.reap()
        assert [error for _, error in ended if error is not None] == []

    def close(self) -> None:
        """Let go of everything."""
        self.port.close()
        self.arena.close()


@pytest.mark.parametrize("choice", [Choice(True), Choice(False)], ids=["engine", "kernel"])
@pytest.mark.parametrize("tokens", [1, 16, 64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
async def test_bytes_come_back(shape: str, dtype: str, tokens: int, choice: Choice) -> None:
    """Scattered blocks that went to the host and came back elsewhere are the same bytes."""
    rig = Rig(shape, dtype, tokens, choice)
    random = np.random.default_rng(tokens)
    device, host, back = (random.permutation(n)[:20] for n in (BLOCKS, HOST_BLOCKS, BLOCKS))
    before = rig.bytes()
    await rig.run(Transfer(1, 1, Route(Tier.DEVICE, Tier.HOST), device, host))
    await rig.run(Transfer(2, 1, Route(Tier.HOST, Tier.DEVICE), host, back))
    axis = 1 if shape == "kv-blocks" else 0
    for old, new in zip(before, rig.bytes(), strict=True):
        expected = np.moveaxis(old.copy(), axis, 0)
        expected[back] = np.moveaxis(old, axis, 0)[device]
        assert np.array_equal(np.moveaxis(new, axis, 0), expected)
    rig.close()


async def test_both_directions_at_once() -> None:
    """Many transfers on both streams, each whole."""
    rig = Rig("kv-blocks", "bfloat16", 16, Choice())
    before = rig.bytes()
    to_host = [
        Transfer(n, 1, Route(Tier.DEVICE, Tier.HOST), np.arange(8), np.arange(8)) for n in range(20)
    ]
    to_device = [
        Transfer(100 + n, 1, Route(Tier.HOST, Tier.DEVICE), np.arange(8, 16), np.arange(8, 16))
        for n in range(20)
    ]
    await rig.run(*(each for pair in zip(to_host, to_device, strict=True) for each in pair))
    for number, (old, new) in enumerate(zip(before, rig.bytes(), strict=True)):
        assert np.array_equal(np.delete(new, range(8, 16), 1), np.delete(old, range(8, 16), 1))
        page = old[0, :8].reshape(8, -1).shape[1]
        host = rig.arena.array[:8, 2 * number * page : (2 * number + 1) * page]
        assert np.array_equal(host, old[0, :8].reshape(8, -1))
    rig.close()


async def test_what_is_faster_is_measured() -> None:
    """In memory of its own: the caches are as they were."""
    rig = Rig("kv-blocks", "bfloat16", 16, Choice())
    before = rig.bytes()
    driver = BoundDriver(0)
    specs = [spec_of(layer) for layer in rig.layers]
    layout = infer_layout(specs, 16, 4, 64, 2)
    arena = Arena.open(HOST_BLOCKS, layout.block_bytes)
    port = CudaDevicePort(layout, arena, rig.layers, driver)
    for old, new in zip(before, rig.bytes(), strict=True):
        assert np.array_equal(old, new)
    port.close()
    arena.close()
    rig.close()


async def test_a_put_reads_what_a_stream_has_queued() -> None:
    """A long kernel that writes the pages comes first."""
    rig = Rig("kv-blocks", "float32", 16, Choice())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        rig.layers[0].fill_(3.0)
    rig.port.order_after(stream.cuda_stream)
    await rig.run(Transfer(1, 1, Route(Tier.DEVICE, Tier.HOST), np.arange(8), np.arange(8)))
    page = 16 * 4 * 64 * 4
    assert (rig.arena.array[:8, :page].copy().view(np.float32) == 3.0).all()
    rig.close()
