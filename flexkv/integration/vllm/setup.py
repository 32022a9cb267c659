"""What FlexKV has to know about a vLLM engine: its model, its block size, its instance."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from flexkv.common.config import CacheConfig, ModelConfig, Settings
from flexkv.integration.vllm.extra_config import mixed_local_hits, with_extra
from flexkv.integration.vllm.groups import EngineGroups, groups_of
from flexkv.integration.vllm.identity import lora_facts, model_id
from flexkv.integration.vllm.refusals import check_engine
from flexkv.integration.vllm.room import Pool
from flexkv.observe.logs import get_logger
from flexkv.settings import load_settings

log = get_logger(__name__)


INSTANCE_SHIFT = 16


class Setup(NamedTuple):
    """An engine, in FlexKV's terms."""

    model: ModelConfig
    settings: Settings
    instance: int
    launches: bool
    """Whether this instance's scheduler launches the server."""
    gates_loads: bool = False
    """Whether loads wait until the workers have finished the step under way."""
    tells_events: bool = False
    """Whether KV events are wanted."""
    names_media: bool = True
    """Whether vLLM names images and sounds by their content."""
    lora: str = ""
    """How LoRA adapters are applied, as JSON."""
    loads_by_layer: bool = False
    """Whether a step loads blocks of host memory itself, layer by layer."""
    groups: EngineGroups | None = None
    """The KV groups; None if they are unknown, and then there is one of all layers."""
    pool: Pool | None = None
    """The device's blocks; None if vLLM itself keeps loads from taking too many of them."""

    @property
    def cache(self) -> CacheConfig:
        """Return the settings of the cache, with vLLM's block size."""
        return self.settings.cache_config


def setup_of(vllm_config: Any, computation: str = "", kv_cache_config: Any = None) -> Setup:
    """Return an engine's setup, from its configuration and FlexKV's own.

    FlexKV's own is, in the order of precedence, vLLM's `kv_connector_extra_config`, the file of
    FLEXKV_CONFIG_PATH, and the environment.

    Args:
        vllm_config: vLLM's `VllmConfig`.
        computation: as for `identity.model_id`.
        kv_cache_config: vLLM's `KVCacheConfig`; None if it is unknown.

    Raises:
        ConfigError: FlexKV cannot serve such an engine; the error says why.
    """
    groups = _groups(vllm_config, kv_cache_config)
    settings = with_extra(load_settings(), vllm_config.kv_transfer_config)
    parallel = vllm_config.parallel_config
    size = int(vllm_config.cache_config.block_size) if groups is None else groups.tokens_per_block
    cache = _with_block_size(settings.cache_config, size)
    dp_rank = int(getattr(parallel, "data_parallel_index", parallel.data_parallel_rank))
    # vLLM may call a data-parallel engine a single one, so each instance_id has 2**16 instances.
    instance = settings.instance_id << INSTANCE_SHIFT | dp_rank
    return Setup(
        _model(vllm_config, computation, groups),
        settings.model_copy(update={"cache_config": cache}),
        instance,
        settings.server_launch_mode == "embedded" and instance == 0,
        _gates_loads(vllm_config),
        bool(getattr(vllm_config.kv_events_config, "enable_kv_cache_events", False)),
        _names_media(vllm_config),
        lora_facts(vllm_config),
        groups=groups,
        pool=_pool(vllm_config, kv_cache_config),
    )


def _pool(vllm_config: Any, kv_cache_config: Any) -> Pool | None:
    """Return the blocks of the device; None if vLLM itself keeps loads from taking too many.

    It does so if this version counts the blocks that prompts under way still need. But it counts
    too few if a KV group gives blocks back. And its count does not help if priorities may change
    the order of prompts while it admits prompts that do not fit whole.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    cache, scheduling = vllm_config.cache_config, vllm_config.scheduler_config
    most_tokens = int(vllm_config.model_config.max_model_len)
    specs = [each.kv_cache_spec for each in getattr(kv_cache_config, "kv_cache_groups", ())]
    sizes = [int(spec.block_size) for spec in specs] or [int(cache.block_size)]
    most = [int(spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes) for spec in specs]
    groups = list(zip(sizes, most or [-(-most_tokens // sizes[0])], strict=True))
    reserves = hasattr(Scheduler, "_inflight_prefill_reserved_blocks")
    in_order = getattr(scheduling, "policy", "fcfs") == "fcfs"
    fits_whole = getattr(scheduling, "scheduler_reserve_full_isl", False)
    keeps_all = all(most * size >= most_tokens for size, most in groups)
    if reserves and keeps_all and (in_order or fits_whole):
        return None
    blocks = getattr(kv_cache_config, "num_blocks", 0) or getattr(cache, "num_gpu_blocks", 0) or 0
    drafts = getattr(vllm_config, "speculative_config", None)
    more = 1 + 2 * int(getattr(drafts, "num_speculative_tokens", 0) or 0) if drafts else 0
    return Pool(int(blocks) - 1, tuple(groups), more) if blocks > 1 else None


def _groups(vllm_config: Any, kv_cache_config: Any) -> EngineGroups | None:
    """Check that FlexKV serves an engine, and return its KV groups."""
    is_known = getattr(kv_cache_config, "kv_cache_groups", None) is not None
    check_engine(vllm_config, knows_caches=is_known)
    groups = groups_of(kv_cache_config, vllm_config)
    mixes = mixed_local_hits(vllm_config.kv_transfer_config)
    return groups if groups is None or mixes is None else replace(groups, mixes=mixes)


def _gates_loads(vllm_config: Any) -> bool:
    """Return whether loads have to wait for the step that is under way.

    With asynchronous scheduling, that step may still write to a freed block. Later versions of vLLM
    do not reuse such a block before the step is done; with earlier ones the workers report its end.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    fenced = hasattr(Scheduler, "_drain_deferred_frees")
    return bool(getattr(vllm_config.scheduler_config, "async_scheduling", False)) and not fenced


def _with_block_size(cache: CacheConfig, block_size: int) -> CacheConfig:
    configured = cache.tokens_per_block
    if "tokens_per_block" in cache.model_fields_set and configured != block_size:
        log.warning("tokens_per_block_ignored", configured=configured, used=block_size)
    return cache.model_copy(update={"tokens_per_block": block_size})


def _names_media(vllm_config: Any) -> bool:
    """Return whether vLLM names images and sounds by their content, or by the user's names.

    Without prefix caching and without a cache of processed media, vLLM only numbers them, anew in
    each process. Earlier versions do so even if the user names them.
    """
    media = getattr(vllm_config.model_config, "multimodal_config", None)
    caches = getattr(vllm_config.cache_config, "enable_prefix_caching", True)
    return media is None or bool(caches) or media.mm_processor_cache_gb != 0


def _model(vllm_config: Any, computation: str, groups: EngineGroups | None) -> ModelConfig:
    """Return the model; it has layer groups unless all layers are equal and in one KV group."""
    if groups is None or len(groups.spans) == 1:
        plain = _plain_model(vllm_config, computation)
        if groups is None or groups.fit(plain):
            return plain
    ranks = vllm_config.parallel_config.tensor_parallel_size
    name = model_id(vllm_config, computation, groups.facts)
    return groups.model(ranks, vllm_config.model_config.use_mla, name)


def _plain_model(vllm_config: Any, computation: str) -> ModelConfig:
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
    """Return the element type of the KV cache: `uint8` for all quantised ones."""
    told = vllm_config.cache_config.cache_dtype
    if told == "auto":
        return str(vllm_config.model_config.dtype).removeprefix("torch.")
    if told.startswith("fp8") or told in ("int8", "uint8"):
        return "uint8"
    return str(told)
