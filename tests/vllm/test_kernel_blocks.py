"""Tests of engines whose attention backends divide vLLM's blocks into smaller *kernel blocks*.

Token t of block b is token `t % own` of kernel block `b * ratio + t // own`: that is where the
backend writes and reads it. Blocks go to host memory and to other blocks by the real CPU device.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

import torch
from vllm.v1.kv_cache_layout import KVCacheLayout

from flexkv.common.config import CacheConfig, ModelConfig
from flexkv.common.errors import ConfigError
from flexkv.common.layout import is_natural, order_of
from flexkv.common.space import BlockSpace
from flexkv.common.terms import Route, Tier, Transfer
from flexkv.integration.vllm import worker
from flexkv.integration.vllm.groups import groups_of
from flexkv.integration.vllm.tensors import tensors_of
from flexkv.integration.vllm.worker import WorkerSide
from flexkv.io.device.cpu import CpuDevicePort
from flexkv.io.device.tensors import layouts_of
from flexkv.io.memory.arena import Arena

from .caches import allocated, engine, full, group, lent, mla, planned, several, state, window
from .test_scheduler_faults import Agent

TO_DEVICE, TO_HOST = Route(Tier.HOST, Tier.DEVICE), Route(Tier.DEVICE, Tier.HOST)
BLOCKS = 8
KV_FIRST, KV_SECOND, LATENT = "kv first", "kv second", "latent"


def filled(kv_caches: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fill the allocation below some tensors with random bytes."""
    for number, tensor in enumerate(kv_caches.values()):
        raw = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        random = np.random.default_rng(number).integers(0, 256, len(raw), np.uint8)
        raw.copy_(torch.from_numpy(random))
    return dict(kv_caches)


def tokens_of(tensor: torch.Tensor, block: int, tokens: int, axis: int = 2) -> torch.Tensor:
    """Return a block as its backend reads it: bytes, token after token.

    `axis` is that of the tokens in a tensor whose kernel blocks have come to its front.
    """
    own = tensor.shape[axis]
    ratio = tokens // own
    places = [(block * ratio + token // own, token % own) for token in range(tokens)]
    read = torch.stack([tensor[kernel].select(axis - 1, at) for kernel, at in places])
    return read.contiguous().view(torch.uint8)


async def _run(port: CpuDevicePort, transfers: Sequence[Transfer]) -> None:
    woken, left = asyncio.Event(), len(transfers)
    port.connect(woken.set)
    for transfer in transfers:
        port.submit(transfer)
    while left := left - len(ended := port.reap()):
        assert [each.error for each in ended] == [None] * len(ended)
        await asyncio.wait_for(woken.wait(), 20)
        woken.clear()


def moved(
    spaces: Sequence[BlockSpace], ranks: Sequence[Mapping[str, Any]],
    moves: Mapping[int, tuple[int, int]],
) -> str:  # fmt: skip
    """Move one block of each group to another one, on all ranks, and return their order.

    `moves` has the blocks by group. The target is wiped before it is loaded.
    """
    arena, order = Arena.open(len(spaces), spaces[0].stride_bytes), ""
    layouts = [layouts_of(spaces, [*each.values()], None, rank) for rank, each in enumerate(ranks)]
    transfers = [
        Transfer(2 * group, 1, TO_HOST, np.array([source]), np.array([group]), group=group)
        for group, (source, _) in moves.items()
    ]
    back = [
        Transfer(2 * group + 1, 1, TO_DEVICE, np.array([group]), np.array([target]), group=group)
        for group, (_, target) in moves.items()
    ]
    for each in (transfers, back):
        for rank, tensors in zip(layouts, ranks, strict=True):
            port = CpuDevicePort(rank, arena, tensors)
            asyncio.run(_run(port, each))
            port.close()
            order = order_of(rank)
    arena.close()
    return order


# -- the allocations of vLLM ---------------------------------------------------------------------

DENSE = {
    *(("LBHNC", heads, layers) for heads in (1, 2) for layers in (1, 3)),
    *(("LBNHC", heads, layers) for heads in (1, 2) for layers in (1, 3)),
    *(("LHBNC", 1, layers) for layers in (1, 3)),
    *((layout, heads, 1) for layout in ("BLHNC", "BLNHC") for heads in (1, 2)),
    ("BHLNC", 1, 1),
}  # fmt: skip
"""The layouts, heads and layers whose blocks vLLM divides: those whose pages are dense."""


@pytest.mark.parametrize("ratio", [2, 3, 33])
@pytest.mark.parametrize("layout", [each.name for each in KVCacheLayout])
def test_each_layout_that_vllm_divides_is_served(configured: Any, layout: str, ratio: int) -> None:
    """A moved block has each token where the backend looks for it, in every dense layout."""
    tokens = 16 * ratio
    for heads in (1, 2):
        for layers in (1, 3):
            names = "abc"[:layers]
            spec = full(block_size=tokens, num_kv_heads=heads)
            plan = planned(configured, group(spec, *names), num_blocks=BLOCKS, layout=layout)
            if (layout, heads, layers) not in DENSE:
                with pytest.raises((ValueError, RuntimeError), match=r"dense, unp|out of bounds"):
                    allocated(plan, 16)
                continue
            kv_caches = filled(allocated(plan, 16))
            found = groups_of(plan, engine(heads=heads))
            assert found is not None
            spaces = found.model(1, False, "m").spaces(tokens)
            wanted = {name: tokens_of(kv_caches[name], 5, tokens) for name in names}
            others = {name: tokens_of(kv_caches[name], 4, tokens) for name in names}
            order = moved(spaces, [lent(found, kv_caches)], {0: (5, 2)})
            for name in names:
                assert torch.equal(tokens_of(kv_caches[name], 2, tokens), wanted[name])
                assert torch.equal(tokens_of(kv_caches[name], 4, tokens), others[name])
            if heads > 1 and layout in ("LBHNC", "BLHNC"):
                assert order == f"splits={ratio} heads tokens kv·dim"
            else:
                assert order == ("tokens heads kv·dim" if heads > 1 else "tokens kv·dim")


@pytest.mark.parametrize(("tokens", "own"), [(784, 16), (528, 16), (1056, 32), (128, 64)])
def test_groups_that_are_divided_and_groups_that_are_not(
    configured: Any, tokens: int, own: int
) -> None:
    """Attention with kernel blocks, a window without, and a state share one allocation."""
    page = tokens * 2 * 16 * 4
    groups = (
        group(full(block_size=tokens), "a", "b"),
        group(window(block_size=tokens), "w", "x"),
        group(state(block_size=tokens, page_size_padded=page), "s", "t"),
    )
    plan = planned(configured, *groups, num_blocks=BLOCKS)
    kv_caches = filled(allocated(plan, own, tokens, tokens))
    found = groups_of(plan, engine())
    assert found is not None
    size = [tokens, tokens, 1]
    before = {
        name: [tokens_of(kv_caches[name], block, size[at]) for block in range(BLOCKS)]
        for at, names in enumerate(("ab", "wx", "st"))
        for name in names
    }
    moves = {0: (1, 2), 1: (3, 4), 2: (5, 6)}
    spaces = found.model(1, False, "m").spaces(tokens)
    order = moved(spaces, [lent(found, kv_caches)], moves)
    assert order == f"splits={tokens // own} heads tokens kv·dim|heads tokens kv·dim|dim"
    for at, names in enumerate(("ab", "wx", "st")):
        source, target = moves[at]
        for name in names:
            assert torch.equal(tokens_of(kv_caches[name], target, size[at]), before[name][source])
            for block in {0, 7} | {source}:
                assert torch.equal(tokens_of(kv_caches[name], block, size[at]), before[name][block])


def test_groups_with_smaller_blocks_may_be_divided_too(configured: Any) -> None:
    """A window whose blocks are parts of the chain's has kernel blocks of its own size."""
    groups = (
        group(full(block_size=64, num_kv_heads=1), "f"),
        group(window(64, block_size=32), "w"),
    )
    plan = planned(configured, *groups, num_blocks=BLOCKS)
    kv_caches = filled(allocated(plan, 64, 16))
    found = groups_of(plan, engine())
    assert found is not None
    assert found.layers == ("f", "w", "w")
    wanted = [tokens_of(kv_caches["w"], block, 32) for block in (1, 2)]
    views = lent(found, kv_caches)
    order = moved(found.model(1, False, "m").spaces(64), [views], {1: (1, 5), 2: (2, 6)})
    assert order == "tokens kv·dim" + 2 * "|splits=2 heads tokens kv·dim"
    for block, content in zip((5, 6), wanted, strict=True):
        assert torch.equal(tokens_of(kv_caches["w"], block, 32), content)


def test_each_rank_has_its_part_of_a_divided_block(configured: Any) -> None:
    """Two ranks fill one host block, and each loads its own heads again."""
    plan = planned(configured, group(full(block_size=64, num_kv_heads=1), "a"), num_blocks=BLOCKS)
    found = groups_of(plan, engine(tp=2))
    assert found is not None
    model, ranks = found.model(2, False, "m"), [filled(allocated(plan, 16)) for _ in range(2)]
    ranks[1]["a"].copy_(ranks[1]["a"].flip(0))
    wanted = [tokens_of(each["a"], 3, 64) for each in ranks]
    views = [dict(tensors_of(each, model, 64, found)) for each in ranks]
    moved(model.spaces(64), views, {0: (3, 6)})
    for each, content in zip(ranks, wanted, strict=True):
        assert torch.equal(tokens_of(each["a"], 6, 64), content)
    assert not torch.equal(*wanted)


def test_divided_latents_and_compressed_ones_are_whole_blocks(configured: Any) -> None:
    """MLA's kernel blocks have the order of whole blocks, also where tokens share a latent."""
    for spec in (mla(block_size=64), mla(block_size=64, tokens_per_state=4)):
        plan = planned(configured, group(spec, "a", "b"), num_blocks=BLOCKS)
        found = groups_of(plan, engine(use_mla=True, heads=1))
        assert found is not None
        kv_caches, states = filled(allocated(plan, 16)), 64 // int(spec.tokens_per_state)
        wanted = tokens_of(kv_caches["b"], 7, states)
        views = lent(found, kv_caches, use_mla=True)
        order = moved(found.model(1, True, "m").spaces(64), [views], {0: (7, 0)})
        assert torch.equal(tokens_of(kv_caches["b"], 0, states), wanted)
        assert is_natural(order)


# -- opaque layers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "heads", "order"),
    [
        ("LBHNC", 2, "splits=4 heads tokens kv·dim;splits=4 dim tokens"),
        ("LBNHC", 2, "tokens heads kv·dim;tokens dim"),
        ("LBHNC", 1, "tokens kv·dim;tokens dim"),
    ],
)
def test_opaque_layers_may_be_divided(configured: Any, layout: str, heads: int, order: str) -> None:
    """The bytes of a layer of unknown shape are moved whole; its order tells layouts apart."""
    shape: dict[str, Any] = {"block_size": 64, "num_kv_heads": heads}
    spec = several(a=full(**shape), b=full(**shape, head_size=4, dtype=torch.bfloat16))
    plan = planned(configured, group(spec, "a", "b"), num_blocks=BLOCKS, layout=layout)
    kv_caches = filled(allocated(plan, 16))
    found = groups_of(plan, engine(heads=heads))
    assert found is not None
    assert [span.is_opaque for span in found.spans] == [False, True]
    wanted = {name: tokens_of(kv_caches[name], 6, 64) for name in "ab"}
    kept = {name: tokens_of(kv_caches[name], 2, 64) for name in "ab"}
    assert (
        moved(found.model(1, False, "m").spaces(64), [lent(found, kv_caches)], {0: (6, 1)}) == order
    )
    for name in "ab":
        assert torch.equal(tokens_of(kv_caches[name], 1, 64), wanted[name])
        assert torch.equal(tokens_of(kv_caches[name], 2, 64), kept[name])


def test_opaque_layers_with_heads_before_tokens_have_another_order(configured: Any) -> None:
    """Blocks of unknown shape are not shared between engines with different layouts."""
    spec = several(a=full(), b=full(head_size=4))
    texts = set()
    for layout in ("LBHNC", "LBNHC"):
        plan = planned(configured, group(spec, "a", "b"), num_blocks=BLOCKS, layout=layout)
        found = groups_of(plan, engine())
        assert found is not None
        spaces, views = found.model(1, False, "m").spaces(16), lent(found, allocated(plan))
        texts.add(layouts_of(spaces, [*views.values()], None, 0)[0].order.split(";")[1])
    assert texts == {"tokens dim", "dim tokens"}


# -- earlier versions ----------------------------------------------------------------------------

PLAIN: dict[str, Any] = {"num_layers": 2, "head_size": 8, "dtype": "float16", "model_id": "m"}


def earlier(form: str, ratio: int, order: Sequence[int] = range(5)) -> dict[str, torch.Tensor]:
    """Return tensors as earlier versions of vLLM have them; their axes are in memory in `order`."""
    shape = {
        KV_FIRST: (2, BLOCKS * ratio, 16, 2, 8),
        KV_SECOND: (BLOCKS * ratio, 2, 16, 2, 8),
        LATENT: (BLOCKS * ratio, 16, 8),
    }[form]
    order = order if form != LATENT else range(3)
    back = [list(order).index(axis) for axis in range(len(shape))]
    made = {}
    for name in "ab":
        made[name] = torch.zeros([shape[axis] for axis in order], dtype=torch.float16).permute(back)
    return filled(made)


def kernel_first(form: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a view [kernel block, …, token, …] of such a tensor."""
    return tensor.transpose(0, 1) if form == KV_FIRST else tensor


TOKENS_FIRST, HEADS_FIRST, KV_INSIDE = (0, 1, 2, 3, 4), (0, 1, 3, 2, 4), (1, 0, 2, 3, 4)
EARLIER = [
    (KV_FIRST, TOKENS_FIRST, "kv tokens heads dim"),
    (KV_FIRST, HEADS_FIRST, "kv splits={} heads tokens dim"),
    (KV_FIRST, KV_INSIDE, "splits={} kv tokens heads dim"),  # beside state layers
    (KV_SECOND, TOKENS_FIRST, "splits={} kv tokens heads dim"),
    (KV_SECOND, HEADS_FIRST, "splits={} kv heads tokens dim"),
    (LATENT, range(3), "tokens dim"),
]


@pytest.mark.parametrize("ratio", [2, 7, 33, 49])
@pytest.mark.parametrize(("form", "stored", "order"), EARLIER)
@pytest.mark.parametrize("knows", [True, False], ids=["number told", "number unknown"])
def test_plain_models_of_earlier_versions(
    form: str, stored: Sequence[int], order: str, ratio: int, knows: bool
) -> None:
    """The tokens of the kernel blocks tell how many make a block, even if vLLM does not."""
    is_latent, tokens = form == LATENT, 16 * ratio
    heads = 1 if is_latent else 2
    model = ModelConfig(**PLAIN, num_kv_heads=heads, use_mla=is_latent)
    kv_caches = earlier(form, ratio, stored)
    groups: Any = SimpleNamespace(num_blocks=BLOCKS) if knows else None
    views = tensors_of(kv_caches, model, tokens, groups)
    read = [kernel_first(form, each) for each in kv_caches.values()]
    axis = 1 if is_latent else 2
    wanted = [tokens_of(each, 6, tokens, axis) for each in read]
    kept = [tokens_of(each, 5, tokens, axis) for each in read]
    assert moved(model.spaces(tokens), [views], {0: (6, 3)}) == order.format(ratio)
    for each, content, other in zip(read, wanted, kept, strict=True):
        assert torch.equal(tokens_of(each, 3, tokens, axis), content)
        assert torch.equal(tokens_of(each, 5, tokens, axis), other)


def test_a_worker_lends_the_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker lends its device's memory as vLLM's blocks, whatever the version of vLLM."""
    monkeypatch.setattr(worker, "Agent", Agent)
    setup: Any = SimpleNamespace(
        settings=SimpleNamespace(server_recv_port="ipc:///nowhere"), instance=0, groups=None,
        model=ModelConfig(**PLAIN, num_kv_heads=2), cache=CacheConfig(tokens_per_block=64),
        loads_by_layer=False,
    )  # fmt: skip
    side: Any = WorkerSide(setup, 0)
    for form, shape in ((KV_FIRST, (2, 8, 4, 16, 2, 8)), (KV_SECOND, (8, 4, 2, 16, 2, 8))):
        kv_caches = earlier(form, 4)
        side.register_kv_caches(kv_caches)
        (views,) = side._agent.lent
        assert list(views) == ["a", "b"]
        for name, view in views.items():
            assert view.shape == shape
            assert view.data_ptr() == kv_caches[name].data_ptr()
    side.close()


# -- refused -------------------------------------------------------------------------------------


def test_a_number_of_blocks_that_is_not_vllms_is_refused_by_layer(configured: Any) -> None:
    """Each block must have the same number of kernel blocks; a state has none."""
    states = state(block_size=64, page_size_padded=64 * 2 * 16 * 4)
    groups = group(full(block_size=64), "a"), group(states, "s")
    plan = planned(configured, *groups, num_blocks=BLOCKS)
    found = groups_of(plan, engine())
    assert found is not None
    kv_caches = allocated(plan, 16, 64)
    assert list(lent(found, kv_caches)) == ["a", "s"]
    for name in "as":
        wrong = {**kv_caches, name: torch.cat([kv_caches[name]] * 2)}
        with pytest.raises(ConfigError, match=f"kv_caches.'{name}'.*the 8 blocks of vLLM"):
            lent(found, wrong)


def test_opaque_layers_whose_kernel_blocks_lie_apart_are_refused(configured: Any) -> None:
    """The bytes of such a block are not known."""
    spec = several(a=full(block_size=64), b=full(block_size=64, head_size=4))
    plan = planned(configured, group(spec, "a", "b"), num_blocks=BLOCKS)
    found = groups_of(plan, engine())
    assert found is not None
    kv_caches = allocated(plan, 16)
    apart = torch.zeros(2 * 4 * BLOCKS, 2, 16, 8)[::2]
    with pytest.raises(
        ConfigError, match=r"kv_caches.'b'.*kernel blocks that are 2048 bytes apart"
    ):
        lent(found, {**kv_caches, "b": apart})
    with pytest.raises(ConfigError, match=r"kv_caches.'b'.*the 8 blocks of vLLM"):
        lent(found, {**kv_caches, "b": kv_caches["b"][1:]})


def test_tensors_of_other_tokens_are_refused_with_their_shape() -> None:
    """Kernel blocks of more tokens than vLLM's, or that do not divide them, are refused."""
    model = ModelConfig(**PLAIN, num_kv_heads=2)
    for tokens in (8, 24, 40):
        views = tensors_of(earlier(KV_SECOND, 1), model, tokens, None)
        with pytest.raises(ConfigError, match=r"\(8, 2, 16, 2, 8\).*fits none of") as caught:
            layouts_of(model.spaces(tokens), [*views.values()], None, 0)
        assert caught.value.field == "kv_caches[0]"
