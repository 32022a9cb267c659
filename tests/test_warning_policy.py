"""Tests of which warnings fail a test: see `tests/warning_policy.py`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LIBRARY = """
import functools
import gc
import warnings


def renamed(old=None, new=None):
    if old is not None:
        warnings.warn("old is new now", DeprecationWarning, stacklevel=2)


def wrapped(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        warnings.warn(f"{function.__name__} goes", FutureWarning, stacklevel=2)
        return function(*args, **kwargs)

    return call


@wrapped
def going():
    pass


def calls_itself_wrongly():
    renamed(old=1)
    going()


def warns_about_itself():
    warnings.warn("I am untested here", UserWarning)


def leaks():
    open(__file__)


async def work():
    pass


def forgets_to_await():
    work()


def collect():
    gc.collect()
"""
"""An installed package that is not ours."""

TRAMPOLINE = """
class Module:
    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)
"""
"""A copy of how torch forwards the call of a module."""

MODEL = """
import warnings

from torch.nn.modules.module import Module


class Layer(Module):
    def forward(self, old=None, cache=None):
        if old is not None:
            warnings.warn("use cache", FutureWarning, stacklevel=2)


class Model(Module):
    def forward(self):
        Layer()(old=1)
"""


OURS = "import library\n\n\ndef call():\n    library.renamed(old=1)\n"
"""A module of our own that is not a test module."""

OUR_CALLS = [
    "library.renamed(old=1)",
    "ours.call()",
    "library.going()",
    "functools.partial(library.renamed, old=1)()",
    "list(map(lambda one: library.renamed(old=one), [1]))",
    "model.Layer()(old=1)",
    "import old_name",
    "warnings.warn('of our own')",
    "eval('1 is 1')",
]

LEAKS = [
    "open(__file__)",
    "library.work()",
    "asyncio.run(drop())",
    "asyncio.new_event_loop(); gc.collect()",
    "cycle(); gc.collect()",
    "cycle(); library.collect()",
    "Broken()",
    "run_in_thread(fail)",
]

THEIR_CALLS = [
    "library.calls_itself_wrongly()",
    "library.warns_about_itself()",
    "library.leaks()",
    "library.forgets_to_await()",
    "model.Model()()",
    "import noisy",
]

TEST_MODULE = """
import asyncio
import functools
import gc
import threading
import warnings

import library
import model
import ours


class Broken:
    def __del__(self):
        raise ValueError


def fail():
    raise ValueError


def run_in_thread(target):
    thread = threading.Thread(target=target)
    thread.start()
    thread.join()


def cycle():
    held = [open(__file__)]
    held.append(held)


async def drop():
    library.work()
    await asyncio.sleep(0)
"""

COLLECTED = {
    "imports": "import old_name\n\n\ndef test():\n    pass\n",
    "class": "class TestNothing:\n    def __init__(self):\n        pass\n",
    "their_import": "import noisy\n\n\ndef test():\n    pass\n",
}
"""Test modules that cause a warning when pytest collects them."""


def run(work: Path, modules: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run pytest over test modules, with the libraries installed beside them."""
    installed = work / "venv" / "site-packages"
    for package in ("torch", "torch/nn", "torch/nn/modules"):
        (installed / package).mkdir(parents=True)
        (installed / package / "__init__.py").touch()
    (installed / "torch/nn/modules/module.py").write_text(TRAMPOLINE)
    (installed / "library.py").write_text(LIBRARY)
    (installed / "model.py").write_text(MODEL)
    (installed / "old_name.py").write_text("import warnings\nwarnings.warn('gone', stacklevel=2)")
    (installed / "noisy.py").write_text("import warnings\nwarnings.warn('untested')")
    (work / "ours.py").write_text(OURS)
    for name, text in modules.items():
        (work / f"test_{name}.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider"]
    command += ["-p", "tests.warning_policy", "-o", "filterwarnings=always"]
    command += ["-o", "asyncio_default_fixture_loop_scope=function", "-c", "/dev/null"]
    command += ["--continue-on-collection-errors", "--rootdir", "."]
    path = f"{ROOT}:{installed}:{work}"
    return subprocess.run(
        command,
        cwd=work,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the outcome of each test of a run: PASSED, FAILED or ERROR."""
    lines = [TEST_MODULE]
    for number, call in enumerate(OUR_CALLS + LEAKS + THEIR_CALLS):
        lines.append(f"\n\ndef test_{number}():\n    {call}\n")
    done = run(tmp_path_factory.mktemp("policy"), {"calls": "".join(lines), **COLLECTED})
    said = re.findall(
        r"^(PASSED|FAILED|ERROR) test_(\S+?)\.py(?:::test_?(\w*))?", done.stdout, re.M
    )
    calls = OUR_CALLS + LEAKS + THEIR_CALLS
    return {
        calls[int(number)] if module == "calls" else module: outcome
        for outcome, module, number in said
    }


@pytest.mark.parametrize("call", OUR_CALLS)
def test_a_warning_that_our_call_causes_is_an_error(call: str, outcomes: dict[str, str]) -> None:
    """A deprecated call of ours fails a test, by whatever path it reaches the library."""
    assert outcomes[call] == "FAILED"


@pytest.mark.parametrize("call", LEAKS)
def test_a_leak_is_an_error(call: str, outcomes: dict[str, str]) -> None:
    """What our code leaves open fails a test, even if a library triggers the garbage collection."""
    assert outcomes[call] == "FAILED"


@pytest.mark.parametrize("call", THEIR_CALLS)
def test_what_a_library_says_of_itself_is_no_error(call: str, outcomes: dict[str, str]) -> None:
    """A library that warns about its own calls, or leaks on its own, fails no test of ours."""
    assert outcomes[call] == "PASSED"


def test_collection_is_judged_too(outcomes: dict[str, str]) -> None:
    """At collection, a deprecated import or an unusable test class of ours is an error.

    A library's warning about itself is not.
    """
    assert [outcomes[name] for name in COLLECTED] == ["ERROR", "ERROR", "PASSED"]


def test_the_last_garbage_is_judged_too(tmp_path: Path) -> None:
    """A leak that is collected only when pytest ends makes the run fail."""
    leak = "\n\ndef test():\n    gc.disable()\n    cycle()\n"
    done = run(tmp_path, {"it": TEST_MODULE + leak})
    assert "1 passed" in done.stdout, done.stdout + done.stderr
    assert done.returncode != 0
    assert "ResourceWarning: unclosed file" in done.stderr
