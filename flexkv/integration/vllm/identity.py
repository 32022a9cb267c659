"""Names the model that an engine serves, and the way it computes: KV is kept under this name.

The name covers everything that changes the KV of given tokens: the loaded weights, and every option
with which vLLM computes. Options that are unknown here count, so a new option of vLLM costs a warm
cache and never a wrong answer. Tokenizers do not count, since keys are made of tokens.

Weights that cannot be looked at (in an object store, from another process, or exchanged while the
engine runs) get a name that is valid for the life of the engine, unless the user names them by
`weights_id` in vLLM's `kv_connector_extra_config`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from flexkv.integration.vllm.files import facts_of, hub_name_of, snapshot_of
from flexkv.integration.vllm.refusals import DRAFTS_WITHOUT_KV
from flexkv.observe.logs import get_logger

log = get_logger(__name__)

WEIGHTS_ID = "weights_id"
"""Key of `kv_connector_extra_config`: the user's own name for the weights."""

MODEL_BESIDE = frozenset({
    "hf_config", "hf_text_config", "model", "model_weights", "revision", "multimodal_config",
    "tokenizer", "tokenizer_mode", "tokenizer_revision", "skip_tokenizer_init", "seed",
    "allowed_local_media_path", "allowed_media_domains", "max_model_len", "hf_token",
    "spec_target_max_model_len", "enforce_eager", "return_sampling_mask", "max_logprobs",
    "logprobs_mode", "use_fp64_gumbel", "enable_trace_replay", "disable_cascade_attn",
    "enable_prompt_embeds", "served_model_name", "generation_config",
    "override_generation_config", "enable_sleep_mode", "sleep_preserve_parameter_names",
    "sleep_mode_backend", "sleep_mode_offload_cudagraph", "enable_nccl_comm_suspend",
    "enable_cumem_allocator", "logits_processors", "io_processor_plugin", "renderer_num_workers",
    "allow_deprecated_quantization", "config_format", "max_seq_len_to_capture", "pooler_config",
})  # fmt: skip
"""Fields of `ModelConfig` that change no KV, or are covered elsewhere in this file."""
LOAD_BESIDE = frozenset({
    "download_dir", "safetensors_prefetch_num_threads", "safetensors_prefetch_block_size",
    "device", "use_tqdm_on_load", "pt_load_map_location",
})  # fmt: skip
MEDIA_BESIDE = frozenset({
    "limit_per_prompt", "mm_processor_cache_gb", "mm_processor_cache_type",
    "mm_shm_cache_max_object_size_mb", "mm_encoder_tp_mode", "skip_mm_profiling",
    "mm_tensor_ipc", "mm_ipc_gpu_memory_gb", "mm_encoder_fp8_scale_save_path",
    "mm_encoder_fp8_scale_save_margin", "interleave_mm_strings",
})  # fmt: skip
CACHE_OF_KV = (
    "cache_dtype", "calculate_kv_scales", "kv_cache_dtype_skip_layers", "sliding_window",
    "kv_sharing_fast_prefill", "swa_bounded_replay", "indexer_kv_dtype", "mamba_cache_dtype",
    "mamba_ssm_cache_dtype",
)  # fmt: skip
"""Fields of `CacheConfig` that count; the other ones say how much is kept, and where."""
ATTENTION_BESIDE = frozenset({
    "device_buffer_size", "eager_host_mirror", "flash_attn_max_num_splits_for_cuda_graph",
    "tokenspeed_mla_min_split_kv", "tq_max_kv_splits_for_cuda_graph",
    "sparse_mla_prefill_workspace_factor", "flex_attn_block_m", "flex_attn_block_n",
    "flex_attn_q_block_size", "flex_attn_kv_block_size",
})  # fmt: skip
DRAFTS_BESIDE = frozenset({
    "model", "revision", "enforce_eager", "max_model_len", "tensor_parallel_size",
    "target_model_config", "target_parallel_config", "draft_model_config", "draft_parallel_config",
    "draft_load_config", "disable_padded_drafter_batch", "disable_eagle_block_drop",
    "disable_lookahead_block_hashes",
    "use_local_argmax_reduction", "prompt_lookup_max", "prompt_lookup_min",
    "suffix_decoding_max_tree_depth", "suffix_decoding_max_cached_requests",
    "suffix_decoding_max_spec_factor", "suffix_decoding_min_token_prob",
    "rejection_sample_method", "synthetic_acceptance_rates", "synthetic_acceptance_length",
    "enable_adaptive_verification", "draft_sample_method", "dspark_draft_topk",
})  # fmt: skip
"""Fields of `SpeculativeConfig` that change no KV of drafts, or are covered elsewhere here."""
ROPE_OF_ANY_LENGTH = frozenset({
    "default", "linear", "llama3", "yarn", "mrope", "deepseek_yarn", "proportional",
})  # fmt: skip
"""Kinds of rotary embedding that do not depend on the longest prompt that is served."""

FROM_FILES = frozenset({
    "auto", "hf", "pt", "safetensors", "fastsafetensors", "instanttensor", "npcache", "gguf",
    "bitsandbytes", "mistral", "sharded_state", "runai_streamer", "runai_streamer_sharded",
    "tensorizer",
})  # fmt: skip
"""Load formats whose weights are the files that the configuration names."""
RANDOM = "dummy"

WEIGHT_SUFFIXES = frozenset({
    ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz", ".tensors",
})  # fmt: skip

_OF_RANK = re.compile(r"_dp\d+$")


def model_id(vllm_config: Any, computation: str = "", layout: Sequence[str] = ()) -> str:
    """Return the name of an engine's model and computation: a readable part, then a digest.

    Each call looks at the files of the weights, which have to be on this machine by then.

    Args:
        vllm_config: vLLM's `VllmConfig`.
        computation: what `computation_of` returned before the model was loaded, if it was called.
        layout: the layers in the order of their KV in a block, and what their states are; empty
            for layers of one shape in the usual order.
    """
    name = _name_of(vllm_config.model_config)
    facts = [name, computation or computation_of(vllm_config), _weights(vllm_config)]
    if layout:
        facts.append(list(layout))
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    return f"vllm {name} {digest}"


def weights_are_here(vllm_config: Any) -> bool:
    """Return whether the weights' files are on this machine, if weights are read from files."""
    model, load = vllm_config.model_config, vllm_config.load_config
    if _load_format(load) not in FROM_FILES or "://" in _where(model):
        return True
    try:
        place = _place_of(model, load)
        names = [place.name] if place.is_file() else [name for name, *_ in facts_of(place)]
    except OSError:
        return False
    return any(Path(name).suffix in WEIGHT_SUFFIXES for name in names)


def lora_facts(vllm_config: Any) -> str:
    """Return how an engine applies LoRA adapters, as JSON; empty if it has none."""
    config = getattr(vllm_config, "lora_config", None)
    if config is None:
        return ""
    names = ("lora_dtype", "target_modules", "enable_tower_connector_lora",
             "enable_mixed_moe_lora_format", "enable_moe_shared_loras")  # fmt: skip
    return json.dumps([_plain(getattr(config, name, None)) for name in names])


# -- configuration ------------------------------------------------------------------------------


def computation_of(vllm_config: Any) -> str:
    """Return everything but the weights that determines the KV, as JSON.

    Some models change their configuration while they are loaded, in the worker's process only.
    """
    return json.dumps(_computation(vllm_config), sort_keys=True)


def _computation(vllm_config: Any) -> dict[str, Any]:
    import vllm

    model, cache = vllm_config.model_config, vllm_config.cache_config
    config = _config_of(model)
    return {
        "vllm": getattr(vllm, "__version__", "").split("+")[0],
        "config": config,
        "model": _fields(model, MODEL_BESIDE),
        "cache": {name: _plain(getattr(cache, name, None)) for name in CACHE_OF_KV},
        "load": _fields(vllm_config.load_config, LOAD_BESIDE),
        "media": _fields(getattr(model, "multimodal_config", None), MEDIA_BESIDE),
        "attention": _fields(getattr(vllm_config, "attention_config", None), ATTENTION_BESIDE),
        "states": _fields(getattr(vllm_config, "mamba_config", None), frozenset()),
        "additional": _plain(getattr(vllm_config, "additional_config", None)),
        "device": str(getattr(vllm_config.device_config, "device_type", "")),
        "longest": _longest(model),
        "code": _remote_code(model, config),
        **_drafts(vllm_config),
    }


def _config_of(model: Any) -> Any:
    """Return a model's own configuration, without what says only where it is from."""
    config = _plain(model.hf_config)
    if isinstance(config, dict):
        for name in ("transformers_version", "_name_or_path", "_commit_hash"):
            config.pop(name, None)
    return config


def _drafts(vllm_config: Any) -> dict[str, Any]:
    """Return how drafts are made, if they have KV of their own: it is stored with the model's."""
    told = _told_drafts(vllm_config)
    if told is None:
        return {}
    facts = {"how": _fields(told, DRAFTS_BESIDE)}
    if (model := getattr(told, "draft_model_config", None)) is not None:
        config = _config_of(model)
        facts |= {"config": config, "model": _fields(model, MODEL_BESIDE),
                  "code": _remote_code(model, config)}  # fmt: skip
    return {"drafts": facts}


def _told_drafts(vllm_config: Any) -> Any:
    """Return vLLM's `SpeculativeConfig` if its drafts have KV of their own."""
    told = getattr(vllm_config, "speculative_config", None)
    return None if told is None or told.method in DRAFTS_WITHOUT_KV else told


def _fields(config: Any, beside: frozenset[str]) -> Any:
    """Return the fields of one of vLLM's configurations, without those in `beside`."""
    if config is None:
        return None
    if dataclasses.is_dataclass(config):
        names = [field.name for field in dataclasses.fields(config)]
    else:
        names = [name for name in vars(config) if not name.startswith("_")]
    wanted = sorted(set(names) - beside)
    return {name: _plain(getattr(config, name, None)) for name in wanted}


def _longest(model: Any) -> int | str | None:
    """Return the length of the longest prompt if attention depends on it; else None."""
    kinds = set(_rope_kinds(_plain(model.hf_config)))
    kind_of_model = str(getattr(model.hf_config, "model_type", ""))
    if kinds <= ROPE_OF_ANY_LENGTH and "llama4" not in kind_of_model:  # it tunes its temperature
        return None
    if getattr(model, "original_max_model_len", None) == -1:
        return "auto"  # a later cut for lack of memory does not change the model
    return int(model.max_model_len)


def _remote_code(model: Any, config: Any) -> list[Any]:
    """Return the commits of other repositories whose code the model may run."""
    if not getattr(model, "trust_remote_code", False) or not isinstance(config, dict):
        return []
    texts = _texts(config.get("auto_map") or {})
    found: list[Any] = []
    for repo in sorted({text.partition("--")[0] for text in texts if "--" in text}):
        try:
            snapshot = snapshot_of(repo, getattr(model, "code_revision", None))
            found.append(hub_name_of(snapshot.resolve()))
        except OSError:
            found.append(repo)
    return found


def _rope_kinds(config: Any) -> Iterator[str]:
    """Yield the kinds of rotary embedding that a configuration names, at any depth."""
    if isinstance(config, dict):
        for name, value in config.items():
            if name in ("rope_scaling", "rope_parameters") and isinstance(value, dict):
                for one in (value, *value.values()):
                    if isinstance(one, dict) and (kind := one.get("rope_type") or one.get("type")):
                        yield str(kind)
            yield from _rope_kinds(value)
    elif isinstance(config, list):
        for value in config:
            yield from _rope_kinds(value)


def _plain(value: Any) -> Any:
    """Return a value in types of JSON, the same in every process."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Enum):
        return [type(value).__name__, value.name]
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((_plain(each) for each in value), key=json.dumps)
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return _plain_object(value)


def _plain_object(value: Any) -> Any:
    """Return the content of an object, or else its name; never its address in memory."""
    if isinstance(value, type) or inspect.isroutine(value):
        return f"{value.__module__}.{value.__qualname__}"
    for method in ("to_dict", "model_dump"):
        if hasattr(value, method):
            return _plain(getattr(value, method)())
    if dataclasses.is_dataclass(value):
        return _fields(value, frozenset())
    text = str(value)
    return type(value).__qualname__ if " at 0x" in text else text


# -- weights ------------------------------------------------------------------------------------


def _weights(vllm_config: Any) -> list[Any]:
    """Return facts that identify the weights."""
    model, load, transfer = (
        vllm_config.model_config, vllm_config.load_config, vllm_config.kv_transfer_config
    )  # fmt: skip
    extra = getattr(transfer, "kv_connector_extra_config", None) or {}
    named = str(extra[WEIGHTS_ID]) if WEIGHTS_ID in extra else None
    facts: list[Any] = [named]
    why = ""
    if getattr(vllm_config, "weight_transfer_config", None) is not None:
        why = "weight_transfer_config is set, so they may change at run time"
    try:
        facts.append(_weight_files(model, load))
        drafts = _told_drafts(vllm_config)
        if (draft := getattr(drafts, "draft_model_config", None)) is not None:
            own = getattr(drafts, "draft_load_config", None) or load
            facts.append(["drafts", _weight_files(draft, own)])
        facts += [[str(path), facts_of(path)] for path in _paths_in(vllm_config)]
        if _load_format(load) not in (*FROM_FILES, RANDOM):
            why = f"FlexKV does not know the load format {_load_format(load)}"
    except OSError as error:
        why = str(error)
    engine = ["engine", _OF_RANK.sub("", str(transfer.engine_id))]
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        facts.append(engine)
        why = "calculate_kv_scales is set: each engine measures its own scales"
        log.warning("kv_kept_for_one_engine", reason=why)
    elif why and named is None:
        facts.append(engine)
        remedy = f"set {WEIGHTS_ID} in kv_connector_extra_config"
        log.warning("weights_not_identified", model=model.model, reason=why, remedy=remedy)
    return facts


def _weight_files(model: Any, load: Any) -> list[Any]:
    """Return facts that identify the weights of one model.

    Raises:
        OSError: they are not on this machine.
    """
    if _load_format(load) == RANDOM:
        return ["seed", model.seed]
    place = _place_of(model, load)
    return [hub_name_of(place.resolve()), facts_of(place)]


def _load_format(load: Any) -> str:
    return str(getattr(load.load_format, "value", load.load_format))


def _where(model: Any) -> str:
    return str(getattr(model, "model_weights", "") or model.model)


def _name_of(model: Any) -> str:
    """Return the model's name, even if vLLM has replaced it by a folder."""
    found = hub_name_of(Path(model.model))
    return str(model.model) if found is None else found[0]


def _place_of(model: Any, load: Any) -> Path:
    """Return the file or folder that has the weights.

    Raises:
        OSError: it is not on this machine.
    """
    where = _where(model)
    if "://" in where:
        raise FileNotFoundError(f"{where} is not on this machine")
    place = Path(where).expanduser()
    if place.exists():
        return place
    # The name of a single file follows the repository's, after a slash or a colon.
    repo = "/".join(where.partition(":")[0].split("/")[:2])
    return snapshot_of(repo, model.revision, getattr(load, "download_dir", None))


def _paths_in(vllm_config: Any) -> Iterator[Path]:
    """Yield the files and folders that options of the weights name.

    Raises:
        OSError: an option names something that is not on this machine.
    """
    model, load = vllm_config.model_config, vllm_config.load_config
    options = (
        getattr(load, "model_loader_extra_config", None),
        getattr(model, "quantization_config", None),
        getattr(model, "quantization_param_path", None),
        getattr(vllm_config.cache_config, "quantization_param_path", None),
        getattr(getattr(model, "multimodal_config", None), "mm_encoder_fp8_scale_path", None),
    )
    for text in _texts(_plain(options)):
        if "://" in text:
            raise FileNotFoundError(f"{text} is not on this machine")
        path = Path(text).expanduser()
        if "%0" in path.name:  # a pattern that contains the rank
            path = path.parent
        if text and _exists(path):
            yield path


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # too long for a name
        return False


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)
