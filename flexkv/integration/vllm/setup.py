"""What FlexKV has to know of a vLLM engine: its model, its block size, which instance it is."""

from __future__ import annotations

from typing import Any, NamedTuple

from flexkv.common.config import CacheConfig, ModelConfig, Settings
from flexkv.common.errors import ConfigError
from flexkv.integration.vllm.identity import lora_facts, model_id
from flexkv.logs import get_logger
from flexkv.settings import load_settings

log = get_logger(__name__)


INSTANCE_SHIFT = 16
DRAFTS_WITHOUT_KV = ("ngram", "ngram_gpu", "suffix")


class Setup(NamedTuple):
    """An engine, in FlexKV's terms."""

    model: ModelConfig
    settings: Settings
    instance: int
    launches: bool
    """Whether this instance's scheduler launches the server."""
    gates_loads: bool = False
    """Whether loads wait until the workers have done the step under way."""
    tells_events: bool = False
    """Whether KV events are wanted."""
    names_media: bool = True
    """Whether vLLM names images and sounds by their content."""
    lora: str = ""
    """How LoRA adapters are applied, as JSON."""

    @property
    def cache(self) -> CacheConfig:
        """Return the cache's own keys, with vLLM's block size."""
        return self.settings.cache_config


def setup_of(vllm_config: Any, computation: str = "") -> Setup:
    """Read an engine's configuration, and FlexKV's own (FLEXKV_CONFIG_PATH, environment).

    Args:
        vllm_config: vLLM's `VllmConfig`.
        computation: as for `identity.model_id`.

    Raises:
        ConfigError: FlexKV cannot serve such an engine; the error says why.
    """
    settings = load_settings()
    parallel = vllm_config.parallel_config
    _check(vllm_config)
    cache = _with_block_size(settings.cache_config, int(vllm_config.cache_config.block_size))
    dp_rank = int(getattr(parallel, "data_parallel_index", parallel.data_parallel_rank))
    # vLLM may say of a data-parallel engine that it is alone: ids of different ones never meet.
    instance = settings.instance_id << INSTANCE_SHIFT | dp_rank
    return Setup(
        _model(vllm_config, computation),
        settings.model_copy(update={"cache_config": cache}),
        instance,
        settings.server_launch_mode == "embedded" and instance == 0,
        _gates_loads(vllm_config),
        bool(getattr(vllm_config.kv_events_config, "enable_kv_cache_events", False)),
        _names_media(vllm_config),
        lora_facts(vllm_config),
    )


def _check(vllm_config: Any) -> None:
    """Refuse by name what would give wrong blocks."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    for name, what in (
        ("pipeline_parallel_size", "pipeline parallelism"),
        ("decode_context_parallel_size", "context parallelism"),
        ("prefill_context_parallel_size", "context parallelism"),
    ):
        if getattr(parallel, name, 1) != 1:
            raise ConfigError(name, getattr(parallel, name), f"FlexKV does not serve {what} yet")
    if getattr(model, "is_hybrid", False):
        raise ConfigError("model", model.model, "FlexKV does not serve models with state layers")
    window = model.get_sliding_window()
    uses_it = getattr(model.hf_text_config, "use_sliding_window", True)
    if window is not None and uses_it:
        why = "FlexKV does not serve layers that forget: vLLM's --disable-sliding-window, if it may"
        raise ConfigError("sliding_window", window, why)
    chunk = getattr(model, "attention_chunk_size", None)
    if chunk:
        raise ConfigError("attention_chunk_size", chunk, "FlexKV does not serve chunked attention")
    role = vllm_config.kv_transfer_config.kv_role
    if role != "kv_both":
        raise ConfigError("kv_role", role, "must be kv_both: FlexKV both stores and loads")
    drafts = getattr(vllm_config, "speculative_config", None)
    if drafts is not None and drafts.method not in DRAFTS_WITHOUT_KV:
        why = f"drafts with a KV cache of their own are not served: {', '.join(DRAFTS_WITHOUT_KV)}"
        raise ConfigError("speculative_config.method", drafts.method, why)


def _gates_loads(vllm_config: Any) -> bool:
    """Tell whether loads have to wait for the step that is under way.

    With asynchronous scheduling a freed block may be written by it still. Later vLLMs do not give
    such a block away before; of earlier ones the workers say when the step is done.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    fenced = hasattr(Scheduler, "_drain_deferred_frees")
    return bool(getattr(vllm_config.scheduler_config, "async_scheduling", False)) and not fenced


def _with_block_size(cache: CacheConfig, block_size: int) -> CacheConfig:
    told = cache.tokens_per_block
    if "tokens_per_block" in cache.model_fields_set and told != block_size:
        log.warning("tokens_per_block", configured=told, used=block_size, reason="is vLLM's block")
    return cache.model_copy(update={"tokens_per_block": block_size})


def _names_media(vllm_config: Any) -> bool:
    """Return whether vLLM names images and sounds by their content, or by the user's names.

    Without prefix caching and a cache of processed media, vLLM only numbers them, in each process
    anew. Earlier versions do so even where the user names them.
    """
    media = getattr(vllm_config.model_config, "multimodal_config", None)
    caches = getattr(vllm_config.cache_config, "enable_prefix_caching", True)
    return media is None or bool(caches) or media.mm_processor_cache_gb != 0


def _model(vllm_config: Any, computation: str) -> ModelConfig:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    return ModelConfig(
        num_layers=model.get_num_layers(parallel),
        num_kv_heads=1 if model.use_mla else model.get_total_num_kv_heads(),
        head_size=model.get_head_size(),
        dtype=_dtype(vllm_config),
        use_mla=model.use_mla,
        tp_size=parallel.tensor_parallel_size,
        model_id=model_id(vllm_config, computation),
    )


def _dtype(vllm_config: Any) -> str:
    """Give the element type of the KV cache, which is one byte for all that are quantised."""
    told = vllm_config.cache_config.cache_dtype
    if told == "auto":
        return str(vllm_config.model_config.dtype).removeprefix("torch.")
    if told.startswith("fp8") or told in ("int8", "uint8"):
        return "uint8"
    return str(told)
