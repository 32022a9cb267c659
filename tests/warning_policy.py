"""Which warnings fail a test: those that a call of our own code causes, and leaks.

A library that deprecates something attributes the warning to the line that called it, and sometimes
to itself. Python's filters see only the module to which a warning is attributed, and that is not
always the caller: torch calls `forward` for the caller of a module, so a model's warning about an
argument is attributed to torch. So each warning is judged by the stack before it is shown. We go
outward from the frame to which it is attributed, past the code that only passes calls on (the
standard library, torch's `__call__`), to the first frame that does not:

    our code          an error, raised where the warning was given, as by a filter "error"
    another's code    it warns about itself: pytest lists the warning, the test goes on

A leak (ResourceWarning, a coroutine never awaited, an exception in `__del__`) is an error unless
another's code dropped the object. What the garbage collector finds, wherever it happens to run, and
what pytest drops, counts as ours. So do pytest's warnings about our tests.
"""

from __future__ import annotations

import gc
import sys
import sysconfig
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

INSTALLED = {"site-packages", "dist-packages"}
STANDARD_LIBRARY = tuple({sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")})
FORWARDERS = ("/torch/nn/modules/module.py", "/torch/utils/_contextlib.py")
"""Files of libraries that only pass calls on, with unchanged arguments."""
HARNESS = {"_pytest", "pytest", "pluggy", "pytest_asyncio", "pytest_cov", "hypothesis"}
"""Packages that call our tests, and drop the objects that the tests leave behind."""

Place = tuple[str, str]
"""A file, and the dotted name of its module."""

collections = [0]
"""The number of runs of the garbage collector that are under way."""


def _count_collections(phase: str, _: dict[str, int]) -> None:
    collections[0] += 1 if phase == "start" else -1


def _is_leak(message: Warning) -> bool:
    return isinstance(
        message,
        ResourceWarning
        | pytest.PytestUnraisableExceptionWarning
        | pytest.PytestUnhandledThreadExceptionWarning,
    ) or (isinstance(message, RuntimeWarning) and "was never awaited" in str(message))


def _places(filename: str, lineno: int, frame: FrameType | None) -> list[Place]:
    """Return the files and modules on the stack, from the place of the warning outward."""
    stack: list[Place] = []
    first = None
    while frame is not None:
        if first is None and (frame.f_code.co_filename, frame.f_lineno) == (filename, lineno):
            first = len(stack)
        stack.append((frame.f_code.co_filename, str(frame.f_globals.get("__name__", ""))))
        frame = frame.f_back
    # Source that is being compiled has no frame yet; its compiler is the next place.
    return [(filename, ""), *stack] if first is None else stack[first:]


def _is_passed_on(place: Place) -> bool:
    """Return whether the code at a place only passes calls on."""
    file, _ = place
    generated = file.startswith("<")
    standard = file.startswith(STANDARD_LIBRARY) and not INSTALLED & set(Path(file).parts)
    return generated or standard or file.endswith(FORWARDERS)


def _is_ours(place: Place, root: Path) -> bool:
    file, module = place
    path = Path(file)
    inside = path.is_relative_to(root) and not INSTALLED & set(path.parts)
    return inside or module.partition(".")[0] == "flexkv"


def is_error(message: Warning, places: list[Place], root: Path) -> bool:
    """Return whether a warning fails a test, given the places on its stack, innermost first."""
    if isinstance(message, pytest.PytestWarning) and not isinstance(message, DeprecationWarning):
        return True
    leak = _is_leak(message)
    if leak and collections[0]:
        return True
    for place in places:
        harness = leak and HARNESS & set(Path(place[0]).parts)
        if not harness and not _is_passed_on(place):
            return _is_ours(place, root)
    return leak


def judging(root: Path) -> Callable[..., None]:
    """Return a `showwarning` that raises errors, and shows other warnings as it does now."""
    show = warnings.showwarning

    def judge(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, *more: Any
    ) -> None:
        warning = message if isinstance(message, Warning) else category(message)
        if is_error(warning, _places(filename, lineno, sys._getframe(1)), root):
            raise warning
        show(message, category, filename, lineno, *more)

    return judge


@contextmanager
def judged(root: Path) -> Iterator[None]:
    """Judge the warnings of a phase; pytest begins each phase by replacing `showwarning`."""
    before = warnings.showwarning
    warnings.showwarning = judging(root)
    try:
        yield
    finally:
        warnings.showwarning = before


def pytest_configure(config: pytest.Config) -> None:
    """Judge the warnings between tests, up to the last garbage; pytest itself undoes it."""
    warnings.showwarning = judging(config.rootpath)
    gc.callbacks.append(_count_collections)


# pytest replaces `showwarning` in each of these hooks; the last wrapper runs inside pytest's own.


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_collection(session: pytest.Session) -> Generator[None, Any, Any]:
    """Judge the warnings of importing the test modules."""
    with judged(session.config.rootpath):
        return (yield)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Judge the warnings of a test and its fixtures."""
    with judged(item.config.rootpath):
        return (yield)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, Any, Any]:
    """Judge what is garbage-collected after all tests have run."""
    with judged(session.config.rootpath):
        return (yield)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_terminal_summary(config: pytest.Config) -> Generator[None, Any, Any]:
    """Judge what is garbage-collected while pytest writes its summary."""
    with judged(config.rootpath):
        return (yield)
