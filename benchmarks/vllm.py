"""Time to the first token of real `vllm serve` engines over HTTP, with and without FlexKV.

Peers: no connector, and vLLM's own ExampleConnector (files). Limit: vLLM's own device cache. All
engines run at once and are asked in turn, prompts whole: ExampleConnector fails with chunks. Needs
vLLM in this Python: `scripts/vllm-venv`.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from benchmarks.harness import Figures, Options, median_ratio
from flexkv.integration.vllm.tiny_model import Shape, make_tiny_model
from flexkv.server.operator import command

MODEL = Shape(layers=12, hidden=1024, heads=16, kv_heads=16)
BLOCK_SIZE, PROMPT_TOKENS, READY_S = 32, 6000, 120.0


def measure(options: Options) -> Figures:
    """Give the figures of the case."""
    if importlib.util.find_spec("vllm") is None:
        return {"vLLM": "is not installed here: scripts/vllm-venv makes an environment with it"}
    repeats = 1 if options.quick else options.repeats
    with tempfile.TemporaryDirectory(dir=options.directory) as name, ExitStack() as stack:
        folder = Path(name).absolute()
        model = make_tiny_model(folder / "model", MODEL, "bfloat16")
        engines = {
            name: stack.enter_context(Engine(model, folder, connector))
            for name, connector in _connectors(folder).items()
        }
        for engine in engines.values():
            engine.wait_ready()
        return _measure(engines, repeats, 600 if options.quick else PROMPT_TOKENS)


def _connectors(folder: Path) -> dict[str, dict[str, Any] | None]:
    return {
        "none": None,
        "FlexKV": {"kv_connector": "FlexKVConnectorV1", "kv_load_failure_policy": "recompute"},
        "Example": {
            "kv_connector": "ExampleConnector",
            "kv_connector_extra_config": {"shared_storage_path": str(folder / "example")},
        },
    }


class Engine:
    """A `vllm serve` of this machine."""

    def __init__(self, model: Path, folder: Path, connector: dict[str, Any] | None) -> None:
        self._model, self._connector = model, connector
        self._folder = folder
        name = connector["kv_connector"] if connector else "none"
        self._log = folder / f"{name}.log"
        self.address = f"ipc://{folder}/socket"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]

    def __enter__(self) -> Self:
        config = self._folder / "flexkv.json"
        token_blocks = PROMPT_TOKENS // BLOCK_SIZE
        cache = {
            "num_cpu_blocks": 4 * token_blocks, "num_ssd_blocks": 12 * token_blocks,
            "ssd_cache_dir": str(self._folder),
        }  # fmt: skip
        settings = {"server_recv_port": self.address, "log_level": "warning"}
        config.write_text(json.dumps({**settings, "cache_config": cache}))
        command_line = [
            str(Path(sys.executable).parent / "vllm"), "serve", str(self._model),
            "--served-model-name", "model", "--enforce-eager", "--dtype", "bfloat16",
            "--kv-cache-memory-bytes", str(1 << 30), "--block-size", str(BLOCK_SIZE),
            "--max-model-len", "8192", "--max-num-batched-tokens", "8192",
            "--port", str(self._port), "--host", "127.0.0.1",
        ]  # fmt: skip
        if self._connector is not None:
            config_json = json.dumps({**self._connector, "kv_role": "kv_both"})
            command_line += ["--kv-transfer-config", config_json]
        environment = {
            **os.environ, "HF_HUB_OFFLINE": "1", "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "0", "VLLM_LOGGING_LEVEL": "ERROR",
            "FLEXKV_CONFIG_PATH": str(config),
        }  # fmt: skip
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command_line, env=environment, stdout=log, stderr=log)
        return self

    def _failed(self, error: OSError) -> RuntimeError:
        said = self._log.read_text(errors="replace").splitlines()
        wrong = next((i for i, line in enumerate(said) if "Traceback" in line), len(said) - 30)
        return RuntimeError("\n".join([f"{self._log.name}: {error}", *said[wrong : wrong + 40]]))

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def wait_ready(self) -> None:
        """Return once requests are taken."""
        until_s = time.monotonic() + READY_S
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health", timeout=5).close()
            except OSError:
                if self._process.poll() is not None or time.monotonic() > until_s:
                    raise
                time.sleep(0.5)
            else:
                self.ask([7] * 100)
                return

    def ask(self, prompt: list[int], tokens: int = 4) -> float:
        """Give the seconds until the first token came."""
        peer = http.client.HTTPConnection("127.0.0.1", self._port, timeout=300)
        body = {"model": "model", "prompt": prompt, "max_tokens": tokens, "temperature": 0,
                "stream": True, "ignore_eos": True}  # fmt: skip
        begin, first_s = time.perf_counter(), 0.0
        peer.request(
            "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        for line in peer.getresponse():
            if line.startswith(b"data:") and not first_s:
                first_s = time.perf_counter() - begin
        peer.close()
        return first_s

    def forget(self) -> None:
        """Empty the engine's own cache, once nothing uses it."""
        for _ in range(200):
            wanted = urllib.request.Request(
                f"http://127.0.0.1:{self._port}/reset_prefix_cache", method="POST"
            )
            try:
                with urllib.request.urlopen(wanted, timeout=30) as answer:
                    if b"true" in answer.read():
                        return
            except OSError as error:
                raise self._failed(error) from error
            time.sleep(0.05)
        raise TimeoutError("the engine's cache is in use still")

    def throughput_s(self, prompts: list[list[int]]) -> float:
        """Give the seconds that prompts take, eight at once."""
        begin = time.perf_counter()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda prompt: self.ask(prompt, 16), prompts))
        return time.perf_counter() - begin


def _measure(engines: dict[str, Engine], repeats: int, prompt_tokens: int) -> Figures:
    words = random.Random(0)
    took: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        took.setdefault(name, []).append(seconds)

    for turn in range(repeats + 1):
        prompt = [words.randrange(3, 1000) for _ in range(prompt_tokens)]
        prompts = [[words.randrange(3, 1000) for _ in range(256)] for _ in range(16)]
        for name in engines if turn % 2 else reversed(engines):
            engine = engines[name]
            engine.forget()
            seconds = {"cold": engine.ask(prompt), "device": engine.ask(prompt)}
            if name == "FlexKV":
                command(engine.address, "flush")
            engine.forget()
            if name != "none":
                seconds["host"] = engine.ask(prompt)
            if name == "FlexKV":
                command(engine.address, "clear", tier="host")
                engine.forget()
                seconds["disk"] = engine.ask(prompt)
            engine.forget()
            seconds["many"] = engine.throughput_s(prompts)
            if turn:  # the first warms up
                for what, value in seconds.items():
                    note(f"{name} {what}", value)
    ours = {what: took[f"FlexKV {what}"] for what in ("cold", "device", "host", "disk", "many")}
    return {
        "recompute, ms": 1e3 * sorted(ours["cold"])[repeats // 2],
        "device hit, ms": 1e3 * sorted(ours["device"])[repeats // 2],
        "host / device hit": median_ratio(ours["host"], ours["device"]),
        "SSD / device hit": median_ratio(ours["disk"], ours["device"]),
        "recompute / host": median_ratio(ours["cold"], ours["host"]),
        "ExampleConnector / its device hit": median_ratio(
            took["Example host"], took["Example device"]
        ),
        "ExampleConnector / FlexKV from host": median_ratio(took["Example host"], ours["host"]),
        "no hit: TTFT / without a connector": median_ratio(ours["cold"], took["none cold"]),
        "no hit: time of 16 prompts / without": median_ratio(ours["many"], took["none many"]),
    }
