"""KV caches of several KV groups cut from one allocation, as vLLM places them.

Layer l and block b of some layers with equal pages begin at `offset + l * layer_stride + b *
block_stride`. A page is [heads, tokens, content]; a layout names the axes of all layers from the
slowest to the fastest: L(ayers), B(locks), H(eads), N (tokens), C(ontent). All groups begin at byte
0: they overlay each other, and each block belongs to one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from flexkv.common.config import LayerGroup, ModelConfig

LAYOUTS = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")


class Pages(NamedTuple):
    """Layers with equal pages: what the model's configuration says of them, and their padding."""

    group: LayerGroup
    heads: int
    tokens: int
    content_bytes: int
    dtype: str
    padding_bytes: int = 0

    @property
    def page_bytes(self) -> int:
        """Return the bytes from one page to the next, where pages are contiguous."""
        return self.heads * self.tokens * self.content_bytes + self.padding_bytes


def pages_of(model: ModelConfig, tokens_per_block: int, padding: Sequence[int]) -> list[Pages]:
    """Return the pages of each layer group of a model on one rank."""
    layers = {
        number: (shape, dtype)
        for space in model.spaces(tokens_per_block)
        for number, shape, dtype in zip(space.layers, space.shapes, space.dtypes, strict=True)
    }
    found = []
    for group, pad in zip(model.layer_groups or (), padding, strict=True):
        shape, dtype = layers[group.layer_indices[0]]
        content = shape.kv_dim * shape.head_size * shape.item_bytes
        found.append(Pages(group, shape.heads, shape.tokens, content, dtype, pad))
    return found


class Backing:
    """One allocation with random bytes, and the views of all layers into it.

    Attributes:
        memory: uint8[n], all bytes, the padding included.
        bytes_of: a layer's uint8[blocks, heads, tokens, content], by its number in the model.
    """

    def __init__(self, pages: Sequence[Pages], layout: str, num_blocks: int, seed: int = 0) -> None:
        """Cut the views of layers with these pages."""
        self._pages, self._blocks = pages, num_blocks
        groups: dict[int, list[Pages]] = {}
        for each in pages:
            groups.setdefault(each.group.kv_group, []).append(each)
        sums = {
            kv_group: sum(each.group.num_layers * each.page_bytes for each in members)
            for kv_group, members in groups.items()
        }
        random = np.random.default_rng(seed)
        self.memory = random.integers(0, 256, num_blocks * max(sums.values()), np.uint8)
        self.bytes_of: dict[int, NDArray[np.uint8]] = {}
        self._dtypes: dict[int, str] = {}
        outermost = max(sums.values()) if layout[0] == "B" else 0
        for members in groups.values():
            offset = 0
            for each in members:
                strides = _strides(each, layout, num_blocks, outermost)
                self._cut(each, strides, offset)
                span = each.page_bytes if outermost else strides["L"]
                offset += each.group.num_layers * span

    def _cut(self, pages: Pages, strides: dict[str, int], offset: int) -> None:
        shape = self._blocks, pages.heads, pages.tokens, pages.content_bytes
        steps = tuple(strides[axis] for axis in "BHNC")
        for nth, number in enumerate(sorted(pages.group.layer_indices)):
            start = self.memory[offset + nth * strides["L"] :]
            view = np.lib.stride_tricks.as_strided(start, shape, steps)
            self.bytes_of[number], self._dtypes[number] = view, pages.dtype

    def tensors(self, library: str = "numpy") -> list[Any]:
        """Return the layers' tensors in the model's order, with elements of their types."""
        names = {"bfloat16": "uint16", "float8_e4m3fn": "int8"}  # which numpy does not have
        found: list[Any] = []
        for number in sorted(self.bytes_of):
            view, dtype = self.bytes_of[number], self._dtypes[number]
            if library == "torch":
                found.append(torch.from_numpy(view).view(getattr(torch, dtype)))
            else:
                found.append(view.view(names.get(dtype, dtype)))
        return found

    def block(self, layers: Sequence[int], number: int) -> bytes:
        """Return a block of some layers as it should be in host memory: in memory's order."""
        return b"".join(self._in_order(self.bytes_of[layer][number]) for layer in layers)

    @staticmethod
    def _in_order(page: NDArray[np.uint8]) -> bytes:
        axes = sorted(range(page.ndim), key=lambda axis: -page.strides[axis])
        return page.transpose(axes).tobytes()


def _strides(pages: Pages, layout: str, num_blocks: int, outermost: int) -> dict[str, int]:
    """Return the bytes from one to the next along each axis.

    `outermost` is the bytes of a block of all layers, where blocks are the outermost axis.
    """
    lengths = {
        "L": pages.group.num_layers, "B": num_blocks, "H": pages.heads, "N": pages.tokens,
        "C": pages.content_bytes,
    }  # fmt: skip
    strides, step = {}, 1
    for axis in reversed(layout):
        if axis in "LB" and pages.padding_bytes:  # padding is at the end of a page
            step = max(step, pages.page_bytes)
        strides[axis] = outermost if axis == "B" and outermost else step
        step = strides[axis] * lengths[axis]
    return strides


def blocks_apart(random: np.random.Generator, count: int, of: int) -> Iterator[NDArray[np.int64]]:
    """Yield `of` disjoint arrays of block ids below `count`, in random order."""
    yield from (np.sort(each) for each in np.array_split(random.permutation(count), of))
