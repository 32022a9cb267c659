"""What FlexKV does not serve under vLLM: an engine that uses any of it does not start.

Blocks of such an engine would be incomplete, have another shape than FlexKV assumes, or depend on
more than the tokens before them, so a load would be wrong. The rules look at vLLM's configuration.
The KV caches themselves are judged by `groups.py`, where the connector knows them. The built-in
shim does not pass them on, so models whose KV caches may be of several kinds are refused there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from flexkv.common.errors import ConfigError

DRAFTS_WITHOUT_KV = ("ngram", "ngram_gpu", "suffix")
DTYPES = ("auto", "float16", "bfloat16", "float32", "half", "float", "fp8", "fp8_e4m3", "fp8_e5m2",
          "fp8_inc", "int8", "uint8")  # fmt: skip
"""`kv_cache_dtype`s whose blocks are plain arrays, with nothing beside them."""
ATTENTION = {"attention", "full_attention", "global_attention", "sliding_attention"}
"""Kinds of layers in models' own configurations; windows are checked by a rule of their own."""
PACKED = ("fp8_ds_mla",)
"""Further `kv_cache_dtype`s whose blocks are plain bytes if the KV caches are known."""
OTHER_DOOR = (
    "vLLM's built-in connector does not say what its KV caches are; FlexKV's own may serve it:"
    ' "kv_connector": "FlexKVConnector",'
    ' "kv_connector_module_path": "flexkv.integration.vllm.connector"'
)
_STATE = "has state layers beside its KV cache"


class Rule(NamedTuple):
    """A feature that is not served.

    Attributes:
        field: a field of vLLM's configuration, by the name that users give it.
        found: returns the offending value; None if there is none.
        why: completes "field=value: …".
        is_of_caches: whether the KV caches, where they are known, are judged instead.
    """

    field: str
    found: Callable[[Any], object]
    why: str
    is_of_caches: bool = False


def _of(owner: str, name: str, usual: object = None) -> Callable[[Any], object]:
    """Return a function that finds a field's value, unless it is false or the usual one."""

    def found(config: Any) -> object:
        value = getattr(getattr(config, owner, None), name, usual)
        return value if value and value != usual else None

    return found


def _model_if(*names: str) -> Callable[[Any], object]:
    """Return a function that finds the model's name if any of these attributes of it is true."""

    def found(config: Any) -> object:
        model = config.model_config
        return model.model if any(getattr(model, name, False) for name in names) else None

    return found


def _text(name: str) -> Callable[[Any], object]:
    """Return a function that finds a value in a model's text configuration; 0 is no value."""

    def found(config: Any) -> object:
        for part in ("hf_text_config", "hf_config"):
            if value := getattr(getattr(config.model_config, part, None), name, None):
                return value
        return None

    return found


def _layers(config: Any) -> object:
    """Return the kinds of layers other than attention in the model's own configuration.

    If vLLM has no code of its own for a model, it has no class to ask about state layers.
    """
    model, kinds = config.model_config, set[str]()
    for part in (getattr(model, "hf_config", None), getattr(model, "hf_text_config", None)):
        for name in ("layer_types", "layers_block_type"):
            told = getattr(part, name, None)
            kinds.update(map(str, told if isinstance(told, list | tuple) else ()))
    return ", ".join(sorted(kinds - ATTENTION)) or None


def _pooling(config: Any) -> object:
    kind = getattr(config.model_config, "runner_type", "generate")
    return kind if kind != "generate" else None


def _window(config: Any) -> object:
    model = config.model_config
    uses_it = getattr(getattr(model, "hf_text_config", None), "use_sliding_window", True)
    window = model.get_sliding_window()
    return window if uses_it else None


def _dtype(config: Any) -> object:
    told = getattr(config.cache_config, "cache_dtype", "auto")
    return told if told not in (*DTYPES, *PACKED) else None


def _custom_dtype(config: Any) -> object:
    """Return the dtype if a platform has registered it: from vLLM 0.33 on, any name can be one."""
    told = getattr(config.cache_config, "cache_dtype", "auto")
    module = sys.modules[type(config.cache_config).__module__]
    handler_of = getattr(module, "get_kv_cache_dtype_handler", None)
    return told if handler_of is not None and handler_of(told) is not None else None


def _packed(config: Any) -> object:
    told = getattr(config.cache_config, "cache_dtype", "auto")
    return told if told in PACKED else None


def _drafts(config: Any) -> object:
    drafts = getattr(config, "speculative_config", None)
    if drafts is None or drafts.method in DRAFTS_WITHOUT_KV:
        return None
    return drafts.method


def _role(config: Any) -> object:
    role = config.kv_transfer_config.kv_role
    return role if role != "kv_both" else None


_CONTEXT = "context parallelism is not served: a rank has only part of each block's tokens"
RULES = (
    Rule("pipeline_parallel_size", _of("parallel_config", "pipeline_parallel_size", 1),
         "pipeline parallelism is not served: a rank has only part of the layers"),
    Rule("decode_context_parallel_size",
         _of("parallel_config", "decode_context_parallel_size", 1), _CONTEXT),
    Rule("prefill_context_parallel_size",
         _of("parallel_config", "prefill_context_parallel_size", 1), _CONTEXT),
    Rule("nnodes", _of("parallel_config", "nnodes_within_dp", 1),
         "engines on several machines are not served: a server serves only its own machine"),
    Rule("model", _model_if("is_attention_free"),
         "is attention-free: it has no KV cache, so there is nothing to keep"),
    Rule("model", _model_if("is_hybrid"), f"is a hybrid model: it {_STATE}", True),
    Rule("model", _model_if("is_encoder_decoder"),
         "is an encoder-decoder model: its cross attention depends on more than the tokens before"),
    Rule("model", _model_if("is_diffusion"),
         "is a diffusion model: its tokens change after their KV is computed"),
    Rule("runner", _pooling,
         "models that pool instead of generating are not served: many attend in both directions"),
    Rule("model", _model_if("has_inner_state"), _STATE, True),
    Rule("model", _model_if("has_noops"),
         "has layers without attention: its layers are not all in the KV cache", True),
    Rule("layer_types", _layers, "only attention layers are served", True),
    Rule("sliding_window", _window,
         "layers that forget older tokens are not served: try vLLM's --disable-sliding-window",
         True),
    Rule("attention_chunk_size", _of("model_config", "attention_chunk_size"),
         "chunked attention is not served: its layers forget older tokens", True),
    Rule("index_topk", _text("index_topk"),
         "sparse attention with an indexer is not served: the indexer has a cache of its own",
         True),
    Rule("num_kv_shared_layers", _text("num_kv_shared_layers"),
         "layers that share a KV cache are not served", True),
    Rule("kv_cache_dtype", _dtype,
         "is not served: such a KV cache has scales or packed values beside its blocks"),
    Rule("kv_cache_dtype", _custom_dtype,
         "is not served: the platform has registered it, and FlexKV does not know what its blocks"
         " hold"),
    Rule("kv_cache_dtype", _packed,
         "is not served: such a KV cache has scales beside its values", True),
    Rule("kv_cache_dtype_skip_layers", _of("cache_config", "kv_cache_dtype_skip_layers"),
         "KV caches whose layers have different dtypes are not served", True),
    Rule("kv_role", _role, "must be kv_both: FlexKV both stores and loads"),
    Rule("speculative_config.method", _drafts,
         f"drafts with a KV cache are not served, only these: {', '.join(DRAFTS_WITHOUT_KV)}",
         True),
)  # fmt: skip
"""Checked in this order, so that an error names the cause, and not a consequence of it."""


def check_engine(vllm_config: Any, knows_caches: bool = False) -> None:
    """Check that FlexKV serves an engine.

    Args:
        vllm_config: vLLM's `VllmConfig`, of any version that is served.
        knows_caches: whether the KV caches are known, and are judged as such by `groups_of`.

    Raises:
        ConfigError: it does not; the error has the field, its value, and why.
    """
    for rule in RULES:
        if rule.is_of_caches and knows_caches:
            continue
        if (value := rule.found(vllm_config)) is not None:
            door = f". {OTHER_DOOR}" if rule.is_of_caches else ""
            raise ConfigError(rule.field, value, f"FlexKV: {rule.why}{door}")
