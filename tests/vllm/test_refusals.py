"""Tests that what FlexKV does not serve under vLLM is refused by its true name."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import huggingface_hub
from vllm.config import KVTransferConfig, cache
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.engine.arg_utils import EngineArgs

from flexkv.common.errors import ConfigError
from flexkv.integration.vllm.connector import FlexKVConnector
from flexkv.integration.vllm.refusals import check_engine
from flexkv.integration.vllm.vllm_v1_adapter import FlexKVConnectorV1Impl

Change = Callable[[Any], None]
support = pytest.mark.support


def model_is(**facts: bool) -> Change:
    """Return a change of the configuration that gives a model's class these facts."""

    def change(config: Any) -> None:
        model = config.model_config
        model._model_info = dataclasses.replace(model._model_info, **facts)

    return change


def sets(path: str, value: object) -> Change:
    """Return a change that sets a field of the configuration."""

    def change(config: Any) -> None:
        *owners, name = path.split(".")
        for owner in owners:
            config = getattr(config, owner)
        object.__setattr__(config, name, value)

    return change


REFUSED = [
    pytest.param(
        model_is(is_attention_free=True, has_inner_state=True), "model", "attention-free",
        marks=support("model", "attention-free (Mamba)", "refused"),
    ),
    pytest.param(
        model_is(is_hybrid=True, has_inner_state=True), "model", "hybrid",
    ),
    pytest.param(model_is(has_inner_state=True), "model", "state layers"),
    pytest.param(
        sets("model_config.hf_config.layer_types", ["full_attention", "linear_attention"]),
        "layer_types", "linear_attention|only attention",
    ),
    pytest.param(
        sets("model_config.is_encoder_decoder", True), "model", "encoder-decoder",
        marks=support("model", "encoder-decoder (Whisper)", "refused"),
    ),
    pytest.param(
        sets("model_config.is_diffusion", True), "model", "diffusion",
        marks=support("model", "diffusion", "refused"),
    ),
    pytest.param(
        sets("model_config.runner_type", "pooling"), "runner", "pool",
        marks=support("model", "pooling: embeddings, rewards, classifiers", "refused"),
    ),
    pytest.param(
        model_is(has_noops=True), "model", "without attention",
    ),
    pytest.param(
        sets("model_config.hf_text_config.sliding_window", 128), "sliding_window", "forget",
    ),
    pytest.param(
        sets("model_config.attention_chunk_size", 8192), "attention_chunk_size", "chunked",
    ),
    pytest.param(
        sets("model_config.hf_text_config.index_topk", 64), "index_topk", "indexer",
    ),
    pytest.param(
        sets("model_config.hf_text_config.num_kv_shared_layers", 2), "num_kv_shared_layers",
        "share",
    ),
    pytest.param(
        sets("cache_config.cache_dtype", "nvfp4"), "kv_cache_dtype", "nvfp4",
        marks=support("cache", "with scales beside the values (`nvfp4`,"
                      " `…_per_token_head`, `fp8_ds_mla`, `turboquant_…`)", "refused"),
    ),
    pytest.param(sets("cache_config.cache_dtype", "fp8_ds_mla"), "kv_cache_dtype", "beside"),
    pytest.param(
        sets("cache_config.kv_cache_dtype_skip_layers", ["0"]), "kv_cache_dtype_skip_layers",
        "different dtypes",
    ),
    pytest.param(
        sets("parallel_config.pipeline_parallel_size", 2), "pipeline_parallel_size", "pipeline",
        marks=support("feature", "pipeline parallelism", "refused"),
    ),
    pytest.param(
        sets("parallel_config.decode_context_parallel_size", 2), "decode_context_parallel_size",
        "context",
        marks=support("feature", "context parallelism (decode, prefill)", "refused"),
    ),
    pytest.param(
        sets("parallel_config.prefill_context_parallel_size", 2), "prefill_context_parallel_size",
        "context",
    ),
    pytest.param(
        sets("parallel_config.nnodes", 2), "nnodes", "several machines",
        marks=support("feature", "one engine on several machines (`--nnodes`)", "refused"),
    ),
    pytest.param(
        sets("speculative_config", SimpleNamespace(method="eagle")), "speculative_config.method",
        "drafts",
    ),
    pytest.param(sets("speculative_config", SimpleNamespace(method="mtp")),
                 "speculative_config.method", "drafts"),
    pytest.param(
        sets("kv_transfer_config.kv_role", "kv_producer"), "kv_role", "kv_both",
        marks=support("feature", "`kv_role` other than `kv_both`", "refused"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "field", "words"), REFUSED)
def test_what_is_not_served_is_refused_by_its_true_name(
    configured: Any, change: Change, field: str, words: str
) -> None:
    """Both connectors refuse it in either role, before they launch or connect to a server."""
    config = copy.deepcopy(configured)
    change(config)
    for role in KVConnectorRole:
        for connector in (FlexKVConnectorV1Impl, FlexKVConnector):
            with pytest.raises(ConfigError, match=words) as caught:
                connector(config, role)
            assert caught.value.field == field


def test_a_plain_model_is_not_refused(configured: Any) -> None:
    """A plain model, one with drafts without KV cache and one with an unused window are served."""
    check_engine(configured)
    config = copy.deepcopy(configured)
    config.speculative_config = SimpleNamespace(method="ngram")
    config.model_config.hf_text_config.sliding_window = 128
    config.model_config.hf_text_config.use_sliding_window = False
    config.model_config.hf_config.layer_types = ["full_attention", "sliding_attention"]
    check_engine(config)


OF_CACHES = [case for case in REFUSED if case.values[1] in (
    "layer_types", "sliding_window", "attention_chunk_size", "index_topk", "num_kv_shared_layers",
    "kv_cache_dtype_skip_layers", "speculative_config.method",
) or case.values[2] in ("hybrid", "state layers", "without attention", "beside")]  # fmt: skip


@support(
    "feature",
    "models with several KV groups, and drafts with KV, behind the built-in shim",
    "refused",
    "FlexKV's own connector knows the KV caches",
)
@pytest.mark.parametrize(("change", "field", "words"), OF_CACHES)
def test_known_kv_caches_are_judged_instead_of_the_model(
    configured: Any, change: Change, field: str, words: str
) -> None:
    """The shim, which does not know them, refuses the model and names the connector that does."""
    config = copy.deepcopy(configured)
    change(config)
    with pytest.raises(ConfigError, match=r"FlexKV's own may serve it.*module_path"):
        check_engine(config)
    check_engine(config, knows_caches=True)


@support("cache", "types that a platform has registered", "refused")
def test_a_dtype_that_a_platform_has_registered_is_refused(
    configured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM 0.33 lets a platform say what a dtype is, even one whose name FlexKV knows."""
    config = copy.deepcopy(configured)
    sets("cache_config.cache_dtype", "int8")(config)
    check_engine(config)
    handler_of = {"int8": object()}.get
    monkeypatch.setattr(cache, "get_kv_cache_dtype_handler", handler_of, raising=False)
    check_engine(configured)
    with pytest.raises(ConfigError, match="the platform has registered it"):
        check_engine(config, knows_caches=True)


def test_what_is_refused_of_any_kv_caches_has_no_other_door(configured: Any) -> None:
    """An error does not send users to a connector that refuses them, too."""
    config = copy.deepcopy(configured)
    sets("parallel_config.pipeline_parallel_size", 2)(config)
    for knows_caches in (False, True):
        with pytest.raises(ConfigError) as caught:
            check_engine(config, knows_caches)
        assert "kv_connector_module_path" not in str(caught.value)


def test_a_real_configuration_without_attention_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real configuration of a model without attention is refused as attention-free."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    facts = {
        "architectures": ["MambaForCausalLM"], "model_type": "mamba", "hidden_size": 64,
        "num_hidden_layers": 2, "state_size": 16, "vocab_size": 256, "conv_kernel": 4, "expand": 2,
        "time_step_rank": 4, "torch_dtype": "float32", "intermediate_size": 128,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(facts))
    arguments = EngineArgs(model=str(tmp_path), skip_tokenizer_init=True, enforce_eager=True)
    arguments.kv_transfer_config = KVTransferConfig(
        kv_connector="FlexKVConnectorV1", kv_role="kv_both"
    )
    with pytest.raises(ConfigError, match="attention-free"):
        check_engine(arguments.create_engine_config())
