"""The model that vLLM's test utilities ask for by name, as a folder without weights."""

from __future__ import annotations

import json
from pathlib import Path

LAYERS, HEADS, HEAD_SIZE = 2, 2, 16


def write(folder: Path) -> None:
    """Write a small model to a folder of this name, so that none is downloaded."""
    model = folder / "facebook/opt-125m"
    model.mkdir(parents=True, exist_ok=True)
    hidden = HEADS * HEAD_SIZE
    facts = {
        "architectures": ["OPTForCausalLM"], "model_type": "opt", "torch_dtype": "float16",
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "hidden_size": hidden,
        "word_embed_proj_dim": hidden, "ffn_dim": 4 * hidden, "vocab_size": 50272,
        "max_position_embeddings": 16384, "do_layer_norm_before": True,
        "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1,
    }  # fmt: skip
    (model / "config.json").write_text(json.dumps(facts, indent=2))
