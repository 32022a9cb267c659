"""Gather and scatter of 64 paged blocks over 32 layers, against what memory allows, and torch.

Limit: one contiguous non-temporal copy of the same bytes by the same two threads. Peer: torch's
index_select (index_copy_) layer by layer, and one copy.
"""

from __future__ import annotations

import mmap
import select

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.harness import Figures, Options, alternate, median_ratio, seconds_of
from flexkv import _ext

LAYERS, BLOCKS, DEVICE_BLOCKS = 32, 64, 512
BLOCKS_IF_QUICK, DEVICE_BLOCKS_IF_QUICK = 8, 10


def measure(options: Options) -> Figures:
    """Return the figures of the case."""
    torch.set_num_threads(2)
    figures: Figures = {}
    sizes = BLOCKS, DEVICE_BLOCKS
    if options.quick:
        sizes = BLOCKS_IF_QUICK, DEVICE_BLOCKS_IF_QUICK
    for run_bytes in (32 << 10, 4 << 10):
        for name, value in _one(run_bytes, *sizes, options.repeats).items():
            figures[f"{run_bytes >> 10} KiB runs: {name}"] = value
    return figures


def _one(run_bytes: int, blocks: int, device_blocks: int, repeats: int) -> Figures:
    random = np.random.default_rng(0)
    pages = _huge(2 * LAYERS * device_blocks * run_bytes).reshape(
        LAYERS, 2, device_blocks, run_bytes
    )
    block_bytes = 2 * LAYERS * run_bytes
    host, spare = _huge(blocks * block_bytes), _huge(blocks * block_bytes)
    ids, host_ids = random.permutation(device_blocks)[:blocks], np.arange(blocks)
    rows = [
        (pages[layer, part].ctypes.data, run_bytes, run_bytes, (2 * layer + part) * run_bytes)
        for layer in range(LAYERS)
        for part in range(2)
    ]
    page_map = _ext.PageMap(np.array(rows, np.int64), device_blocks, host, block_bytes, pages)
    pool = _ext.CopyPool(2)

    def job(direction: int) -> None:
        pool.submit(1, page_map, direction, ids, host_ids, True)
        select.select([pool.fileno()], [], [])
        pool.reap()

    layers = [torch.from_numpy(pages[layer].view(np.float16)) for layer in range(LAYERS)]
    index = torch.from_numpy(ids)
    block_first = torch.from_numpy(spare.view(np.float16)).view(blocks, LAYERS, 2, run_bytes // 2)

    def torch_gather() -> None:
        for number, layer in enumerate(layers):
            block_first[:, number] = layer.index_select(1, index).transpose(0, 1)

    def torch_scatter() -> None:
        for number, layer in enumerate(layers):
            layer.index_copy_(1, index, block_first[:, number].transpose(0, 1))

    took = alternate(
        {
            "gather": lambda: seconds_of(lambda: job(_ext.TO_HOST)),
            "scatter": lambda: seconds_of(lambda: job(_ext.TO_DEVICE)),
            "contiguous": lambda: seconds_of(lambda: pool.copy(spare, host)),
            "torch gather": lambda: seconds_of(torch_gather),
            "torch scatter": lambda: seconds_of(torch_scatter),
        },
        repeats * 2,
    )
    pool.close()
    gigabytes = blocks * block_bytes / 1e9
    return {
        "gather / contiguous copy": median_ratio(took["contiguous"], took["gather"]),
        "scatter / contiguous copy": median_ratio(took["contiguous"], took["scatter"]),
        "gather / torch": median_ratio(took["torch gather"], took["gather"]),
        "scatter / torch": median_ratio(took["torch scatter"], took["scatter"]),
        "contiguous copy, GB/s": gigabytes / float(np.median(took["contiguous"])),
    }


def _huge(size_bytes: int) -> NDArray[np.uint8]:
    """Return random bytes, on huge pages where these are available."""
    memory = mmap.mmap(-1, size_bytes + (2 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, np.uint8)
    start = -array.ctypes.data % (2 << 20)
    array = array[start : start + size_bytes]
    array.view(np.uint64)[:] = np.random.default_rng(1).integers(0, 1 << 62, size_bytes // 8)
    return array
