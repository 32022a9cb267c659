"""Laws of layouts: the pieces are the bytes of the block, for any shape and strides."""

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flexkv.common.errors import BackendUnavailableError, ConfigError
from flexkv.common.layout import KVShape, infer_layout
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
