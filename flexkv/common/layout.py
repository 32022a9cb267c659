"""Where the bytes of a block are in an engine's KV caches, and where they go in a host block.

An engine keeps one tensor per layer; a host block is one contiguous extent over all layers:

    layer 0 tensor   …[K of block b]…[V of block b]…
    layer 1 tensor   …[K of block b]…[V of block b]…          pieces: address + b × stride
                          │               │
    host block       [L0 K][L0 V][L1 K][L1 V] …               offset inside the host block

The shape tells which axis counts blocks; the strides tell everything else. So a permuted view
works like the storage that it looks at, as long as the bytes of one block in one layer are one or
two contiguous extents. Their order inside an extent is the engine's own affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flexkv.common.errors import ConfigError


class TensorSpec(NamedTuple):
    """What must be known of one tensor: where it starts and how it is strided."""

    address: int
    shape: tuple[int, ...]
    strides_bytes: tuple[int, ...]
    itemsize: int


@dataclass(frozen=True, slots=True)
class PagedLayout:
    """The pages of one device: int64[n, 4] `pieces`, in the order of the host block.

    A row is: address of block 0, stride in bytes between blocks, bytes of the piece, offset of
    the piece inside the host block. The pieces fill the host block without a gap.
    """

    pieces: NDArray[np.int64]
    num_blocks: int
    block_bytes: int
    name: str


SHAPES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("kv-blocks", ("kv", "blocks", "tokens", "heads", "dim")),
    ("kv-blocks", ("kv", "blocks", "heads", "tokens", "dim")),
    ("blocks-kv", ("blocks", "kv", "tokens", "heads", "dim")),
    ("blocks-kv", ("blocks", "kv", "heads", "tokens", "dim")),
    ("blocks-heads", ("blocks", "heads", "tokens", "kv·dim")),
    ("fused", ("blocks", "tokens", "heads", "kv·dim")),
    ("fused", ("blocks", "tokens", "heads·kv·dim")),
)
"""Every shape that is known, under the name that `layout` gives it. A new one is a new row."""

LAYOUT_NAMES = tuple(dict.fromkeys(name for name, _ in SHAPES))


class _Fit(NamedTuple):
    name: str
    block_axis: int


class _Piece(NamedTuple):
    address: int
    stride_bytes: int
    bytes: int


def infer_layout(
    specs: Sequence[TensorSpec],
    tokens_per_block: int,
    num_kv_heads: int,
    head_size: int,
    kv_dim: int,
    layout: str | None = None,
) -> PagedLayout:
    """Give the pages of per-layer tensors, from their shapes and strides.

    Args:
        specs: one per layer, in the order of the layers.
        tokens_per_block: tokens of one block.
        num_kv_heads: heads that these tensors hold.
        head_size: elements of one head of one token.
        kv_dim: 2 when K and V are kept apart, 1 when a token has one latent (MLA).
        layout: one of `LAYOUT_NAMES`, for shapes that fit more than one.

    Raises:
        ConfigError: a shape fits no layout or several, layers disagree, or the bytes of one
            block are not one or two contiguous extents.
    """
    if layout is not None and layout not in LAYOUT_NAMES:
        raise ConfigError("layout", layout, f"not one of {', '.join(LAYOUT_NAMES)}")
    if not specs:
        raise ConfigError("kv_caches", [], "no layer is given")
    sizes = {
        "kv": kv_dim,
        "tokens": tokens_per_block,
        "heads": num_kv_heads,
        "dim": head_size,
    }
    fit = _fit(specs[0], sizes, layout)
    pieces: list[_Piece] = []
    for index, spec in enumerate(specs):
        if (spec.shape, spec.itemsize) != (specs[0].shape, specs[0].itemsize):
            raise ConfigError(
                f"kv_caches[{index}]",
                spec.shape,
                f"has {spec.itemsize} bytes an element; kv_caches[0] has shape "
                f"{specs[0].shape} and {specs[0].itemsize} bytes: all layers must agree",
            )
        for piece in _block_pieces(spec, fit.block_axis, f"kv_caches[{index}]"):
            _append_merged(pieces, piece)
    rows = np.array([(*piece, 0) for piece in pieces], dtype=np.int64)
    rows[1:, 3] = np.cumsum(rows[:-1, 2])
    rows.flags.writeable = False
    return PagedLayout(
        pieces=rows,
        num_blocks=specs[0].shape[fit.block_axis],
        block_bytes=int(rows[:, 2].sum()),
        name=fit.name,
    )


def _fit(spec: TensorSpec, sizes: dict[str, int], layout: str | None) -> _Fit:
    """Give the one known shape that `spec` has."""
    fits = [
        _Fit(name, axes.index("blocks"))
        for name, axes in SHAPES
        if (layout is None or name == layout) and _matches(spec.shape, axes, sizes)
    ]
    if not fits:
        known = "; ".join(
            f"{name} [{', '.join(axes)}]"
            for name, axes in SHAPES
            if layout is None or name == layout
        )
        expected = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise ConfigError("kv_caches[0]", spec.shape, f"fits none of: {known}, with {expected}")
    if len({fit.block_axis for fit in fits}) > 1:
        names = ", ".join(dict.fromkeys(fit.name for fit in fits))
        raise ConfigError("layout", layout, f"shape {spec.shape} is ambiguous: name one of {names}")
    if spec.shape[fits[0].block_axis] < 1:
        raise ConfigError("kv_caches[0]", spec.shape, "holds no blocks")
    return fits[0]


def _matches(shape: tuple[int, ...], axes: tuple[str, ...], sizes: dict[str, int]) -> bool:
    return len(shape) == len(axes) and all(
        axis == "blocks" or length == prod(sizes[factor] for factor in axis.split("·"))
        for length, axis in zip(shape, axes, strict=True)
    )


def _block_pieces(spec: TensorSpec, block_axis: int, field: str) -> list[_Piece]:
    """Give the one or two contiguous extents of block 0, with the stride to the next block."""
    inner = sorted(
        (stride, length)
        for axis, (stride, length) in enumerate(zip(spec.strides_bytes, spec.shape, strict=True))
        if axis != block_axis and length > 1
    )
    extent_bytes = spec.itemsize
    while inner and inner[0][0] == extent_bytes:
        extent_bytes *= inner.pop(0)[1]
    match inner:
        case []:
            addresses = [spec.address]
        case [(apart_bytes, 2)] if apart_bytes > extent_bytes:
            addresses = [spec.address, spec.address + apart_bytes]
        case _:
            raise ConfigError(
                field,
                spec.shape,
                f"strides of {spec.strides_bytes} bytes: one block must be one or two "
                "contiguous extents",
            )
    stride_bytes = spec.strides_bytes[block_axis]
    if spec.shape[block_axis] > 1 and stride_bytes < extent_bytes:
        raise ConfigError(
            field,
            spec.shape,
            f"blocks overlap or run backwards: {stride_bytes} bytes from one to the next, "
            f"{extent_bytes} bytes long",
        )
    return [_Piece(address, stride_bytes, extent_bytes) for address in addresses]


def _append_merged(pieces: list[_Piece], piece: _Piece) -> None:
    """Append `piece`, as one with its neighbour where they are adjacent for every block."""
    if pieces:
        last = pieces[-1]
        if (last.address + last.bytes, last.stride_bytes) == (piece.address, piece.stride_bytes):
            pieces[-1] = last._replace(bytes=last.bytes + piece.bytes)
            return
    pieces.append(piece)
