"""Runs real vLLM engines in processes of their own."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is not None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its dependencies
        importlib.import_module("flexkv.integration.vllm.scheduler")

ROOT = Path(__file__).parents[2]
RUN_S = 240.0
collect_ignore = ["upstream"]
"""Scenarios over vLLM's own test utilities, which are called `tests` too: see `test_upstream`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs vLLM where there is none."""
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed: make test-vllm"))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Give the folder of a small model."""
    from flexkv.integration.vllm.tiny_model import make_tiny_model

    return str(make_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


class Started:
    """An engine's process."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.vllm.engine", json.dumps(plan)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    def answer(self) -> dict[str, Any]:
        """Give what it says."""
        said, errors = self._process.communicate(timeout=RUN_S)
        for line in said.splitlines():
            if line.startswith("ANSWER "):
                told: dict[str, Any] = json.loads(line.removeprefix("ANSWER "))
                return told
        raise AssertionError(f"the engine ended with {self._process.returncode}: {errors[-4000:]}")

    def first_answer(self) -> dict[str, Any]:
        """Give what it says, while it stays."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                told: dict[str, Any] = json.loads(line.removeprefix("ANSWER "))
                return told
        raise AssertionError("the engine said nothing")

    def kill(self) -> None:
        """Kill it, and everything that belongs to its session."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()


@pytest.fixture
def run(model: str, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Give what runs a plan to its end; with keywords over the usual ones."""
    return lambda **plan: Started(planned(model, tmp_path, plan)).answer()


@pytest.fixture
def start(model: str, tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """Give what starts a plan, and kills it at last."""
    started: list[Started] = []

    def begin(**plan: Any) -> Started:
        started.append(Started(planned(model, tmp_path, plan)))
        return started[-1]

    yield begin
    for each in started:
        each.kill()


def planned(model: str, folder: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Give a whole plan, with FlexKV's files in a folder."""
    cache = {
        "num_cpu_blocks": 1024, "num_ssd_blocks": 2048, "ssd_cache_dir": str(folder),
        "load_if_faster": False, **plan.pop("cache", {}),
    }  # fmt: skip
    settings = {"server_recv_port": f"ipc://{folder}/socket", "log_level": "warning"}
    return {"model": model, "settings": {**settings, "cache_config": cache}, **plan}
