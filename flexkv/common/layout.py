"""Where the bytes of a block are in an engine's KV caches, and where they go in a host block.

An engine keeps one tensor per layer; a host block is one contiguous extent over all layers:

    layer 0 tensor   …[K of block b]…[V of block b]…
    layer 1 tensor   …[K of block b]…[V of block b]…          pieces: address + b × stride
                          │               │
    host block       [L0 K][L0 V][L1 K][L1 V] …               offset inside the host block

The shape tells which axis counts blocks; the strides tell everything else. So a permuted view
works like the storage below it, as long as the bytes of one block in one layer are one or two
contiguous extents, or one for each head. The order of the elements inside an extent is up to the
engine; see `Order`.

A tensor may keep a block's tokens in several smaller blocks of equal size: if attention kernels
need smaller blocks than the engine's, several consecutive ones make one of the engine's. Then the
axis of blocks becomes two axes, `blocks` and `splits`, and there may be extents for each split. The
number of splits does not matter as long as the bytes come in the same order.

Layers may be cut from one allocation by any strides. Where blocks are its outermost axis, the
layers of a block are adjacent, and copied as one piece. Each KV group has a layout of its own, and
those of several groups may overlay each other: an engine gives each block to one of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from math import prod
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from flexkv.common.errors import ConfigError


class TensorSpec(NamedTuple):
    """Address, shape, strides and item size of one tensor."""

    address: int
    shape: tuple[int, ...]
    strides_bytes: tuple[int, ...]
    itemsize: int


Order: TypeAlias = str
"""Axes of a block from the slowest to the fastest, such as "kv tokens heads dim", without those of
length 1. Where layers differ, the axes of each layer in turn, separated by semicolons; the orders
of several KV groups are separated by bars.

"splits=4 heads tokens dim" is a block of four smaller ones, in each of which heads come before
tokens. If "tokens" would come directly after "splits", only "tokens" is written: the order is that
of a whole block."""

NATURAL = ("kv", "tokens", "heads", "dim")
_AXIS = re.compile("|".join((*NATURAL, "splits=[1-9][0-9]*", "")))


def is_order(text: str) -> bool:
    """Return whether a text could be an order: whether it consists of axes of a block."""
    return all(_AXIS.fullmatch(axis) for axis in re.split("[ ;|·]", text))


def is_natural(order: Order) -> bool:
    """Return whether blocks are ordered as in most engines: K before V, token after token."""
    return all(
        [axis for axis in NATURAL if axis in axes] == axes
        for axes in (each.split() for each in re.split("[;|]", order))
    )


class KVShape(NamedTuple):
    """The shape of one block in one rank's tensor of one layer."""

    tokens: int
    heads: int
    head_size: int
    kv_dim: int
    """2 when K and V are kept apart, 1 when a token has one latent (MLA)."""
    item_bytes: int

    @property
    def block_bytes(self) -> int:
        """Return the bytes of one block in one layer."""
        return prod(self)


class Part(NamedTuple):
    """The part of a host block that a rank fills: part `number` of `of` equal parts."""

    number: int
    of: int


WHOLE = Part(0, 1)


@dataclass(frozen=True, slots=True)
class PagedLayout:
    """The pages of one device: int64[n, 4] `pieces`, in the order of the host block.

    A row is: address of block 0, stride in bytes between blocks, bytes of the piece, offset of
    the piece inside the host block. The pieces fill the device's part of the host block without a
    gap. `layers` has such rows for each layer, int64[m, 4]; `pieces` has adjacent ones merged.
    `block_bytes` is the size of the device's part. `order` is the order of a block's elements
    there: a device with another order cannot use the bytes.
    """

    pieces: NDArray[np.int64]
    num_blocks: int
    block_bytes: int
    name: str
    layers: tuple[NDArray[np.int64], ...]
    order: Order = ""


SHAPES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("kv-blocks", ("kv", "blocks", "tokens", "heads", "dim")),
    ("kv-blocks", ("kv", "blocks", "heads", "tokens", "dim")),
    ("blocks-kv", ("blocks", "kv", "tokens", "heads", "dim")),
    ("blocks-kv", ("blocks", "kv", "heads", "tokens", "dim")),
    ("blocks-heads", ("blocks", "heads", "tokens", "kv·dim")),
    ("fused", ("blocks", "tokens", "heads", "kv·dim")),
    ("fused", ("blocks", "tokens", "heads·kv·dim")),
    ("flat", ("blocks", "dim")),
)
"""Every known shape of undivided blocks, with the name that `layout` selects it by. A new shape is
a new row.

An axis that is left out has length 1. So only a block of one vector, such as a state, is flat: a
row of several would not tell the order of its elements.
"""


def _divided(axes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the axes of a shape whose blocks are divided: `splits` comes behind `blocks`."""
    behind = axes.index("blocks") + 1
    return *axes[:behind], "splits", *axes[behind:]


_KNOWN = (*SHAPES, *((name, _divided(axes)) for name, axes in SHAPES if "tokens" in axes))

LAYOUT_NAMES = tuple(dict.fromkeys(name for name, _ in SHAPES))


class Division(NamedTuple):
    """The axis of a tensor that counts blocks, and how many of them make one of the engine's."""

    axis: int
    splits: int


class _Fit(NamedTuple):
    name: str
    axes: tuple[str, ...]

    @property
    def block_axis(self) -> int:
        return self.axes.index("blocks")


class _Piece(NamedTuple):
    address: int
    stride_bytes: int
    bytes: int


def infer_layout(
    specs: Sequence[TensorSpec],
    shapes: Sequence[KVShape],
    layout: str | None = None,
    part: Part = WHOLE,
    numbers: Sequence[int] = (),
) -> PagedLayout:
    """Return the pages of per-layer tensors, inferred from their shapes and strides.

    Args:
        specs: one per layer, in the order of the layers.
        shapes: the shape of a block in each layer; a single one holds for all layers.
        layout: one of `LAYOUT_NAMES`, for shapes that fit more than one.
        part: the part of the host block that these tensors fill.
        numbers: the layers' numbers in errors, if they do not count from 0.

    Raises:
        ConfigError: a shape fits no layout or several, layers disagree, or the bytes of one block
            are neither one or two contiguous extents nor one for each head or split.
    """
    if layout is not None and layout not in LAYOUT_NAMES:
        raise ConfigError("layout", layout, f"must be one of {', '.join(LAYOUT_NAMES)}")
    if not specs:
        raise ConfigError("kv_caches", [], "must have at least one layer")
    wanted = shapes if len(shapes) > 1 else tuple(shapes) * len(specs)
    fields = [f"kv_caches[{number}]" for number in numbers or range(len(specs))]
    firsts: dict[KVShape, tuple[int, _Fit]] = {}
    layers: list[list[_Piece]] = []
    orders: list[Order] = []
    for index, (spec, shape, field) in enumerate(zip(specs, wanted, fields, strict=True)):
        if shape not in firsts:
            firsts[shape] = index, _fit(spec, shape, layout, field)
        first, fit = firsts[shape]
        _check_alike(spec, field, specs[first], fields[first])
        layers.append(_block_pieces(spec, fit.axes, field))
        orders.append(_order(spec, shape, fit.axes))
    num_blocks = same_blocks(
        {fields[first]: specs[first].shape[fit.block_axis] for first, fit in firsts.values()}
    )
    _check_apart(layers, num_blocks, fields)
    sizes = [sum(piece.bytes for piece in pieces) for pieces in layers]
    offset, merged = part.number * sum(sizes), list[_Piece]()
    for piece in chain.from_iterable(layers):
        _append_merged(merged, piece)
    by_layer = map(_rows, layers, accumulate(sizes, initial=offset))
    name = "+".join(dict.fromkeys(fit.name for _, fit in firsts.values()))
    order = ";".join(orders[:1] if len(set(orders)) == 1 else orders)
    return PagedLayout(_rows(merged, offset), num_blocks, sum(sizes), name, tuple(by_layer), order)


def divisions(shape: Sequence[int], block: KVShape, num_blocks: int = 0) -> set[Division]:
    """Return every way to read a tensor that counts blocks of the engine, or smaller ones.

    Args:
        shape: the shape of one layer's tensor. `splits` of its blocks in a row make one block of
            the engine.
        block: the shape of one of the engine's blocks.
        num_blocks: how many blocks the engine has; 0 if it is unknown.
    """
    found, sizes = set[Division](), _sizes(block)
    for _, axes in SHAPES:
        if len(axes) != len(shape):
            continue
        at, lengths = axes.index("blocks"), dict(zip(axes, shape, strict=True))
        splits = block.tokens // max(lengths.get("tokens", block.tokens), 1)
        if splits > 1:
            axes, whole = _divided(axes), (*shape[:at], shape[at] // splits, splits)
            is_known = shape[at] % splits == 0 and _matches((*whole, *shape[at + 1 :]), axes, sizes)
        else:
            is_known = splits == 1 and _matches(shape, axes, sizes)
        if is_known and num_blocks in (0, shape[at] // splits):
            found.add(Division(at, splits))
    return found


def same_blocks(counts: Mapping[str, int]) -> int:
    """Return the number of blocks, which all layers must share; `counts` has each layer's by field.

    Raises:
        ConfigError: the numbers differ.
    """
    if len({*counts.values()}) > 1:
        told = ", ".join(f"{count} in {field}" for field, count in counts.items())
        raise ConfigError("kv_caches", told, "all layers must have the same number of blocks")
    return next(iter(counts.values()))


def order_of(layouts: Sequence[PagedLayout]) -> Order:
    """Return the order of a block's elements in each KV group of one device."""
    return "|".join(layout.order for layout in layouts)


def _check_apart(layers: list[list[_Piece]], num_blocks: int, fields: Sequence[str]) -> None:
    """Check that no byte belongs to two layers, which would overwrite each other.

    Pieces are compared only with those whose ranges of addresses overlap: first all at once by
    their residues, and if that leaves a doubt, each with each.

    Raises:
        ConfigError: two tensors are the same memory, or overlap.
    """
    pieces = sorted((*piece, number) for number, layer in enumerate(layers) for piece in layer)
    rows = np.array(pieces, np.int64)
    if num_blocks == 1:  # its stride has no effect, and may be anything
        rows[:, 1] = rows[-1, 0] - rows[0, 0] + rows[:, 2].max()
    ends = np.maximum.accumulate(rows[:, 0] + (num_blocks - 1) * rows[:, 1] + rows[:, 2])
    gaps = np.flatnonzero(rows[1:, 0] >= ends[:-1]) + 1
    for first, last in pairwise((0, *gaps.tolist(), len(rows))):
        near = rows[first:last]
        if len(near) == 1 or _have_own_residues(near):
            continue
        for at, row in enumerate(near):
            for other in _doubtful(row, near[at + 1 :], num_blocks):
                if _overlap(row, other, num_blocks):
                    one, another = sorted((int(row[3]), int(other[3])))
                    why = f"shares memory with {fields[one]}: each layer must have its own"
                    raise ConfigError(fields[another], f"address {int(other[0]):#x}", why)


def _have_own_residues(rows: NDArray[np.int64]) -> bool:
    """Return whether no two pieces share a residue of the strides' greatest common divisor.

    All blocks of a piece have the same residues, so such pieces cannot overlap.
    """
    modulus = np.gcd.reduce(rows[:, 1])
    begins = rows[:, 0] % modulus
    order = np.argsort(begins)
    room = np.diff(begins[order], append=begins[order[0]] + modulus)
    return bool((room >= rows[order, 2]).all())


def _doubtful(
    row: NDArray[np.int64], others: NDArray[np.int64], num_blocks: int
) -> NDArray[np.int64]:
    """Return the pieces, of those that begin no earlier, that may share a byte with one piece."""
    address, stride, size, _ = row
    others = others[: np.searchsorted(others[:, 0], address + (num_blocks - 1) * stride + size)]
    modulus = np.gcd(others[:, 1], stride)
    apart = (others[:, 0] - address) % modulus
    found: NDArray[np.int64] = others[(apart < size) | (modulus - apart < others[:, 2])]
    return found


def _overlap(row: NDArray[np.int64], other: NDArray[np.int64], num_blocks: int) -> bool:
    """Return whether any block of one piece shares a byte with any block of another."""
    (address, stride, size, _), (other_address, other_stride, other_size, _) = row, other
    begins = address + np.arange(num_blocks) * stride
    # Of the other's blocks that begin before a block ends, the last one comes closest to it.
    numbers = (begins + size - 1 - other_address) // other_stride
    closest = other_address + numbers.clip(0, num_blocks - 1) * other_stride
    return bool(((closest < begins + size) & (begins < closest + other_size)).any())


def _order(spec: TensorSpec, shape: KVShape, axes: tuple[str, ...]) -> Order:
    """Return the axes of a block in one layer, ordered by their strides."""
    sizes = {"kv": shape.kv_dim, "heads": shape.heads, "tokens": shape.tokens}
    lengths = zip(spec.strides_bytes, spec.shape, axes, strict=True)
    inner = [(stride, length, axis) for stride, length, axis in lengths if length > 1]
    order = list[str]()
    for _, length, axis in sorted(inner, reverse=True):
        if axis == "splits" and length < shape.tokens:
            order.append(f"splits={length}")
        elif axis == "splits":  # of one token each
            order.append("tokens")
        elif axis == "tokens" and order and order[-1].startswith("splits"):
            order[-1] = "tokens"
        elif axis != "blocks":
            # A factor of length 1 has no effect: MLA's "heads·kv·dim" is just "dim".
            order.append("·".join(each for each in axis.split("·") if sizes.get(each) != 1))
    return " ".join(order)


def _check_alike(spec: TensorSpec, field: str, first: TensorSpec, first_field: str) -> None:
    """Check that a tensor has the same shape and item size as the first of its KV shape."""
    if (spec.shape, spec.itemsize) != (first.shape, first.itemsize):
        raise ConfigError(
            field,
            spec.shape,
            f"has {spec.itemsize} bytes per element; {first_field} has shape "
            f"{first.shape} and {first.itemsize} bytes per element: these must be equal",
        )


def _rows(pieces: list[_Piece], offset: int) -> NDArray[np.int64]:
    """Return pieces in a row from an offset in the host block on."""
    rows = np.array([(*piece, offset) for piece in pieces], dtype=np.int64)
    rows[1:, 3] += np.cumsum(rows[:-1, 2])
    rows.flags.writeable = False
    return rows


def _fit(spec: TensorSpec, shape: KVShape, layout: str | None, field: str) -> _Fit:
    """Return the known shape that `spec` has; without exactly one, raise a ConfigError."""
    if spec.itemsize != shape.item_bytes:
        why = f"has {spec.itemsize} bytes per element, but the model's dtype has {shape.item_bytes}"
        raise ConfigError(field, spec.shape, why)
    sizes = _sizes(shape)
    told = ", ".join(f"{name}={size}" for name, size in sizes.items())
    named = [_Fit(*row) for row in _KNOWN if layout in (None, row[0])]
    known = [fit for fit in named if _has_all_axes(fit.axes, sizes)]
    if not known:
        why = f"is only for blocks of one vector, such as states; those of {field} have {told}"
        raise ConfigError("layout", layout, why)
    fits = [fit for fit in known if _matches(spec.shape, fit.axes, sizes)]
    if not fits:
        whole = [fit for fit in known if "splits" not in fit.axes]
        expected = "; ".join(f"{name} [{', '.join(axes)}]" for name, axes in whole)
        if len(whole) < len(known) and shape.tokens > 1:
            expected += "; or divided: two axes, blocks and splits, and tokens / splits for tokens"
        why = f"fits none of: {expected}, where {told}"
        if len(spec.shape) == 2 and len(known) < len(named):
            why += "; a row for each block does not tell the order of its elements"
        raise ConfigError(field, spec.shape, why)
    if len({fit.block_axis for fit in fits}) > 1:
        names = ", ".join(dict.fromkeys(fit.name for fit in fits))
        raise ConfigError("layout", layout, f"shape {spec.shape} is ambiguous: give one of {names}")
    if spec.shape[fits[0].block_axis] < 1:
        raise ConfigError(field, spec.shape, "must have at least one block")
    return fits[0]


def _sizes(shape: KVShape) -> dict[str, int]:
    """Return the lengths of the axes of a whole block."""
    return {
        "kv": shape.kv_dim,
        "tokens": shape.tokens,
        "heads": shape.heads,
        "dim": shape.head_size,
    }


def _has_all_axes(axes: tuple[str, ...], sizes: Mapping[str, int]) -> bool:
    """Return whether every axis of a block that is longer than 1 is among these."""
    factors = "·".join(axes).split("·")
    return all(size == 1 or axis in factors for axis, size in sizes.items())


def _matches(shape: Sequence[int], axes: tuple[str, ...], sizes: Mapping[str, int]) -> bool:
    if len(shape) != len(axes):
        return False
    lengths = dict(zip(axes, shape, strict=True))
    splits = lengths.get("splits", 1)
    if "splits" in lengths and (splits < 2 or sizes["tokens"] % splits):
        return False
    told = {**sizes, "tokens": sizes["tokens"] // splits, "splits": splits}
    return all(
        axis == "blocks" or length == prod(told[factor] for factor in axis.split("·"))
        for axis, length in lengths.items()
    )


def _block_pieces(spec: TensorSpec, axes: tuple[str, ...], field: str) -> list[_Piece]:
    """Return the contiguous extents of block 0, with the stride to the next block."""
    block_axis = axes.index("blocks")
    inner = sorted(
        (spec.strides_bytes[axis], spec.shape[axis], name)
        for axis, name in enumerate(axes)
        if axis != block_axis and spec.shape[axis] > 1
    )
    extent_bytes = spec.itemsize
    while inner and inner[0][0] == extent_bytes:
        extent_bytes *= inner.pop(0)[1]
    offsets, span_bytes, nested = [0], extent_bytes, True
    for stride, length, _ in inner:  # from the fastest of the axes that lie apart
        nested = nested and stride >= span_bytes
        offsets = [number * stride + offset for number in range(length) for offset in offsets]
        span_bytes += (length - 1) * stride
    apart = {name for *_, name in inner}
    if not nested or (len(offsets) > 2 and not apart <= {"kv", "heads", "splits"}):
        why = "a block must be one or two contiguous extents, or one for each head or split"
        raise ConfigError(field, spec.shape, f"has strides of {spec.strides_bytes} bytes: {why}")
    stride_bytes = spec.strides_bytes[block_axis]
    if spec.shape[block_axis] > 1 and stride_bytes < extent_bytes:
        raise ConfigError(
            field,
            spec.shape,
            f"blocks overlap or run backwards: each has {extent_bytes} bytes, but the next one "
            f"begins {stride_bytes} bytes later",
        )
    return [_Piece(spec.address + offset, stride_bytes, extent_bytes) for offset in offsets]


def _append_merged(pieces: list[_Piece], piece: _Piece) -> None:
    """Append `piece`, merged with the last piece if they are adjacent in every block."""
    if pieces:
        last = pieces[-1]
        if (last.address + last.bytes, last.stride_bytes) == (piece.address, piece.stride_bytes):
            pieces[-1] = last._replace(bytes=last.bytes + piece.bytes)
            return
    pieces.append(piece)
