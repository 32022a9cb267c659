"""Start programs at once, by forking a process that has imported flexkv already.

Importing it takes most of a second of a core, and the tests start hundreds of programs.

    test ── connects; sends words and descriptors ──▶ template ── forks ──▶ program
      ◀────── the program's id, then its exit status ───┘

A program has its own session, environment, directory and standard streams, and ends like any
other. Only its imports are there already, and `ps` shows the template's command line. How users
start a server is tested in `test_launch.py`.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import random
import runpy
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Any, NamedTuple, NoReturn
from unittest.mock import patch

from flexkv.common.config import ModelConfig, Settings
from flexkv.process.polling import is_readable
from flexkv.server import launch
from flexkv.server.launch import LaunchedServer

from .caches import MODEL

ROOT = Path(__file__).parents[2]
IMPORTED = ("flexkv.cli.main", "tests.system.kill_instance", "tests.system.crash_writer")
REQUEST_BYTES_MAX = 1 << 17

_BETWEEN = """
import json, os, socket, sys
engine = os.getppid()
words = sys.argv[sys.argv.index("flexkv.cli.main") + 1:]
words += ["--parent", str(engine), "--parent-fd"]
channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
channel.connect({path!r})
request = ["flexkv.cli.main", "app", words, dict(os.environ), os.getcwd(), True]
socket.send_fds(channel, [json.dumps(request).encode()], [0, 1, 2, os.pidfd_open(engine)])
"""
"""The code between an engine and its server; it has the template fork in place of an `exec`."""


@contextmanager
def servers_are_forked() -> Iterator[None]:
    """Fork servers that are launched within this context off the template: they start at once."""
    with patch.object(launch, "_BETWEEN", _BETWEEN.format(path=_template())):
        yield


def forked_server(settings: Settings, model: ModelConfig = MODEL) -> LaunchedServer:
    """Return a server that was launched and takes connections."""
    with servers_are_forked():
        return LaunchedServer(model, settings)


class Program:
    """A program with pipes to it: a function of a module, or the module as by `python -m`."""

    def __init__(self, module: str, function: str | None, *words: object) -> None:
        stdin, to = os.pipe()
        of, stdout = os.pipe()
        self.stdin, self.stdout = os.fdopen(to, "w"), os.fdopen(of)
        self._channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.connect(_template())
        asked = [module, function, [str(word) for word in words], dict(os.environ), str(ROOT)]
        socket.send_fds(self._channel, [json.dumps([*asked, False]).encode()], [stdin, stdout, 2])
        os.close(stdin)
        os.close(stdout)
        self.pid = int(self._channel.recv(32))
        self._status: int | None = None

    def say(self, *words: object) -> None:
        """Write a line to its stdin."""
        self.stdin.write(" ".join(map(str, words)) + "\n")
        self.stdin.flush()

    def hear(self, within_s: float = 60.0) -> str:
        """Return the next line of its stdout; empty if it has ended. None may be buffered yet."""
        assert is_readable(self.stdout, within_s), "it says nothing"
        return self.stdout.readline().removesuffix("\n")

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait until it ends, and return its exit status; -9 if it was killed."""
        if self._status is None:
            self._channel.settimeout(timeout_s)
            self._status = int(self._channel.recv(32))
            self._channel.close()
        return self._status

    @property
    def is_running(self) -> bool:
        """Return whether its end was not waited for yet."""
        return self._status is None

    def kill(self) -> None:
        """Send SIGKILL, and wait until it has ended."""
        if self._status is None:
            with suppress(ProcessLookupError):  # it has ended by itself
                os.kill(self.pid, 9)
            self.wait()

    def close(self) -> None:
        """Kill it if it has not ended, and close the pipes."""
        self.kill()
        self.stdin.close()
        self.stdout.close()


@cache
def _template() -> str:
    """Return the path of the socket at which the template process waits for requests."""
    folder = tempfile.TemporaryDirectory(prefix="flexkv-forked-")
    path, owner = f"{folder.name}/socket", os.getpid()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen(64)
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.system.forked", str(listener.fileno())],
            cwd=ROOT, pass_fds=[listener.fileno()], stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def end() -> None:
        if os.getpid() == owner:
            process.terminate()
            process.wait()
            folder.cleanup()

    atexit.register(end)
    return path


class Request(NamedTuple):
    """A program to start."""

    module: str
    function: str | None
    words: list[str]
    environment: dict[str, str]
    folder: str
    is_server: bool
    """Whether it gets the launcher's pidfd as an argument and prints its own process id."""


def _requested(listener: socket.socket) -> tuple[Request, list[int]] | None:
    """Fork for each request. Return it in the child; return None once the parent has ended."""
    with ExitStack() as opened, DefaultSelector() as selector:
        parent = os.pidfd_open(os.getppid())
        opened.callback(os.close, parent)
        selector.register(opened.enter_context(listener), EVENT_READ)
        selector.register(parent, EVENT_READ)
        channels: dict[int, tuple[int, socket.socket]] = {}
        while True:
            for key, _ in selector.select():
                if key.fd == parent:
                    return None
                if key.fileobj is not listener:
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    _tell_end(*channels.pop(key.fd))
                    continue
                channel, _ = listener.accept()
                told, fds, _, _ = socket.recv_fds(channel, REQUEST_BYTES_MAX, 4)
                if not (pid := os.fork()):
                    for each, (_, other) in channels.items():
                        os.close(each)
                        other.close()
                    channel.close()
                    return Request(*json.loads(told)), fds
                for fd in fds:
                    os.close(fd)
                with suppress(OSError):  # the requesting process has ended
                    channel.send(str(pid).encode())
                ended = os.pidfd_open(pid)
                selector.register(ended, EVENT_READ)
                channels[ended] = (pid, channel)


def _tell_end(pid: int, channel: socket.socket) -> None:
    _, status = os.waitpid(pid, 0)
    with channel, suppress(OSError):
        channel.send(str(os.waitstatus_to_exitcode(status)).encode())


def _run(request: Request, fds: list[int]) -> Any:
    """Run what was requested, as a program of its own."""
    os.setsid()
    for number, (name, fd) in enumerate(zip(("stdin", "stdout", "stderr"), fds, strict=False)):
        os.dup2(fd, number)
        os.close(fd)
        stream = os.fdopen(number, "w" if number else "r", 1 if number == 2 else -1, closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    os.environ.clear()
    os.environ.update(request.environment)
    os.chdir(request.folder)
    random.seed()
    tempfile.tempdir = None
    sys.argv = [request.module, *request.words]
    if request.is_server:
        sys.argv.append(str(fds[3]))
        os.write(1, b"%d\n" % os.getpid())
    if request.function is None:
        runpy.run_module(request.module, run_name="__main__", alter_sys=True)
        return 0
    return getattr(import_module(request.module), request.function)()


def main() -> NoReturn:
    """Import everything, and fork programs until the parent has ended."""
    for module in IMPORTED:
        import_module(module)
    gc.collect()
    gc.freeze()
    found = _requested(socket.socket(fileno=int(sys.argv[1])))
    sys.exit(_run(*found) if found is not None else 0)


if __name__ == "__main__":
    main()
