"""When FlexKV itself, not vLLM, makes prompts that load leave each other enough blocks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from flexkv.integration.vllm.room import Pool
from flexkv.integration.vllm.setup import _pool

SHAPE: dict[str, Any] = {
    "block_size": 16, "num_kv_heads": 2, "head_size": 8, "dtype": torch.float16,
}  # fmt: skip
FULL = FullAttentionSpec(**SHAPE)
WINDOW = SlidingWindowSpec(**SHAPE, sliding_window=48)
CHUNKED = ChunkedLocalAttentionSpec(**SHAPE, attention_chunk_size=64)
STATE = MambaSpec(block_size=16, shapes=((4,),), dtypes=(torch.float16,), mamba_cache_mode="align")
MIXED = UniformTypeKVCacheSpecs(
    block_size=16, kv_cache_specs={"a": FULL, "b": FullAttentionSpec(**{**SHAPE, "head_size": 4})}
)


def pool(*specs: Any, **more: Any) -> Pool | None:
    """Return the pool of an engine with 100 blocks, 1024 tokens at most and 128 in a step."""
    config = SimpleNamespace(
        cache_config=SimpleNamespace(
            block_size=16, num_gpu_blocks=100, mamba_cache_mode="align",
            enable_prefix_caching=True,
        ),
        model_config=SimpleNamespace(max_model_len=1024),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1
        ),
        scheduler_config=SimpleNamespace(
            policy=more.get("policy", "fcfs"),
            scheduler_reserve_full_isl=more.get("reserves", True),
        ),
        max_in_flight_tokens=128,
        speculative_config=more.get("drafts"),
    )  # fmt: skip
    groups = [KVCacheGroupSpec([f"layer {at}"], spec) for at, spec in enumerate(specs)]
    caches = SimpleNamespace(num_blocks=100, kv_cache_groups=groups) if groups else None
    return _pool(config, caches)


@pytest.mark.parametrize("specs", [(), (FULL,), (FULL, FULL), (MIXED,)])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_plain_models_are_left_to_vllm(specs: tuple[Any, ...], policy: str) -> None:
    """vLLM counts correctly if each group keeps all blocks of a prompt."""
    assert pool(*specs, policy=policy) is None


@pytest.mark.parametrize(("spec", "most"), [(WINDOW, 12), (CHUNKED, 12), (STATE, 2)])
def test_groups_that_give_blocks_back(spec: Any, most: int) -> None:
    """A request holds at most the blocks for which vLLM plans the device's memory."""
    assert pool(spec, FULL) == Pool(99, ((16, most), (16, 64)), 0)


@pytest.mark.parametrize("specs", [(), (FULL,), (MIXED,)])
def test_versions_without_the_rule(monkeypatch: pytest.MonkeyPatch, specs: tuple[Any, ...]) -> None:
    """Versions of vLLM that take any load need FlexKV's rule, even if they report no KV caches."""
    monkeypatch.delattr(Scheduler, "_inflight_prefill_reserved_blocks")
    assert pool(*specs) == Pool(99, ((16, 64),), 0)


def test_priorities_without_the_check_of_whole_prompts() -> None:
    """FlexKV's rule is needed if any load may come first and need not fit whole."""
    assert pool(FULL, policy="priority", reserves=False) is not None
    assert pool(FULL, policy="fcfs", reserves=False) is None


def test_drafts_need_more_tokens() -> None:
    """A request with drafts has blocks for them, too."""
    drafts = SimpleNamespace(num_speculative_tokens=3)
    assert pool(WINDOW, FULL, drafts=drafts) == Pool(99, ((16, 12), (16, 64)), 7)
