"""A real Mooncake Store for tests: its master, and a process that adds memory to it."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

PATIENCE_S = 60.0
SEGMENT_BYTES = 192 << 20
PROGRAMS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
"""Where its programs are: beside this Python, or anywhere else."""
_MEMORY = """
import sys
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
code = store.setup("127.0.0.1", "P2PHANDSHAKE", int(sys.argv[2]), 0, "tcp", "", sys.argv[1])
print("there", code, flush=True)
sys.stdin.read()
"""


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Mooncake:
    """A store on loopback.

    Attributes:
        port: of its master.
    """

    def __init__(self, segment_bytes: int = SEGMENT_BYTES) -> None:
        """Start the master and the memory."""
        self.port = free_port()
        self._segment_bytes = segment_bytes
        self._numbers = itertools.count()
        self._start()

    def _start(self) -> None:
        self.master = self._master()
        try:
            self.memory = self._memory()
        except BaseException:
            self.kill_master()
            raise

    @property
    def address(self) -> str:
        """Return the master's address."""
        return f"127.0.0.1:{self.port}"

    def _master(self) -> subprocess.Popen[bytes]:
        program = shutil.which("mooncake_master", path=PROGRAMS)
        assert program is not None, "there is no mooncake_master: run `make setup-dev`"
        addresses = ("--rpc_address=127.0.0.1", "--metrics_host=127.0.0.1")
        ports = (f"--rpc_port={self.port}", f"--metrics_port={free_port()}")
        times = ("--client_ttl=60", "--put_start_discard_timeout_sec=5")
        master = subprocess.Popen(
            [program, *addresses, *ports, *times],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until_s = time.monotonic() + PATIENCE_S
        while True:
            assert master.poll() is None, "mooncake_master has ended"
            assert time.monotonic() < until_s, "mooncake_master does not answer"
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return master
            time.sleep(0.02)

    def _memory(self) -> subprocess.Popen[bytes]:
        memory = subprocess.Popen(
            [sys.executable, "-c", _MEMORY, self.address, str(self._segment_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert memory.stdout is not None
        if (said := memory.stdout.readline()) != b"there 0\n":
            memory.kill()
            memory.communicate()
            raise AssertionError(f"no memory was added to the store: {said!r}")
        return memory

    def restart(self) -> None:
        """Kill the master and its memory, and start both anew, without objects."""
        self.close()
        self._start()

    def kill_master(self) -> None:
        """Kill the master."""
        self.master.kill()
        self.master.wait()

    def file(self, folder: Path, **changes: Any) -> str:
        """Write a configuration file, and return its path."""
        config = {
            "local_hostname": "127.0.0.1",
            "metadata_server": "P2PHANDSHAKE",
            "master_server_address": self.address,
            "global_segment_size": 0,
            "protocol": "tcp",
            **changes,
        }
        path = folder / f"mooncake-{next(self._numbers)}.json"
        path.write_text(json.dumps(config))
        return str(path)

    def close(self) -> None:
        """Kill everything."""
        for process in (self.memory, self.master):
            process.send_signal(signal.SIGKILL)
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()


@contextmanager
def running(segment_bytes: int = SEGMENT_BYTES) -> Iterator[Mooncake]:
    """Start a store, and stop it afterwards."""
    with ExitStack() as stack:
        store = Mooncake(segment_bytes)
        stack.callback(store.close)
        yield store


@pytest.fixture(scope="session")
def mooncake() -> Iterator[Mooncake]:
    """Yield a running store."""
    with running() as store:
        yield store
