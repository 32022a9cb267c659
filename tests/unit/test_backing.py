"""KV groups over one allocation: every byte of a block is copied, and no other byte is touched."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexkv.common.config import LayerGroup, ModelConfig
from flexkv.common.errors import ConfigError
from flexkv.common.layout import PagedLayout, order_of
from flexkv.common.space import BlockSpace
from flexkv.common.terms import Route, Tier, Transfer
from flexkv.io.cuda.choice import Choices, CopyMethod, CopyPreference
from flexkv.io.cuda.pinned import Pinned
from flexkv.io.cuda.port import CudaDevicePort
from flexkv.io.device.cpu import CpuDevicePort
from flexkv.io.device.tensors import layouts_of
from flexkv.io.memory.arena import Arena
from flexkv.io.ports import DevicePort
from flexkv.testing.fake_cuda import FakeCuda
from tests.unit.backing import LAYOUTS, Backing, blocks_apart, pages_of

TO_DEVICE, TO_HOST = Route(Tier.HOST, Tier.DEVICE), Route(Tier.DEVICE, Tier.HOST)
BLOCKS, TOKENS = 12, 4
ONE_PAGE = ("LHBNC", "BHLNC")
"""Layouts in which a page with several heads is not contiguous, and so cannot be padded."""


def _model(groups: Sequence[dict[str, Any]], **changes: Any) -> ModelConfig:
    """Return a model whose layers are dealt out to the groups in turns."""
    left = [group["num_layers"] for group in groups]
    dealt: list[list[int]] = [[] for _ in groups]
    for number in range(sum(left)):
        at = max(range(len(groups)), key=lambda each: (left[each], each == number % len(groups)))
        dealt[at].append(number)
        left[at] -= 1
    sizes: dict[str, Any] = {"num_layers": sum(map(len, dealt)), "num_kv_heads": 2, "head_size": 8}
    layers = [
        LayerGroup(**group, layer_indices=tuple(indices))
        for group, indices in zip(groups, dealt, strict=True)
    ]
    return ModelConfig(**{**sizes, "dtype": "float16", **changes}, layer_groups=layers)


class Port:
    """A port of some kind to one device, which ends its transfers one by one."""

    def __init__(
        self, mode: str, layouts: Sequence[PagedLayout], arena: Arena, of: Backing
    ) -> None:
        self._mode, self._arena, self._undo = mode, arena, ExitStack()
        self._made: DevicePort
        self.open(layouts, of)

    def open(self, layouts: Sequence[PagedLayout], of: Backing) -> None:
        """Attach to the KV caches of a device."""
        self.close()
        if self._mode == "cpu":
            self._made = CpuDevicePort(layouts, self._arena, of.memory)
        else:
            driver, preference = FakeCuda([of.memory]), CopyPreference(use_engine=True)
            made = CudaDevicePort(
                layouts, Pinned(self._arena), of.memory, driver, (preference, preference)
            )
            for way in made._streams:
                way.choose(Choices.always(CopyMethod(self._mode)))
            self._undo.callback(lambda: driver.left == 0 or pytest.fail("something is left"))
            self._made = made
        self._undo.callback(self._made.close)

    async def run(self, transfer: Transfer) -> None:
        """Run one transfer to its end."""
        woken = asyncio.Event()
        self._made.connect(woken.set)
        self._made.submit(transfer)
        while not (ended := self._made.reap()):
            await woken.wait()
            woken.clear()
        assert [each.error for each in ended] == [None]

    def close(self) -> None:
        """Close the port."""
        self._undo.close()


async def _copied(
    mode: str,
    spaces: Sequence[BlockSpace],
    layouts: Sequence[PagedLayout],
    devices: tuple[Backing, Backing],
    seed: int,
) -> None:
    """Copy blocks of every group to host memory, and to a second device, and check every byte."""
    random, places, (device, target) = np.random.default_rng(seed), 3 * BLOCKS, devices
    arena = Arena.open(places, spaces[0].stride_bytes)
    arena.array[:] = random.integers(0, 256, arena.array.shape, np.uint8)
    port = Port(mode, layouts, arena, device)
    expected, untouched = arena.array.copy(), device.memory.copy()
    shares = list(blocks_apart(random, BLOCKS, len(spaces)))
    hosts = [random.permutation(each) for each in blocks_apart(random, places, len(spaces))]
    for space, ids, host in zip(spaces, shares, hosts, strict=True):
        for block, place in zip(ids, host[: len(ids)], strict=True):
            content = device.block(space.layers, block)
            assert len(content) == space.block_bytes == layouts[space.group].block_bytes
            expected[place, : len(content)] = np.frombuffer(content, np.uint8)
        await port.run(Transfer(1, 1, TO_HOST, ids, host[: len(ids)], group=space.group))
    assert np.array_equal(arena.array, expected)
    assert np.array_equal(device.memory, untouched)

    port.open(layouts_of(spaces, target.tensors(), None, 0), target)
    wanted = target.memory.copy()
    copies = []
    for space, ids, host in zip(spaces, shares, hosts, strict=True):
        others = ids[::-1].copy()
        await port.run(Transfer(1, 1, TO_DEVICE, host[: len(ids)], others, group=space.group))
        copies += [(layer, ids, others) for layer in space.layers]
    port.close()
    found = target.memory.copy()
    target.memory[:] = wanted
    for layer, ids, others in copies:
        target.bytes_of[layer][others] = device.bytes_of[layer][ids]
    assert np.array_equal(found, target.memory)
    assert np.array_equal(arena.array, expected)
    arena.close()


# -- the six layouts of vLLM ----------------------------------------------------------------------

HYBRIDS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], list[int]]] = {
    "one group": ([{"num_layers": 3, "num_kv_heads": 3, "head_size": 8}], {}, [0]),
    "window": (
        [
            {"num_layers": 2, "num_kv_heads": 2, "head_size": 8},
            {"num_layers": 2, "num_kv_heads": 2, "head_size": 8, "kind": "sliding_window",
             "window": 8, "kv_group": 1},
            {"num_layers": 2, "num_kv_heads": 2, "head_size": 8, "kind": "sliding_window",
             "window": 8, "kv_group": 2},
        ],
        {}, [0, 0, 0],
    ),
    "fp8 beside bf16": (
        [
            {"num_layers": 2, "num_kv_heads": 2, "head_size": 8, "dtype": "fp8"},
            {"num_layers": 2, "num_kv_heads": 1, "head_size": 8, "kind": "chunked", "window": 8,
             "kv_group": 1, "dtype": "bfloat16"},
        ],
        {}, [0, 0],
    ),
    "states with padding": (
        [
            {"num_layers": 1, "num_kv_heads": 1, "head_size": 16},
            {"num_layers": 1, "kind": "state", "state_bytes": 200, "kv_group": 1},
            {"num_layers": 1, "kind": "state", "state_bytes": 201, "kv_group": 2},
        ],
        {}, [0, 56, 55],
    ),
    "MLA and state": (
        [
            {"num_layers": 2, "num_kv_heads": 1, "head_size": 24},
            {"num_layers": 2, "kind": "state", "state_bytes": 100, "kv_group": 1},
        ],
        {"use_mla": True}, [0, 92],
    ),
}  # fmt: skip
MIXED: dict[str, tuple[list[dict[str, Any]], dict[str, Any], list[int]]] = {
    "MLA with an indexer": (
        [
            {"num_layers": 2, "num_kv_heads": 1, "head_size": 24},
            {"num_layers": 2, "num_kv_heads": 1, "head_size": 9, "dtype": "uint8"},
        ],
        {"use_mla": True}, [0, 12],
    ),
    "windows of MLA and compressed": (
        [
            {"num_layers": 2, "num_kv_heads": 1, "head_size": 24},
            {"num_layers": 1, "num_kv_heads": 1, "head_size": 16, "compress_ratio": 4},
            {"num_layers": 3, "num_kv_heads": 1, "head_size": 24, "kind": "sliding_window",
             "window": 5, "kv_group": 1, "tokens_per_block": 8},
            {"num_layers": 1, "kind": "state", "state_bytes": 321, "kv_group": 2},
        ],
        {"use_mla": True}, [0, 0, 0, 0],
    ),
}  # fmt: skip
"""Groups with pages of several sizes; if there are several, blocks are the outermost axis."""
CASES = (
    [(name, layout) for layout in LAYOUTS for name in HYBRIDS]
    + [(name, layout) for layout in ("BLHNC", "BLNHC") for name in MIXED]
    + [("MLA with an indexer", layout) for layout in ("LBHNC", "LBNHC")]
)

ON_CPU = [(*case, mode) for case in CASES for mode in ("cpu", "cpu-torch")]
ON_CUDA = [
    (name, layout, mode)
    for name, layout in (
        ("states with padding", "BLHNC"), ("window", "LHBNC"), ("MLA with an indexer", "BLNHC"),
    )
    for mode in ("engine", "staged", "kernel")
]  # fmt: skip


@pytest.mark.support(
    "cache", "all of vLLM's layouts (`LBHNC`, `LBNHC`, `LHBNC`, `BLHNC`, `BLNHC`, `BHLNC`)"
)
@pytest.mark.parametrize(("name", "layout", "mode"), [*ON_CPU, *ON_CUDA])
async def test_every_layout_of_vllm(name: str, layout: str, mode: str) -> None:
    """Blocks of every group go to host memory and back, whatever the order of the axes."""
    groups, changes, padding = {**HYBRIDS, **MIXED}[name]
    model = _model(groups, **changes)
    spaces, pages = model.spaces(TOKENS), pages_of(model, TOKENS, padding)
    devices = Backing(pages, layout, BLOCKS, 1), Backing(pages, layout, BLOCKS, 2)
    library = "torch" if mode == "cpu-torch" else "numpy"
    layouts = layouts_of(spaces, devices[0].tensors(library), None, 0)
    await _copied(mode.removesuffix("-torch"), spaces, layouts, devices, 3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adjacent_pages_are_one_piece(layout: str) -> None:
    """With blocks outermost, all layers of a group are one run; else each layer has its own.

    Where heads are outside the layers or the blocks, each head of a layer is a run.
    """
    groups, _, _ = HYBRIDS["window"]
    model = _model(groups)
    spaces = model.spaces(TOKENS)
    device = Backing(pages_of(model, TOKENS, [0, 0, 0]), layout, BLOCKS)
    runs = {"BLHNC": 1, "BLNHC": 1, "LBHNC": 2, "LBNHC": 2, "LHBNC": 4, "BHLNC": 4}
    layouts = layouts_of(spaces, device.tensors(), None, 0)
    assert [len(each.pieces) for each in layouts] == [runs[layout]] * 3
    order = "tokens heads kv·dim" if "NH" in layout else "heads tokens kv·dim"
    assert order_of(layouts) == "|".join([order] * 3)


# -- any groups -----------------------------------------------------------------------------------


@st.composite
def _groups(draw: Any, layout: str) -> list[dict[str, Any]]:
    """Draw layer groups of up to four KV groups."""
    mixed = layout in ("BLHNC", "BLNHC")
    groups: list[dict[str, Any]] = []
    num_layers = draw(st.integers(1, 3))
    for kv_group in range(draw(st.integers(1, 4))):
        is_state = kv_group and draw(st.booleans())
        for _ in range(draw(st.integers(1, 2 if mixed else 1))):
            own: dict[str, Any] = {
                "num_layers": draw(st.integers(1, 3)) if mixed else num_layers,
                "kv_group": kv_group,
            }
            if is_state:
                own |= {"kind": "state", "state_bytes": draw(st.integers(1, 300))}
            else:
                own |= {
                    "num_kv_heads": draw(st.integers(1, 3)), "head_size": draw(st.integers(1, 9)),
                    "dtype": draw(st.sampled_from(["int8", "float16", "float32"])),
                    "kv_dim": draw(st.integers(1, 2)),
                }  # fmt: skip
            groups.append(own)
    return groups


def _in_one_stride(groups: list[dict[str, Any]], layout: str) -> list[int]:
    """Return paddings with which all pages have one size, a multiple of every element's."""
    model = _model(groups)
    sizes = [each.page_bytes for each in pages_of(model, TOKENS, [0] * len(groups))]
    page = -(-max(sizes) // 4) * 4
    return [page - size for size in sizes]


@given(st.sampled_from(LAYOUTS), st.data(), st.integers(0, 1 << 20))
@settings(max_examples=settings.default.max_examples * 2 // 5)
def test_groups_over_one_allocation(layout: str, data: Any, seed: int) -> None:
    """Any groups, over one allocation: every byte is right, and padding stays as it was."""
    groups = data.draw(_groups(layout))
    if layout in ONE_PAGE:  # a page in pieces cannot be padded: give every group the same
        groups = [{**groups[0], "kv_group": each["kv_group"]} for each in groups]
    padding = _in_one_stride(groups, layout)
    model = _model(groups)
    pages = pages_of(model, TOKENS, padding)
    devices = Backing(pages, layout, BLOCKS, seed), Backing(pages, layout, BLOCKS, seed + 1)
    spaces = model.spaces(TOKENS)
    layouts = layouts_of(spaces, devices[0].tensors(), None, 0)
    asyncio.run(_copied("cpu", spaces, layouts, devices, seed))


# -- what is refused ------------------------------------------------------------------------------


def test_layers_of_one_group_may_not_share_memory() -> None:
    """Groups overlay each other; two layers of one group may not, and are named as they were."""
    groups, _, _ = HYBRIDS["window"]
    model = _model(groups)
    spaces = model.spaces(TOKENS)
    tensors = Backing(pages_of(model, TOKENS, [0, 0, 0]), "LBHNC", BLOCKS).tensors()
    first, second = spaces[1].layers
    tensors[second] = tensors[first]
    with pytest.raises(ConfigError, match=rf"shares memory with kv_caches\[{first}\]") as caught:
        layouts_of(spaces, tensors, None, 0)
    assert caught.value.field == f"kv_caches[{second}]"


@pytest.mark.parametrize("layout", ["BLHNC", "LBHNC"])
def test_pages_of_two_sizes_may_not_share_memory(layout: str) -> None:
    """The same holds where pages differ in size: those of an indexer may not be inside latents."""
    groups, changes, padding = MIXED["MLA with an indexer"]
    model = _model(groups, **changes)
    spaces, pages = model.spaces(TOKENS), pages_of(model, TOKENS, padding)
    device = Backing(pages, layout, BLOCKS)
    (latent, *_), (indexer, *_) = (each.group.layer_indices for each in pages)
    tensors, size = device.tensors(), pages[1]._replace(padding_bytes=0).page_bytes
    rows = device.memory[: BLOCKS * size].reshape(BLOCKS, 1, TOKENS, -1)
    assert rows.ctypes.data == tensors[latent].ctypes.data
    tensors[indexer] = rows
    with pytest.raises(ConfigError, match=rf"shares memory with kv_caches\[{latent}\]") as caught:
        layouts_of(spaces, tensors, None, 0)
    assert caught.value.field == f"kv_caches[{indexer}]"


def test_groups_must_have_as_many_blocks() -> None:
    """A block id belongs to any group, so all have the same number of blocks."""
    groups, _, _ = HYBRIDS["window"]
    model = _model(groups)
    spaces = model.spaces(TOKENS)
    tensors = Backing(pages_of(model, TOKENS, [0, 0, 0]), "LBHNC", BLOCKS).tensors()
    for number in spaces[2].layers:
        tensors[number] = tensors[number][:-1]
    with pytest.raises(ConfigError, match=f"{BLOCKS - 1} in kv_caches.*same number of blocks"):
        layouts_of(spaces, tensors, None, 0)
    with pytest.raises(ConfigError, match="one tensor for each of the 6 layers"):
        layouts_of(spaces, tensors[:-1], None, 0)


def test_a_layer_with_the_wrong_type_is_named_by_its_number_in_the_model() -> None:
    """The error names the tensor as the caller passed it, not its place in its group."""
    groups, _, padding = HYBRIDS["states with padding"]
    model = _model(groups)
    spaces = model.spaces(TOKENS)
    tensors = Backing(pages_of(model, TOKENS, padding), "LBHNC", BLOCKS).tensors()
    (number,) = spaces[2].layers
    tensors[number] = np.zeros((BLOCKS, 1, 1, 50), np.float32)
    with pytest.raises(ConfigError, match="must be int8") as caught:
        layouts_of(spaces, tensors, None, 0)
    assert caught.value.field == f"kv_caches[{number}]"
    tensors[number] = np.zeros((BLOCKS, 1, 1, 200), np.int8)
    with pytest.raises(ConfigError, match="fits none of") as caught:
        layouts_of(spaces, tensors, None, 0)
    assert caught.value.field == f"kv_caches[{number}]"


def test_a_named_layout_does_not_hold_for_states() -> None:
    """A name says which axis of K and V is which; the rows of a state are rows all the same."""
    groups, _, _ = HYBRIDS["states with padding"]
    model = _model(groups)
    spaces = model.spaces(TOKENS)
    attention = np.zeros((2, 2, TOKENS, 1, 16), np.float16)
    rows = [np.zeros((2, 200), np.int8), np.zeros((2, 201), np.int8)]
    tensors: list[Any] = [attention, *rows]
    tensors = [tensors[space.group] for number in range(3) for space in spaces
               if space.layers == (number,)]  # fmt: skip
    layouts = layouts_of(spaces, tensors, "blocks-kv", 0)
    assert [each.name for each in layouts] == ["blocks-kv", "flat", "flat"]
    assert order_of(layouts) == "kv tokens dim|dim|dim"
