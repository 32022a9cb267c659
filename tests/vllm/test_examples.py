"""Tests that the examples with vLLM run, and print what they should."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from flexkv.testing.vllm_serve import free_port

ROOT = Path(__file__).parents[2]
RUN_S = 400
ENVIRONMENT = {
    **os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
}  # fmt: skip


def test_an_offline_run_takes_the_document_from_flexkv(tmp_path: Path) -> None:
    """vllm_prefix_caching: with FlexKV the answers are equal, and no document is computed twice."""
    answers = []
    for more in ([], ["--without"]):
        command = [sys.executable, str(ROOT / "examples/vllm_prefix_caching.py"), *more]
        done = subprocess.run(
            [*command, "--tokens", "512"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True,
            text=True, timeout=RUN_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        rows = re.findall(r"^ +(\d+) +[\d.]+ +\d+ +(\d+) +(\[.*\])$", done.stdout, re.MULTILINE)
        assert [int(cached) for _, cached, _ in rows] == [0, *[0 if more else 512] * 3]
        answers.append([answer for _, _, answer in rows])
        assert list(tmp_path.iterdir()) == []
    assert answers[0] == answers[1]


def test_curl_is_answered_with_what_flexkv_has(tmp_path: Path) -> None:
    """vllm_online: the third answer comes from FlexKV, after vLLM's own cache was emptied."""
    command = [str(ROOT / "examples/vllm_online.sh")]
    environment = {**ENVIRONMENT, "PORT": str(free_port())}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=RUN_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cached = [int(n) for n in re.findall(r'"cached_tokens": ?(\d+)', done.stdout)]
    assert cached == [0, 384, 384], done.stdout
    assert re.search(r"flexkv_connector_loaded_blocks_total{.*} 12", done.stdout), done.stdout
