"""Runs of the model that recites, with drafts: after local hits, and after loads."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from .conversations import Recitals, Sizes
from .engine import EXTERNAL_HITS, Plan, counted, finish, scheduler_of, settled, started

SIZES = Sizes(turns=2, first_tokens=300, answer_tokens=24)
BLOCK_TOKENS = 32
"""Tokens of a block of the device."""
NEW_WORDS = 9
PASSES = ("cold", "local", "external", "corrupt")
"""The passes over the same prompts, in their order.

"cold" begins with empty caches; "local" finds in the device cache what "cold" left there. Before
each batch of the others the device cache is emptied. In "corrupt", what is loaded is corrupted in
the layers that the plan names.
"""

COUNTS = {
    "external": EXTERNAL_HITS,
    "drafted": "vllm:spec_decode_num_draft_tokens",
    "accepted": "vllm:spec_decode_num_accepted_tokens",
}

Told = dict[str, Any]


def parting(prompt: list[int], blocks: int) -> list[int]:
    """Return a prompt that shares its first `blocks` blocks with another prompt, and then differs.

    The answer begins with the last word of these blocks, and goes on with the word behind it. That
    word differs from the other prompt's, so the KV that a head has written for the other prompt at
    the end of these blocks is wrong here.
    """
    shared = prompt[: blocks * BLOCK_TOKENS]
    new = [word for word in reversed(prompt) if word not in shared and word != prompt[-1]]
    return [*shared, *new[1 : NEW_WORDS + 1], shared[-2]]


def recite(plan: Told, passes: tuple[str, ...]) -> Generator[Told, Any, None]:
    """Run the passes in this process, yield what each has shown, and keep the engine."""
    whole = Plan(**plan)
    corrupts, whole.corrupt_loads = whole.corrupt_loads, False
    llm = started(whole)
    told: Told = {}
    for name in passes:
        whole.corrupt_loads = corrupts and name == "corrupt"
        told[name] = one_pass(llm, whole, empties=name in ("external", "corrupt"))
    finish(llm)
    pool = scheduler_of(llm).kv_cache_manager.block_pool
    told["leaked_blocks"] = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
    told["layers"] = [
        name
        for group in scheduler_of(llm).kv_cache_config.kv_cache_groups
        for name in group.layer_names
    ]
    if whole.has_server:
        told["server"] = settled(whole)
    yield told


def one_pass(llm: Any, plan: Plan, *, empties: bool) -> Told:
    """Ask everything once, and return what was asked, answered, hit and drafted, by batch.

    Args:
        llm: the engine.
        plan: the sizes of the conversations.
        empties: whether the device cache is emptied before each batch.
    """
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=plan.answer_tokens, ignore_eos=True, detokenize=False
    )
    recitals = Recitals(plan)
    branches = [parting(prompt, 5 + at % 4) for at, prompt in enumerate(recitals.prompts)]
    told: Told = {what: [] for what in ("prompts", "answers", "cached", *COUNTS)}
    for turn in range(plan.turns + 1):
        prompts = recitals.prompts if turn < plan.turns else branches
        told["prompts"].append([list(prompt) for prompt in prompts])
        if empties:
            finish(llm)
            assert llm.reset_prefix_cache()
        before = {what: counted(llm, name) for what, name in COUNTS.items()}
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = llm.generate(asked, sampling, use_tqdm=False)
        answers = [list(output.outputs[0].token_ids) for output in outputs]
        told["answers"].append(answers)
        told["cached"].append([output.num_cached_tokens for output in outputs])
        for what, name in COUNTS.items():
            told[what].append(counted(llm, name) - before[what])
        if turn < plan.turns:
            recitals.answered(answers, told["cached"][-1])
    return told
