"""A real S3 server for tests: moto, in a virtual environment of its own (`make moto`)."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(os.environ.get("MOTO_VENV", Path(__file__).parents[1] / ".venv-moto"))
PATIENCE_S = 60.0
SECRET = "a-secret-of-tests"


class Moto:
    """A running server.

    Attributes:
        port: where it listens on loopback.
        pid: its process.
        custom: `remote_config_custom` for a bucket of it.
    """

    def __init__(self, port: int, pid: int) -> None:
        self.port, self.pid = port, pid
        self._numbers = itertools.count()

    @property
    def custom(self) -> dict[str, Any]:
        """Return the options of a client."""
        return self.custom_at(self.port)

    def custom_at(self, port: int) -> dict[str, Any]:
        """Return the options of a client that reaches the server by another port."""
        return {
            "endpoint": f"http://127.0.0.1:{port}",
            "region": "us-east-1",
            "access_key_id": "an-access-key",
            "secret_access_key": SECRET,
        }

    def new_bucket(self) -> str:
        """Create a bucket, and return its name."""
        name = f"bucket-{next(self._numbers)}"
        self.request("PUT", name)
        return name

    def request(self, method: str, path: str) -> None:
        """Make a request of one's own."""
        url = f"http://127.0.0.1:{self.port}/{path}"
        with urllib.request.urlopen(urllib.request.Request(url, method=method)):
            pass


@contextmanager
def running() -> Iterator[Moto]:
    """Start a server on a free port, and stop it afterwards."""
    program = PROGRAM / "bin/moto_server"
    assert program.exists(), f"there is no {program}: run `make moto`"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(program), "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as serving:
        try:
            until_s = time.monotonic() + PATIENCE_S
            while not _answers(port):
                assert serving.poll() is None, "moto has ended"
                assert time.monotonic() < until_s, "moto does not answer"
                time.sleep(0.05)
            yield Moto(port, serving.pid)
        finally:
            serving.kill()


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="session")
def moto() -> Iterator[Moto]:
    """Yield a running server."""
    with running() as server:
        yield server
