"""The page maps between one device and an arena: of whole blocks, and of ranges of layers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flexkv._ext import PageMap
from flexkv.common.layout import PagedLayout
from flexkv.common.terms import Layers
from flexkv.io.checksums.sums import Sums
from flexkv.io.memory.arena import Arena

MAPS_MAX = 256


class Pages:
    """Where a device's blocks are, and who keeps them alive."""

    def __init__(
        self, layout: PagedLayout, arena: Arena, owner: object, sums: Sums | None = None
    ) -> None:
        """Map the pages of `layout`.

        Args:
            layout: where the device blocks are.
            arena: the host blocks, held.
            owner: whatever keeps the KV caches alive (the tensors), held.
            sums: uint64[host blocks], gets the sum of each that a copy of whole blocks fills.
        """
        self._layout, self._arena, self._owner = layout, arena, owner
        self._maps: dict[tuple[int, int] | None, PageMap] = {None: self._map(layout.pieces, sums)}

    def of(self, layers: Layers | None) -> PageMap:
        """Give the map of some layers, or of whole blocks (of the device's part of them)."""
        if layers is None:
            return self._maps[None]
        bounds = layers.first, layers.last
        if bounds not in self._maps:
            if len(self._maps) > MAPS_MAX:  # odd rhythms of a prefill
                self._maps = {None: self._maps[None]}
            rows = np.concatenate(self._layout.layers[slice(*bounds)])
            self._maps[bounds] = self._map(rows, None)
        return self._maps[bounds]

    def close(self) -> None:
        """Let go of the arena and of the owner."""
        self._maps.clear()
        self._owner = None

    def _map(self, rows: NDArray[np.int64], sums: Sums | None) -> PageMap:
        arena, blocks = self._arena, self._layout.num_blocks
        return PageMap(rows, blocks, arena.buffer, arena.block_stride_bytes, self._owner, sums)
