"""The host blocks, as the adapters see them that exchange blocks with stores and other nodes."""

from __future__ import annotations

from typing import NamedTuple

from flexkv.common.terms import BlockIds
from flexkv.io.memory.arena import Arena
from flexkv.io.ports import Sums


class HostBlocks(NamedTuple):
    """The host memory of the blocks.

    Attributes:
        arena: their places.
        sums: their checksums, uint64[host blocks].
        block_bytes: the bytes of a block of each KV group.
    """

    arena: Arena
    sums: Sums
    block_bytes: tuple[int, ...]

    def views(self, host_ids: BlockIds, group: int) -> list[memoryview]:
        """Return the bytes of some blocks."""
        stride, size, buffer = self.arena.block_stride_bytes, self.block_bytes[group], self.buffer
        return [buffer[at * stride : at * stride + size] for at in host_ids.tolist()]

    @property
    def buffer(self) -> memoryview:
        """Return the bytes of the arena."""
        return self.arena.buffer
