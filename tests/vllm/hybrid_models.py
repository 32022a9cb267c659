"""The small models whose KV groups matter: how vLLM runs them here, and the groups it makes."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from flexkv._ext import needed
from flexkv.common.space import Kind
from flexkv.testing.tiny_hybrids import RECIPES, make_tiny_hybrid

from .conversations import Sizes

BLOCK_BY_BLOCK = {"max_num_seqs": 1, "max_num_batched_tokens": 96}
"""In bf16 a token's numbers depend on which tokens are computed with it, and so do those of all
tokens behind it. Where a step computes one block of one prompt, these are the same tokens wherever
a hit has ended, so that answers can be compared."""
CHUNKED = {"VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE": "1"}


class Group(NamedTuple):
    """One of vLLM's KV cache groups."""

    kind: str
    """The name of its specification, without "Spec"."""
    block_tokens: int
    page_bytes: int
    """Bytes of one block of one layer."""
    layers: tuple[int, ...]
    window: int = 0
    """Tokens of the window or of a chunk."""


KINDS = {
    "FullAttention": Kind.FULL, "MLAAttention": Kind.FULL, "SlidingWindow": Kind.WINDOW,
    "ChunkedLocalAttention": Kind.CHUNK, "Mamba": Kind.STATE,
}  # fmt: skip


class Hybrid(NamedTuple):
    """How a model runs."""

    groups: tuple[Group, ...]
    engine: Mapping[str, Any] = MappingProxyType({})
    """Arguments of vLLM's `LLM`."""
    environment: Mapping[str, str] = MappingProxyType({})
    blocks: int = 128
    """Blocks of a device cache that is too small for all conversations."""
    host_share: int = 3
    """The host tier has room for one in this many of the blocks that can be hit."""
    keeps: bool = True
    """Whether such a device cache keeps what it has room for: of windows alone, that is enough for
    all conversations."""
    answer_tokens: int = 12
    needs: str = ""
    """What the CPU must have, as in /proc/cpuinfo."""


HYBRIDS = {
    "gemma3": Hybrid((
        Group("SlidingWindow", 32, 16384, (0, 3), 64),
        Group("SlidingWindow", 32, 16384, (1, 4), 64),
        Group("FullAttention", 32, 16384, (2, 5)),
    ), blocks=160),
    "gemma4": Hybrid((
        Group("SlidingWindow", 32, 16384, (0, 3), 64),
        Group("SlidingWindow", 32, 16384, (1, 4), 64),
        Group("FullAttention", 64, 16384, (2, 5)),
    ), blocks=96, host_share=6),
    "gpt_oss": Hybrid((
        Group("SlidingWindow", 32, 16384, (0, 2), 64),
        Group("FullAttention", 32, 16384, (1, 3)),
    )),
    "llama4": Hybrid((
        Group("ChunkedLocalAttention", 32, 16384, (0,), 128),
        Group("ChunkedLocalAttention", 32, 16384, (1,), 128),
        Group("ChunkedLocalAttention", 32, 16384, (2,), 128),
        Group("FullAttention", 32, 16384, (3,)),
    ), environment=CHUNKED),
    "qwen3_next": Hybrid((
        Group("Mamba", 96, 98304, (0,)),
        Group("Mamba", 96, 98304, (1,)),
        Group("Mamba", 96, 98304, (2,)),
        Group("FullAttention", 96, 98304, (3,)),
    ), {**BLOCK_BY_BLOCK, "mamba_ssm_cache_dtype": "float32"}, blocks=40, answer_tokens=6),
    "nemotron_h": Hybrid((
        Group("Mamba", 32, 16384, (0, 2)),
        Group("FullAttention", 32, 16384, (1, 3)),
    )),
    "mistral": Hybrid((
        Group("SlidingWindow", 32, 16384, (0, 1, 2, 3), 64),
    ), keeps=False, host_share=6),
    "deepseek_v3": Hybrid((
        Group("MLAAttention", 32, 36864, (0, 1, 2, 3)),
    ), {"max_num_seqs": 1}, needs="amx_tile"),
}  # fmt: skip


def engine_of(name: str) -> dict[str, Any]:
    """Return the arguments of vLLM's `LLM` for a model."""
    return {
        "dtype": RECIPES[name].dtype, "max_num_batched_tokens": 256, "enable_prefix_caching": True,
        **HYBRIDS[name].engine,
    }  # fmt: skip


def why_not(name: str) -> str:
    """Return why this machine cannot run a model; "" if it can."""
    needs = HYBRIDS[name].needs
    has = needs in Path("/proc/cpuinfo").read_text().split() if needs else True
    return "" if has else f"vLLM caches no prefixes of {name} on a CPU without {needs}"


def patch_vllm() -> None:
    """Work around a fault of vLLM 0.32's: it needs a GPU to cache prefixes of mamba2 layers.

    The CPU's scan of chunks returns no states within a prompt, and vLLM looks for them. Without
    this patch every prompt of more than two blocks ends the engine, whatever the connector.
    """
    from vllm.model_executor.layers.mamba.abstract import MambaBase
    from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2

    MambaMixer2.get_kv_cache_spec = MambaBase.get_kv_cache_spec


def make(folder: str) -> Generator[str, Any, None]:
    """Write every model into a folder of its name. To be run in a process with vLLM's venv."""
    for name in RECIPES:
        make_tiny_hybrid(name, Path(folder) / name)
    yield "made"


def groups_of(kv_cache_config: Any) -> list[Group]:
    """Return the groups that vLLM has made."""
    return [
        Group(
            type(group.kv_cache_spec).__name__.removesuffix("Spec"),
            group.kv_cache_spec.block_size,
            group.kv_cache_spec.page_size_bytes,
            tuple(int(name.split(".")[2]) for name in group.layer_names),
            window_of(group.kv_cache_spec),
        )
        for group in kv_cache_config.kv_cache_groups
    ]


def window_of(spec: Any) -> int:
    """Return the tokens of a group's window or chunk, or 0."""
    told = getattr(spec, "sliding_window", None) or getattr(spec, "attention_chunk_size", None)
    return told or 0


def reachable_blocks(name: str, sizes: Sizes) -> int:
    """Return how many blocks of all groups some prompt of the conversations can hit.

    Its prefixes end where the prompt itself may be hit, or where its answer ends; a state is
    offered at the first of these only. Without full attention a hit needs all blocks of the window,
    though it does not load them all.
    """
    groups = list(HYBRIDS[name].groups)
    if all(KINDS[group.kind] is not Kind.FULL for group in groups):
        groups[0] = groups[0]._replace(kind="FullAttention", window=0)
    alignment = max(group.block_tokens for group in groups)
    found = set[tuple[int, int]]()
    for turn in range(sizes.turns):
        prompt = sizes.first_tokens + turn * (sizes.turn_tokens + sizes.answer_tokens)
        for tokens in (prompt - 1, prompt + sizes.answer_tokens - 1):
            for number, (kind, block_tokens, _, _, window) in enumerate(groups):
                if KINDS[kind] is Kind.STATE and tokens >= prompt:
                    continue
                end = tokens // alignment * alignment
                first, last = needed(KINDS[kind], window, block_tokens, end)
                found |= {(number, block) for block in range(first, last)}
    return sizes.conversations * len(found)
