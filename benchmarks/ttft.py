"""Time to the first token behind a prefix: loaded from host memory, from SSD, and recomputed.

On a GPU it is an 8B-shaped model of random weights, at 8k, 16k and 32k tokens; without one a small
model on the CPU. The model is Hugging Face's, and its cache is copied to and from pages by the code
of `examples/transformers_prefix_cache.py`.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Figures, Options, median_ratio
from examples.transformers_prefix_cache import TOKENS_PER_BLOCK, Pages, compute, open_model
from flexkv.common.config import CacheConfig
from flexkv.common.terms import Tier
from flexkv.kvmanager import KVManager

SUFFIX = 64
"""Tokens behind the prefix, which are always computed."""


def measure(options: Options) -> Figures:
    """Return the figures of the case."""
    if torch.cuda.is_available():
        model, prefixes = _large(), (8192, 16384, 32768)
    else:
        model, prefixes = open_model(None), (512, 1024, 2048)
    figures: Figures = {}
    for prefix in prefixes[:1] if options.quick else prefixes:
        figures |= asyncio.run(_measure(model, prefix, options))
    return figures


def _large() -> Any:
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=1 << 17,
        dtype=torch.bfloat16,
    )
    with torch.device("cuda"):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


async def _measure(model: Any, prefix: int, options: Options) -> Figures:
    words = torch.randint(0, 2000, (1, prefix + SUFFIX), device=model.device)
    prompt, blocks = words[0, :prefix].cpu(), prefix // TOKENS_PER_BLOCK
    pages = Pages(model, blocks)
    slots = torch.arange(prefix)
    took: dict[str, list[float]] = {"recompute": [], "host": [], "SSD": []}
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        cache = CacheConfig(
            tokens_per_block=TOKENS_PER_BLOCK,
            num_cpu_blocks=2 * blocks + 8,
            num_ssd_blocks=2 * blocks,
            ssd_cache_dir=folder,
        )
        async with KVManager(pages.model, cache) as manager:
            manager.register_kv_caches(pages.layers)
            held = DynamicCache()
            _first_token(model, words[:, :prefix], held)
            pages.from_cache(held, prefix)
            del held
            await manager.put(prompt, slots)
            await manager.flush()

            async def recompute() -> DynamicCache:
                return DynamicCache()

            async def load() -> DynamicCache:
                assert (await manager.get(prompt, slots)).return_mask.all()
                return pages.to_cache(prefix)

            for _ in range(options.repeats + 1):
                took["recompute"].append(await _timed(model, words, 0, recompute))
                took["host"].append(await _timed(model, words, prefix, load))
                manager.clear(Tier.HOST)
                took["SSD"].append(await _timed(model, words, prefix, load))
    alone = took["recompute"][1:]
    figures: Figures = {}
    for name, seconds in took.items():
        figures[f"{prefix} tokens, {name}, ms"] = statistics.median(seconds[1:]) * 1e3
        if name != "recompute":
            figures[f"{prefix} tokens, recompute / {name}"] = median_ratio(alone, seconds[1:])
    return figures


async def _timed(
    model: Any, words: torch.Tensor, prefix: int, cache: Callable[[], Awaitable[DynamicCache]]
) -> float:
    """Return the seconds to the first token of a prompt whose prefix the cache has."""
    begin = time.perf_counter()
    _first_token(model, words[:, prefix:], await cache())
    return time.perf_counter() - begin


@torch.inference_mode()
def _first_token(model: Any, words: torch.Tensor, cache: DynamicCache) -> int:
    logits = compute(model, words, cache, logits_to_keep=1)
    return int(logits[0, -1].argmax())  # waits for the device
