"""Processes forked from one that has imported vLLM already.

An import takes longer than a small engine takes to start. Each process is a session of its own, so
that everything that it starts can be killed with it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Generator
from contextlib import suppress
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

RUN_S, LOG_BYTES = 240.0, 4000

Work = Callable[..., Generator[Any, Any, None]]


@cache
def _context() -> ForkServerContext:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Threads that busy-wait for each other cost more than they gain on a shared machine.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.vllm.preload"])
    return context


class Forked:
    """A process that runs a generator, sends what that yields, and passes on what it is asked."""

    def __init__(self, log: Path, work: Work, *arguments: Any) -> None:
        """Start it; its output goes to the file `log`."""
        self._log = log
        self._pipe, theirs = _context().Pipe()
        self._process = _context().Process(
            target=_work, args=(theirs, str(log), work, arguments), name=work.__name__
        )
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Return its process id, which is also its session's."""
        assert self._process.pid is not None
        return self._process.pid

    def ask(self, what: Any) -> None:
        """Send a value to the generator; do nothing if the process has ended."""
        with suppress(OSError):
            self._pipe.send(what)

    def told(self, within_s: float = RUN_S) -> Any:
        """Return the next value that the generator yielded."""
        try:
            if self._pipe.poll(within_s):
                return self._pipe.recv()
            why = f"nothing in {within_s} s"
        except (EOFError, ConnectionResetError):
            why = "it has ended"
        raise AssertionError(f"{why}: {self._log.read_bytes()[-LOG_BYTES:].decode()}")

    def kill(self) -> None:
        """Kill it and all processes of its session. Idempotent."""
        with suppress(ProcessLookupError, ValueError):
            os.killpg(self.pid, signal.SIGKILL)
        with suppress(ValueError):
            self._process.join()
            self._process.close()
        self._pipe.close()


def _work(pipe: Connection, log: str, work: Work, arguments: tuple[Any, ...]) -> None:
    os.setsid()
    said = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    for descriptor in (1, 2):
        os.dup2(said, descriptor)
    works = work(*arguments)
    try:
        said = next(works)
        while True:
            pipe.send(said)
            try:
                asked = pipe.recv()
            except EOFError:  # the test has closed the pipe
                break
            said = works.send(asked)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        raise
    finally:
        pipe.close()


def fork_workers() -> None:
    """Make vLLM fork its processes, which would otherwise import everything again on the CPU."""
    import vllm.v1.engine.utils
    import vllm.v1.executor.multiproc_executor

    context = multiprocessing.get_context("fork")
    for module in (vllm.v1.engine.utils, vllm.v1.executor.multiproc_executor):
        module.get_mp_context = lambda: context
