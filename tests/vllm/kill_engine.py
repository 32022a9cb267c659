"""One of several engines that share a server, in vLLM's own processes, each of which may be killed.

this process ──▶ EngineCore, the scheduler's ──▶ worker
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from typing import Any, NamedTuple

from flexkv.testing.vllm_serve import SHIM
from tests.vllm.fork import fork_workers

FREED_S = 20.0


class Asked(NamedTuple):
    """Prompts to answer, and the salt under which their blocks are kept."""

    prompts: list[list[int]]
    salt: str
    answer_tokens: int


class Answered(NamedTuple):
    """The answers to the prompts."""

    answers: list[list[int]]
    cached: list[int]
    freed: bool
    """Whether the engine got every block back soon afterwards."""


def engine(model: str, environment: dict[str, str]) -> Generator[Any, Asked, None]:
    """Answer what is asked; each round starts with the engine's own cache empty."""
    os.environ.update({"VLLM_CPU_OMP_THREADS_BIND": "nobind", **environment})
    fork_workers()
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model, skip_tokenizer_init=True, dtype="float32", enforce_eager=True,
        kv_cache_memory_bytes=16 << 20, block_size=32, max_model_len=1536, max_num_seqs=4,
        kv_transfer_config={**SHIM, "kv_role": "kv_both"}, disable_log_stats=True,
    )  # fmt: skip
    asked = yield "begun"
    while True:
        sampling = SamplingParams(
            temperature=0, max_tokens=asked.answer_tokens, ignore_eos=True, detokenize=False
        )
        prompts: list[Any] = [
            {"prompt_token_ids": prompt, "cache_salt": asked.salt} for prompt in asked.prompts
        ]
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        asked = yield Answered(
            [list(output.outputs[0].token_ids) for output in outputs],
            [output.num_cached_tokens or 0 for output in outputs],
            _freed(llm),
        )


def _freed(llm: Any) -> bool:
    until_s = time.monotonic() + FREED_S
    while not llm.reset_prefix_cache():
        if time.monotonic() > until_s:
            return False
        time.sleep(0.01)
    return True
