"""moto, a double of S3 in memory, in a virtual environment of its own (`make moto`)."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAM = Path(os.environ.get("MOTO_VENV", Path(__file__).parents[1] / ".venv-moto"))
PATIENCE_S = 60.0


@contextmanager
def serving() -> Iterator[tuple[int, int]]:
    """Start moto on a free port, and stop it afterwards; yield the port and the process."""
    program = PROGRAM / "bin/moto_server"
    assert program.exists(), f"there is no {program}: run `make moto`"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(program), "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            until_s = time.monotonic() + PATIENCE_S
            while not _answers(port):
                assert server.poll() is None, "moto has ended"
                assert time.monotonic() < until_s, "moto does not answer"
                time.sleep(0.05)
            yield port, server.pid
        finally:
            server.kill()


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
