"""Models with several KV groups: what each needs of a prefix, its blocks, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from flexkv.cli.doctor_model import kv_groups
from flexkv.cli.main import commands
from flexkv.common.config import CacheConfig, LayerGroup, ModelConfig
from flexkv.common.errors import ConfigError
from flexkv.common.layout import KVShape
from flexkv.common.space import BlockSpace, GroupRule, Kind, rules_of

RUNNER = CliRunner()
BASE: dict[str, Any] = {"num_layers": 4, "num_kv_heads": 2, "head_size": 8, "dtype": "float16"}
FULL = {"num_layers": 2, "num_kv_heads": 2, "head_size": 8}
WINDOW = {**FULL, "kind": "sliding_window", "window": 64, "kv_group": 1}
CHUNK = {**FULL, "kind": "chunked", "window": 128, "kv_group": 1}
STATE = {"num_layers": 2, "kind": "state", "state_bytes": 10496, "kv_group": 1}


def model_of(*groups: dict[str, Any], **changes: Any) -> ModelConfig:
    """Return a model with these layer groups."""
    layers = sum(group["num_layers"] for group in groups)
    return ModelConfig(**{**BASE, "num_layers": layers, **changes}, layer_groups=groups)


# -- which blocks a prefix needs -------------------------------------------------------------------


def _touched(kind: Kind, window: int, block: int, end: int) -> tuple[int, int]:
    """Return what a prefix needs, counted token by token."""
    if kind is Kind.STATE:
        return max(0, end // block - 1), end // block
    reach = {
        Kind.FULL: range(end),
        Kind.WINDOW: range(max(0, end - window + 1), end),
        Kind.CHUNK: range(end - end % max(window, 1), end),
    }[kind]
    blocks = sorted({token // block for token in reach})
    return (blocks[0], end // block) if blocks else (end // block, end // block)


@given(st.sampled_from(Kind), st.integers(1, 200), st.integers(1, 40), st.integers(0, 30))
def test_a_prefix_needs_the_blocks_that_its_next_token_reaches(
    kind: Kind, window: int, block: int, blocks: int
) -> None:
    """The blocks needed are those with a token that the next one attends to, or the last state."""
    window = window if kind in (Kind.WINDOW, Kind.CHUNK) else 0
    space = BlockSpace(block, (), (), 1, 1, {}, kind=kind, window=window)
    assert space.needed(blocks * block) == _touched(kind, window, block, blocks * block)


def test_rules_have_what_the_index_needs_of_the_leaves() -> None:
    """Each group but the first has a rule: its kind, its window in tokens, and its blocks."""
    wide = {**FULL, "kv_group": 3, "tokens_per_block": 64}
    spaces = model_of(FULL, STATE, {**CHUNK, "kv_group": 2}, wide).spaces(32)
    assert rules_of(spaces) == (
        GroupRule(1, Kind.STATE, 0, 1, 32),
        GroupRule(2, Kind.CHUNK, 128, 1, 32),
        GroupRule(3, Kind.FULL, 0, 2, 64),
    )
    assert rules_of(ModelConfig(**BASE).spaces(32)) == ()


# -- spaces ---------------------------------------------------------------------------------------


def test_each_kv_group_has_a_space() -> None:
    """A space has the layers of its group in their order, with its kind, window and block size."""
    spaces = model_of(
        {**FULL, "layer_indices": [5, 2], "dtype": "bfloat16"},
        {**WINDOW, "layer_indices": [0, 3], "dtype": "float8_e4m3fn", "head_size": 16},
        {**STATE, "layer_indices": [4, 1], "kv_group": 2, "tokens_per_block": 64},
    ).spaces(32)
    assert [space.layers for space in spaces] == [(2, 5), (0, 3), (1, 4)]
    assert [space.kind for space in spaces] == [Kind.FULL, Kind.WINDOW, Kind.STATE]
    assert [space.window for space in spaces] == [0, 64, 0]
    assert [space.tokens_per_block for space in spaces] == [32, 32, 64]
    assert [space.shapes[0] for space in spaces] == [
        KVShape(32, 2, 8, 2, 2),
        KVShape(32, 2, 16, 2, 1),
        KVShape(1, 1, 10496, 1, 1),
    ]
    assert [space.dtypes for space in spaces] == [
        ("bfloat16",) * 2, ("float8_e4m3fn",) * 2, ("int8",) * 2,
    ]  # fmt: skip
    assert [(space.group, space.stride_bytes) for space in spaces] == [
        (0, 24576), (1, 24576), (2, 24576),
    ]  # fmt: skip


def test_layers_of_one_kv_group_may_differ_in_shape() -> None:
    """MLA with an indexer: one KV group, whose layers have two sizes of pages."""
    latent = {"num_layers": 2, "num_kv_heads": 1, "head_size": 576, "layer_indices": [0, 2]}
    indexer = {
        "num_layers": 2, "num_kv_heads": 1, "head_size": 132, "layer_indices": [1, 3],
        "dtype": "uint8",
    }  # fmt: skip
    (space,) = model_of(latent, indexer, use_mla=True, tp_size=4, dtype="bfloat16").spaces(64)
    assert space.block_bytes == 2 * 64 * (576 * 2 + 132)
    assert space.layers == (0, 1, 2, 3)
    assert space.shapes[1] == KVShape(64, 1, 132, 1, 1)


@pytest.mark.parametrize(
    ("leaf", "changes", "parts"),
    [
        (WINDOW, {"tp_size": 2}, [2, 2]),
        ({**WINDOW, "num_kv_heads": 8}, {"tp_size": 4}, [2, 4]),
        (STATE, {"tp_size": 2}, [2, 1]),
        ({**STATE, "num_kv_heads": 2}, {"tp_size": 2}, [2, 2]),
        ({**STATE, "num_kv_heads": 4}, {"tp_size": 4, "use_mla": True}, [1, 4]),
        ({**WINDOW, "num_kv_heads": 4, "kv_dim": 2}, {"tp_size": 2, "use_mla": True}, [1, 2]),
    ],
)
def test_each_kv_group_has_parts_of_its_own(
    leaf: dict[str, Any], changes: dict[str, Any], parts: list[int]
) -> None:
    """TP ranks divide the blocks of each group by its own heads; a state is whole, or in slices."""
    spaces = model_of(FULL, leaf, **changes).spaces(32)
    assert [space.parts for space in spaces] == parts
    leaf_bytes = 10496 if leaf["kind"] == "state" else 32 * 8 * 2 * 2
    heads = leaf.get("num_kv_heads", 1)
    assert spaces[1].block_bytes == 2 * leaf_bytes * heads


def test_a_window_is_the_prefix_of_a_model_without_full_attention() -> None:
    """Its blocks share keys neither with those of full attention nor with another window's."""
    window = {**WINDOW, "kv_group": 0}
    models = [model_of(window), model_of({**window, "window": 65}), model_of(FULL)]
    chains = [model.spaces(32)[0] for model in models]
    assert [chain.kind for chain in chains] == [Kind.WINDOW, Kind.WINDOW, Kind.FULL]
    assert len({repr(chain.facts) for chain in chains}) == 3


# -- what is refused, by name ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "field", "why"),
    [
        ([WINDOW, STATE], "layer_groups", "numbered from 0 without a gap, but .* given: 1$"),
        ([FULL, {**WINDOW, "kv_group": 2}], "layer_groups", "without a gap, but .* given: 0, 2$"),
        ([{**STATE, "kv_group": 0}], "layer_groups[0].kind", "neither full attention nor a window"),
        ([{**CHUNK, "kv_group": 0}], "layer_groups[0].kind", "neither full attention nor a window"),
        ([{**WINDOW, "kv_group": 0}, {**FULL, "kv_group": 1}], "layer_groups[0].kind",
         "must be 'full' for kv_group 0"),
        ([{**STATE, "kv_group": 0}, {**WINDOW, "kv_group": 1}], "layer_groups[0].kind",
         "must be 'sliding_window' for kv_group 0"),
        ([{**STATE, "kv_group": 0}, {**FULL, "kv_group": 1}], "layer_groups[0].kind",
         "must be 'full' for kv_group 0"),
        ([FULL, WINDOW, {**CHUNK, "window": 64}], "layer_groups[2].kind", "'sliding_window'"),
        ([FULL, WINDOW, {**WINDOW, "window": 65}], "layer_groups[2].window", "must be 64"),
        ([FULL, WINDOW, {**WINDOW, "tokens_per_block": 64}], "layer_groups[2].tokens_per_block",
         "must be None"),
        ([FULL, {**WINDOW, "kv_group": 32}], "layer_groups[1].kv_group", "less than 32"),
        ([FULL, {**WINDOW, "kind": "ring"}], "layer_groups[1].kind", "'full', 'sliding_window'"),
        ([FULL, {**WINDOW, "window": 0}], "layer_groups[1].window", "at least 1 for kind="),
        ([{**FULL, "window": 5}], "layer_groups[0].window", "left out for kind='full'"),
        ([FULL, {**STATE, "window": 5}], "layer_groups[1].window", "left out for kind='state'"),
        ([FULL, {**STATE, "state_bytes": 0}], "layer_groups[1].state_bytes", "at least 1"),
        ([{**FULL, "state_bytes": 5}], "layer_groups[0].state_bytes", "left out for kind='full'"),
        ([FULL, {**STATE, "head_size": 5}], "layer_groups[1].head_size", "be state_bytes"),
        ([FULL, {**STATE, "kv_dim": 2}], "layer_groups[1].kv_dim", "left out for kind='state'"),
        ([FULL, {**STATE, "compress_ratio": 2}], "layer_groups[1].compress_ratio", "left out"),
        ([FULL, {**STATE, "num_kv_heads": 3}], "layer_groups[1].num_kv_heads", "must be 1 if each"),
        ([{"num_layers": 2, "head_size": 8}], "layer_groups[0].num_kv_heads", "is required"),
        ([{"num_layers": 2, "num_kv_heads": 2}], "layer_groups[0].head_size", "is required"),
        ([{**FULL, "head_size": 70000}], "layer_groups[0].head_size", "equal to 65536"),
        ([FULL, {**WINDOW, "kv_dim": 3}], "layer_groups[1].kv_dim", "less than or equal to 2"),
    ],
)  # fmt: skip
def test_a_wrong_group_is_refused_by_name(
    groups: list[dict[str, Any]], field: str, why: str
) -> None:
    """The error has the field of the group that breaks a rule, and the rule."""
    with pytest.raises(ConfigError, match=why) as caught:
        model_of(*groups)
    assert caught.value.field == field
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize(
    ("groups", "field", "why"),
    [
        ([{**FULL, "tokens_per_block": 64}], "layer_groups[0].tokens_per_block", "for kv_group 0"),
        ([FULL, {**WINDOW, "tokens_per_block": 16}], "layer_groups[1].tokens_per_block",
         "=16: must be a multiple of the cache's tokens_per_block=32"),
        ([FULL, {**WINDOW, "tokens_per_block": 48}], "layer_groups[1].tokens_per_block", "=48"),
        ([FULL, {**WINDOW, "compress_ratio": 3}], "tokens_per_block", "multiple of compress_ratio"),
    ],
)  # fmt: skip
def test_blocks_that_do_not_fit_the_chain_are_refused(
    groups: list[dict[str, Any]], field: str, why: str
) -> None:
    """A group's block is a whole number of blocks of the prefix."""
    with pytest.raises(ConfigError, match=why) as caught:
        CacheConfig(tokens_per_block=32, num_cpu_blocks=4).sized(model_of(*groups))
    assert caught.value.field == field


def test_ranks_must_divide_layers_of_one_kv_group_alike() -> None:
    """Layers of one KV group have the same parts; other groups may have others."""
    wide = {**WINDOW, "num_kv_heads": 8}
    model_of(FULL, wide, tp_size=4)
    with pytest.raises(ConfigError, match="other layers of kv_group 1 into 4: the numbers must"):
        model_of(FULL, wide, {**WINDOW, "num_kv_heads": 2}, tp_size=4)


def test_a_state_needs_no_heads() -> None:
    """Heads and head size of a state follow from its bytes; they may be given if they agree."""
    group = LayerGroup(num_layers=1, kind="state", state_bytes=100_000, kv_group=1)
    assert (group.num_kv_heads, group.head_size) == (1, 100_000)
    again = LayerGroup(
        num_layers=1, kind="state", state_bytes=100_000, kv_group=1, num_kv_heads=1,
        head_size=100_000,
    )  # fmt: skip
    assert repr(group) == repr(again)


# -- what one stride wastes -----------------------------------------------------------------------


def test_the_doctor_tells_what_each_group_wastes(tmp_path: Path) -> None:
    """Each group's finding has the bytes of its block and of its place, and the share wasted."""
    groups = [
        FULL, {**WINDOW, "num_layers": 1}, {**CHUNK, "kv_group": 2, "num_kv_heads": 4},
        {**STATE, "num_layers": 1, "kv_group": 3},
    ]  # fmt: skip
    path = tmp_path / "model.json"
    path.write_text(json.dumps({**BASE, "num_layers": 6, "layer_groups": groups}))
    arguments = ["doctor", "--dir", str(tmp_path), "--model", str(path), "--json"]
    told = RUNNER.invoke(commands, arguments, env={"FLEXKV_TOKENS_PER_BLOCK": "128"})
    assert told.exit_code == 0, told.output
    findings = {name: each for name, each in json.loads(told.output).items() if "KV" in name}
    assert {name: (each["found"], each["good"]) for name, each in findings.items()} == {
        "KV group 0: full attention, 2 layers": (_waste(16384, 32768, "50.0"), False),
        "KV group 1: window of 64 tokens, 1 layer": (_waste(8192, 32768, "75.0"), False),
        "KV group 2: chunks of 128 tokens, 2 layers": (_waste(32768, 32768, "0.0"), True),
        "KV group 3: state, 1 layer": (_waste(10496, 32768, "68.0"), False),
    }
    advice = findings["KV group 3: state, 1 layer"]["advice"]
    assert advice == "each place has room for a block of KV group 2, the largest"


def _waste(block_bytes: int, place_bytes: int, percent: str) -> str:
    return f"a block has {block_bytes:,} bytes and takes {place_bytes:,}: {percent} % wasted"


def test_the_doctor_says_when_blocks_are_smaller_than_a_page() -> None:
    """A model with one group wastes only what its block leaves of its last page."""
    one, two = (ModelConfig(**{**BASE, "num_layers": layers}) for layers in (1, 64))
    (small,) = kv_groups(one, 16)
    assert (small.good, small.found) == (False, _waste(1024, 4096, "75.0"))
    assert small.advice.endswith("set tokens_per_block higher")
    (large,) = kv_groups(two, 16)
    assert (large.good, large.advice) == (True, "")


@pytest.mark.parametrize("text", ["[]", "{", '{"num_layers": 0}', '{"layers": 1}'])
def test_the_doctor_refuses_a_wrong_model_by_name(tmp_path: Path, text: str) -> None:
    """A file that is no model is an error that names what is wrong with it."""
    path = tmp_path / "model.json"
    path.write_text(text)
    failed = RUNNER.invoke(commands, ["doctor", "--model", str(path), "--json"])
    assert isinstance(failed.exception, ConfigError)


# -- keys of today's models -----------------------------------------------------------------------


def test_facts_of_models_with_one_group_are_what_they_were() -> None:
    """Keys are derived from the text of the groups, which new fields do not change unless set."""
    group = LayerGroup(num_layers=1, num_kv_heads=2, head_size=8, dtype="bf16", layer_indices=(0,))
    text = (
        "LayerGroup(num_layers=1, num_kv_heads=2, head_size=8, layer_indices=(0,), "
        "dtype='bfloat16', compress_ratio=1)"
    )
    assert repr(group) == text
    (space,) = ModelConfig(**{**BASE, "num_layers": 1}, layer_groups=[group]).spaces(16)
    assert dict(space.facts) == {
        "model_id": "", "num_layers": 1, "num_kv_heads": 2, "head_size": 8, "kv_dim": 2,
        "dtype": "float16", "tokens_per_block": 16, "layer_groups": f"({text},)",
    }  # fmt: skip
    assert "kind='state', state_bytes=64, kv_group=1" in repr(
        LayerGroup(num_layers=1, kind="state", state_bytes=64, kv_group=1)
    )
