"""Processes that have imported vLLM already: they are forked from one that did so once.

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
    # Threads that wait for each other in a loop cost more than they give where others run, too.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.vllm.preload"])
    return context


class Forked:
    """A process that tells what a generator yields, and sends it what it is asked."""

    def __init__(self, log: Path, work: Work, *arguments: Any) -> None:
        """Let it begin; what it says goes to a file."""
        self._log = log
        self._pipe, theirs = _context().Pipe()
        self._process = _context().Process(
            target=_work, args=(theirs, str(log), work, arguments), name=work.__name__
        )
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Give its process id, which is that of its session, too."""
        assert self._process.pid is not None
        return self._process.pid

    def ask(self, what: Any) -> None:
        """Let it go on with this: what it yields then is told. One that has ended hears nothing."""
        with suppress(OSError):
            self._pipe.send(what)

    def told(self, within_s: float = RUN_S) -> Any:
        """Give what it tells next."""
        try:
            if self._pipe.poll(within_s):
                return self._pipe.recv()
            why = f"nothing in {within_s} s"
        except (EOFError, ConnectionResetError):
            why = "it has ended"
        raise AssertionError(f"{why}: {self._log.read_bytes()[-LOG_BYTES:].decode()}")

    def kill(self) -> None:
        """Kill it, and everything that belongs to its session. Idempotent."""
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
            except EOFError:  # nobody is left to ask
                break
            said = works.send(asked)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        raise
    finally:
        pipe.close()


def fork_workers() -> None:
    """Let vLLM fork its processes, too: on the CPU it would have them import everything again."""
    import vllm.v1.engine.utils
    import vllm.v1.executor.multiproc_executor

    context = multiprocessing.get_context("fork")
    for module in (vllm.v1.engine.utils, vllm.v1.executor.multiproc_executor):
        module.get_mp_context = lambda: context
