"""Registers the host arena with CUDA: whole, or in parts if the driver takes no more at once."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np

from flexkv.common.config import GB
from flexkv.common.errors import ConfigError, DeviceError
from flexkv.io.cuda.driver import CudaDriver
from flexkv.io.cuda.grids import Runs
from flexkv.io.memory.arena import Arena

INVALID_VALUE, OUT_OF_MEMORY = 1, 2
"""Error codes of the driver for too much memory at once."""
PARTS_MAX = 1024


class Pinned:
    """An arena, registered once for all devices of this process, while any of them holds it.

    Attributes:
        arena: the host blocks.
        bounds: the addresses at which one registration ends and the next begins; no copy may
            cross one.
    """

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.bounds: list[int] = []
        self._addresses: list[int] = []
        self._holders = 0

    def hold(self, driver: CudaDriver, undo: ExitStack) -> None:
        """Register the arena unless another device did, and hold it until `undo` ends.

        Raises:
            ConfigError: the driver cannot register all of it; the message says what to do.
            DeviceError: the driver reported an error for another reason.
        """
        if not self._holders:
            self._register(driver)
        self._holders += 1
        undo.callback(self._let_go, driver)

    def _let_go(self, driver: CudaDriver) -> None:
        self._holders -= 1
        if not self._holders:
            with ExitStack() as undo:
                for address in self._addresses:
                    undo.callback(driver.unregister, address)

    def _register(self, driver: CudaDriver) -> None:
        arena = self.arena
        size, part_blocks = arena.num_blocks * arena.block_stride_bytes, arena.num_blocks
        while True:
            bounds = list(range(0, arena.num_blocks, part_blocks))
            taken = 0
            try:
                with ExitStack() as parts:
                    for first in bounds:
                        blocks = min(part_blocks, arena.num_blocks - first)
                        address = arena.address + first * arena.block_stride_bytes
                        driver.register(address, blocks * arena.block_stride_bytes)
                        parts.callback(driver.unregister, address)
                        taken += blocks * arena.block_stride_bytes
                    parts.pop_all()
            except DeviceError as error:
                if error.code not in (INVALID_VALUE, OUT_OF_MEMORY):
                    raise
                if part_blocks > 1 and len(bounds) < PARTS_MAX and not taken:
                    part_blocks = -(-part_blocks // 2)
                    continue
                why = (
                    f"CUDA registered only {taken / GB:.2f} of {size / GB:.2f} GB of host memory "
                    f"({error}): raise the limit on locked memory (ulimit -l), or set fewer blocks"
                )
                raise ConfigError("num_cpu_blocks", arena.num_blocks, why) from error
            self._addresses = [arena.address + first * arena.block_stride_bytes for first in bounds]
            self.bounds = self._addresses[1:]
            return


def split(runs: Runs, bounds: list[int]) -> Runs:
    """Return runs, cut where they cross from one registration to the next."""
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
