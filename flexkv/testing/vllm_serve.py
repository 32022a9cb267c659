"""A `vllm serve` on this machine, on the CPU, for benchmarks and tests.

Its folder holds its log (`vllm.log`) and FlexKV's configuration, socket and SSD tier.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from flexkv.server.launch import END_S
from flexkv.testing.namespaces import Host

READY_S, REQUEST_S, LOOK_S = 240.0, 300.0, 0.2
MODEL_NAME = "model"
LOG_LINES = 40
"""Lines of its log that are quoted when it fails."""

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
        model: folder of the model.
        connector: value of vLLM's `--kv-transfer-config`; None: no connector.
        settings: FlexKV's; they override a socket and an SSD directory in the engine's folder.
        arguments: for `vllm serve`, in addition to the usual ones.
        environment: variables in addition to those of this process.
        host: the machine that it runs on; None: this one.
    """

    model: Path
    connector: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    host: Host | None = None


class Program:
    """A server process of a command that is installed with this Python."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def _start(
        self,
        command_line: Sequence[str],
        environment: Mapping[str, str],
        before: Sequence[str] = (),
    ) -> None:
        """Start it; `before` are the words of a command that becomes the program."""
        name, *words = command_line
        command_line = [*before, str(Path(sys.executable).parent / name), *words]
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
        """Return the id of the first process, which is also the id of its session."""
        return self._process.pid

    def terminate(self, within_s: float = END_S) -> int:
        """Send SIGTERM to the first process, as a service manager does; return its exit status.

        Raises:
            subprocess.TimeoutExpired: the process does not end in time.
        """
        self._process.terminate()
        return self._process.wait(within_s)

    def kill(self) -> None:
        """Kill all its processes, as `kill -9` does, but not FlexKV's server."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def wait_healthy(self, look: Callable[[], object]) -> None:
        """Return once `look()` raises no OSError.

        Raises:
            RuntimeError: the program has ended or takes too long; the error quotes its log.
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
        """Return an error that quotes the log."""
        said = self._log.read_text(errors="replace").splitlines()
        last = len(said) - LOG_LINES
        wrong = next((i for i, line in enumerate(said) if "Traceback" in line), max(last, 0))
        lines = [f"{self._log}: {error}", *said[wrong : wrong + LOG_LINES]]
        return RuntimeError("\n".join(lines))


class VllmServe(Program):
    """A `vllm serve`: its processes, and requests to it. A context manager."""

    def __init__(self, served: Served, folder: Path) -> None:
        super().__init__(folder / "vllm.log")
        self._served, self._folder = served, folder
        self.address = f"ipc://{folder}/socket"
        """The address of FlexKV's server."""
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
        host = served.host
        self._start(command_line, environment, () if host is None else host.command)
        return self

    def wait_ready(self) -> None:
        """Return once the engine accepts requests.

        Raises:
            RuntimeError: it has ended or takes too long; the error quotes its log.
        """
        self.wait_healthy(lambda: self.request("GET", "/health"))

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> bytes:
        """Send a request, and return the body of the answer. In names of headers "_" means "-".

        Raises:
            OSError: there is no answer, or its status is not 200.
        """
        peer = _Connection(self.port, self._served.host)
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
        """Return the greedy answer to a prompt, and how many tokens of the prompt were cached.

        With `dp_rank`, that data-parallel engine answers; otherwise any engine does.
        """
        headers = {} if dp_rank is None else {"X_data_parallel_rank": str(dp_rank)}
        body = completion(prompt, tokens)
        answer = json.loads(self.request("POST", "/v1/completions", body, **headers))
        return token_ids(answer), cached_tokens(answer)

    def first_token_s(self, prompt: list[int], tokens: int = 4) -> float:
        """Return the seconds until the first token of an answer arrives."""
        first_s, *_ = self.arrivals_s(prompt, tokens)
        return first_s

    def arrivals_s(self, prompt: list[int], tokens: int) -> Iterator[float]:
        """Yield the seconds after which each part of a streamed answer arrives."""
        for arrived_s, _ in self.streamed(prompt, tokens):
            yield arrived_s

    def streamed(self, prompt: list[int], tokens: int) -> Iterator[tuple[float, list[int]]]:
        """Yield each part of a streamed answer: after how many seconds, and its tokens.

        The last part only says that nothing follows.
        """
        peer = _Connection(self.port, self._served.host)
        body = json.dumps({**completion(prompt, tokens), "stream": True})
        begin_s = time.perf_counter()
        peer.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        for line in peer.getresponse():
            if line.startswith(b"data:"):
                arrived_s = time.perf_counter() - begin_s
                said = line.removeprefix(b"data:").strip()
                yield arrived_s, [] if said == b"[DONE]" else token_ids(json.loads(said))
        peer.close()

    def counted(self, name: str) -> float:
        """Return the value of one of vLLM's counters, summed over its labels."""
        lines = self.request("GET", "/metrics").decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    def forget(self) -> None:
        """Empty the engine's own cache, once nothing uses it.

        Raises:
            TimeoutError: blocks of the cache stay in use.
        """
        for _ in range(200):
            try:
                answer = self.request("POST", "/reset_prefix_cache")
            except OSError as error:
                raise self.failed(error) from error
            if b"true" in answer:
                return
            time.sleep(0.05)
        raise TimeoutError("the engine's cache is still in use")


class _Connection(http.client.HTTPConnection):
    """A connection to a port of a machine that only its own programs reach."""

    def __init__(self, port: int, host: Host | None) -> None:
        super().__init__("127.0.0.1", port, timeout=REQUEST_S)
        self._machine = host

    def connect(self) -> None:
        """Connect, from the machine itself."""
        if self._machine is None:
            super().connect()
        else:
            self.sock = self._machine.connect("127.0.0.1", self.port, REQUEST_S)


def completion(prompt: list[int], tokens: int) -> dict[str, Any]:
    """Return the body of a `/v1/completions` request for a greedy answer of `tokens` tokens."""
    return {"model": MODEL_NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True}  # fmt: skip


def token_ids(answer: Any) -> list[int]:
    """Return the tokens in an answer of `/v1/completions`."""
    ids: list[int] = answer["choices"][0]["token_ids"]
    return ids


def cached_tokens(answer: Any) -> int:
    """Return how many prompt tokens were cached; needs `--enable-prompt-tokens-details`."""
    details = answer["usage"].get("prompt_tokens_details") or {}
    return details.get("cached_tokens") or 0


def free_port() -> int:
    """Return a port of this machine that is free at the moment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
