"""What FlexKV has to know of a vLLM engine: its model, its block size, which instance it is."""

from __future__ import annotations

from typing import Any, NamedTuple

import structlog

from flexkv.common.config import CacheConfig, ModelConfig, Settings
from flexkv.common.errors import ConfigError
from flexkv.settings import load_settings

log = structlog.get_logger(__name__)


class Setup(NamedTuple):
    """An engine, in FlexKV's terms."""

    model: ModelConfig
    settings: Settings
    instance: int
    launches: bool
    """Whether this instance's scheduler launches the server."""

    @property
    def cache(self) -> CacheConfig:
        """Give the cache's own keys, with vLLM's block size."""
        return self.settings.cache_config


def setup_of(vllm_config: Any) -> Setup:
    """Read an engine's configuration, and FlexKV's own (FLEXKV_CONFIG_PATH, environment).

    Args:
        vllm_config: vLLM's `VllmConfig`.

    Raises:
        ConfigError: FlexKV cannot serve such an engine; the error says why.
    """
    settings = load_settings()
    parallel = vllm_config.parallel_config
    for name, what in (
        ("pipeline_parallel_size", "pipeline parallelism"),
        ("decode_context_parallel_size", "context parallelism"),
        ("prefill_context_parallel_size", "context parallelism"),
    ):
        if getattr(parallel, name, 1) != 1:
            raise ConfigError(name, getattr(parallel, name), f"FlexKV does not serve {what} yet")
    cache = _with_block_size(settings.cache_config, int(vllm_config.cache_config.block_size))
    dp_rank = int(getattr(parallel, "data_parallel_index", parallel.data_parallel_rank))
    instance = settings.instance_id * parallel.data_parallel_size + dp_rank
    return Setup(
        _model(vllm_config),
        settings.model_copy(update={"cache_config": cache}),
        instance,
        settings.server_launch_mode == "embedded" and instance == 0,
    )


def _with_block_size(cache: CacheConfig, block_size: int) -> CacheConfig:
    told = cache.tokens_per_block
    if "tokens_per_block" in cache.model_fields_set and told != block_size:
        log.warning("tokens_per_block", configured=told, used=block_size, reason="is vLLM's block")
    return cache.model_copy(update={"tokens_per_block": block_size})


def _model(vllm_config: Any) -> ModelConfig:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if getattr(model, "is_hybrid", False):
        raise ConfigError("model", model.model, "FlexKV does not serve models with state layers")
    return ModelConfig(
        num_layers=model.get_num_layers(parallel),
        num_kv_heads=1 if model.use_mla else model.get_total_num_kv_heads(),
        head_size=model.get_head_size(),
        dtype=_dtype(vllm_config),
        use_mla=model.use_mla,
        tp_size=parallel.tensor_parallel_size,
        model_id=_model_id(vllm_config),
    )


def _dtype(vllm_config: Any) -> str:
    """Give the element type of the KV cache, which is one byte for all that are quantised."""
    told = vllm_config.cache_config.cache_dtype
    if told == "auto":
        return str(vllm_config.model_config.dtype).removeprefix("torch.")
    if told.startswith("fp8") or told in ("int8", "uint8"):
        return "uint8"
    return str(told)


def _model_id(vllm_config: Any) -> str:
    """Name everything that makes other KV bytes of the same tokens, beside the shape.

    How a backend lays out a block is its own affair, and so is the kind of device: CPU backends
    transpose K.
    """
    model = vllm_config.model_config
    device = getattr(vllm_config.device_config, "device_type", "")
    backend = getattr(getattr(vllm_config, "attention_config", None), "backend", None)
    facts = (
        "vllm", model.model, model.revision or "", model.quantization or "",
        vllm_config.cache_config.cache_dtype, device, getattr(backend, "name", backend) or "",
    )  # fmt: skip
    return "|".join(map(str, facts))
