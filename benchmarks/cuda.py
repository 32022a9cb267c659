"""Copies between a GPU and pinned host memory: scattered chunks, both ways, beside computing.

Limit: one contiguous copy of the same bytes by the copy engine, in the same run; and for a matrix
product, the same product alone.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Figures, Options, median_ratio
from flexkv.common.errors import BackendUnavailableError, DeviceError
from flexkv.common.layout import PagedLayout
from flexkv.common.terms import Route, Tier, Transfer
from flexkv.io.arena import Arena
from flexkv.io.cuda.choice import Choices, How, Wish
from flexkv.io.cuda.driver import BoundDriver
from flexkv.io.cuda.pinned import Pinned
from flexkv.io.cuda.port import CudaDevicePort

Ids = NDArray[np.int64]

CHUNKS = 10_000
SIZES = (4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10, 256 << 10)
WAYS = {how.value: Choices.always(how) for how in How}
ROUTES = Route(Tier.DEVICE, Tier.HOST), Route(Tier.HOST, Tier.DEVICE)
PRODUCT = 8192
"""Rows and columns of the matrices."""


def measure(options: Options) -> Figures:
    """Give the figures of the case; without a GPU, why there are none."""
    try:
        BoundDriver(0).close()
    except (BackendUnavailableError, DeviceError) as error:
        return {"GPU copies": f"not measured: {error}"}
    figures: Figures = {}
    for size in SIZES[:1] if options.quick else SIZES:
        figures |= asyncio.run(_scattered(size, options.repeats))
    figures |= asyncio.run(_both_ways(options.repeats))
    return {**figures, **asyncio.run(_beside_computing(options.repeats))}


class Rig:
    """A port to chunks of one size on the GPU, connected to the running loop."""

    def __init__(self, size: int, chunks: int) -> None:
        import torch

        self.chunks, self.size = chunks, size
        memory = torch.zeros(chunks * size, dtype=torch.uint8, device="cuda")
        torch.cuda.synchronize()
        rows = np.array([[memory.data_ptr(), size, size, 0]], np.int64)
        layout = PagedLayout(rows, chunks, size, "bench", (rows,))
        self.arena = Arena.open(chunks, size)
        pinned, wishes = Pinned(self.arena), (Wish(), Wish())
        self.port = CudaDevicePort(layout, pinned, memory, BoundDriver(0), wishes)
        self.chosen = [way.choices for way in self.port._ways]
        self._woken = asyncio.Event()
        self.port.connect(self._woken.set)

    def choose(self, choices: list[Choices]) -> None:
        """Let copies be made so: to the host, to the device."""
        for way, each in zip(self.port._ways, choices, strict=True):
            way.choose(each)

    async def moved(self, *jobs: tuple[Route, Ids, Ids]) -> float:
        """Give the seconds that some transfers take that begin at once."""
        begin = time.perf_counter()
        for token, (route, sources, targets) in enumerate(jobs):
            self.port.submit(Transfer(token, 0, route, sources, targets))
        ended = self.port.reap()
        while len(ended) < len(jobs):
            await self._woken.wait()
            self._woken.clear()
            ended += self.port.reap()
        assert not any(completion.error for completion in ended)
        return time.perf_counter() - begin

    def close(self) -> None:
        """Let go of everything."""
        self.port.close()
        self.arena.close()


async def _scattered(size: int, repeats: int) -> Figures:
    """Scattered chunks each way, by each way to copy, and as chosen."""
    rig = Rig(size, min(CHUNKS, (4 << 30) // size))
    random = np.random.default_rng(0)
    ways = {name: [choices] * 2 for name, choices in WAYS.items()} | {"choice": rig.chosen}
    figures: Figures = {}
    every = np.arange(rig.chunks)
    for number, route in enumerate(ROUTES):
        for name, choices in ways.items():
            scattered, contiguous = [], []
            for _ in range(repeats + 1):
                rig.choose(choices)
                ids = random.permutation(rig.chunks), random.permutation(rig.chunks)
                scattered.append(await rig.moved((route, *ids)))
                rig.choose([WAYS["engine"]] * 2)  # neighbours on both ends are one copy
                contiguous.append(await rig.moved((route, every, every)))
            what = f"{size >> 10} KiB chunks, {route}, by {name}"
            figures[f"{what} / contiguous"] = median_ratio(contiguous[1:], scattered[1:])
            figures[f"{what}, GB/s"] = rig.chunks * size / statistics.median(scattered[1:]) / 1e9
        figures[f"{size >> 10} KiB chunks, {route}, chosen"] = str(rig.chosen[number])
    rig.close()
    return figures


async def _both_ways(repeats: int) -> Figures:
    """Blocks of 2 MiB both ways at once, against one way."""
    rig = Rig(2 << 20, 1024)
    half = rig.chunks // 2
    out, back = np.arange(half), np.arange(half, rig.chunks)
    one, both = [], []
    for _ in range(repeats + 1):
        one.append(await rig.moved((ROUTES[0], out, out)))
        both.append(await rig.moved((ROUTES[0], out, out), (ROUTES[1], back, back)))
    rig.close()
    return {"2 MiB blocks, both ways at once / one way": 2 * median_ratio(one[1:], both[1:])}


async def _beside_computing(repeats: int) -> Figures:
    """A bf16 matrix product beside saturated copies both ways, against the same alone."""
    import torch

    left, right = (
        torch.randn(PRODUCT, PRODUCT, device="cuda", dtype=torch.bfloat16) for _ in range(2)
    )
    out = torch.empty_like(left)
    rig = Rig(64 << 10, 16384)
    random = np.random.default_rng(0)
    figures: Figures = {}
    for name, choices in WAYS.items():
        rig.choose([choices] * 2)
        alone, beside = [], []
        for _ in range(repeats + 1):
            alone.append(await _products(left, right, out, None, random))
            beside.append(await _products(left, right, out, rig, random))
        figures[f"product beside copies by {name} / alone"] = median_ratio(alone[1:], beside[1:])
    rig.close()
    return figures


async def _products(left: Any, right: Any, out: Any, rig: Rig | None, random: Any) -> float:
    """Give the seconds of GPU time that products take, copies going on all the while."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stop = asyncio.Event()
    copies = asyncio.create_task(_copy_until(stop, rig, random)) if rig else None
    await asyncio.sleep(0.01)
    begin.record()
    for _ in range(20):
        torch.mm(left, right, out=out)
    end.record()
    await asyncio.to_thread(end.synchronize)
    stop.set()
    if copies is not None:
        await copies
    return float(begin.elapsed_time(end)) / 1e3


async def _copy_until(stop: asyncio.Event, rig: Rig, random: Any) -> None:
    """Keep both directions busy."""
    half = rig.chunks // 2
    while not stop.is_set():
        ids = random.permutation(half), half + random.permutation(half)
        await rig.moved((ROUTES[0], ids[0], ids[0]), (ROUTES[1], ids[1], ids[1]))
