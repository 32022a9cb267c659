"""Tests that the examples with vLLM run, and print what they should."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import urllib.request
from contextlib import closing
from pathlib import Path
from random import SystemRandom

import pytest

from flexkv.server.operator import command
from flexkv.testing.vllm_serve import free_port
from tests.system.serving import eventually, is_running

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


def two_ports() -> int:
    """Return the first of two consecutive ports that are free, and so are those 1,000 above."""
    while True:
        port = SystemRandom().randrange(20_000, 30_000)
        try:
            for number in (port, port + 1, port + 1000, port + 1001):
                with closing(socket.socket()) as trial:
                    trial.bind(("127.0.0.1", number))
        except OSError:
            continue
        return port


def answer_at(port: int) -> tuple[str, int]:
    """Ask a node to continue a prompt; return what it says, and how many tokens it did not compute.

    The prompt has three whole spans of 256 tokens.
    """
    words = " ".join(f"w{number}" for number in range(10, 900))
    body = {"model": "model", "max_tokens": 8, "temperature": 0, "prompt": words}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=RUN_S) as answer:
        told = json.load(answer)
    cached = told["usage"]["prompt_tokens_details"] or {}
    return told["choices"][0]["text"], cached.get("cached_tokens") or 0


def test_nodes_of_one_machine_share_over_redis(tmp_path: Path) -> None:
    """start_multi_node_serving: what one node computed, the other one loads; `stop` ends all."""
    script = str(ROOT / "scripts/multi-nodes/start_multi_node_serving.sh")
    run, port = tmp_path / "run", two_ports()
    sizes = {"CPU_CACHE_GB": "0.1", "SSD_CACHE_GB": "0.1"}
    environment = {**ENVIRONMENT, **sizes, "RUN_DIR": str(run), "READY_S": str(RUN_S)}

    def told(*words: str) -> str:
        out = tmp_path / "out"
        with out.open("w") as stream:  # a pipe would stay open in the engines
            done = subprocess.run(
                [script, *words], env=environment, stdout=stream, stderr=stream, timeout=RUN_S,
            )  # fmt: skip
        assert done.returncode == 0, out.read_text()
        return out.read_text()

    assert "node 1" in told("2", str(port))
    try:
        pids = [int(each.read_text().split()[0]) for each in run.glob("*.pid")]
        assert len(pids) == 3
        first, cached = answer_at(port)
        assert cached == 0
        eventually_knows(run / "node-1.json")
        assert answer_at(port + 1) == (first, 768)
    finally:
        told("stop")
    assert not any(map(is_running, pids))
    assert not list(run.glob("*.pid"))


@pytest.mark.parametrize(
    ("words", "said"),
    [(("two",), "must be numbers"), (("0",), "at least 1"), (("2", "64600"), "PORT=64600 is too")],
)
def test_a_start_that_cannot_be_is_refused(
    tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    """start_multi_node_serving: a wrong number is named before anything is started or written."""
    script = str(ROOT / "scripts/multi-nodes/start_multi_node_serving.sh")
    environment = {**ENVIRONMENT, "RUN_DIR": str(tmp_path / "run")}
    done = subprocess.run([script, *words], env=environment, capture_output=True, check=False)
    assert done.returncode == 1
    assert said in done.stderr.decode()
    assert not (tmp_path / "run").exists()


def eventually_knows(config: Path) -> None:
    """Wait until a node knows that another one has three spans."""
    address = json.loads(config.read_text())["server_recv_port"]

    def knows() -> bool:
        nodes = command(address, "status")["statistics"]["cluster"]["state"]["nodes"]
        return [node["spans"] for node in nodes] == [3]

    eventually(knows)
