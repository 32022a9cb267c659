"""Registers the host arena with CUDA: whole, or in parts where the driver takes no more at once."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np

from flexkv.common.config import GB
from flexkv.common.errors import ConfigError, DeviceError
from flexkv.io.arena import Arena
from flexkv.io.cuda.driver import CudaDriver, Runs

INVALID_VALUE, OUT_OF_MEMORY = 1, 2
"""What the driver says of too much at once."""
PARTS_MAX = 1024


def register(driver: CudaDriver, arena: Arena, undo: ExitStack) -> list[int]:
    """Register an arena; `undo` gets what takes it back.

    Returns:
        The addresses at which one registration ends and the next begins: no copy may span them.

    Raises:
        ConfigError: the driver takes it in no parts; it says how much it took, and what to do.
        DeviceError: the driver refused for another reason.
    """
    size = arena.num_blocks * arena.block_stride_bytes
    part_blocks = arena.num_blocks
    while True:
        with ExitStack() as parts:
            bounds = list(range(0, arena.num_blocks, part_blocks))
            taken = 0
            try:
                for first in bounds:
                    blocks = min(part_blocks, arena.num_blocks - first)
                    address = arena.address + first * arena.block_stride_bytes
                    driver.register(address, blocks * arena.block_stride_bytes)
                    parts.callback(driver.unregister, address)
                    taken += blocks * arena.block_stride_bytes
            except DeviceError as error:
                if error.code not in (INVALID_VALUE, OUT_OF_MEMORY):
                    raise
                if part_blocks > 1 and len(bounds) < PARTS_MAX and not taken:
                    part_blocks = -(-part_blocks // 2)
                    continue
                why = (
                    f"CUDA registers {taken / GB:.2f} of {size / GB:.2f} GB of host memory "
                    f"({error}): raise the limit on locked memory (ulimit -l), or give fewer blocks"
                )
                raise ConfigError("num_cpu_blocks", arena.num_blocks, why) from error
            undo.push(parts.pop_all())
            return [arena.address + first * arena.block_stride_bytes for first in bounds[1:]]


def split(runs: Runs, bounds: list[int]) -> Runs:
    """Cut runs where they span two registrations."""
    for bound in bounds:
        for row in (0, 1):
            at, size = runs[row], runs[2]
            spans = (at < bound) & (at + size > bound)
            if not spans.any():
                continue
            before = np.where(spans, bound - at.astype(np.int64), size).astype(np.uint64)
            rest = np.stack(
                [(runs[0] + before)[spans], (runs[1] + before)[spans], (size - before)[spans]]
            )
            runs = np.concatenate([np.stack([runs[0], runs[1], before]), rest], axis=1)
    return np.ascontiguousarray(runs)
