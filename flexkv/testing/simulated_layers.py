"""A simulated request that goes layer by layer: it writes its layers, or checks what comes."""

from __future__ import annotations

import asyncio
from random import Random

import numpy as np
from numpy.typing import NDArray

from flexkv.common.request import KVResponse, Operation, Request
from flexkv.common.terms import BLOCK_KEY_BYTES
from flexkv.engine.engine import Engine
from flexkv.front.layerwise import LayerProgress

LAYERS = 4
LAYER_BYTES = BLOCK_KEY_BYTES // LAYERS


class LayeredRequest:
    """The simulated engine's side of one request.

    Attributes:
        progress: watches the request.
    """

    def __init__(
        self, random: Random, engine: Engine, request: Request, device: NDArray[np.uint8]
    ) -> None:
        """Take the request; `device` is uint8[slots, 16]."""
        self._random, self._engine, self._device = random, engine, device
        self._request, self._is_put = request, request.operation is Operation.PUT
        self.progress = LayerProgress(LAYERS, 0 if self._is_put else LAYERS)
        self._seen: dict[int, NDArray[np.uint8]] = {}

    async def write(self, slots: list[int], contents: NDArray[np.uint8]) -> None:
        """Write the layers of a put one by one, perhaps not all of them."""
        random = self._random
        stop_at = random.choice([LAYERS, LAYERS, random.randrange(LAYERS)])
        for layer in range(stop_at):
            await asyncio.sleep(random.uniform(0.0, 0.002))
            columns = slice(layer * LAYER_BYTES, (layer + 1) * LAYER_BYTES)
            self._device[slots, columns] = contents[:, columns]
            self.progress.ready = layer + 1
            self._engine.nudge_device()

    async def look(self, slots: list[int]) -> None:
        """Look at the layers of a get as they come."""
        for layer in range(LAYERS):
            if not await self.progress.reached(layer):
                return
            columns = slice(layer * LAYER_BYTES, (layer + 1) * LAYER_BYTES)
            self._seen[layer] = self._device[slots, columns].copy()

    def check(self, response: KVResponse, slots: list[int]) -> None:
        """Check that each layer of what a get has loaded was there when that was reported."""
        first, last = self._request.span.first_block, self._request.span.last_block
        per_block = self._request.tokens_per_block
        moved = response.return_mask[: last * per_block : per_block][first:]
        loaded = self._device[np.array(slots, np.int64)[moved]]
        for layer, content in self._seen.items():
            columns = slice(layer * LAYER_BYTES, (layer + 1) * LAYER_BYTES)
            assert np.array_equal(content[moved], loaded[:, columns]), "wrong layer"
        if moved.all() and len(moved):
            assert len(self._seen) == LAYERS, "a layer was not reported"
