"""KV caches of several groups, planned and allocated by vLLM's own code, without a model."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.core.kv_cache_utils import generate_scheduler_kv_cache_config
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    CircularBufferSpec,
    FullAttentionSpec,
    KVCacheGroupSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowMLASpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

from flexkv.integration.vllm.groups import EngineGroups
from flexkv.integration.vllm.tensors import tensors_of

try:  # vLLM 0.33
    from vllm.v1.core.kv_cache_planning import get_kv_cache_config_from_groups
except ImportError:
    from vllm.v1.core.kv_cache_utils import get_kv_cache_config_from_groups

SHAPE: dict[str, Any] = {
    "block_size": 16, "num_kv_heads": 2, "head_size": 8, "dtype": torch.float32,
}  # fmt: skip
PAGE = 16 * 2 * 16 * 4
"""Bytes of a block of one layer of this shape."""


def full(**more: Any) -> FullAttentionSpec:
    """Return the spec of a layer with full attention."""
    return FullAttentionSpec(**{**SHAPE, **more})


def window(tokens: int = 32, **more: Any) -> SlidingWindowSpec:
    """Return the spec of a layer with a sliding window."""
    return SlidingWindowSpec(**{**SHAPE, **more}, sliding_window=tokens)


def chunked(tokens: int = 64, **more: Any) -> ChunkedLocalAttentionSpec:
    """Return the spec of a layer with chunked local attention."""
    return ChunkedLocalAttentionSpec(**{**SHAPE, **more}, attention_chunk_size=tokens)


def state(mode: str = "align", **more: Any) -> MambaSpec:
    """Return the spec of a layer with a state, whose page is padded to that of attention."""
    return MambaSpec(**{
        "block_size": 16, "shapes": ((3, 5), (2, 4, 4)), "dtypes": (torch.float32, torch.float32),
        "page_size_padded": PAGE, "mamba_cache_mode": mode, **more,
    })  # fmt: skip


def mla(size: int = 16, **more: Any) -> MLAAttentionSpec:
    """Return the spec of a layer with MLA."""
    told = {**SHAPE, "num_kv_heads": 1, "head_size": size, "max_tp_shards": 1, **more}
    return MLAAttentionSpec(**told)


def ring(**more: Any) -> CircularBufferSpec:
    """Return the spec of a layer that keeps the tokens of one compressed state."""
    return CircularBufferSpec(**{**SHAPE, "block_size": 8, **more})


def replayed(tokens: int = 32, **more: Any) -> SlidingWindowMLASpec:
    """Return the spec of a layer with a window that vLLM computes again after each hit."""
    shape = {**SHAPE, "num_kv_heads": 1, **more}
    return SlidingWindowMLASpec(**shape, sliding_window=tokens, bounded_replay=True)


def several(**specs: Any) -> UniformTypeKVCacheSpecs:
    """Return the spec of a group whose layers differ in shape, by layer."""
    first = next(iter(specs.values()))
    return UniformTypeKVCacheSpecs(block_size=first.block_size, kv_cache_specs=specs)


def group(spec: Any, *layers: str, **more: Any) -> KVCacheGroupSpec:
    """Return a KV group of layers."""
    return KVCacheGroupSpec(list(layers), spec, **more)


def planned(
    config: Any, *groups: KVCacheGroupSpec, num_blocks: int = 8, layout: str = "LBHNC"
) -> Any:
    """Return the `KVCacheConfig` of a worker, placed as vLLM places it."""
    config = copy.copy(config)
    config.cache_config = copy.copy(config.cache_config)
    config.cache_config.kv_cache_layout = layout
    config.cache_config.num_gpu_blocks_override = num_blocks
    found = get_kv_cache_config_from_groups(config, list(groups), 1 << 26)
    found.kv_cache_layout = layout
    return found


def of_scheduler(worker: Any) -> Any:
    """Return what the scheduler's side gets of a worker's `KVCacheConfig`."""
    return generate_scheduler_kv_cache_config([worker])


def allocated(worker: Any, *kernel_tokens: int) -> dict[str, torch.Tensor]:
    """Return the KV tensors, by layer, all in one allocation.

    `kernel_tokens` are those of the attention backends' blocks in each group, if not vLLM's own.
    """
    layout, device = KVCacheLayout[worker.kv_cache_layout], torch.device("cpu")
    sizes = list(kernel_tokens) or None
    found: dict[str, torch.Tensor] = allocate_kv_cache(worker, device, layout, sizes)
    return found


def lent(found: EngineGroups, kv_caches: dict[str, Any], use_mla: bool = False) -> dict[str, Any]:
    """Return the KV tensors that a worker with all heads of these groups lends."""
    model = found.model(1, use_mla, "m")
    return dict(tensors_of(kv_caches, model, found.tokens_per_block, found))


def engine(tp: int = 1, heads: int = 2, use_mla: bool = False, drafts: Any = None) -> Any:
    """Return what is used of vLLM's configuration."""
    model = SimpleNamespace(use_mla=use_mla, get_total_num_kv_heads=lambda: heads)
    return SimpleNamespace(
        model_config=model, parallel_config=SimpleNamespace(tensor_parallel_size=tp),
        speculative_config=drafts,
    )  # fmt: skip
