"""Fixtures that run real vLLM engines in processes of their own."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from flexkv.common.errors import BackendUnavailableError
from flexkv.server.operator import command

from .engine import Plan, folder_of
from .engine import run as run_here
from .fork import Forked
from .support import proof_of

if importlib.util.find_spec("vllm") is not None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of vLLM's dependencies
        importlib.import_module("flexkv.integration.vllm.scheduler")

INSTALLED = sysconfig.get_path("purelib")
collect_ignore = ["upstream"]
"""Not collected: scenarios over vLLM's own package `tests`, which `test_upstream` runs."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests of this folder without vLLM, and leave out those of engines on newer code."""
    vllm = importlib.util.find_spec("vllm")
    of_vllm = [item for item in items if Path(__file__).parent in item.path.parents]
    if vllm is None:
        for item in of_vllm:
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed: make test-vllm"))
    elif not (Path(vllm.origin or "").is_relative_to(INSTALLED) or os.environ.get("ENGINES")):
        left_out = {item for item in of_vllm if proof_of(item.nodeid) == "engine"}
        config.hook.pytest_deselected(items=[*left_out])
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a small model."""
    from flexkv.testing.tiny_model import make_tiny_model

    return str(make_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="session")
def configured(model: str) -> Any:
    """Return an engine's configuration, as vLLM makes it."""
    import huggingface_hub
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import EngineArgs

    patch = pytest.MonkeyPatch()
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    try:
        arguments = EngineArgs(model=model, dtype="float32", skip_tokenizer_init=True)
        arguments.kv_transfer_config = KVTransferConfig(
            kv_connector="FlexKVConnectorV1", kv_role="kv_both"
        )
        return arguments.create_engine_config()
    finally:
        patch.undo()


class Started:
    """An engine that runs a plan in a process of its own."""

    def __init__(self, plan: dict[str, Any]) -> None:
        log = folder_of(plan["settings"]) / "engine.log"
        self._process = Forked(log, run_plan, plan)

    def answer(self) -> dict[str, Any]:
        """Return what the plan's run reported; the engine goes on."""
        told: dict[str, Any] = self._process.told()
        return told

    def kill(self) -> None:
        """Kill it and all processes of its session."""
        self._process.kill()


def run_plan(plan: dict[str, Any]) -> Generator[dict[str, Any], Any, None]:
    """Run a plan in this process, yield its result, and keep the engine."""
    yield run_here(Plan(**plan))


@pytest.fixture(scope="session")
def expected(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the answers of an engine without a connector."""
    engine = Started(planned(model, tmp_path_factory.mktemp("without"), {"connector": "none"}))
    answer = engine.answer()
    engine.kill()
    return answer


@pytest.fixture
def start(model: str, tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """Yield a function that starts an engine for a plan; kill the engines afterwards."""
    with ExitStack() as stack:

        def begin(**plan: Any) -> Started:
            engine = Started(planned(plan.pop("model", model), tmp_path, plan))
            stack.callback(engine.kill)
            return engine

        yield begin


@pytest.fixture
def run(start: Callable[..., Started]) -> Callable[..., dict[str, Any]]:
    """Return a function that runs a plan to its end, and waits for the end of FlexKV's server."""

    def once(**plan: Any) -> dict[str, Any]:
        engine = start(**plan)
        answer = engine.answer()
        engine.kill()
        if "server" in answer:
            wait_gone(answer["server"]["pid"])
        return answer

    return once


def wait_gone(pid: int, within_s: float = 60.0) -> None:
    """Wait until a process that is no child has ended; it may still be writing to SSD."""
    until_s = time.monotonic() + within_s
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < until_s, f"process {pid} did not end"
        time.sleep(0.05)


def planned(model: str, folder: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Return a whole plan, with FlexKV's files in a folder."""
    cache = {
        "num_cpu_blocks": 1024, "num_ssd_blocks": 2048, "ssd_cache_dir": str(folder),
        "load_if_faster": False, **plan.pop("cache", {}),
    }  # fmt: skip
    settings = {
        "server_recv_port": f"ipc://{folder}/socket", "log_level": "warning",
        "server_answer_ms": 60_000, "match_wait_ms": 50, **plan.pop("settings", {}),
    }  # fmt: skip
    return {"model": model, "settings": {**settings, "cache_config": cache}, **plan}


class External:
    """A server that is started as `flexkv serve`, and belongs to no engine."""

    def __init__(self, model_file: Path, settings: dict[str, Any]) -> None:
        self.address = settings["server_recv_port"]
        folder = folder_of(settings)
        config = folder / "server.json"
        config.write_text(json.dumps(settings))
        self._log = folder / "server.log"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "flexkv.cli.main", "serve", str(model_file)],
                env={**os.environ, "FLEXKV_CONFIG_PATH": str(config)}, stdout=log, stderr=log,
            )  # fmt: skip

    def status(self, within_s: float = 30.0) -> dict[str, Any]:
        """Return its status once it listens."""
        until_s = time.monotonic() + within_s
        while True:
            try:
                told: dict[str, Any] = command(self.address, "status")
            except BackendUnavailableError:
                ended = self._process.poll() is not None
                assert not ended, self._log.read_text()
                assert time.monotonic() < until_s, self._log.read_text()
                time.sleep(0.02)
            else:
                return told

    def kill(self) -> None:
        """Kill it, and wait for its end."""
        self._process.kill()
        self._process.wait()

    def end(self) -> int:
        """End it by SIGTERM, and return its exit status."""
        self._process.terminate()
        return self._process.wait(60)


@pytest.fixture(scope="session")
def hybrids(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Yield what runs the small models with several KV groups."""
    from .hybrids import Hybrids

    with ExitStack() as stack:
        yield Hybrids(tmp_path_factory.mktemp("hybrids"), stack)


@pytest.fixture(scope="session")
def model_file(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file that describes the model to a server, made as a user makes it."""
    file = tmp_path_factory.mktemp("server") / "model.json"
    words = [sys.executable, "-m", "flexkv.integration.vllm.model", model, "--dtype", "float32"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    told = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    file.write_text(told.stdout)
    return file
