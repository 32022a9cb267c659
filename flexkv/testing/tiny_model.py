"""A small random Llama, made offline: for demos and tests whose output depends on the KV cache.

python -m flexkv.testing.tiny_model FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple


class Shape(NamedTuple):
    """The shape of a model."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int

    @property
    def head_size(self) -> int:
        """Return the number of elements of one head."""
        return self.hidden // self.heads


VOCABULARY, TOKENS_MAX = 1024, 16384
WEIGHT_STD = 0.2
"""Standard deviation of weights: so large that greedy tokens depend on the KV cache."""


LLAMA = Shape(layers=4, hidden=256, heads=4, kv_heads=2)


def make_tiny_model(
    folder: Path, shape: Shape = LLAMA, dtype: str = "float32", seed: int = 0
) -> Path:
    """Write a model that vLLM can load, the same for the same seed, and return its folder.

    Needs torch, safetensors and tokenizers, which come with vLLM.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(seed)
    wanted = getattr(torch, dtype)

    def weight(*size: int) -> Any:
        return (torch.randn(*size, generator=random) * WEIGHT_STD).to(wanted)

    width, kv_width = shape.hidden, shape.kv_heads * shape.head_size
    inner = 2 * width
    tensors = {"model.embed_tokens.weight": weight(VOCABULARY, width),
               "lm_head.weight": weight(VOCABULARY, width),
               "model.norm.weight": torch.ones(width, dtype=wanted)}  # fmt: skip
    for layer in range(shape.layers):
        at = f"model.layers.{layer}"
        for name, size in (
            ("self_attn.q_proj", (width, width)), ("self_attn.k_proj", (kv_width, width)),
            ("self_attn.v_proj", (kv_width, width)), ("self_attn.o_proj", (width, width)),
            ("mlp.gate_proj", (inner, width)), ("mlp.up_proj", (inner, width)),
            ("mlp.down_proj", (width, inner)),
        ):  # fmt: skip
            tensors[f"{at}.{name}.weight"] = weight(*size)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{name}.weight"] = torch.ones(width, dtype=wanted)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(shape, inner, dtype), indent=2))
    _write_tokenizer(folder)
    return folder


def _write_tokenizer(folder: Path) -> None:
    """Write a tokenizer in which every token is a word: token 17 is "w17"."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{n}": n for n in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    facts = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))


def _config(shape: Shape, inner: int, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "hidden_size": shape.hidden, "intermediate_size": inner,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_size,
        "vocab_size": VOCABULARY, "max_position_embeddings": TOKENS_MAX,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": False, "torch_dtype": dtype, "bos_token_id": 1, "eos_token_id": 2,
        "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m flexkv.testing.tiny_model FOLDER")
    make_tiny_model(Path(sys.argv[1]))
