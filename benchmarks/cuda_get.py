"""Gets of a long prompt on a GPU through the manager: end to end, layer by layer, in CPU time.

Limit: one contiguous copy of the same bytes by the copy engine, in the same run. Without a GPU only
the host's own CPU time is measured, over a driver that does nothing.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest

from benchmarks.harness import Figures, Options, median_ratio
from benchmarks.rigs import LARGE, PER_BLOCK, cache_of, prompt, slots_of
from flexkv.common.errors import BackendUnavailableError, DeviceError
from flexkv.io.cuda.driver import BoundDriver
from flexkv.kvmanager import KVManager
from flexkv.testing.fake_cuda import FakeTensor

BLOCKS = 2048
"""Blocks of 2 MiB: a prompt of 32k tokens of an 8B-shaped model."""
WAYS: dict[str, dict[str, Any]] = {
    "choice": {},
    "engine": {"use_ce_transfer_h2d": True, "use_ce_transfer_d2h": True},
    "kernel": {
        "use_ce_transfer_h2d": False,
        "use_ce_transfer_d2h": False,
        "transfer_num_cta_h2d": 8,
        "transfer_num_cta_d2h": 8,
    },
}


class NoDriver:
    """A driver that does no work, and reports its end at once."""

    named = "none"

    def __init__(self, ordinal: int) -> None:
        self._handles = iter(range(1, 1 << 30))

    def open_stream(self, urgent: bool) -> int:
        """Return a new handle."""
        return next(self._handles)

    def notify(self, stream: int, eventfd: int) -> None:
        """Signal the end at once."""
        os.eventfd_write(eventfd, 1)

    def inside(self) -> AbstractContextManager[None]:
        """Return a context manager that does nothing."""
        return nullcontext()

    def is_capturing(self, stream: int) -> bool:
        """Return False: no graph is being captured."""
        return False

    def __getattr__(self, name: str) -> Any:
        """Return a function that returns a handle, whatever its arguments."""
        return lambda *_: 1


def measure(options: Options) -> Figures:
    """Return the figures of the case."""
    blocks = (8, 64) if options.quick else (8, 256, BLOCKS)
    try:
        BoundDriver(0).close()
    except (BackendUnavailableError, DeviceError) as error:
        figures: Figures = {"GPU gets": f"not measured: {error}"}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("flexkv.tiers.backend.BoundDriver", NoDriver)
            for name in ("engine", "kernel"):
                config = WAYS[name]
                spent = asyncio.run(_cpu_time(config, blocks, options.repeats, _fake_tensors))
                for what, us in spent.items():
                    figures[f"{what}, by {name}, without the driver"] = us
        return figures
    figures = asyncio.run(_end_to_end(BLOCKS, options.repeats))
    for name, config in WAYS.items():
        spent = asyncio.run(_cpu_time(config, blocks, options.repeats, _cuda_tensors))
        figures |= {f"{what}, by {name}": us for what, us in spent.items()}
    return figures | asyncio.run(_bare_cpu_time(blocks, options.repeats))


def _shape(blocks: int) -> tuple[int, ...]:
    return (2, blocks, PER_BLOCK, LARGE.num_kv_heads, LARGE.head_size)


def _fake_tensors(blocks: int) -> list[Any]:
    return [FakeTensor(np.zeros(_shape(blocks), np.float16)) for _ in range(LARGE.num_layers)]


def _cuda_tensors(blocks: int) -> list[Any]:
    import torch

    shape = _shape(blocks)
    return [torch.zeros(shape, dtype=torch.float16, device="cuda") for _ in range(LARGE.num_layers)]


async def _cpu_time(
    config: dict[str, Any], counts: tuple[int, ...], repeats: int, tensors: Any
) -> Figures:
    """Return the CPU time that this process spends on a get, by number of blocks."""
    figures: Figures = {}
    most = max(counts)
    cache = cache_of(most + 8, enable_ssd=False, **config)
    async with KVManager(LARGE, cache) as manager:
        manager.register_kv_caches(tensors(2 * most))
        places = np.random.default_rng(0).permutation(2 * most)[:most]
        await manager.put(prompt(0, most), slots_of(places))
        for blocks in counts:
            tokens, slots = prompt(0, most)[: blocks * PER_BLOCK], slots_of(places[:blocks])
            spent = []
            for _ in range(repeats * 4 + 1):
                begin = time.process_time()
                response = await manager.get(tokens, slots)
                spent.append(time.process_time() - begin)
                assert response.return_mask.all()
            figures[f"CPU time of a get of {blocks} blocks, µs"] = (
                statistics.median(spent[1:]) * 1e6
            )
    return figures


async def _bare_cpu_time(counts: tuple[int, ...], repeats: int) -> Figures:
    """Return the CPU time of one contiguous copy that the loop awaits, by number of blocks."""
    import torch

    size = max(counts) * 2 << 20
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")
    driver, ended = BoundDriver(0), asyncio.Event()
    stream, eventfd = driver.open_stream(urgent=True), os.eventfd(0, os.EFD_NONBLOCK)
    loop = asyncio.get_running_loop()
    loop.add_reader(eventfd, lambda: (os.eventfd_read(eventfd), ended.set()))
    figures: Figures = {}
    for blocks in counts:
        run = np.array([[device.data_ptr()], [host.data_ptr()], [blocks * 2 << 20]], np.uint64)
        spent = []
        for _ in range(repeats * 4 + 1):
            begin = time.process_time()
            driver.copy(run, stream)
            driver.notify(stream, eventfd)
            await ended.wait()
            ended.clear()
            spent.append(time.process_time() - begin)
        figures[f"CPU time of a bare copy of {blocks} blocks, µs"] = (
            statistics.median(spent[1:]) * 1e6
        )
    loop.remove_reader(eventfd)
    os.close(eventfd)
    driver.close_stream(stream)
    driver.close()
    return figures


async def _end_to_end(blocks: int, repeats: int) -> Figures:
    """Time a get from host memory, whole and up to its first layer, against a contiguous copy."""
    import torch

    host = torch.empty(blocks * 2 << 20, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")
    gets, firsts, wholes, copies = [], [], [], []
    async with KVManager(LARGE, cache_of(blocks + 8, enable_ssd=False)) as manager:
        manager.register_kv_caches(_cuda_tensors(2 * blocks))
        places = np.random.default_rng(0).permutation(2 * blocks)[:blocks]
        tokens, slots = prompt(0, blocks), slots_of(places)
        await manager.put(tokens, slots)
        for _ in range(repeats + 1):
            begin = time.perf_counter()
            device.copy_(host, non_blocking=True)
            torch.cuda.synchronize()
            copies.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            assert (await manager.get(tokens, slots)).return_mask.all()
            gets.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            get = manager.get_layerwise(tokens, slots)
            assert await get.layer(0)
            firsts.append(time.perf_counter() - begin)
            await get
            wholes.append(time.perf_counter() - begin)
    size = blocks * 2 << 20
    return {
        "get of 32k tokens / contiguous copy, rate": median_ratio(copies[1:], gets[1:]),
        "get of 32k tokens, GB/s": size / statistics.median(gets[1:]) / 1e9,
        "first layer / whole get, time": median_ratio(firsts[1:], wholes[1:]),
        "layer by layer / contiguous copy, rate": median_ratio(copies[1:], wholes[1:]),
    }
