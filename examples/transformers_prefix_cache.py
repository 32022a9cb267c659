"""A Hugging Face causal LM whose prefixes are kept in FlexKV from request to request.

    pip install flexkv transformers torch
    python examples/transformers_prefix_cache.py                       # random weights
    python examples/transformers_prefix_cache.py --model /path/to/model --ssd /data/flexkv

Each turn of a conversation is a prompt that begins with the one before. It is answered twice: by
computing all of it, and by loading the known prefix from FlexKV and computing the rest. Both must
give the same tokens.

The model's KV cache is one tensor a sequence, whereas an engine keeps pages. So this example has
pages of its own, [2, blocks, tokens, heads, dim] a layer, which FlexKV reads and fills.
"""

from __future__ import annotations

import argparse
import asyncio
import inspect
import time
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from flexkv.common.config import CacheConfig, ModelConfig
from flexkv.kvmanager import KVManager

TOKENS_PER_BLOCK = 16
NEW_TOKENS = 8


class Answer(NamedTuple):
    """The tokens that a model answered, and what the answer took."""

    tokens: list[int]
    first_token_s: float
    loaded_tokens: int
    cache: DynamicCache


def open_model(path: str | None, device: str = "cpu") -> torch.nn.Module:
    """Load a model, or make a small one of random weights."""
    if path is not None:
        return AutoModelForCausalLM.from_pretrained(path).to(device).eval()
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=2000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1 << 15,
    )
    return LlamaForCausalLM(shape).to(device).eval()


def compute(
    model: torch.nn.Module, words: torch.Tensor, cache: DynamicCache, **options: int
) -> torch.Tensor:
    """Return the logits of the words that follow those in the cache, and add them to the cache.

    Later releases of transformers call the argument `cache`, earlier ones `past_key_values`.
    """
    names = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in names else "past_key_values"
    return model(words, **{name: cache}, use_cache=True, **options).logits


class Pages:
    """The pages of one sequence, and their traffic with FlexKV and with the model's own cache."""

    def __init__(self, model: torch.nn.Module, blocks: int) -> None:
        config = model.config
        heads = config.num_key_value_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (2, blocks, TOKENS_PER_BLOCK, heads, dim)
        self.layers = [
            torch.zeros(shape, dtype=model.dtype, device=model.device)
            for _ in range(config.num_hidden_layers)
        ]
        self.model = ModelConfig(
            num_layers=len(self.layers), num_kv_heads=heads, head_size=dim, dtype=model.dtype
        )

    def to_cache(self, tokens: int) -> DynamicCache:
        """Return the first `tokens` tokens as the model's own kind of cache."""
        cache = DynamicCache()
        for number, layer in enumerate(self.layers):
            flat = layer.flatten(1, 2)[:, :tokens].transpose(1, 2)  # [2, heads, tokens, dim]
            cache.update(flat[0:1].clone(), flat[1:2].clone(), number)
        return cache

    def from_cache(self, cache: DynamicCache, tokens: int) -> None:
        """Copy the first `tokens` tokens from the model's cache into the pages."""
        for layer, held in zip(self.layers, cache.layers, strict=True):
            both = torch.cat([held.keys, held.values])[:, :, :tokens].transpose(1, 2)
            layer.flatten(1, 2)[:, :tokens] = both


@torch.inference_mode()
def answer(model: torch.nn.Module, prompt: list[int], cache: DynamicCache, loaded: int) -> Answer:
    """Compute the part of a prompt that the cache lacks, and answer greedily."""
    begin_s = time.perf_counter()
    step = torch.tensor([prompt[loaded:]], device=model.device)
    tokens: list[int] = []
    first_token_s = 0.0
    while len(tokens) < NEW_TOKENS:
        logits = compute(model, step, cache)[0, -1]
        tokens.append(int(logits.argmax()))
        first_token_s = first_token_s or time.perf_counter() - begin_s
        step = torch.tensor([[tokens[-1]]], device=model.device)
    return Answer(tokens, first_token_s, loaded, cache)


async def answer_with(
    manager: KVManager, pages: Pages, model: torch.nn.Module, prompt: list[int]
) -> Answer:
    """Load what FlexKV has of a prompt, compute the rest, and store all whole blocks."""
    begin_s = time.perf_counter()
    slots = torch.arange(len(prompt))
    response = await manager.get(prompt, slots)
    # The last token is always computed, because its logits are needed.
    loaded = min(int(response.return_mask.sum()), len(prompt) - 1)
    cache = pages.to_cache(loaded) if loaded else DynamicCache()
    load_s = time.perf_counter() - begin_s
    found = answer(model, prompt, cache, loaded)
    pages.from_cache(found.cache, len(prompt))
    await manager.put(prompt, slots)
    return found._replace(first_token_s=found.first_token_s + load_s)


def conversation(model: torch.nn.Module, turns: int, tokens: int) -> list[list[int]]:
    """Return the prompts of a conversation, each an extension of the one before."""
    random = torch.Generator().manual_seed(1)
    words = torch.randint(0, model.config.vocab_size, (turns * tokens,), generator=random).tolist()
    return [words[: (turn + 1) * tokens] for turn in range(turns)]


async def main(arguments: argparse.Namespace) -> int:
    """Answer every turn both ways, and return 0 if the answers agree, else 1."""
    model = open_model(arguments.model, arguments.device)
    prompts = conversation(model, arguments.turns, arguments.tokens)
    blocks = -(-len(prompts[-1]) // TOKENS_PER_BLOCK)
    pages = Pages(model, blocks)
    cache = CacheConfig(
        tokens_per_block=TOKENS_PER_BLOCK,
        num_cpu_blocks=2 * blocks,
        **({"num_ssd_blocks": 4 * blocks, "ssd_cache_dir": arguments.ssd} if arguments.ssd else {}),
    )
    wrong = 0
    async with KVManager(pages.model, cache) as manager:
        manager.register_kv_caches(pages.layers)
        answer(model, prompts[0], DynamicCache(), 0)  # warms up
        print("turn  prompt  loaded  first token without  with  same tokens")
        for turn, prompt in enumerate(prompts, 1):
            alone = answer(model, prompt, DynamicCache(), 0)
            cached = await answer_with(manager, pages, model, prompt)
            same = alone.tokens == cached.tokens
            wrong += not same
            print(
                f"{turn:4}  {len(prompt):6}  {cached.loaded_tokens:6}  "
                f"{1e3 * alone.first_token_s:16.1f} ms  {1e3 * cached.first_token_s:.1f} ms  "
                f"{'yes' if same else 'NO'}"
            )
        await manager.flush()  # the next run finds what is still being written now
    return 1 if wrong else 0


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a local model; default: random weights")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=256, help="tokens that each turn adds")
    parser.add_argument("--ssd", type=Path, help="keep blocks in this directory too")
    return parser.parse_args(words)


if __name__ == "__main__":
    raise SystemExit(asyncio.run(main(parse())))
