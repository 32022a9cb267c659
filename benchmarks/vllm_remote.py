"""Time to the first token of a prefix that another `vllm serve` has computed, through a store.

One engine computes prompts, and ends. Another one, with host memory of its own that is empty, is
asked for them: first they come from the store, then from its host memory. The bar for the former is
the latter and 1.3 times what plain reads of the same objects take, as many at once. Most prompts
have 5,904 tokens: 5,888 in whole spans, which are hits in both, and 16 that are always computed.
Two have 6,000 ("cut spans"). A store has whole spans only, so 112 tokens of these are computed at
first, and 16 once host memory has their blocks.

The stores are an S3 server (moto, or Ceph's with `S3_SERVER=rgw`) and a directory, both on this
machine. LMCache, where it is installed, has a directory: its S3 client reaches only servers that
give each bucket a host name.
Needs vLLM in this Python: `scripts/vllm-venv`.
"""

from __future__ import annotations

import asyncio
import importlib.util
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks import lmcache
from benchmarks.harness import Figures, Options, median_ratio
from benchmarks.vllm import BLOCK_SIZE, LOADED, MODEL, PROMPT_BYTES, PROMPT_TOKENS
from flexkv.io.remote.open import open_store
from flexkv.io.remote.options import RemoteOptions
from flexkv.io.remote.store import Listed
from flexkv.server.operator import command
from flexkv.testing.tiny_model import make_tiny_model
from flexkv.testing.vllm_serve import OWN, Served, VllmServe
from tests.moto import PROGRAM
from tests.s3 import running

SPAN_TOKENS, OWN_TOKENS = 256, 16
"""Tokens of a span, and tokens of a prompt behind its whole spans: fewer than in a block."""
CUT = "cut spans, "
"""Begins the names of figures of prompts that end within a span."""
CUT_PROMPTS = 2
ALLOWED = 1.3
"""How many times the plain reads a fetch may take."""
GETS = 20
"""How many objects FlexKV reads at once: those that `remote_read_window_mb` has room for."""
HOST_BLOCKS = 5 * PROMPT_TOKENS // BLOCK_SIZE
"""A fetch may fill a quarter of host memory."""
PATIENCE_S, STILL_S = 300.0, 3.0
READS = RemoteOptions(deadline_s=120.0, gets_max=GETS)


def measure(options: Options) -> Figures:
    """Return the figures of the case."""
    if importlib.util.find_spec("vllm") is None:
        return {"vLLM": "is not installed here: scripts/vllm-venv makes an environment with it"}
    repeats = 1 if options.quick else options.repeats
    tokens = 600 if options.quick else PROMPT_TOKENS
    words = random.Random(0)
    whole = tokens // SPAN_TOKENS * SPAN_TOKENS + OWN_TOKENS
    lengths = [whole] * (repeats + 1) + [tokens] * min(repeats, CUT_PROMPTS)
    prompts = [[words.randrange(3, 1000) for _ in range(length)] for length in lengths]
    with tempfile.TemporaryDirectory(dir=options.directory) as name, ExitStack() as stack:
        folder = Path(name).absolute()
        arms = _arms(folder, stack)
        for arm in arms:
            arm.compute(prompts)
        for arm in arms:
            stack.enter_context(arm.asked_anew())
        # The first prompt warms up.
        for turn, prompt in enumerate(prompts):
            for arm in arms if turn % 2 else reversed(arms):
                arm.ask(turn, prompt, CUT if turn > repeats else "" if turn else None)
        return _figures(arms)


def _arms(folder: Path, stack: ExitStack) -> list[_Arm]:
    model = make_tiny_model(folder / "model", MODEL, "bfloat16")
    arms: list[_Arm] = []
    if PROGRAM.exists():
        s3 = stack.enter_context(running())
        arms.append(_FlexKV("S3", folder, model, f"s3://{s3.new_bucket()}/kv", s3.custom))
    arms.append(_FlexKV("directory", folder, model, f"file://{folder}/shared", {}))
    if not lmcache.missing():
        arms.append(_LMCache("LMCache, directory", folder, model))
    return arms


class _Arm:
    """A store, the engine that fills it, and the one that is asked afterwards.

    Attributes:
        name: in the figures.
        took: the seconds to the first token, of each counted prompt, by where it came from.
    """

    connector: dict[str, Any] = OWN

    def __init__(self, name: str, folder: Path, model: Path) -> None:
        self.name, self._model = name, model
        self._folder = folder / name.replace(", ", "-")
        self._folder.mkdir()
        self.took: dict[str, list[float]] = {}
        self._engine: VllmServe

    @contextmanager
    def _serving(self, name: str) -> Iterator[VllmServe]:
        """Run an engine whose own tiers are empty."""
        (folder := self._folder / name).mkdir()
        arguments = (
            "--dtype", "bfloat16", "--kv-cache-memory-bytes", str(1 << 29),
            "--block-size", str(BLOCK_SIZE), "--max-model-len", "8192",
            "--max-num-batched-tokens", "8192",
        )  # fmt: skip
        environment = {"VLLM_CPU_OMP_THREADS_BIND": "0", "PYTHONHASHSEED": "0"}
        served = Served(self._model, self.connector, self.settings(), arguments, environment)
        with VllmServe(served, folder) as engine:
            engine.wait_ready()
            engine.first_token_s([7] * 100)
            yield engine

    def settings(self) -> dict[str, Any]:
        """Return FlexKV's settings."""
        return {}

    def compute(self, prompts: list[list[int]]) -> None:
        """Have an engine compute prompts and store them, and end it."""
        with self._serving("first") as engine:
            for prompt in prompts:
                self.note("cold", engine.first_token_s(prompt))
                self.stored(engine)
        del self.took["cold"][0]  # it warmed up

    @contextmanager
    def asked_anew(self) -> Iterator[None]:
        """Run the engine that is asked for what the first one has computed."""
        with self._serving("second") as self._engine:
            self.ready(self._engine)
            yield

    def ask(self, number: int, prompt: list[int], kind: str | None) -> None:
        """Ask for a prompt that is in the store, and once more; without a kind do not count it."""
        engine = self._engine
        took = {}
        for source in ("store", "host"):
            engine.forget()
            before = engine.counted(LOADED)
            took[source] = engine.first_token_s(prompt)
            if engine.counted(LOADED) - before < len(prompt) // 2:
                raise RuntimeError(f"{self.name} computed tokens that it should have loaded")
        took |= self.plain_s(number)
        if kind is not None:
            for source, seconds in took.items():
                self.note(kind + source, seconds)

    def note(self, what: str, seconds: float) -> None:
        """Note how long something has taken."""
        self.took.setdefault(what, []).append(seconds)

    def stored(self, engine: VllmServe) -> None:
        """Wait until the store has what an engine has computed."""
        raise NotImplementedError

    def ready(self, engine: VllmServe) -> None:
        """Wait until an engine knows what the store has."""

    def plain_s(self, number: int) -> dict[str, float]:
        """Return the seconds that plain reads of a prompt's objects take, if they are measured."""
        return {}


class _FlexKV(_Arm):
    """FlexKV over a store, whose objects are also read plainly."""

    def __init__(
        self, name: str, folder: Path, model: Path, url: str, custom: dict[str, Any]
    ) -> None:
        super().__init__(name, folder, model)
        self._url, self._custom = url, custom
        self._objects: list[list[Listed]] = []
        """The objects of each prompt."""

    def settings(self) -> dict[str, Any]:
        cache = {
            "num_cpu_blocks": HOST_BLOCKS, "num_ssd_blocks": 0, "enable_remote": True,
            "remote_cache_path": self._url, "remote_config_custom": self._custom,
            "remote_list_per_s": 0, "load_if_faster": False, "io_deadline_s": 120,
        }  # fmt: skip
        return {"cache_config": cache, "prefetch_stop": "complete"}

    def stored(self, engine: VllmServe) -> None:
        command(engine.address, "flush")
        known = {each.name for objects in self._objects for each in objects}
        found = asyncio.run(self._listed())
        self._objects.append([each for each in found if each.name not in known])

    async def _listed(self) -> list[Listed]:
        """Return the objects of spans; others are small."""
        store = open_store(self._url, self._custom, READS)
        pages = [page async for page in store.pages("")]
        store.close()
        return [each for page in pages for each in page if each.size_bytes > 1 << 20]

    def ready(self, engine: VllmServe) -> None:
        until_s = time.monotonic() + PATIENCE_S
        while True:
            told = command(engine.address, "status")["statistics"]["stores"]["remote"]
            if told["listed_rounds"]:
                return
            if time.monotonic() > until_s:
                raise TimeoutError(f"{self.name} is not listed: {told}")
            time.sleep(0.05)

    def plain_s(self, number: int) -> dict[str, float]:
        return {"plain": asyncio.run(self._read(self._objects[number]))}

    async def _read(self, objects: list[Listed]) -> float:
        """Read objects, as many at once as FlexKV does, and return the seconds."""
        store: Any = open_store(self._url, self._custom, READS)
        left = list(objects)
        buffers = {each.name: bytearray(each.size_bytes) for each in objects}

        async def some() -> None:
            while left:
                name, size, _ = left.pop()
                if store.kind == "directory":
                    count = await store.read_into(name, 0, [memoryview(buffers[name])])
                else:
                    count = sum(map(len, await store.get(name, 0, size)))
                assert count == size

        begin_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(GETS):
                group.create_task(some())
        took_s = time.perf_counter() - begin_s
        store.close()
        return took_s

    @property
    def mib(self) -> float:
        """Return the size of a prompt's objects."""
        return sum(each.size_bytes for each in self._objects[-1]) / 2**20


class _LMCache(_Arm):
    """LMCache's server, with a directory behind its host memory."""

    @contextmanager
    def _serving(self, name: str) -> Iterator[VllmServe]:
        store, logs = self._folder / "shared", self._folder / f"server-{name}"
        logs.mkdir()
        store.mkdir(exist_ok=True)
        host_gb = HOST_BLOCKS * BLOCK_SIZE / PROMPT_TOKENS * PROMPT_BYTES / 2**30
        with lmcache.LMCacheServer(logs, BLOCK_SIZE, host_gb, store) as server:
            self.connector = server.connector
            with super()._serving(name) as engine:
                yield engine

    def stored(self, engine: VllmServe) -> None:
        """Wait until the directory does not grow any more: the server does not tell."""
        seen, since_s = -1, time.monotonic()
        until_s = since_s + PATIENCE_S
        while seen <= 0 or time.monotonic() - since_s < STILL_S:
            files = sum(1 for _ in (self._folder / "shared").rglob("*.data"))
            if files != seen:
                seen, since_s = files, time.monotonic()
            if time.monotonic() > until_s:
                raise TimeoutError(f"{self.name} has stored {seen} files")
            time.sleep(0.1)


def _figures(arms: list[_Arm]) -> Figures:
    figures: Figures = {}
    ours = [arm for arm in arms if isinstance(arm, _FlexKV)]
    for arm in arms:
        took = arm.took
        for kind in ("", CUT):
            store = took[kind + "store"]
            if isinstance(arm, _FlexKV):
                sources = zip(took[kind + "host"], took[kind + "plain"], strict=True)
                figures[f"{arm.name}: {kind}store / (host + 1.3 x plain)"] = median_ratio(
                    store, [host + ALLOWED * plain for host, plain in sources]
                )
            else:
                for each in ours:
                    figures[f"{arm.name} / FlexKV, {kind}{each.name}"] = median_ratio(
                        store, each.took[kind + "store"]
                    )
        if isinstance(arm, _FlexKV):
            figures[f"{arm.name}: plain, MiB/s"] = arm.mib / statistics.median(took["plain"])
        for what, seconds in took.items():
            figures[f"{arm.name}: {what}, ms"] = 1e3 * statistics.median(seconds)
    if not PROGRAM.exists():
        figures["S3"] = "is not measured: make moto"
    if absent := lmcache.missing():
        figures["LMCache"] = f"is not measured: pip install --no-deps {' '.join(absent)}"
    return figures
