"""Small random models for tests under vLLM: with several KV groups, MLA or windows alone.

They are made offline.

python -m flexkv.testing.tiny_hybrids NAME FOLDER

Their weights are so wide that greedy tokens depend on every byte of the KV cache and the states.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from flexkv.testing.tiny_model import TOKENS_MAX, VOCABULARY

WEIGHT_STD = 0.25
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "max_position_embeddings": TOKENS_MAX, "hidden_size": 128,
    "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "initializer_range": WEIGHT_STD, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SLIDING, FULL = "sliding_attention", "full_attention"


class Recipe(NamedTuple):
    """A model: its transformers class of configuration, and what differs from `COMMON`."""

    config: str
    facts: dict[str, Any]
    dtype: str = "float32"
    constant: Mapping[str, float] = MappingProxyType({})
    """Parameters, by a part of their name, that have this value.

    Random A_log and dt_bias forget so fast that a wrong state changes no token.
    """


RECIPES = {
    # Four layers with a sliding window and two with full attention.
    "gemma3": Recipe("Gemma3TextConfig", {
        "num_hidden_layers": 6, "sliding_window": 64, "query_pre_attn_scalar": 32,
        "tie_word_embeddings": False,
        "layer_types": [SLIDING, SLIDING, FULL] * 2,
    }),
    # The same, but full attention keeps half the bytes of a token, so vLLM doubles its blocks.
    "gemma4": Recipe("Gemma4TextConfig", {
        "num_hidden_layers": 6, "sliding_window": 64, "tie_word_embeddings": False,
        "layer_types": [SLIDING, SLIDING, FULL] * 2, "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": VOCABULARY, "attention_k_eq_v": True,
        "global_head_dim": 32, "num_global_key_value_heads": 1,
    }),
    # Attention sinks, mixture of experts.
    "gpt_oss": Recipe("GptOssConfig", {
        "num_hidden_layers": 4, "sliding_window": 64, "layer_types": [SLIDING, FULL] * 2,
        "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 128,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 32.0, "beta_fast": 32.0,
            "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 4096,
        },
    }),
    # Three layers with chunked local attention and one with full attention.
    "llama4": Recipe("Llama4TextConfig", {
        "num_hidden_layers": 4, "attention_chunk_size": 128, "intermediate_size_mlp": 256,
        "moe_layers": [], "interleave_moe_layer_step": 0, "no_rope_layers": [1, 1, 1, 0],
        "layer_types": ["chunked_attention"] * 3 + [FULL], "attn_temperature_tuning": False,
    }),
    # Three layers with a gated delta net and one with full attention. On a CPU only bf16.
    "qwen3_next": Recipe("Qwen3NextConfig", {
        "num_hidden_layers": 4, "num_key_value_heads": 4, "head_dim": 64,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 64, "linear_value_head_dim": 64,
        "layer_types": ["linear_attention"] * 3 + [FULL], "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    }, "bfloat16", {"A_log": -4.0}),
    # Two mamba2 layers and two with full attention.
    "nemotron_h": Recipe("NemotronHConfig", {
        "layers_block_type": ["linear_attention", FULL] * 2, "ssm_state_size": 16,
        "mamba_num_heads": 4, "mamba_head_dim": 32, "n_groups": 2, "expand": 1,
        "rescale_prenorm_residual": False, "mtp_layers_block_type": [],
    }, "float32", {"dt_bias": -3.0}),
    # Four layers with a sliding window, and none with full attention.
    "mistral": Recipe("MistralConfig", {"num_hidden_layers": 4, "sliding_window": 64}),
    # Multi-head latent attention. On a CPU only bf16, with AMX.
    "deepseek_v3": Recipe("DeepseekV3Config", {
        "num_hidden_layers": 4, "first_k_dense_replace": 4, "num_key_value_heads": 4,
        "q_lora_rank": None, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 64, "v_head_dim": 64, "n_routed_experts": 4, "n_group": 1,
        "topk_group": 1, "num_experts_per_tok": 2, "num_nextn_predict_layers": 0,
    }, "bfloat16"),
}  # fmt: skip


def make_tiny_hybrid(name: str, folder: Path, seed: int = 0) -> Path:
    """Write the model `name` of `RECIPES` for vLLM, and return its folder.

    The same seed gives the same weights. Needs torch and transformers, which come with vLLM.
    """
    import torch
    import transformers

    recipe = RECIPES[name]
    config = getattr(transformers, recipe.config)(**{**COMMON, **recipe.facts})
    torch.manual_seed(seed)
    models: Any = transformers.AutoModelForCausalLM
    model = models.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            words = key.split(".")
            for word in recipe.constant.keys() & words:
                weight.fill_(recipe.constant[word])
            if "sinks" in words or words[-1] == "bias":
                weight.normal_(0.0, WEIGHT_STD)
    model.to(getattr(torch, recipe.dtype)).save_pretrained(folder)
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**facts, "dtype": recipe.dtype}, indent=2))
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in RECIPES:
        sys.exit(f"usage: python -m flexkv.testing.tiny_hybrids {{{','.join(RECIPES)}}} FOLDER")
    make_tiny_hybrid(sys.argv[1], Path(sys.argv[2]))
