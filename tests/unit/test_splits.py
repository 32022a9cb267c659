"""Laws of blocks that an engine divides into smaller ones: their bytes, and their order."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import permutations
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flexkv.common.errors import ConfigError
from flexkv.common.layout import (
    SHAPES,
    WHOLE,
    Division,
    KVShape,
    PagedLayout,
    Part,
    divisions,
    infer_layout,
    is_natural,
    is_order,
)
from flexkv.common.terms import Route, Tier, Transfer
from flexkv.io.cuda.choice import CopyMethod
from flexkv.io.cuda.pinned import Pinned
from flexkv.io.cuda.port import CudaDevicePort
from flexkv.io.device.tensors import describe
from flexkv.io.memory.arena import Arena
from flexkv.testing.fake_cuda import FakeCuda
from tests.unit.test_backing import Port

TO_DEVICE, TO_HOST = Route(Tier.HOST, Tier.DEVICE), Route(Tier.DEVICE, Tier.HOST)
BLOCKS = 6
READ = ("blocks", "tokens", "kv", "heads", "dim")
FORMS = [axes for _, axes in SHAPES if "tokens" in axes]
Bytes = NDArray[np.uint8]


class Divided:
    """The caches of an engine whose kernels see `splits` blocks for each of its own.

    Attributes:
        memory: all bytes.
        tokens: views of the layers as uint16[kernel block, token, kv, head, dim].
        tensors: the layers' tensors, with the axes of the form, divided into [blocks, splits, …].
    """

    def __init__(
        self, form: tuple[str, ...], splits: int, shape: KVShape, layers: int = 2,
        stored: tuple[str, ...] | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        """Fill layers of this form, whose axes are in memory as `stored` has them."""
        self.splits, self.own = splits, shape.tokens // splits
        lengths = {
            "blocks": BLOCKS * splits, "tokens": self.own, "kv": shape.kv_dim,
            "heads": shape.heads, "dim": shape.head_size,
        }  # fmt: skip
        stored = stored or form
        factors = [axis for each in stored for axis in each.split("·")]
        sizes = [lengths[axis] for axis in factors]
        random = np.random.default_rng(seed)
        self.memory = random.integers(0, 256, layers * prod(sizes) * 2, np.uint8)
        self.tokens, self.tensors = list[Any](), list[Any]()
        for raw in np.split(self.memory.view(np.uint16), layers):
            whole = raw.reshape(sizes)
            missing = [axis for axis in READ if axis not in factors]
            full = whole.reshape(*sizes, *[1] * len(missing))
            self.tokens.append(full.transpose([(*factors, *missing).index(axis) for axis in READ]))
            merged = [prod(lengths[axis] for axis in each.split("·")) for each in stored]
            view = raw.reshape(merged).transpose([stored.index(axis) for axis in form])
            at = form.index("blocks")
            if splits > 1:
                view = view.reshape(*view.shape[:at], BLOCKS, splits, *view.shape[at + 1 :])
                assert np.shares_memory(view, self.memory)
            self.tensors.append(view)

    def layout(self, shape: KVShape, part: Part = WHOLE) -> PagedLayout:
        """Return the layout of the tensors."""
        return infer_layout([describe(each) for each in self.tensors], [shape], None, part)

    def content(self, block: int) -> Bytes:
        """Return what the kernels read for the tokens of a block: [layer, token, kv, head, dim]."""
        at = [block * self.splits + token // self.own for token in range(self.own * self.splits)]
        within = [token % self.own for token in range(self.own * self.splits)]
        return np.stack([layer[at, within] for layer in self.tokens])


def host_block(layout: PagedLayout, block: int) -> bytes:
    """Return what a block becomes in host memory."""
    return b"".join(
        ctypes.string_at(address + block * stride, size)
        for address, stride, size, _ in layout.pieces.tolist()
    )


def every_division(shape: KVShape, counts: tuple[int, ...]) -> Iterator[tuple[Divided, str]]:
    """Yield caches of all forms, with their axes in memory in any order; and the order as text."""
    for form in FORMS:
        for stored in permutations(form):
            for splits in counts:
                try:
                    made = Divided(form, splits, shape, 1, stored)
                    yield made, made.layout(shape).order
                except (ConfigError, ValueError):  # neither contiguous, nor apart by head or split
                    continue


def test_equal_orders_are_equal_bytes_and_the_reverse() -> None:
    """Blocks of the same tokens have the same bytes in host memory if and only if the texts agree.

    So a device may use what another one has stored exactly if their orders are equal.
    """
    shape, kinds = KVShape(8, 3, 5, 2, item_bytes=2), dict[str, bytes]()
    values = np.random.default_rng(1).integers(0, 1 << 16, (8, 2, 3, 5), np.uint16)
    seen = 0
    for made, text in every_division(shape, (1, 2, 4, 8)):
        for token, value in enumerate(values):
            made.tokens[0][2 * made.splits + token // made.own, token % made.own] = value
        found = host_block(made.layout(shape), 2)
        order = text.replace("·", " ")
        assert kinds.setdefault(order, found) == found, text
        assert is_order(text)
        seen += 1
    assert len(set(kinds.values())) == len(kinds)
    assert (seen, len(kinds)) == (830, 86)
    assert is_natural("kv tokens heads dim")
    assert not is_natural("splits=2 kv tokens heads dim")


@pytest.mark.parametrize(
    ("form", "splits", "order"),
    [
        (("kv", "blocks", "tokens", "heads", "dim"), 4, "kv tokens heads dim"),
        (("blocks", "kv", "tokens", "heads", "dim"), 4, "splits=4 kv tokens heads dim"),
        (("blocks", "kv", "tokens", "heads", "dim"), 2, "splits=2 kv tokens heads dim"),
        (("blocks", "kv", "heads", "tokens", "dim"), 8, "tokens kv heads dim"),
        (("blocks", "heads", "tokens", "kv·dim"), 2, "splits=2 heads tokens kv·dim"),
        (("blocks", "tokens", "heads", "kv·dim"), 2, "tokens heads kv·dim"),
        (("blocks", "tokens", "heads·kv·dim"), 4, "tokens heads·kv·dim"),
    ],
)
def test_an_order_tells_splits_only_where_they_matter(
    form: tuple[str, ...], splits: int, order: str
) -> None:
    """Splits that come directly before tokens, or have one token each, do not change the order."""
    shape = KVShape(8, 3, 4, 2, item_bytes=2)
    assert Divided(form, splits, shape).layout(shape).order == order


def test_axes_of_length_one_do_not_come_between() -> None:
    """With one head or one latent, the axis of the heads or of K and V separates nothing."""
    one_head, latent = KVShape(8, 1, 4, 2, item_bytes=2), KVShape(8, 1, 4, 1, item_bytes=2)
    split = Divided(("blocks", "heads", "tokens", "kv·dim"), 4, one_head)
    assert split.layout(one_head).order == "tokens kv·dim"
    for form in FORMS:
        assert Divided(form, 4, latent).layout(latent).order == "tokens dim"


@pytest.mark.parametrize(
    "wrong",
    ["splits", "splits=", "splits=0", "splits=-1", "splits=\uff12", "splits=2x", "split=2",
     "splits=02 tokens", "tokens=2", "splits=2\n"],
)  # fmt: skip
def test_what_is_no_order_is_known(wrong: str) -> None:
    """A text of another server or agent is believed only if it consists of axes."""
    assert not is_order(wrong)
    assert is_order("splits=49 kv heads·dim|splits=2 tokens;dim|")


MODES = ("cpu", "engine", "kernel", "staged")


async def moved(
    mode: str, source: Divided, target: Divided, shape: KVShape, part: Part, seed: int = 0
) -> None:
    """Move blocks of one engine to others of another, over host memory, and check each token."""
    layouts = [each.layout(shape, part) for each in (source, target)]
    assert layouts[0].order == layouts[1].order
    arena = Arena.open(BLOCKS, -(-part.of * layouts[0].block_bytes // 4096) * 4096)
    ids, places = (np.random.default_rng(seed).permutation(BLOCKS)[:4] for _ in range(2))
    wanted, before = [source.content(each) for each in ids], source.memory.copy()
    kept = {each: target.content(each) for each in range(BLOCKS) if each not in ids[::-1]}
    with ExitStack() as undo:
        undo.callback(arena.close)
        port: Any = Port(mode, layouts[:1], arena, source)  # type: ignore[arg-type]
        undo.callback(port.close)
        await port.run(Transfer(1, 1, TO_HOST, ids, places))
        port.open(layouts[1:], target)
        await port.run(Transfer(2, 1, TO_DEVICE, places, ids[::-1].copy()))
    for block, content in zip(ids[::-1], wanted, strict=True):
        assert np.array_equal(target.content(block), content)
    assert np.array_equal(source.memory, before)
    assert all(np.array_equal(target.content(each), kept[each]) for each in kept)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
async def test_tokens_keep_their_places_in_moved_blocks(mode: str, form: tuple[str, ...]) -> None:
    """Token t of a block is token t of the block that it is moved to, seen by the same kernels."""
    shape = KVShape(8, 2, 8, 2, item_bytes=2)
    for splits in (2, 4, 8):
        caches = (Divided(form, splits, shape, seed=seed) for seed in (1, 2))
        await moved(mode, *caches, shape, Part(1, 2))


@pytest.mark.parametrize(
    ("tokens", "splits"), [(tokens, tokens // own) for own in (16, 32, 64)
                           for tokens in (2 * own, 3 * own, 528, 784, 1056) if not tokens % own]
)  # fmt: skip
async def test_kernel_blocks_of_hybrids(tokens: int, splits: int) -> None:
    """Blocks of 528, 784 or 1056 tokens, of kernel blocks of 16, 32 or 64."""
    shape = KVShape(tokens, 2, 4, 2, item_bytes=2)
    for form in FORMS[1:5]:
        caches = (Divided(form, splits, shape, seed=seed) for seed in (1, 2))
        await moved("cpu", *caches, shape, WHOLE)


async def test_divided_and_whole_blocks_of_one_order_are_exchanged() -> None:
    """An engine with other kernel blocks, or none, loads what has the same order."""
    shape = KVShape(12, 5, 8, 2, item_bytes=2)
    for form in (FORMS[0], FORMS[5], FORMS[6]):
        for splits in ((1, 3), (4, 1), (2, 6)):
            caches = [Divided(form, n, shape, seed=n) for n in splits]
            await moved("cpu", *caches, shape, WHOLE)


# -- many pieces --------------------------------------------------------------------------------


def apart(splits: int, heads: int, shape: KVShape, layers: int) -> SimpleNamespace:
    """Return layers with a gap behind each head of each kernel block, so as many pieces."""
    own, gap = shape.tokens // splits, 32
    row = own * shape.head_size * 2 + gap
    memory = np.random.default_rng(splits).integers(
        0, 256, layers * 2 * BLOCKS * splits * heads * row, np.uint8
    )
    each = np.split(memory, layers)
    rows = [raw.reshape(2, BLOCKS, splits, heads, row)[..., : row - gap] for raw in each]
    tensors = [
        view.view(np.uint16).reshape(2, BLOCKS, splits, heads, own, shape.head_size)
        for view in rows
    ]  # fmt: skip
    return SimpleNamespace(memory=memory, tensors=tensors)


@pytest.mark.parametrize("mode", MODES)
async def test_a_block_may_be_thousands_of_pieces(mode: str) -> None:
    """A piece for K and V, each split and each head of every layer is copied, and nothing else."""
    shape, layers = KVShape(98, 4, 16, 2, item_bytes=2), 4
    source, target = (apart(49, 4, shape, layers) for _ in range(2))
    target.memory[:] = 0
    layouts = [
        infer_layout([describe(tensor) for tensor in each.tensors], [shape])
        for each in (source, target)
    ]
    assert [len(each.pieces) for each in layouts] == [layers * 2 * 49 * 4] * 2
    assert layouts[0].order == "kv splits=49 heads tokens dim"
    arena = Arena.open(2, -(-layouts[0].block_bytes // 4096) * 4096)
    with ExitStack() as undo:
        undo.callback(arena.close)
        port: Any = Port(mode, layouts[:1], arena, source)  # type: ignore[arg-type]
        undo.callback(port.close)
        await port.run(Transfer(1, 1, TO_HOST, np.array([5, 1]), np.array([0, 1])))
        for place, block in enumerate((5, 1)):
            wanted = b"".join(tensor[:, block].tobytes() for tensor in source.tensors)
            assert arena.array[place, : len(wanted)].tobytes() == wanted
        port.open(layouts[1:], target)
        await port.run(Transfer(2, 1, TO_DEVICE, np.array([0, 1]), np.array([2, 5])))
    for mine, theirs in zip(target.tensors, source.tensors, strict=True):
        assert np.array_equal(mine[:, [2, 5]], theirs[:, [5, 1]])
        mine[:, [2, 5]] = 0
    assert not target.memory.any()


def test_the_choice_of_copies_is_measured_with_many_pieces(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """If a block has more pieces than a measurement's limit of chunks, two blocks are measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shape = KVShape(14, 3, 16, 2, item_bytes=2)
    caches = apart(7, 3, shape, 2)
    layout = infer_layout([describe(tensor) for tensor in caches.tensors], [shape])
    monkeypatch.setattr("flexkv.io.cuda.copier.MEASURED_CHUNKS", len(layout.pieces) - 1)
    arena = Arena.open(2, -(-layout.block_bytes // 4096) * 4096)
    before, driver = caches.memory.copy(), FakeCuda([caches.memory], delay_max_s=0.0)
    port = CudaDevicePort([layout], Pinned(arena), caches.memory, driver)
    assert all(choice.of(1).method in CopyMethod for choice in port.choices.values())
    assert np.array_equal(caches.memory, before)
    port.close()
    arena.close()
    assert driver.left == 0


# -- what a tensor can be ------------------------------------------------------------------------


def test_a_tensor_tells_how_blocks_are_divided() -> None:
    """The tokens of a tensor's blocks tell how many make one; the number of blocks must agree."""
    shape = KVShape(784, 2, 64, 2, item_bytes=2)
    for form, axis in [(FORMS[0], 1), (FORMS[2], 0), (FORMS[4], 0), (FORMS[5], 0), (FORMS[6], 0)]:
        for splits in (1, 2, 7, 49, 784):
            made = Divided(form, 1, shape._replace(tokens=784 // splits), 1).tensors[0].shape
            seen = tuple(n * splits if at == axis else n for at, n in enumerate(made))
            assert divisions(seen, shape) == {Division(axis, splits)}
            assert divisions(seen, shape, BLOCKS) == {Division(axis, splits)}
            assert divisions(seen, shape, BLOCKS + 1) == set()
    for wrong in ((8, 2, 15, 128), (7, 2, 392, 128), (8, 2, 1568, 128), (8, 3, 16, 128), (8, 0, 2),
                  (8, 2, 0, 128), ()):  # fmt: skip
        assert divisions(wrong, shape) == set()


def test_a_state_is_never_divided() -> None:
    """The block of a state is one vector: a tensor with more of them has more blocks."""
    state = KVShape(1, 1, 200, 1, item_bytes=1)
    for seen in ((12, 200), (12, 1, 1, 200)):
        assert divisions(seen, state, 12) == {Division(0, 1)}
        assert divisions(seen, state, 6) == set()


def test_splits_that_do_not_make_a_block_are_refused() -> None:
    """The error says what the axes should be."""
    shape = KVShape(8, 3, 4, 2, item_bytes=2)
    for seen in ((BLOCKS, 3, 3, 2, 8), (BLOCKS, 1, 8, 24), (BLOCKS, 2, 8, 24), (BLOCKS, 16, 1, 24)):
        with pytest.raises(ConfigError, match="two axes, blocks and splits") as caught:
            infer_layout([describe(np.zeros(seen, np.uint16))], [shape])
        assert caught.value.value == seen


def test_a_block_of_splits_that_overlap_is_refused() -> None:
    """Strides that put a head of one split where another split begins are no layout."""
    shape = KVShape(8, 2, 4, 2, item_bytes=2)
    memory = np.zeros(BLOCKS * 128, np.uint16)
    view = np.lib.stride_tricks.as_strided(
        memory, (BLOCKS, 2, 2, 4, 8), (256, 128, 128, 16, 2)
    )  # fmt: skip
    with pytest.raises(ConfigError, match="one for each head or split"):
        infer_layout([describe(view)], [shape])
