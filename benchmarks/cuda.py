"""Copies between a GPU and pinned host memory, by copy engine and by kernel, scattered.

Limit: one contiguous copy of the same bytes by the copy engine, in the same run.
"""

from __future__ import annotations

import asyncio
import statistics
import time

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
SIZES = (4 << 10, 16 << 10, 64 << 10, 256 << 10)
WAYS = {how.value: Choices.always(how) for how in How}


def measure(options: Options) -> Figures:
    """Give the figures of the case; without a GPU, why there are none."""
    try:
        driver = BoundDriver(0)
    except (BackendUnavailableError, DeviceError) as error:
        return {"GPU copies": f"not measured: {error}"}
    driver.close()
    figures: Figures = {}
    for size in SIZES[:1] if options.quick else SIZES:
        for name, choices in WAYS.items():
            figures |= asyncio.run(_measure(size, name, choices, options.repeats))
    return figures


async def _measure(size: int, name: str, choices: Choices, repeats: int) -> Figures:
    import torch

    chunks = min(CHUNKS, (2 << 30) // size)
    memory = torch.zeros(chunks * size, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    address = memory.data_ptr()
    rows = np.array([[address, size, size, 0]], np.int64)
    layout = PagedLayout(rows, chunks, size, "bench", (rows,))
    arena, driver = Arena.open(chunks, size), BoundDriver(0)
    port = CudaDevicePort(layout, Pinned(arena), memory, driver, (Wish(use_engine=True),) * 2)
    woken = asyncio.Event()
    port.connect(woken.set)
    random = np.random.default_rng(0)
    figures: Figures = {}

    async def moved(route: Route, way: Choices, ids: tuple[Ids, Ids]) -> float:
        port._ways[route.target is Tier.DEVICE].choices = way
        begin = time.perf_counter()
        port.submit(Transfer(0, 0, route, *ids))
        ended = port.reap()
        while not ended:
            await woken.wait()
            woken.clear()
            ended = port.reap()
        assert ended[0].error is None
        return time.perf_counter() - begin

    for route in (Route(Tier.DEVICE, Tier.HOST), Route(Tier.HOST, Tier.DEVICE)):
        scattered, contiguous = [], []
        for _ in range(repeats + 1):
            ids = random.permutation(chunks), random.permutation(chunks)
            scattered.append(await moved(route, choices, ids))
            # Neighbours on both ends are one run: one copy.
            ids = np.arange(chunks), np.arange(chunks)
            contiguous.append(await moved(route, WAYS["engine"], ids))
        what = f"{size >> 10} KiB chunks, {route}, by {name}"
        figures[f"{what} / contiguous"] = median_ratio(contiguous[1:], scattered[1:])
        figures[f"{what}, GB/s"] = chunks * size / statistics.median(scattered[1:]) / 1e9
    port.close()
    arena.close()
    return figures
