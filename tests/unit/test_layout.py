"""Laws of layouts: the pieces are the bytes of the block, for any shape and strides."""

import ctypes
import sys
from itertools import combinations
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from flexkv.common.errors import BackendUnavailableError, ConfigError
from flexkv.common.layout import KVShape, TensorSpec, infer_layout
from flexkv.io.device.tensors import describe, device_of, kv_cache_list

LAYERS, BLOCKS, TOKENS, HEADS, DIM = 3, 5, 4, 2, 8
BLOCK_ELEMENTS = 2 * TOKENS * HEADS * DIM

SHAPES = {
    "kv-blocks": (2, BLOCKS, TOKENS, HEADS, DIM),
    "blocks-kv": (BLOCKS, 2, TOKENS, HEADS, DIM),
    "blocks-heads": (BLOCKS, HEADS, TOKENS, 2 * DIM),
    "fused": (BLOCKS, TOKENS, HEADS * 2 * DIM),
}
MAKERS = {
    "numpy": lambda array: array,
    "torch": torch.from_numpy,
}


def layers_of(shape, dtype=np.int16):
    """Return one array per layer, with elements that all differ."""
    size = int(np.prod(shape))
    return [
        np.arange(size, dtype=dtype).reshape(shape) + np.array(i * size, dtype)
        for i in range(LAYERS)
    ]


def infer(tensors, layout=None, kv_dim=2, heads=HEADS):
    """Return the layout inferred from tensors of the sizes above."""
    specs = [describe(tensor) for tensor in tensors]
    shape = KVShape(TOKENS, heads, DIM, kv_dim, specs[0].itemsize if specs else 2)
    return infer_layout(specs, [shape], layout)


def read_block(layout, block):
    """Return the bytes of one block, read through the pieces."""
    host = bytearray(layout.block_bytes)
    for address, stride, size, offset in layout.pieces.tolist():
        host[offset : offset + size] = ctypes.string_at(address + block * stride, size)
    return bytes(host)


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("name", SHAPES)
def test_every_layout_gives_the_bytes_of_the_block(name, maker):
    """The pieces give a block layer after layer, K before V, from numpy and from torch."""
    arrays = layers_of(SHAPES[name])
    layout = infer([MAKERS[maker](array) for array in arrays])
    assert (layout.name, layout.num_blocks) == (name, BLOCKS)
    assert layout.block_bytes == LAYERS * BLOCK_ELEMENTS * 2
    axis = 1 if name == "kv-blocks" else 0
    for block in range(BLOCKS):
        expected = b"".join(array.take(block, axis).tobytes() for array in arrays)
        assert read_block(layout, block) == expected


def test_mla_is_one_extent_a_layer():
    """A layer of [blocks, tokens, dim], one latent per token, has one piece."""
    arrays = layers_of((BLOCKS, TOKENS, DIM))
    layout = infer(arrays, kv_dim=1, heads=1)
    assert (layout.name, len(layout.pieces)) == ("fused", LAYERS)
    for block in range(BLOCKS):
        assert read_block(layout, block) == b"".join(array[block].tobytes() for array in arrays)


def test_heads_before_tokens_is_the_same_layout():
    """Separate K and V with heads before tokens, as in CPU attention, are accepted too."""
    arrays = layers_of((2, BLOCKS, HEADS, TOKENS, DIM))
    layout = infer(arrays)
    assert layout.name == "kv-blocks"
    assert read_block(layout, 3) == b"".join(array[:, 3].tobytes() for array in arrays)


@pytest.mark.parametrize("maker", MAKERS)
def test_a_permuted_view_is_its_storage(maker):
    """A [2, blocks, …] view stored blocks first has one extent a block, in storage order."""
    storages = layers_of((BLOCKS, 2, TOKENS, HEADS, DIM))
    views = [MAKERS[maker](storage).swapaxes(0, 1) for storage in storages]
    layout = infer(views)
    assert (layout.name, len(layout.pieces)) == ("kv-blocks", LAYERS)
    for block in range(BLOCKS):
        assert read_block(layout, block) == b"".join(s[block].tobytes() for s in storages)


def test_a_view_permuted_inside_the_block_is_its_storage():
    """Swapping tokens and heads inside a block changes nothing, as its bytes are opaque."""
    storages = layers_of((2, BLOCKS, HEADS, TOKENS, DIM))
    layout = infer([storage.transpose(0, 1, 3, 2, 4) for storage in storages])
    assert len(layout.pieces) == 2 * LAYERS
    assert read_block(layout, 2) == b"".join(s[:, 2].tobytes() for s in storages)


def test_layers_of_one_storage_are_one_piece():
    """Layers that lie side by side in every block are copied as one extent."""
    storage = np.arange(BLOCKS * LAYERS * BLOCK_ELEMENTS, dtype=np.int16)
    storage = storage.reshape(BLOCKS, LAYERS, 2, TOKENS, HEADS, DIM)
    layout = infer([storage[:, layer] for layer in range(LAYERS)])
    assert len(layout.pieces) == 1
    assert read_block(layout, 4) == storage[4].tobytes()


def test_padding_between_blocks_is_skipped():
    """Padding between blocks is skipped by their stride."""
    storages = layers_of((2 * BLOCKS, 2, TOKENS, HEADS, DIM))
    layout = infer([storage[::2] for storage in storages])
    assert layout.num_blocks == BLOCKS
    assert read_block(layout, 3) == b"".join(s[6].tobytes() for s in storages)


def test_pieces_are_frozen():
    """The pieces of a layout are read-only."""
    layout = infer(layers_of(SHAPES["fused"]))
    with pytest.raises(ValueError, match="read-only"):
        layout.pieces[0, 0] = 0


def test_ambiguous_shape_names_the_argument_that_settles_it():
    """A shape with two readings is an error that names `layout` and both candidates."""
    arrays = layers_of((2, 2, TOKENS, HEADS, DIM))
    with pytest.raises(ConfigError, match=r"\(2, 2, 4, 2, 8\).*kv-blocks, blocks-kv") as caught:
        infer(arrays)
    assert caught.value.field == "layout"


@pytest.mark.parametrize(("name", "axis"), [("kv-blocks", 1), ("blocks-kv", 0)])
def test_a_named_layout_settles_an_ambiguous_shape(name, axis):
    """With `layout` given, an ambiguous shape is read by it."""
    arrays = layers_of((2, 2, TOKENS, HEADS, DIM))
    layout = infer(arrays, layout=name)
    assert layout.name == name
    assert read_block(layout, 1) == b"".join(a.take(1, axis).tobytes() for a in arrays)


@pytest.mark.parametrize(
    ("shape", "layout", "said"),
    [
        ((2, BLOCKS, TOKENS + 1, HEADS, DIM), None, "fits none of: kv-blocks"),
        ((BLOCKS, TOKENS), None, "fits none of"),
        (SHAPES["kv-blocks"], "blocks-heads", "fits none of: blocks-heads"),
        ((2, 0, TOKENS, HEADS, DIM), None, "at least one block"),
    ],
)
def test_a_shape_that_does_not_fit_is_named(shape, layout, said):
    """The error has the shape and the layouts that were tried."""
    with pytest.raises(ConfigError, match=said) as caught:
        infer(layers_of(shape), layout=layout)
    assert caught.value.field == "kv_caches[0]"
    assert caught.value.value == shape


def vectors_of(size, kv_dim=1, tokens=1, heads=1, item_bytes=1):
    """Return the KV shape of blocks of so many vectors."""
    return KVShape(tokens, heads, size, kv_dim, item_bytes)


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((BLOCKS, BLOCK_ELEMENTS), vectors_of(DIM, 2, TOKENS, HEADS, 2)),
        ((BLOCKS, TOKENS * DIM), vectors_of(DIM, tokens=TOKENS)),
        ((BLOCKS, HEADS * DIM), vectors_of(DIM, heads=HEADS)),
        ((BLOCKS, 2 * DIM), vectors_of(DIM, kv_dim=2)),
        ((BLOCKS, DIM), vectors_of(DIM, 2, TOKENS, HEADS, 2)),
    ],
    ids=["all", "tokens", "heads", "K and V", "as long as one vector"],
)
def test_rows_of_several_vectors_are_refused(shape, sizes):
    """A row for each block is refused unless the block is one vector: it would tell no order."""
    specs = [describe(np.zeros(shape, f"i{sizes.item_bytes}"))]
    with pytest.raises(ConfigError, match="does not tell the order of its elements") as caught:
        infer_layout(specs, [sizes])
    assert (caught.value.field, caught.value.value) == ("kv_caches[0]", shape)
    why = rf"only for blocks of one vector, such as states; .*\[0\] have kv={sizes.kv_dim}, tokens"
    with pytest.raises(ConfigError, match=why) as caught:
        infer_layout(specs, [sizes], "flat")
    assert (caught.value.field, caught.value.value) == ("layout", "flat")


@pytest.mark.parametrize("layout", [None, "flat"])
def test_rows_of_one_vector_are_flat(layout):
    """A row is accepted where the block is one vector, as the block of a state is."""
    states = layers_of((BLOCKS, 200))
    found = infer_layout(
        [describe(state) for state in states], [vectors_of(200, item_bytes=2)], layout
    )
    assert (found.name, found.order) == ("flat", "dim")
    assert read_block(found, 2) == b"".join(state[2].tobytes() for state in states)
    with pytest.raises(ConfigError, match=r"fits none of.*flat \[blocks, dim\].*dim=201$"):
        infer_layout([describe(state) for state in states], [vectors_of(201, item_bytes=2)], layout)


def test_an_unknown_layout_is_named():
    """An unknown layout is an error that lists the known ones."""
    with pytest.raises(ConfigError, match="kv-blocks, blocks-kv, blocks-heads, fused"):
        infer(layers_of(SHAPES["fused"]), layout="layerwise")


def test_no_layer_is_an_error():
    """An engine without layers is an error."""
    with pytest.raises(ConfigError, match="at least one layer"):
        infer([])


@pytest.mark.parametrize("other", [(2, BLOCKS + 1, TOKENS, HEADS, DIM), SHAPES["blocks-kv"]])
def test_layers_must_agree(other):
    """Layers with different block counts or layouts are refused."""
    arrays = [*layers_of(SHAPES["kv-blocks"]), *layers_of(other)]
    with pytest.raises(ConfigError, match="these must be equal") as caught:
        infer(arrays)
    assert caught.value.field == f"kv_caches[{LAYERS}]"


def test_layers_must_agree_on_the_element_size():
    """Layers with different element sizes are refused."""
    arrays = [*layers_of(SHAPES["fused"]), *layers_of(SHAPES["fused"], np.int32)]
    with pytest.raises(ConfigError, match="4 bytes per element"):
        infer(arrays)


def test_scattered_blocks_are_refused():
    """A block in more than two extents, such as every other token of a longer one, is refused."""
    arrays = [array[:, ::2] for array in layers_of((BLOCKS, 2 * TOKENS, HEADS * 2 * DIM))]
    with pytest.raises(ConfigError, match="one or two contiguous extents"):
        infer(arrays)


@pytest.mark.parametrize(
    "bend",
    [
        lambda array: np.lib.stride_tricks.as_strided(array, array.shape, (0, *array.strides[1:])),
        lambda array: array[::-1],
    ],
    ids=["overlapping", "backwards"],
)
def test_blocks_that_share_bytes_or_run_backwards_are_refused(bend):
    """Blocks that share bytes, or that lie in descending order, are refused."""
    with pytest.raises(ConfigError, match="overlap or run backwards"):
        infer([bend(array) for array in layers_of(SHAPES["fused"])])


def test_read_only_arrays_are_refused():
    """A read-only array is refused, as a get could not write to it."""
    array = layers_of(SHAPES["fused"])[0]
    array.flags.writeable = False
    with pytest.raises(ConfigError, match="must be writable"):
        describe(array, "kv_caches[0]")


def test_other_devices_are_refused_by_name():
    """A tensor on an unsupported device is refused with the device's name."""
    with pytest.raises(BackendUnavailableError, match="meta"):
        device_of([torch.empty(2, device="meta")])


def test_tensors_on_several_devices_are_refused_by_name():
    """Tensors of one rank on several devices are refused by name."""
    cpu, cuda = SimpleNamespace(device="cpu"), SimpleNamespace(device=torch.device("cuda", 1))
    assert (device_of([cpu]), device_of([cuda, cuda])) == (("cpu", 0), ("cuda", 1))
    with pytest.raises(ConfigError, match=r"kv_caches\[1\]='cpu:0': kv_caches\[0\] is on cuda:1"):
        device_of([cuda, cpu])


def test_anything_else_is_no_tensor():
    """A list of numbers is refused as a KV cache."""
    with pytest.raises(ConfigError, match="must be a numpy array or a torch tensor"):
        describe([1, 2])


def test_kv_caches_come_in_the_order_of_the_layers():
    """KV caches keep the order of a dict's insertions, or of a sequence."""
    assert kv_cache_list({"layers.1": 1, "layers.0": 0}) == [1, 0]
    assert kv_cache_list((5, 6)) == [5, 6]


@pytest.mark.parametrize("wrong", [{}, [], "layers", 5])
def test_kv_caches_that_are_none_are_refused(wrong):
    """KV caches without a layer, or of another type, are an error."""
    with pytest.raises(ConfigError):
        kv_cache_list(wrong)


# -- layers that overlap --------------------------------------------------------------------------


class Rows(NamedTuple):
    """A layer whose blocks are rows of bytes: where they begin, their stride and their size."""

    address: int
    stride_bytes: int
    size_bytes: int


def infer_rows(rows, num_blocks):
    """Return the layout of layers with such blocks."""
    specs = [
        TensorSpec(each.address, (num_blocks, 1, each.size_bytes), (each.stride_bytes, 1, 1), 1)
        for each in rows
    ]
    return infer_layout(specs, [KVShape(1, 1, each.size_bytes, 1, 1) for each in rows])


def first_that_meet(rows, num_blocks):
    """Return the first two layers in memory that share a byte: the later one's address too."""
    taken = [
        {
            each.address + block * each.stride_bytes + byte
            for block in range(num_blocks)
            for byte in range(each.size_bytes)
        }
        for each in rows
    ]
    order = sorted(range(len(rows)), key=lambda number: (rows[number], number))
    for one, another in combinations(order, 2):
        if taken[one] & taken[another]:
            return min(one, another), max(one, another), rows[another].address
    return None


@st.composite
def several_rows(draw):
    """Draw layers that begin near each other, mostly with strides that have a common divisor."""
    unit, rows = draw(st.sampled_from([1, 2, 6, 8])), []
    for _ in range(draw(st.integers(2, 5))):
        stride = unit * draw(st.integers(1, 6))
        size = draw(st.integers(1, min(stride, draw(st.sampled_from([1, 3, 36])))))
        rows.append(Rows(4096 + draw(st.integers(0, 80)), stride, size))
    return rows


@given(several_rows(), st.integers(1, 9))
@example([Rows(0, 64, 64), Rows(0, 32, 32)], 9)
@example([Rows(0, 16, 8), Rows(8, 32, 8)], 9)
@example([Rows(0, 10, 2), Rows(5, 11, 2)], 5)
@example([Rows(0, 10, 2), Rows(5, 11, 2)], 9)
@example([Rows(0, 8, 8), Rows(16, 8, 8)], 2)
@example([Rows(8, 0, 8), Rows(0, -8, 9)], 1)
def test_layers_overlap_exactly_if_they_share_a_byte(rows, num_blocks):
    """Layers with any strides are refused if and only if a byte belongs to two of them.

    The error names the first two in memory, and where the later one begins.
    """
    found = first_that_meet(rows, num_blocks)
    if found is None:
        assert infer_rows(rows, num_blocks).num_blocks == num_blocks
        return
    first, second, address = found
    with pytest.raises(ConfigError, match=rf"shares memory with kv_caches\[{first}\]") as caught:
        infer_rows(rows, num_blocks)
    assert (caught.value.field, caught.value.value) == (
        f"kv_caches[{second}]", f"address {address:#x}"
    )  # fmt: skip


def lines_run(rows, num_blocks):
    """Return how many lines of the module run to infer the layout of such layers."""
    count, before = 0, sys.gettrace()

    def trace(frame, event, _):
        nonlocal count
        count += event == "line"
        return trace if frame.f_code.co_filename == infer_layout.__code__.co_filename else None

    sys.settrace(trace)
    try:
        infer_rows(rows, num_blocks)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize(
    "rows_of",
    [
        lambda count: [Rows(16 * i, 16 * count, 8) for i in range(count)],
        lambda count: [Rows(16 * i, 16 * count * (1 + i % 2), 8) for i in range(count)],
        lambda count: [Rows(4096 * i, 16, 8) for i in range(count)],
    ],
    ids=["blocks first", "two strides", "layers first"],
)
def test_the_cost_of_comparing_layers_grows_with_their_number(rows_of):
    """With twice the layers in one allocation, about twice the code runs, not four times."""
    few, many = (lines_run(rows_of(count), 64) for count in (100, 200))
    assert many < 3 * few
