"""Time to the first token of a prefix that another `vllm serve` has in host memory, over a wire.

Two engines run on machines of their own, with a wire between them that delays each packet by 5 ms;
the Redis that both know runs on the first one's. A prompt is computed on the first engine, then
asked of the second, which fetches it, and once more of that, which has it in host memory then. As
many bytes as were fetched also go over the wire by a plain TCP connection that stays open. Prompts
have 3,088 tokens: 3,072 in whole spans, and 16 that are always computed. All answers must be equal.
Workers busy-wait for a second after work. On machines of their own the first engine's would be in
nobody's way, so the second engine is asked when they have gone to sleep.
Needs vLLM in this Python (`scripts/vllm-venv`), root, iproute2, nftables and redis-server.
"""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import Figures, Options, median_ratio
from flexkv.common.errors import BackendUnavailableError
from flexkv.index.spans import SPAN_TOKENS_MAX
from flexkv.server.operator import command
from flexkv.testing.namespaces import Host, Network, missing
from flexkv.testing.redis_server import PROGRAMS, RedisServer
from flexkv.testing.tiny_model import Shape, make_tiny_model
from flexkv.testing.vllm_serve import OWN, Served, VllmServe
from flexkv.testing.wire import Quality, Wire

MODEL = Shape(layers=12, hidden=1024, heads=16, kv_heads=4)
BLOCK_TOKENS, SPANS, OWN_TOKENS, ANSWER_TOKENS = 32, 12, 16, 8
DELAY_MS = 5.0
PASSWORD = "of the benchmark"
PATIENCE_S, ASLEEP_S = 120.0, 2.0
FETCHED = "flexkv_connector_fetched_blocks_total"


def measure(options: Options) -> Figures:
    """Return the figures of the case."""
    if lacking := _lacking():
        return {"vLLM over a wire": f"is not measured: {lacking}"}
    repeats, spans = (1, 2) if options.quick else (options.repeats, SPANS)
    words = random.Random(0)
    length = spans * SPAN_TOKENS_MAX + OWN_TOKENS
    prompts = [[words.randrange(3, 1000) for _ in range(length)] for _ in range(repeats + 1)]
    with tempfile.TemporaryDirectory(dir=options.directory) as name, ExitStack() as stack:
        pair = _Pair(Path(name).absolute(), len(prompts) * length, stack)
        pair.ask(prompts[0])  # warms up
        rounds = [pair.ask(prompt) for prompt in prompts[1:]]
        return _figures(rounds)


def _lacking() -> str:
    if importlib.util.find_spec("vllm") is None:
        return "scripts/vllm-venv makes an environment with vLLM"
    if not any(map(shutil.which, PROGRAMS)):
        return "redis-server is not installed"
    return missing()


class _Round(NamedTuple):
    """What one prompt has taken.

    Attributes:
        cold_s: to the first token, computed on the first engine.
        peer_s: to the first token on the second one, which fetched the rest.
        host_s: to the first token there, from host memory.
        wire_s: a plain transfer of as many bytes.
        nbytes: how many were fetched.
    """

    cold_s: float
    peer_s: float
    host_s: float
    wire_s: float
    nbytes: int


class _Pair:
    """Two engines on machines of their own, and plain sockets between these."""

    def __init__(self, folder: Path, tokens: int, stack: ExitStack) -> None:
        """Start everything; the host memory of each engine has room for so many tokens."""
        one, other = stack.enter_context(Network(2)).hosts
        wire = stack.enter_context(Wire((one, other), Quality(DELAY_MS)))
        redis = RedisServer(PASSWORD, wire.addresses[0], one.command, one.connect)
        stack.callback(redis.close)
        redis.start()
        model = make_tiny_model(folder / "model", MODEL)
        engines = []
        for host, address in zip((one, other), wire.addresses, strict=True):
            keys = {
                "num_cpu_blocks": 2 * tokens // BLOCK_TOKENS, "num_ssd_blocks": 0,
                "load_if_faster": False, "enable_p2p_cpu": True, "redis_host": wire.addresses[0],
                "redis_port": redis.port, "redis_password": PASSWORD, "local_ip": address,
            }  # fmt: skip
            (own := folder / address).mkdir()
            engines.append(stack.enter_context(VllmServe(_served(model, host, keys), own)))
        for engine in engines:
            engine.wait_ready()
            _until(partial(_is_lent, engine), "its memory is not lent")
            engine.first_token_s([7] * 100)
        self._first, self._second = engines
        self._plain = _Plain(one, other, wire.addresses[0], stack)
        self._asked_spans = 0

    def ask(self, prompt: list[int]) -> _Round:
        """Ask for a new prompt everywhere.

        Raises:
            RuntimeError: an answer was another one, or not all of it came from where it should.
        """
        cold_s, answer = _first_token(self._first, prompt)
        self._asked_spans += len(prompt) // SPAN_TOKENS_MAX
        _until(self._is_known, f"{self._asked_spans} spans are not known")
        time.sleep(ASLEEP_S)
        took_s: dict[str, float] = {}
        before, bytes_before = self._second.counted(FETCHED), self._read_bytes()
        for source in ("its peer", "host memory"):
            self._second.forget()
            took_s[source], again = _first_token(self._second, prompt)
            if again != answer:
                raise RuntimeError(f"from {source} the answer is {again}, not {answer}")
        fetched = self._second.counted(FETCHED) - before
        if fetched != len(prompt) // SPAN_TOKENS_MAX * SPAN_TOKENS_MAX // BLOCK_TOKENS:
            raise RuntimeError(f"{fetched} blocks were fetched")
        nbytes = self._read_bytes() - bytes_before
        wire_s = self._plain.transfer_s(nbytes)
        return _Round(cold_s, took_s["its peer"], took_s["host memory"], wire_s, nbytes)

    def _is_known(self) -> bool:
        """Return whether the second engine's server knows everything that the first one has."""
        nodes = _cluster(self._second)["state"]["nodes"]
        return [node["spans"] for node in nodes] == [self._asked_spans]

    def _read_bytes(self) -> int:
        nbytes: int = _cluster(self._second)["read_in_all"]["bytes"]
        return nbytes


def _until(condition: Callable[[], bool], why: str) -> None:
    """Wait until a condition holds."""
    until_s = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > until_s:
            raise TimeoutError(why)
        time.sleep(0.02)


def _is_lent(engine: VllmServe) -> bool:
    """Return whether an engine's server has its memory; the engine answers before that, too."""
    try:
        instances = command(engine.address, "status")["instances"]
    except BackendUnavailableError:
        return False
    return [instance["ranks"] for instance in instances.values()] == [[0]]


def _served(model: Path, host: Host, keys: dict[str, Any]) -> Served:
    arguments = (
        "--dtype", "float32", "--kv-cache-memory-bytes", str(1 << 29),
        "--block-size", str(BLOCK_TOKENS), "--max-model-len", "8192",
        "--max-num-batched-tokens", "8192",
    )  # fmt: skip
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": "0", "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    settings = {"cache_config": keys, "prefetch_stop": "complete"}
    return Served(model, OWN, settings, arguments, environment, host)


def _first_token(engine: VllmServe, prompt: list[int]) -> tuple[float, list[int]]:
    """Return the seconds to the first token of an answer, and the answer."""
    parts = list(engine.streamed(prompt, ANSWER_TOKENS))
    return parts[0][0], [token for _, tokens in parts for token in tokens]


def _cluster(engine: VllmServe) -> Any:
    return command(engine.address, "status")["statistics"]["cluster"]


class _Plain:
    """A plain connection from one machine to another, whose ends are in this process."""

    def __init__(self, source: Host, target: Host, address: str, stack: ExitStack) -> None:
        listening = source.inside(lambda: socket.create_server((address, 0)))
        self._reads = target.connect(address, listening.getsockname()[1], PATIENCE_S)
        self._sends, _ = listening.accept()
        listening.close()
        for end in (self._reads, self._sends):
            stack.callback(end.close)

    def transfer_s(self, nbytes: int) -> float:
        """Return the seconds from the question for so many bytes to the last of them."""
        buffer, data = memoryview(bytearray(nbytes)), bytes(nbytes)

        def send() -> None:
            self._sends.recv(1)
            self._sends.sendall(data)

        thread = threading.Thread(target=send)
        thread.start()
        begin_s, at = time.perf_counter(), 0
        self._reads.sendall(b"?")
        while at < nbytes:
            at += self._reads.recv_into(buffer[at:])
        took_s = time.perf_counter() - begin_s
        thread.join()
        return took_s


def _figures(rounds: list[_Round]) -> Figures:
    def median(of: Callable[[_Round], float]) -> float:
        return statistics.median(map(of, rounds))

    peer = [each.peer_s for each in rounds]
    return {
        "peer / (host + wire) (bar: 1.3)": median_ratio(
            peer, [each.host_s + each.wire_s for each in rounds]
        ),
        "computing / peer (bar: 5)": median_ratio([each.cold_s for each in rounds], peer),
        "computing, ms": 1e3 * median(lambda each: each.cold_s),
        "peer, ms": 1e3 * median(lambda each: each.peer_s),
        "host, ms": 1e3 * median(lambda each: each.host_s),
        "wire, ms": 1e3 * median(lambda each: each.wire_s),
        "fetched, MiB": rounds[0].nbytes / 2**20,
        "wire, MiB/s": median(lambda each: each.nbytes / 2**20 / each.wire_s),
        "load average": os.getloadavg()[0],
    }
