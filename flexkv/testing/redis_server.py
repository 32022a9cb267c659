"""A real Redis or Valkey server for tests, on loopback or elsewhere, that writes no file.

It dies with the process that started it, however that ends. The environment variable REDIS_SERVER
names another program than the installed one.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence

PROGRAMS = "redis-server", "valkey-server"
PATIENCE_S = 30.0
DIES_WITH_US = "setpriv", "--pdeathsig", "KILL"


def _connected(ip: str, port: int, timeout_s: float) -> socket.socket:
    return socket.create_connection((ip, port), timeout_s)


class RedisServer:
    """A server that can be killed and started again, empty, at the same port.

    Attributes:
        port: where it listens.
        password: which its clients have to know; "" if none.
    """

    def __init__(
        self,
        password: str = "",
        ip: str = "127.0.0.1",
        command: Sequence[str] = (),
        connect: Callable[[str, int, float], socket.socket] = _connected,
        more: Sequence[str] = (),
    ) -> None:
        """Choose a free port; `command` and `connect` reach the network in which it is to run.

        `more` are options of the server.
        """
        self._more = more
        self.password, self._ip, self._command, self._connect = password, ip, command, connect
        self._folder = tempfile.TemporaryDirectory(prefix="flexkv-redis-")
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]

    def start(self) -> None:
        """Return once the server answers."""
        programs = [os.environ["REDIS_SERVER"]] if "REDIS_SERVER" in os.environ else PROGRAMS
        program = next(filter(None, map(shutil.which, programs)), None)
        assert program, "redis-server is not installed"
        options = ["--port", str(self.port), "--bind", self._ip, "--dir", self._folder.name]
        options += ["--save", "", "--appendonly", "no", "--loglevel", "warning"]
        options += self._more
        if self.password:
            options += ["--requirepass", self.password]
        command = [*DIES_WITH_US, *self._command, program, *options]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        until_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                self._connect(self._ip, self.port, 1.0).close()
            except OSError:
                assert self._process.poll() is None, "the server has ended"
                assert time.monotonic() < until_s, "the server does not answer"
                time.sleep(0.02)
            else:
                return

    @property
    def pid(self) -> int:
        """Return the server's process."""
        assert self._process is not None, "it is not running"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Return whether it was started and not killed since."""
        return self._process is not None

    def kill(self) -> None:
        """Kill the server: what it knew is lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def close(self) -> None:
        """Kill the server and remove its folder."""
        self.kill()
        self._folder.cleanup()
