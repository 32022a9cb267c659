"""Copies between a GPU and pinned host memory: scattered chunks, both ways, beside computing.

Limit: one contiguous copy of the same bytes by the copy engine, in the same run. For a matrix
product beside copies: the same product alone.
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
from flexkv.io.cuda.choice import Choices, CopyMethod, CopyPreference
from flexkv.io.cuda.driver import BoundDriver
from flexkv.io.cuda.pinned import Pinned
from flexkv.io.cuda.port import CudaDevicePort
from flexkv.io.memory.arena import Arena

Ids = NDArray[np.int64]

CHUNKS = 10_000
SIZES = (4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10, 256 << 10)
PIECES, PIECE, BLOCKS = 64, 32 << 10, 1024
"""Blocks of an 8B-shaped model: scattered on the device, contiguous in host memory."""
WAYS = {
    "engine": Choices.always(CopyMethod.ENGINE),
    "staged": Choices.always(CopyMethod.STAGED, 16),
    "kernel": Choices.always(CopyMethod.KERNEL, 2),
}
ROUTES = Route(Tier.DEVICE, Tier.HOST), Route(Tier.HOST, Tier.DEVICE)
PRODUCT = 8192
"""Rows and columns of the matrices."""


def measure(options: Options) -> Figures:
    """Return the figures of the case; without a GPU, the reason that there are none."""
    try:
        BoundDriver(0).close()
    except (BackendUnavailableError, DeviceError) as error:
        return {"GPU copies": f"not measured: {error}"}
    figures: Figures = {}
    for size in SIZES[:1] if options.quick else SIZES:
        rig = Rig(size, min(CHUNKS, (4 << 30) // size))
        figures |= asyncio.run(_scattered(rig, rig, options.repeats))
    if not options.quick:
        whole = Rig(PIECES * PIECE, BLOCKS)
        figures |= asyncio.run(_scattered(Rig(PIECE, BLOCKS, PIECES), whole, options.repeats))
    figures |= asyncio.run(_both_ways(options.repeats))
    return {**figures, **asyncio.run(_beside_computing(options.repeats))}


class Rig:
    """A port to GPU blocks that are made of pieces of one size. Call `connect` in the loop."""

    def __init__(self, size: int, blocks: int, pieces: int = 1) -> None:
        import torch

        self.blocks, self.block_bytes = blocks, size * pieces
        self.what = f"{size >> 10} KiB chunks" + (f", {pieces} to a block" if pieces > 1 else "")
        memory = torch.zeros(blocks * self.block_bytes, dtype=torch.uint8, device="cuda")
        self.is_contiguous = pieces == 1
        torch.cuda.synchronize()
        at = np.arange(pieces, dtype=np.int64) * size
        rows = np.stack([memory.data_ptr() + at * blocks, *[np.full(pieces, size)] * 2, at], axis=1)
        layout = PagedLayout(rows, blocks, self.block_bytes, "bench", (rows,))
        self.arena = Arena.open(blocks, self.block_bytes)
        pinned, preferences = Pinned(self.arena), (CopyPreference(), CopyPreference())
        self.port = CudaDevicePort([layout], pinned, memory, BoundDriver(0), preferences)
        self.chosen = [way.choices for way in self.port._streams]
        self._woken = asyncio.Event()

    def connect(self) -> None:
        """Attach to the running loop."""
        self.port.connect(self._woken.set)

    def choose(self, choices: list[Choices]) -> None:
        """Set how copies are made: first those to the host, then those to the device."""
        for way, each in zip(self.port._streams, choices, strict=True):
            way.choose(each)

    async def moved(self, *jobs: tuple[Route, Ids, Ids]) -> float:
        """Return the seconds until transfers that were submitted together have all ended."""
        begin = time.perf_counter()
        for op_id, (route, sources, targets) in enumerate(jobs):
            self.port.submit(Transfer(op_id, 0, route, sources, targets))
        ended = self.port.reap()
        while len(ended) < len(jobs):
            await self._woken.wait()
            self._woken.clear()
            ended += self.port.reap()
        assert not any(completion.error for completion in ended)
        return time.perf_counter() - begin

    async def contiguous(self, route: Route) -> float:
        """Return the seconds that the copy engine takes for all bytes as one copy."""
        assert self.is_contiguous
        self.choose([WAYS["engine"]] * 2)  # blocks that adjoin on both sides make one copy
        every = np.arange(self.blocks)
        return await self.moved((route, every, every))

    def close(self) -> None:
        """Release the port and the arena."""
        self.port.close()
        self.arena.close()


async def _scattered(rig: Rig, whole: Rig, repeats: int) -> Figures:
    """Time scattered chunks on each route, by each copy method, beside `whole` as one copy."""
    for each in {rig, whole}:
        each.connect()
    random = np.random.default_rng(0)
    ways = {name: [choices] * 2 for name, choices in WAYS.items()} | {"choice": rig.chosen}
    figures: Figures = {}
    size = rig.blocks * rig.block_bytes
    for number, route in enumerate(ROUTES):
        for name, choices in ways.items():
            scattered, contiguous = [], []
            for _ in range(repeats + 1):
                rig.choose(choices)
                ids = random.permutation(rig.blocks), random.permutation(rig.blocks)
                scattered.append(await rig.moved((route, *ids)))
                contiguous.append(await whole.contiguous(route))
            what = f"{rig.what}, {route}, by {name}"
            figures[f"{what} / contiguous"] = median_ratio(contiguous[1:], scattered[1:])
            figures[f"{what}, GB/s"] = size / statistics.median(scattered[1:]) / 1e9
        figures[f"{rig.what}, {route}, chosen"] = _told(rig.chosen[number])
    for each in {rig, whole}:
        each.close()
    return figures


def _told(choices: Choices) -> str:
    """Return the chosen copy methods in words, each with its largest number of chunks."""
    bounds = [f"up to {count}: " for count in choices.counts] + ["beyond: "]
    return ", ".join(
        f"{bound}{choice.method}" + (f" {choice.thread_blocks}" if choice.cost else "")
        for bound, choice in zip(bounds, choices.choices, strict=True)
    )


async def _both_ways(repeats: int) -> Figures:
    """Time blocks of 2 MiB copied both ways at once, against one way."""
    rig = Rig(2 << 20, 1024)
    rig.connect()
    half = rig.blocks // 2
    out, back = np.arange(half), np.arange(half, rig.blocks)
    one, both = [], []
    for _ in range(repeats + 1):
        one.append(await rig.moved((ROUTES[0], out, out)))
        both.append(await rig.moved((ROUTES[0], out, out), (ROUTES[1], back, back)))
    rig.close()
    return {"2 MiB blocks, both ways at once / one way": 2 * median_ratio(one[1:], both[1:])}


async def _beside_computing(repeats: int) -> Figures:
    """Time a bf16 matrix product beside saturated copies both ways, against the product alone."""
    import torch

    left, right = (
        torch.randn(PRODUCT, PRODUCT, device="cuda", dtype=torch.bfloat16) for _ in range(2)
    )
    out = torch.empty_like(left)
    rig = Rig(64 << 10, 16384)
    rig.connect()
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
    """Return the seconds of GPU time that 20 products take, beside copies if there is a rig."""
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
    """Keep both directions busy until `stop` is set."""
    half = rig.blocks // 2
    while not stop.is_set():
        ids = random.permutation(half), half + random.permutation(half)
        await rig.moved((ROUTES[0], ids[0], ids[0]), (ROUTES[1], ids[1], ids[1]))
