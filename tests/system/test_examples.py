"""Tests that the examples run, and print what they should."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import yaml

from flexkv.common.config import CacheConfig, Settings

from .serving import eventually, is_running

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def run(command: list[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder."""
    return subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("async_library", ["put: KVResponse(success, 64 of 64 tokens)",
                           "match: PrefixMatch(64 tokens: host 64)",
                           "get: KVResponse(success, 64 of 64 tokens)",
                           "flushed: 4 blocks on SSD", "every byte is back"]),
        ("task_ids", ["put: KVResponse(success, 64 of 64 tokens)", "match: 64 tokens",
                      "get: KVResponse(success, 64 of 64 tokens)", "every byte is back"]),
        ("two_engines", ["first engine, put: success, 32 blocks",
                         "second engine, match: {'host': 32}",
                         "second engine, get: success, 32 blocks", "every byte is there"]),
        ("shared_store", ["first engine, put: KVResponse(success, 512 of 512 tokens)",
                          "second engine, get: KVResponse(success, 512 of 512 tokens)",
                          "fetched: 32 blocks", "every byte is there"]),
        ("two_nodes", ["first node, put: KVResponse(success, 512 of 512 tokens)",
                       "second node, match: PrefixMatch(0 tokens; 512 more in peer)",
                       "second node, get: KVResponse(success, 512 of 512 tokens)",
                       "every byte is there"]),
    ],
)  # fmt: skip
def test_an_example_runs_as_it_says(tmp_path: Path, name: str, lines: list[str]) -> None:
    """An example runs as a script without arguments, in any directory, and prints no warning."""
    command = [sys.executable, ROOT / f"examples/{name}.py"]
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    assert "model_id_not_given" not in done.stderr
    said = [line for line in done.stdout.splitlines() if line in lines]
    assert said == lines, done.stdout


def test_a_server_and_an_engine_of_several_processes_run_as_they_say(tmp_path: Path) -> None:
    """The examples of a server and an engine run in two processes, over one given folder."""
    command = [sys.executable, ROOT / "examples/run_server.py", "folder"]
    server = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT)
    try:
        command = [sys.executable, ROOT / "examples/scheduler_server_example.py", "folder"]
        done = run(command, tmp_path)
        assert done.returncode == 0, done.stderr
        assert "every byte is back" in done.stdout
    finally:
        server.terminate()
        assert server.wait(60) == 0


def test_the_files_for_a_cluster_have_known_keys_only() -> None:
    """The compose file and the Kubernetes example are YAML, and set valid keys of FlexKV."""
    folder = ROOT / "examples/cluster"
    compose = yaml.safe_load((folder / "compose.yaml").read_text())
    engines = [each for name, each in compose["services"].items() if name.startswith("vllm")]
    assert len(engines) == 2
    objects = list(yaml.safe_load_all((folder / "kubernetes.yaml").read_text()))
    (stateful,) = [each for each in objects if each["kind"] == "StatefulSet"]
    (pod,) = stateful["spec"]["template"]["spec"]["containers"]
    set_ = [engine["environment"] for engine in engines]
    set_.append({each["name"]: each.get("value", "10.0.0.1") for each in pod["env"]})
    known = {*Settings.model_fields, *CacheConfig.model_fields}
    for environment in set_:
        keys = {name.removeprefix("FLEXKV_").lower(): value for name, value in environment.items()}
        assert known >= set(keys)
        given = {
            key: re.sub(r"\$\{.*?(?::-(.*))?\}", lambda found: found[1] or "given", str(value))
            for key, value in keys.items()
            if key in CacheConfig.model_fields
        }
        assert CacheConfig(**given).has_peers
    for args in (*(engine["command"] for engine in engines), pod["args"]):
        connector = json.loads(args[args.index("--kv-transfer-config") + 1])
        assert connector["kv_connector"] == "FlexKVConnector"


def test_every_example_is_run_by_a_test() -> None:
    """Every example is run by a test, and named in the README."""
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_examples.py"))
    readme = (ROOT / "README.md").read_text()
    for path in (ROOT / "examples").iterdir():
        if path.suffix in (".py", ".sh"):
            assert path.stem in tests, path.name
            assert path.name in readme, path.name


TWICE = """
import os, runpy, sys
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM
for _ in range(2):
    if not (child := os.fork()):
        sys.argv = sys.argv[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit()
    _, status = os.waitpid(child, 0)
    if status:
        sys.exit(1)
"""
"""Runs a program in two processes, one after the other, which import slow packages only once."""


def test_prefixes_of_a_transformers_model_are_kept(tmp_path: Path) -> None:
    """Tokens are equal with and without FlexKV; a second process finds the first's SSD blocks."""
    pytest.importorskip("transformers")
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", TWICE]
    command += ["examples/transformers_prefix_cache.py", "--turns", "2"]
    command += ["--tokens", "40", "--ssd", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.endswith(" yes")]
    assert [row[2] for row in rows] == [
        "0",
        "32",
        "32",
        "79",
    ]  # whole blocks are hit, and at least one token is computed


def test_stopping_several_nodes_leaves_none_of_their_processes(tmp_path: Path) -> None:
    """What ignores SIGTERM is killed, and so is what a node that died has left; no stranger is."""
    stubborn = "trap '' TERM; sleep 1000 & echo $!; wait"
    dies = "sleep 1000 & echo $!; read line"
    with ExitStack() as undo:
        nodes, pids = [], []
        for number, text in enumerate((stubborn, dies, dies)):
            node = subprocess.Popen(
                ["sh", "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                start_new_session=True,
            )  # fmt: skip
            undo.enter_context(node)
            undo.callback(kill_session, node.pid)
            assert node.stdout is not None
            pids.append(int(node.stdout.readline()))
            since = Path(f"/proc/{node.pid}/stat").read_text().rpartition(")")[2].split()[19]
            is_ours = number < 2
            (tmp_path / f"node-{number}.pid").write_text(f"{node.pid} {since if is_ours else 1}\n")
            nodes.append(node)
        nodes[1].kill()
        nodes[1].wait()
        script = ROOT / "scripts/multi-nodes/start_multi_node_serving.sh"
        environment = {**os.environ, "RUN_DIR": str(tmp_path), "STOP_S": "0"}
        subprocess.run([script, "stop"], env=environment, check=True, capture_output=True)
        assert nodes[0].wait(timeout=60) == -signal.SIGKILL
        eventually(lambda: not is_running(pids[0]) and not is_running(pids[1]))
        assert is_running(pids[2])
        assert nodes[2].poll() is None
        assert not list(tmp_path.glob("*.pid"))


def kill_session(group: int) -> None:
    """Kill what is left of a session."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
