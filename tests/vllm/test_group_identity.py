"""Tests that a model's name covers its drafts and the layers of its KV groups."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from flexkv.integration.vllm.setup import setup_of

from .caches import chunked, full, group, state, window


@pytest.fixture
def config(configured: Any) -> Any:
    """Return a configuration that a test may change."""
    return copy.deepcopy(configured)


def with_drafts(config: Any, where: Path, **more: Any) -> Any:
    """Return a configuration whose drafts are made by a model of their own."""
    config = copy.deepcopy(config)
    draft = copy.deepcopy(config.model_config)
    draft.model = str(where)
    facts = {"num_speculative_tokens": 3, "method": "draft_model", **more}
    config.speculative_config = SimpleNamespace(
        draft_model_config=draft, draft_load_config=None, **facts
    )
    return config


def grouped(config: Any, *groups: Any) -> str:
    """Return the name of a model with these KV groups."""
    caches = SimpleNamespace(kv_cache_groups=groups)
    return setup_of(config, kv_cache_config=caches).model.model_id


def test_a_draft_model_with_kv_belongs_to_the_name(config: Any, tmp_path: Path) -> None:
    """Its weights and method count; drafts without KV do not change the target's name."""
    layers = group(full(), "target", "draft")
    first = Path(shutil.copytree(config.model_config.model, tmp_path / "draft"))
    drafted = with_drafts(config, first)
    names = {grouped(config, layers), grouped(drafted, layers)}
    names.add(grouped(with_drafts(config, first, method="eagle"), layers))
    names.add(grouped(with_drafts(config, first, num_speculative_tokens=4), layers))
    weights = next(first.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    names.add(grouped(drafted, layers))
    assert len(names) == 5
    assert grouped(with_drafts(config, first, method="ngram"), layers) == grouped(config, layers)
    assert grouped(with_drafts(config, first, model="a name"), layers) == grouped(drafted, layers)


def test_which_layers_a_group_has_belongs_to_the_name(config: Any) -> None:
    """Groups of the same shapes with other layers share nothing, and neither do other kinds."""
    names = {
        grouped(config, group(full(), "a"), group(window(), "b")),
        grouped(config, group(full(), "b"), group(window(), "a")),
    }
    assert len(names) == 2
    models = [
        setup_of(config, kv_cache_config=SimpleNamespace(kv_cache_groups=groups)).model
        for groups in (
            [group(full(), "a"), group(window(), "b")],
            [group(full(), "a"), group(window(48), "b")],
            [group(full(), "a"), group(chunked(), "b")],
            [group(full(), "a"), group(full(), "b")],
        )
    ]
    facts = {repr(each.spaces(16)[0].facts) for each in models}
    assert len(facts) == 4


def test_what_a_state_is_belongs_to_the_name(config: Any) -> None:
    """States of as many bytes share nothing if their kinds, shapes, dtypes or arithmetic differ."""
    half, bfloat = torch.float16, torch.bfloat16
    states = [
        state(dtypes=(half, half)),
        state(dtypes=(bfloat, bfloat)),
        state(dtypes=(half, bfloat)),
        state(dtypes=(half, half), shapes=((5, 3), (2, 4, 4))),
        state(dtypes=(half, half), shapes=((3, 5), (4, 2, 4))),
        state(dtypes=(half, half), mamba_type=MambaAttentionBackendEnum.GDN_ATTN),
    ]
    names = {grouped(config, group(full(), "a"), group(each, "b")) for each in states}
    assert len(names) == len(states)
    whole = grouped(config, group(full(), "a"), group(states[0], "b"))
    for owner, field, value in (
        ("cache_config", "mamba_cache_dtype", "float16"),
        ("cache_config", "mamba_ssm_cache_dtype", "float16"),
        ("mamba_config", "enable_stochastic_rounding", True),
    ):
        other = copy.deepcopy(config)
        setattr(getattr(other, owner), field, value)
        assert grouped(other, group(full(), "a"), group(states[0], "b")) != whole, field


def test_a_plain_model_has_the_name_it_had(config: Any) -> None:
    """Its blocks of earlier runs are found again, whether or not vLLM tells its KV groups."""
    plain = setup_of(config).model
    spec = full(
        block_size=config.cache_config.block_size, num_kv_heads=plain.num_kv_heads,
        head_size=plain.head_size,
    )  # fmt: skip
    layers = [f"layer {number}" for number in range(plain.num_layers)]
    caches = SimpleNamespace(kv_cache_groups=[group(spec, *layers)])
    assert setup_of(config, kv_cache_config=caches).model == plain
