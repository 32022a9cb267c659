"""The page maps between one device and an arena: for whole blocks, and for ranges of layers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from flexkv._ext import PageMap
from flexkv.common.layout import PagedLayout
from flexkv.common.terms import Layers
from flexkv.io.memory.arena import Arena
from flexkv.io.ports import Sums

MAPS_MAX = 256


class Pages:
    """The page maps of one device, and the owner that keeps its KV caches alive."""

    def __init__(
        self, layout: PagedLayout, arena: Arena, owner: object, sums: Sums | None = None
    ) -> None:
        """Map the pages of `layout`.

        Args:
            layout: where the device blocks are.
            arena: the host blocks, held by this object.
            owner: what keeps the KV caches alive (the tensors), held by this object.
            sums: uint64[host blocks]; copies of whole blocks store the sums of those they fill.
        """
        self._layout, self._arena, self._owner = layout, arena, owner
        self._maps: dict[tuple[int, int] | None, PageMap] = {None: self._map(layout.pieces, sums)}

    def of(self, layers: Layers | None) -> PageMap:
        """Return the map for some layers, or, for None, for the device's part of whole blocks."""
        if layers is None:
            return self._maps[None]
        bounds = layers.first, layers.last
        if bounds not in self._maps:
            if len(self._maps) > MAPS_MAX:  # too many different ranges: start again
                self._maps = {None: self._maps[None]}
            rows = np.concatenate(self._layout.layers[slice(*bounds)])
            self._maps[bounds] = self._map(rows, None)
        return self._maps[bounds]

    def close(self) -> None:
        """Release the maps, which hold the arena's memory, and the owner."""
        self._maps.clear()
        self._owner = None

    def _map(self, rows: NDArray[np.int64], sums: Sums | None) -> PageMap:
        arena, blocks = self._arena, self._layout.num_blocks
        return PageMap(rows, blocks, arena.buffer, arena.block_stride_bytes, self._owner, sums)
