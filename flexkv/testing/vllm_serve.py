"""A `vllm serve` of this machine, on the CPU: for benchmarks and tests.

Its folder holds what it says (`vllm.log`), FlexKV's configuration, socket and SSD tier.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from flexkv.server.launch import END_S

READY_S, REQUEST_S, LOOK_S = 240.0, 300.0, 0.2
MODEL_NAME = "model"
LOG_LINES = 40
"""Of what it says, so many tell why it failed."""

SHIM = {"kv_connector": "FlexKVConnectorV1", "kv_load_failure_policy": "recompute"}
OWN = {
    **SHIM,
    "kv_connector": "FlexKVConnector",
    "kv_connector_module_path": "flexkv.integration.vllm.connector",
}


@dataclass(frozen=True)
class Served:
    """What to serve, and how.

    Attributes:
        model: its folder.
        connector: of vLLM's `--kv-transfer-config`; none is without a connector.
        settings: FlexKV's, over a socket and an SSD tier in the engine's folder.
        arguments: of `vllm serve`, beside the usual ones.
        environment: over this process's own.
    """

    model: Path
    connector: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


class Program:
    """A server of this machine, from a command that was installed with this Python."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def _start(self, command_line: Sequence[str], environment: Mapping[str, str]) -> None:
        name, *words = command_line
        command_line = [str(Path(sys.executable).parent / name), *words]
        environment = {**os.environ, **environment}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command_line, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.kill()

    @property
    def pid(self) -> int:
        """Return the id of its first process, which is also the id of its session."""
        return self._process.pid

    def terminate(self, within_s: float = END_S) -> int:
        """Send SIGTERM to the first process, as a service manager does; return its exit status.

        Raises:
            subprocess.TimeoutExpired: it does not end in time.
        """
        self._process.terminate()
        return self._process.wait(within_s)

    def kill(self) -> None:
        """Let every process of it end at once, as `kill -9` does; not FlexKV's server."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def wait_healthy(self, look: Callable[[], object]) -> None:
        """Return once a look at it raises no OSError.

        Raises:
            RuntimeError: it has ended, or takes too long; with what it said.
        """
        until_s = time.monotonic() + READY_S
        while True:
            try:
                look()
            except OSError as error:
                if self._process.poll() is not None or time.monotonic() > until_s:
                    raise self.failed(error) from error
                time.sleep(LOOK_S)
            else:
                return

    def failed(self, error: OSError) -> RuntimeError:
        """Give an error that has what it said."""
        said = self._log.read_text(errors="replace").splitlines()
        last = len(said) - LOG_LINES
        wrong = next((i for i, line in enumerate(said) if "Traceback" in line), max(last, 0))
        lines = [f"{self._log}: {error}", *said[wrong : wrong + LOG_LINES]]
        return RuntimeError("\n".join(lines))


class VllmServe(Program):
    """Its processes, and what can be asked of it."""

    def __init__(self, served: Served, folder: Path) -> None:
        super().__init__(folder / "vllm.log")
        self._served, self._folder = served, folder
        self.address = f"ipc://{folder}/socket"
        """FlexKV's."""
        self.port = free_port()

    def __enter__(self) -> Self:
        served, config = self._served, self._folder / "flexkv.json"
        cache = {"ssd_cache_dir": str(self._folder), **served.settings.get("cache_config", {})}
        settings = {"server_recv_port": self.address, "log_level": "warning", **served.settings}
        config.write_text(json.dumps({**settings, "cache_config": cache}))
        command_line = [
            "vllm", "serve", str(served.model),
            "--served-model-name", MODEL_NAME, "--enforce-eager",
            "--host", "127.0.0.1", "--port", str(self.port), *served.arguments,
        ]  # fmt: skip
        if served.connector is not None:
            connector = json.dumps({"kv_role": "kv_both", **served.connector})
            command_line += ["--kv-transfer-config", connector]
        environment = {
            "HF_HUB_OFFLINE": "1", "VLLM_SERVER_DEV_MODE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
            "FLEXKV_CONFIG_PATH": str(config), **served.environment,
        }  # fmt: skip
        self._start(command_line, environment)
        return self

    def wait_ready(self) -> None:
        """Return once requests are taken.

        Raises:
            RuntimeError: it has ended, or takes too long; with what it said.
        """
        self.wait_healthy(lambda: self.request("GET", "/health"))

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> bytes:
        """Give the body of an answer; in the names of headers "_" stands for "-".

        Raises:
            OSError: nobody answers, or with another status than 200.
        """
        peer = http.client.HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_S)
        try:
            told = None if body is None else json.dumps(body)
            more = {name.replace("_", "-"): value for name, value in headers.items()}
            peer.request(method, path, told, {"Content-Type": "application/json", **more})
            with peer.getresponse() as answer:
                said = answer.read()
        finally:
            peer.close()
        if answer.status != http.client.OK:
            raise OSError(f"{path}: {answer.status} {said[:400].decode(errors='replace')}")
        return said

    def complete(
        self, prompt: list[int], tokens: int, dp_rank: int | None = None
    ) -> tuple[list[int], int]:
        """Give the greedy answer to a prompt, and how many of its tokens were not computed.

        With `dp_rank` that data-parallel engine answers, else whichever.
        """
        headers = {} if dp_rank is None else {"X_data_parallel_rank": str(dp_rank)}
        body = completion(prompt, tokens)
        answer = json.loads(self.request("POST", "/v1/completions", body, **headers))
        return token_ids(answer), cached_tokens(answer)

    def first_token_s(self, prompt: list[int], tokens: int = 4) -> float:
        """Give the seconds until the first token of an answer came."""
        peer = http.client.HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_S)
        body = json.dumps({**completion(prompt, tokens), "stream": True})
        begin, first_s = time.perf_counter(), 0.0
        peer.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        for line in peer.getresponse():
            if line.startswith(b"data:") and not first_s:
                first_s = time.perf_counter() - begin
        peer.close()
        return first_s

    def forget(self) -> None:
        """Empty the engine's own cache, once nothing uses it.

        Raises:
            TimeoutError: its blocks stay in use.
        """
        for _ in range(200):
            try:
                answer = self.request("POST", "/reset_prefix_cache")
            except OSError as error:
                raise self.failed(error) from error
            if b"true" in answer:
                return
            time.sleep(0.05)
        raise TimeoutError("the engine's cache is in use still")


def completion(prompt: list[int], tokens: int) -> dict[str, Any]:
    """Give what to ask `/v1/completions` for a greedy answer of so many tokens."""
    return {"model": MODEL_NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True}  # fmt: skip


def token_ids(answer: Any) -> list[int]:
    """Give the tokens of what `/v1/completions` answers."""
    ids: list[int] = answer["choices"][0]["token_ids"]
    return ids


def cached_tokens(answer: Any) -> int:
    """Give the tokens that were not computed: with `--enable-prompt-tokens-details`."""
    details = answer["usage"].get("prompt_tokens_details") or {}
    return details.get("cached_tokens") or 0


def free_port() -> int:
    """Give a port of this machine that nobody has, for now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
