"""One engine of `flexkv vllm-demo`: it answers conversations, and times their first tokens.

    python -m flexkv.cli.vllm_demo_engine '{"model": …}'    # a line of JSON at the end

Only this module imports vLLM, because vLLM runs the main module again in each of its processes.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from typing import Any

import msgspec

ANSWER_TOKENS, VOCABULARY = 8, 1000


class Wanted(msgspec.Struct):
    """The engine and conversations to run."""

    model: str
    with_flexkv: bool
    address: str
    conversations: int
    turns: int
    first_tokens: int
    turn_tokens: int
    tokens_max: int
    pool_bytes: int
    block_size: int


class Turn(msgspec.Struct):
    """One turn over all conversations."""

    ttft_s: list[float]
    prompt_tokens: int
    cached_tokens: int
    hit_blocks: dict[str, int]
    """Blocks that FlexKV found, by tier."""
    answers: list[list[int]]


def run(wanted: Wanted) -> list[Turn]:
    """Run an engine, and return its turns."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["HF_HUB_OFFLINE"] = "1"
    from vllm import LLM, SamplingParams

    more: dict[str, Any] = {}
    if wanted.with_flexkv:
        more["kv_transfer_config"] = {
            "kv_connector": "FlexKVConnector",
            "kv_connector_module_path": "flexkv.integration.vllm.connector",
            "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
        }  # fmt: skip
    llm = LLM(
        model=wanted.model, skip_tokenizer_init=True, enforce_eager=True, dtype="float32",
        kv_cache_memory_bytes=wanted.pool_bytes, block_size=wanted.block_size,
        max_model_len=wanted.tokens_max, max_num_seqs=4, **more,
    )  # fmt: skip
    sampling = SamplingParams(
        temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True, detokenize=False
    )
    words = random.Random(0)
    prompts = [_said(words, wanted.first_tokens) for _ in range(wanted.conversations)]
    _ask(llm, sampling, "warm-up", _said(words, 64))
    turns = []
    for number in range(wanted.turns):
        before = _hits(wanted)
        asked = [_ask(llm, sampling, f"{number}-{i}", p) for i, p in enumerate(prompts)]
        hits = {tier: blocks - before.get(tier, 0) for tier, blocks in _hits(wanted).items()}
        answers = [list(output.outputs[0].token_ids) for _, output in asked]
        turns.append(
            Turn(
                [seconds for seconds, _ in asked],
                sum(map(len, prompts)),
                sum(output.num_cached_tokens or 0 for _, output in asked),
                hits,
                answers,
            )
        )
        for prompt, answer in zip(prompts, answers, strict=True):
            prompt += answer + _said(words, wanted.turn_tokens)
    return turns


def _said(words: random.Random, count: int) -> list[int]:
    return [words.randrange(3, VOCABULARY) for _ in range(count)]


def _ask(llm: Any, sampling: Any, name: str, prompt: list[int]) -> tuple[float, Any]:
    """Return the seconds to the first token, and the whole answer."""
    engine, begin = llm.llm_engine, time.perf_counter()
    engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
    first_s, last = 0.0, None
    while engine.has_unfinished_requests():
        for output in engine.step():
            first_s = first_s or time.perf_counter() - begin
            last = output
    return first_s, last


def _hits(wanted: Wanted) -> dict[str, int]:
    if not wanted.with_flexkv:
        return {}
    from flexkv.server.operator import command

    hits: dict[str, int] = command(wanted.address, "status")["statistics"]["hit_blocks"]
    return hits


if __name__ == "__main__":
    turns = run(msgspec.json.decode(sys.argv[1].encode(), type=Wanted))
    sys.stdout.write("\n" + json.dumps(msgspec.to_builtins(turns)) + "\n")
