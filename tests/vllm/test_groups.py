"""Tests of which KV groups are served, and of what FlexKV takes them for."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import (
    CircularBufferSpec,
    CrossAttentionSpec,
    EncoderOnlyAttentionSpec,
    HiddenStateCacheSpec,
    HiSparseHotSpec,
    HiSparseResidentSpec,
    KVCacheGroupRole,
    KVCacheSpec,
    RSWASpec,
    SinkFullAttentionSpec,
    SlidingWindowMLASpec,
)

from flexkv.common.config import ModelConfig
from flexkv.common.errors import ConfigError
from flexkv.common.space import Kind
from flexkv.integration.vllm.groups import LEFT_OUT, WHY_REFUSED, groups_of
from flexkv.integration.vllm.shapes import KINDS

from .caches import (
    SHAPE,
    allocated,
    chunked,
    engine,
    full,
    group,
    lent,
    mla,
    of_scheduler,
    planned,
    replayed,
    ring,
    several,
    state,
    window,
)


def judged(configured: Any, *groups: Any, **more: Any) -> Any:
    """Return the groups as both sides of the connector take them, which must be the same."""
    layout = more.pop("layout", "LBHNC")
    vllm, worker = engine(**more), planned(configured, *groups, layout=layout)
    found = groups_of(worker, vllm)
    assert found == groups_of(of_scheduler(worker), vllm)
    return found


support = pytest.mark.support
SERVED = [
    pytest.param(window(), Kind.WINDOW, 32, "sliding_window", id="window"),
    pytest.param(
        SlidingWindowMLASpec(**{**SHAPE, "num_kv_heads": 1}, sliding_window=32),
        Kind.WINDOW, 32, "sliding_window_mla", id="window_mla",
        marks=support("cache", "sliding windows of MLA"),
    ),
    pytest.param(
        window(extra_retained_tokens=3), Kind.WINDOW, 35, "sliding_window", id="kept_longer"
    ),
    pytest.param(chunked(), Kind.CHUNK, 64, "chunked_local_attention", id="chunked"),
    pytest.param(state(), Kind.STATE, 0, "mamba", id="state"),
    pytest.param(full(dtype=torch.bfloat16), Kind.FULL, 0, "full_attention", id="full"),
    pytest.param(
        mla(), Kind.FULL, 0, "mla_attention", id="mla",
        marks=support("model", "with MLA (DeepSeek V2, V3)", "served",
                      "vLLM caches no prefixes of MLA on a CPU without AMX"),
    ),
    pytest.param(
        SinkFullAttentionSpec(**SHAPE, sink_len=4), Kind.FULL, 0, "sink_full_attention", id="sinks",
        marks=support("cache", "attention sinks that are in the KV cache"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "kind", "tokens", "name"), SERVED)
def test_each_kind_of_group_beside_full_attention_is_served(
    configured: Any, spec: Any, kind: Kind, tokens: int, name: str
) -> None:
    """It becomes a group of leaves, after the chain, wherever vLLM has it in its order."""
    found = judged(configured, group(spec, "a", "b"), group(full(), "c"), layout="BLHNC")
    chain, leaf = found.model(1, False, "m").spaces(found.tokens_per_block)
    if kind is Kind.FULL:  # then it is the first such group
        assert (found.engine_ids, found.layers) == ((0, 1), ("a", "b", "c"))
        assert found.names == (name, "full_attention")
    else:
        assert (found.engine_ids, found.layers) == ((0, 1), ("c", "a", "b"))
        assert found.names == ("full_attention", name)
        assert (leaf.kind, leaf.window, leaf.layers) == (kind, tokens, (1, 2))
    assert chain.kind is Kind.FULL


def test_a_state_has_its_content_and_not_its_page(configured: Any) -> None:
    """The padding of a state's page belongs to nobody, so it is not part of its block."""
    found = judged(configured, group(state(), "s"), group(full(), "f"))
    leaf = found.model(1, False, "m").spaces(16)[1]
    assert leaf.block_bytes == 4 * (3 * 5 + 2 * 4 * 4)
    assert found.have_states


def test_the_chain_has_the_smallest_blocks(configured: Any) -> None:
    """Of several groups with full attention the one with the smallest block is the chain."""
    found = judged(
        configured, group(full(block_size=32, num_kv_heads=1), "a"), group(full(), "b"),
        layout="BLHNC",
    )  # fmt: skip
    assert (found.chain, found.tokens_per_block, found.alignment_tokens) == (1, 16, 32)
    assert found.block_tokens(1) == 32
    assert [space.tokens_per_block for space in found.model(1, False, "m").spaces(16)] == [16, 32]


@support("model", "with MLA and an indexer (DeepSeek V3.2)")
def test_layers_of_two_page_sizes_in_one_group_are_served(configured: Any) -> None:
    """The scheduler's side sees one spec of the group; both sides come to the same shapes."""
    group_of_two = group(several(a=mla(16), i=mla(4, dtype=torch.uint8), b=mla(16)), "a", "i", "b")
    for layout in ("LBHNC", "BLHNC"):
        found = judged(configured, group_of_two, use_mla=True, heads=1, layout=layout)
        assert (found.layers, found.are_several) == (("a", "b", "i"), False)
        (space,) = found.model(1, True, "m").spaces(16)
        assert space.part_bytes == 2 * 16 * 16 * 4 + 16 * 4


@support(
    "cache",
    "layers of two dtypes in one group (`--kv-cache-dtype-skip-layers`)",
    "served",
    "with its own connector",
)
def test_layers_of_two_dtypes_in_one_group_are_served(configured: Any) -> None:
    """Layers that vLLM leaves unquantised are bytes to the side that does not know them."""
    spec = several(a=full(dtype=torch.uint8), b=full(dtype=torch.bfloat16))
    worker = planned(configured, group(spec, "a", "b"))
    found = judged(configured, group(spec, "a", "b"))
    (space,) = found.model(1, False, "m").spaces(16)
    assert space.part_bytes == 16 * 2 * 16 * (1 + 2)
    tensors = lent(found, allocated(worker))
    assert tensors["b"].shape == (8, 1, 16, 64)
    assert tensors["b"].dtype is torch.int8


@pytest.mark.parametrize("layout", ["LBHNC", "BLHNC"])
def test_opaque_layers_are_the_same_bytes(configured: Any, layout: str) -> None:
    """The bytes of an opaque layer's block are those of the engine's own view of it."""
    spec = several(a=full(), b=full(head_size=4, dtype=torch.bfloat16))
    worker = planned(configured, group(spec, "a", "b"), layout=layout)
    kv_caches = allocated(worker)
    for number, tensor in enumerate(kv_caches.values()):
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) % 251 + number)
    found = groups_of(worker, engine())
    assert found is not None
    tensor = lent(found, kv_caches)["b"]
    assert tensor.stride()[1:] == (tensor.stride(0), 1, 16), "heads come before tokens"
    for block in range(8):
        wanted = kv_caches["b"][block].contiguous().view(torch.int8).flatten()
        assert torch.equal(tensor[block].swapaxes(1, 2).flatten(), wanted)


@support(
    "cache",
    "layers that share one (Gemma 3n), or have none (Nemotron-NAS)",
    "served",
    "with its own connector",
)
def test_layers_that_share_a_cache_have_no_tensor_of_their_own(configured: Any) -> None:
    """vLLM's workers list such a layer beside its target: only the target is transferred."""
    worker = planned(configured, group(full(), "a"))
    worker.kv_cache_groups[0].layer_names.append("shares a")
    found = groups_of(worker, engine())
    assert found is not None
    kv_caches = allocated(worker)
    kv_caches["shares a"] = kv_caches["a"]
    assert list(lent(found, kv_caches)) == ["a"]


def test_a_layer_without_tensor_is_named() -> None:
    """A layer that the engine has not allocated is an error, not a hole in the block."""
    config = SimpleNamespace(kv_cache_groups=[group(full(), "a")])
    found = groups_of(config, engine())
    assert found is not None
    with pytest.raises(ConfigError, match="must have layer a"):
        lent(found, {})


def test_a_plain_model_is_what_it_was(configured: Any) -> None:
    """Equal layers in one group are the model by vLLM's configuration, with the keys it had."""
    plain = ModelConfig(num_layers=2, num_kv_heads=2, head_size=8, dtype="float32", model_id="m")
    assert judged(configured, group(full(), "a", "b")).fit(plain)
    eight_bit = plain.model_copy(update={"dtype": "uint8"})
    assert judged(configured, group(full(dtype=torch.int8), "a", "b")).fit(eight_bit)
    for other in (
        [group(full(), "a", "b", "draft")],
        [group(full(head_size_v=4), "a", "b")],
        [group(several(a=full(), b=full(num_kv_heads=1)), "a", "b")],
        [group(full(), "a"), group(full(), "b")],
    ):
        assert not judged(configured, *other).fit(plain)


def test_windows_that_vllm_keeps_whole_are_full_attention(configured: Any) -> None:
    """Without the hybrid manager, all blocks of a layer with a window are kept."""
    found = judged(configured, group(full(sliding_window=32), "a"))
    assert not found.are_several


# -- tensor parallelism -------------------------------------------------------------------------


def test_heads_count_over_all_ranks(configured: Any) -> None:
    """Specs are those of one rank; ranks share heads or states only where that is known."""
    alone = judged(configured, group(full(num_kv_heads=1), "a"), tp=4, heads=2)
    assert alone.shape(0).num_kv_heads == 2
    beside = judged(
        configured, group(full(num_kv_heads=1), "a"), group(window(num_kv_heads=1), "b"), tp=4,
        heads=2,
    )  # fmt: skip
    assert [shape.num_kv_heads for shape in beside.layer_groups] == [4, 4]
    known = judged(
        configured, group(full(num_kv_heads=1, max_tp_shards=2), "a"), group(window(), "b"), tp=4,
        layout="BLHNC",
    )  # fmt: skip
    assert [shape.num_kv_heads for shape in known.layer_groups] == [2, 8]


def test_mla_beside_states_is_one_latent_for_all_ranks(configured: Any) -> None:
    """All ranks have MLA's latent, each has its slice of a state unless that is replicated too."""
    for replicated, slices in ((False, 4), (True, 1)):
        groups = group(mla(32), "m"), group(state(tp_replicated=replicated), "s")
        found = judged(configured, *groups, tp=4, use_mla=True, heads=1, layout="BLHNC")
        assert [shape.num_kv_heads for shape in found.layer_groups] == [1, slices]
        chain, leaf = found.model(4, True, "m").spaces(16)
        assert (chain.parts, leaf.parts) == (1, slices)


def test_layers_whose_spec_is_unknown_belong_to_their_rank(configured: Any) -> None:
    """A draft's heads may be divided where the target's latent is not, unless vLLM says so."""
    spec = several(a=mla(), draft=full(num_kv_heads=1))
    found = judged(configured, group(spec, "a", "draft"), tp=2, use_mla=True, heads=1)
    assert [shape.num_kv_heads for shape in found.layer_groups] == [2, 2]
    worker = planned(configured, group(several(a=mla(), i=mla(4)), "a", "i"))
    worker.kv_tp_replicas = 2
    both = groups_of(worker, engine(tp=2, use_mla=True, heads=1))
    assert both is not None
    assert [shape.num_kv_heads for shape in both.layer_groups] == [1, 1]


# -- drafts, boundaries, mixes ------------------------------------------------------------------


def test_drafts_that_drop_the_last_block_are_known_by_the_configuration(configured: Any) -> None:
    """vLLM flags no group where it drops the last block of all of them."""
    plain, flagged = group(full(), "a"), group(full(), "a", is_eagle_group=True)
    eagle = SimpleNamespace(use_eagle=lambda: True)
    kept = SimpleNamespace(use_eagle=lambda: True, use_eagle_block_drop=lambda: False)
    copy = SimpleNamespace(use_eagle=lambda: False)
    assert judged(configured, plain, drafts=eagle).drops_last
    assert judged(configured, flagged).drops_last
    for drafts in (None, copy, kept):
        assert not judged(configured, plain, drafts=drafts).drops_last


@pytest.mark.parametrize(("told", "kept"), [(0, 0), (64, 64), (None, 16)])
def test_boundaries_are_kept_as_often_as_vllm_keeps_them(
    configured: Any, told: int | None, kept: int
) -> None:
    """vLLM's retention interval says where a hit may end besides the ends of prompts."""
    worker = planned(configured, group(full(), "a"), group(window(), "b"))
    worker.prefix_cache_retention_interval = told
    found = groups_of(worker, engine())
    assert found is not None
    assert found.retained_tokens == kept


def test_loads_continue_local_hits_of_kinds_that_are_proved(configured: Any) -> None:
    """For a kind of state without proof, only prompts are loaded that the device lacks wholly."""
    chain = group(full(), "a")
    assert judged(configured, chain, group(window(), "b")).mixes
    assert judged(configured, chain, group(state(), "b")).mixes
    gdn = state(mamba_type=MambaAttentionBackendEnum.GDN_ATTN)
    assert not judged(configured, chain, group(gdn, "b")).mixes


# -- refused ------------------------------------------------------------------------------------

ONE = {**SHAPE, "num_kv_heads": 1}
REFUSED = [
    (CrossAttentionSpec(**SHAPE), "kv_cache_spec", "x.*cross"),
    (EncoderOnlyAttentionSpec(**SHAPE), "kv_cache_spec", "x.*both directions"),
    (HiSparseHotSpec(block_size=16, page_size=4096, blocks_per_request=2), "kv_cache_spec",
     "x.*HiSparse"),
    (HiSparseResidentSpec(block_size=16, page_size=4096), "kv_cache_spec", "x.*HiSparse"),
    (RSWASpec(**SHAPE, rswa_window=32), "kv_cache_spec", "x.*middle"),
    (HiddenStateCacheSpec(**ONE), "kv_cache_spec", "x.*hidden states"),
    (full(tokens_per_state=3), "kv_cache_spec", "x.*whole states of 3 tokens"),
    (state("none"), "kv_cache_spec", "x.*mamba_cache_mode is none"),
    (full(non_causal=True), "kv_cache_spec", "x.*later tokens"),
    (window(block_size=24), "kv_cache_spec", "x.*24 tokens.*multiple.*16"),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "field", "words"), REFUSED)
def test_what_is_not_served_is_refused_by_layer_and_reason(
    spec: Any, field: str, words: str
) -> None:
    """The error names the kind of cache, a layer that has it, and why."""
    config = SimpleNamespace(kv_cache_groups=[group(full(), "f"), group(spec, "x", "y")])
    with pytest.raises(ConfigError, match=words) as caught:
        groups_of(config, engine())
    assert caught.value.field == field


def test_a_kind_that_is_new_is_refused() -> None:
    """A spec that is derived from a known one may keep something else."""

    class Newer(type(full())):  # type: ignore[misc]
        """Full attention with a difference."""

    config = SimpleNamespace(kv_cache_groups=[group(Newer(**SHAPE), "x")])
    with pytest.raises(ConfigError, match=r"Newer.*x.*does not know"):
        groups_of(config, engine())


def test_groups_elsewhere_are_refused() -> None:
    """Blocks that lie in the engine's host memory are not those of the device's pool."""
    hidden = {"host_resident": True}, {"role": KVCacheGroupRole.HISPARSE_SOURCE}
    for more in hidden:
        config = SimpleNamespace(kv_cache_groups=[group(full(), "x", **more)])
        with pytest.raises(ConfigError, match=r"x.*host memory"):
            groups_of(config, engine())


def test_groups_that_vllm_does_not_transfer_are_left_out(configured: Any) -> None:
    """Their content is rebuilt from another group, and their kind does not matter."""
    replica = group(CircularBufferSpec(**SHAPE), "r", enable_kv_transfer=False)
    found = judged(configured, replica, group(full(), "a"), group(window(), "b"))
    assert (found.engine_ids, found.layers) == ((1, 2), ("a", "b"))


@pytest.mark.parametrize(
    "left_out",
    [
        pytest.param(ring(), id="ring"),
        pytest.param(replayed(), id="replayed"),
        pytest.param(several(x=ring(), y=ring(head_size=4)), id="rings"),
        pytest.param(several(x=replayed(), y=replayed()), id="replayed_layers"),
    ],
)
def test_groups_that_vllm_makes_anew_are_left_out(configured: Any, left_out: Any) -> None:
    """They are neither stored nor loaded, and loads fail as a whole.

    With one group left, the model is still not a plain one: FlexKV lends only this group's layers.
    """
    told = group(left_out, "x", "y"), group(mla(tokens_per_state=4), "a", "b")
    found = judged(configured, *told, layout="BLHNC")
    assert (found.engine_ids, found.layers) == ((1,), ("a", "b"))
    assert (found.are_several, found.fail_whole) == (False, True)
    assert not found.fit(found.model(1, False, "m").model_copy(update={"layer_groups": None}))
    assert list(lent(found, allocated(planned(configured, *told, layout="BLHNC")))) == ["a", "b"]
    beside = judged(configured, *told, group(window(), "w"), layout="BLHNC")
    assert (beside.engine_ids, beside.layers) == ((1, 2), ("a", "b", "w"))


def test_hits_end_on_the_alignment_that_left_out_groups_ask_for() -> None:
    """FlexKV's alignment is a multiple of vLLM's, which covers the blocks of all groups."""
    told = SimpleNamespace(
        kv_cache_groups=[group(ring(block_size=12), "x"), group(full(), "a")],
        cache_hit_alignment_tokens=48,
    )
    found = groups_of(told, engine())
    assert found is not None
    assert (found.tokens_per_block, found.alignment_tokens) == (16, 48)
    told.kv_cache_groups.append(group(window(), "w"))
    with pytest.raises(ConfigError, match="cache_hit_alignment_tokens=48"):
        groups_of(told, engine())


def test_other_groups_without_prefixes_are_refused() -> None:
    """It is not known whether vLLM makes the content of other kinds, or of mixed groups, anew."""

    class Newer(CircularBufferSpec):
        """A ring with a difference."""

    class Cached(type(replayed())):  # type: ignore[misc]
        """A window without replay that keeps no prefixes."""

        prefix_cacheable, prefix_replay_tokens = False, 0

    Cached.__name__ = "SlidingWindowMLASpec"
    refused = [
        (Newer(**SHAPE), "Newer.*x.*does not know"),
        (Cached(**ONE, sliding_window=32), "x.*does not cache prefixes"),
        (several(y=ring(), x=full()), "CircularBufferSpec.*y.*does not know"),
    ]
    for spec, words in refused:
        config = SimpleNamespace(kv_cache_groups=[group(full(), "f"), group(spec, "x", "y")])
        with pytest.raises(ConfigError, match=words):
            groups_of(config, engine())
    for more in ({"host_resident": True}, {"role": KVCacheGroupRole.HISPARSE_INDEXER}):
        config = SimpleNamespace(kv_cache_groups=[group(full(), "f"), group(ring(), "x", **more)])
        with pytest.raises(ConfigError, match=r"x.*host memory"):
            groups_of(config, engine())


def test_the_documentation_lists_every_kind_of_cache() -> None:
    """It says of each of vLLM's specs whether it is served, left out or refused."""
    listed: dict[str, set[str]] = {"served": set(), "left out": set(), "refused": set()}
    text = (Path(__file__).parents[2] / "docs" / "vllm.md").read_text()
    for names, how in re.findall(r"^\| (.*`\w+Spec`.*) \| \*(.+?)\* \|", text, re.MULTILINE):
        listed[how] |= set(re.findall(r"`(\w+Spec)`", names))
    assert listed == {"served": {*KINDS}, "left out": {*LEFT_OUT}, "refused": {*WHY_REFUSED}}
    every, above = set[str](), [KVCacheSpec]
    while above:
        above = [below for spec in above for below in spec.__subclasses__()]
        every |= {spec.__name__ for spec in above if spec.__module__ == KVCacheSpec.__module__}
    assert every - set().union(*listed.values()) == {"AttentionSpec", "UniformTypeKVCacheSpecs"}


def test_models_of_states_or_chunks_alone_are_refused() -> None:
    """Prefixes are found by blocks of full attention or of a window, and such models have none."""
    for groups in (
        [group(state(), "s")], [group(chunked(), "c")], [group(ring(), "r")], [],
        [group(window(1), "w")],
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="neither full attention nor a window"):
            groups_of(SimpleNamespace(kv_cache_groups=groups), engine())


def test_a_window_is_the_chain_of_a_model_without_full_attention(configured: Any) -> None:
    """The chain is the longest of the windows with the smallest blocks; the rest are leaves."""
    found = judged(
        configured, group(state(), "s"), group(window(16), "a"), group(window(48), "b", "c"),
        group(chunked(32), "d"),
    )  # fmt: skip
    assert [source.engine_id for source in found.sources] == [2, 0, 1, 3]
    assert found.layers == ("b", "c", "s", "a", "d")
    assert found.fail_whole
    chain, *leaves = found.model(1, False, "m").spaces(16)
    assert (chain.kind, chain.window) == (Kind.WINDOW, 48)
    assert [leaf.kind for leaf in leaves] == [Kind.STATE, Kind.WINDOW, Kind.CHUNK]


def test_a_window_alone_is_not_full_attention(configured: Any) -> None:
    """Blocks of different windows, and those of full attention, all have different keys."""
    alone = [judged(configured, group(each, "a", "b")) for each in (window(), window(48), full())]
    plain = ModelConfig(num_layers=2, num_kv_heads=2, head_size=8, dtype="float32", model_id="m")
    assert [found.fit(plain) for found in alone] == [False, False, True]
    assert [found.fail_whole for found in alone] == [True, True, False]
    facts = [repr(found.model(1, False, "m").spaces(16)[0].facts) for found in alone]
    assert len({*facts, repr(plain.spaces(16)[0].facts)}) == 4


@pytest.mark.parametrize(
    ("chain", "other"),
    [(window(32), chunked(64)), (window(32), window(48, block_size=32))],
)
def test_without_full_attention_no_layer_may_reach_back_beyond_the_chain(
    chain: Any, other: Any
) -> None:
    """A load moves the chain's last window, which must contain all that other groups need."""
    config = SimpleNamespace(kv_cache_groups=[group(chain, "c"), group(other, "x")])
    with pytest.raises(ConfigError, match=r"the layer x: without full attention.*such as c"):
        groups_of(config, engine())


def test_more_groups_than_flexkv_counts_are_refused() -> None:
    """More KV groups than FlexKV can count are refused."""
    groups = [group(full(), f"layer {number}") for number in range(33)]
    with pytest.raises(ConfigError, match="at most 32"):
        groups_of(SimpleNamespace(kv_cache_groups=groups), engine())


def test_hits_that_end_elsewhere_are_refused() -> None:
    """Hits on fractions of the groups' blocks are fine; hits that no block divides are not."""
    groups = [group(full(), "a"), group(window(), "b")]
    told = SimpleNamespace(kv_cache_groups=groups, cache_hit_alignment_tokens=8)
    assert groups_of(told, engine()) is not None
    told.cache_hit_alignment_tokens = 48
    with pytest.raises(ConfigError, match="cache_hit_alignment_tokens=48"):
        groups_of(told, engine())


def test_without_kv_caches_nothing_is_judged() -> None:
    """Earlier versions of vLLM, and the built-in shim, do not pass them on."""
    assert groups_of(None, engine()) is None
