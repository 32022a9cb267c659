"""An offline run of vLLM that shares a long prefix between prompts, with and without FlexKV.

    python examples/vllm_prefix_caching.py                    # a small random model, on the CPU
    python examples/vllm_prefix_caching.py --model MODEL      # yours

Each prompt is a long document and a question. Before each question vLLM's own cache is emptied, as
if other requests had evicted the document; FlexKV still has it.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from flexkv.testing.tiny_model import make_tiny_model

QUESTIONS, QUESTION_TOKENS, ANSWER_TOKENS = 4, 32, 8


def words(seed: int, count: int) -> list[int]:
    """Return random token ids."""
    chance = random.Random(seed)
    return [chance.randrange(3, 1000) for _ in range(count)]


def connector_in(folder: Path) -> dict[str, Any]:
    """Return the part of vLLM's configuration that names FlexKV's connector and sets its keys.

    The address is set only to keep the example apart from other servers.
    """
    return {
        "kv_connector": "FlexKVConnector",
        "kv_connector_module_path": "flexkv.integration.vllm.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "num_cpu_blocks": 1024,
            "num_ssd_blocks": 1024,
            "ssd_cache_dir": str(folder),
            "server_recv_port": f"ipc://{folder}/socket",
            "load_if_faster": False,  # the model is so small that computing may be faster
            "log_level": "warning",
        },
    }


def until_idle(llm: Any) -> None:
    """Wait until vLLM has finished its work after an answer, such as a put; empty its cache."""
    engine = llm.llm_engine
    until_s = time.monotonic() + 60
    while engine.engine_core.engine_core.scheduler.has_requests():
        engine.step()
        time.sleep(0.001)
    while not llm.reset_prefix_cache():
        assert time.monotonic() < until_s, "its blocks stay in use"
        time.sleep(0.01)


def main() -> None:
    """Ask each question of the same document, and print how many tokens were not computed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a model for vLLM; default: a small one is made")
    parser.add_argument("--tokens", type=int, default=2048, help="length of the document")
    parser.add_argument("--without", action="store_true", help="run vLLM alone, for comparison")
    asked = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # `until_idle` needs the engine
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory(prefix=".flexkv-example-", dir=".") as name:
        folder = Path(name).absolute()
        own: dict[str, Any] = {}
        if asked.model is None:
            own = {"dtype": "float32", "skip_tokenizer_init": True, "block_size": 32}
            own["kv_cache_memory_bytes"] = 64 << 20
        if not asked.without:
            own["kv_transfer_config"] = connector_in(folder)
        model = asked.model or str(make_tiny_model(folder / "model"))
        llm = LLM(model=model, enforce_eager=True, max_model_len=asked.tokens + 256, **own)
        sampling = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True,
                                  detokenize=False)  # fmt: skip
        document = words(0, asked.tokens)
        print("question  seconds  prompt  not computed  answer")
        for number in range(QUESTIONS):
            prompt = {"prompt_token_ids": document + words(1 + number, QUESTION_TOKENS)}
            begin_s = time.perf_counter()
            (output,) = llm.generate([prompt], sampling, use_tqdm=False)
            took_s, tokens = time.perf_counter() - begin_s, output.outputs[0].token_ids
            cached = output.num_cached_tokens or 0
            print(f"{number:8} {took_s:8.3f} {asked.tokens + QUESTION_TOKENS:7} {cached:13} "
                  f" {list(tokens)}")  # fmt: skip
            until_idle(llm)
        llm.llm_engine.engine_core.shutdown()  # FlexKV's server flushes to SSD, and ends


if __name__ == "__main__":
    main()
