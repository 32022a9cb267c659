"""Processes of other users, and directories for them, for tests that run as root."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexkv.common.config import Settings
from flexkv.server.launch import told_of

from .serving import eventually, settings_in

OWNER, OTHER, STRANGER = 61_101, 61_102, 61_103
ROOT = Path(__file__).parents[2]
END_S = 60.0


class Users:
    """A starter of processes of other users, which forks one that has imported everything."""

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        words = [sys.executable, "-m", "tests.system.as_user", str(theirs.fileno())]
        self._process = subprocess.Popen(words, cwd=ROOT, pass_fds=[theirs.fileno()])
        theirs.close()

    def begin(self, uid: int, action: str, arguments: Any, fds: list[int]) -> int:
        """Start a process with these standard streams, and return its process id."""
        socket.send_fds(self._channel, [json.dumps([uid, action, arguments]).encode()], fds)
        return int(self._channel.recv(32))

    def close(self) -> None:
        """End the process that forks others."""
        self._channel.close()
        self._process.wait()


_users: list[Users] = []


@contextmanager
def users() -> Iterator[None]:
    """Allow `Process` to start processes of other users within this context."""
    _users.append(Users())
    try:
        yield
    finally:
        _users.pop().close()


class Process:
    """A process of a user that runs one action of `as_user`."""

    def __init__(self, uid: int, action: str, *arguments: Any) -> None:
        told = [told_of(a) if isinstance(a, Settings) else a for a in arguments]
        stdin, self._stdin = os.pipe()
        self._stdout, stdout = os.pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 -- closed in `close`
        self.pid = _users[0].begin(uid, action, told, [stdin, stdout, self._log.fileno()])
        os.close(stdin)
        os.close(stdout)
        self._said = b""
        eventually(lambda: self._read(0.1) or b"\n" in self._said, END_S)
        assert self._said.startswith(b"begun\n"), self.log

    @property
    def log(self) -> str:
        """Return what it has logged."""
        return os.pread(self._log.fileno(), 1 << 20, 0).decode()

    def _read(self, wait_s: float) -> bool:
        """Read its output, after at most `wait_s`; return whether it has ended."""
        if not select.select([self._stdout], [], [], wait_s)[0]:
            return False
        more = os.read(self._stdout, 1 << 16)
        self._said += more
        return not more

    @property
    def has_ended(self) -> bool:
        """Return whether it has ended."""
        return self._read(0.0)

    def result(self) -> Any:
        """End its stdin, wait for its end, and return its result."""
        os.close(self._stdin)
        self._stdin = -1
        eventually(lambda: self._read(0.1), END_S)
        said = self._said.removeprefix(b"begun\n")
        assert said, self.log
        return json.loads(said)

    def end(self) -> Any:
        """Send SIGTERM, and return its result."""
        os.kill(self.pid, signal.SIGTERM)
        return self.result()

    def close(self) -> None:
        """Kill it if it still runs, and close its streams."""
        if self._stdin >= 0:
            os.kill(self.pid, signal.SIGKILL)
            os.close(self._stdin)
            eventually(lambda: self._read(0.1), END_S)
        os.close(self._stdout)
        self._log.close()


@contextmanager
def process(uid: int, action: str, *arguments: Any) -> Iterator[Process]:
    """Yield a process of a user that has begun; kill it afterwards."""
    made = Process(uid, action, *arguments)
    try:
        yield made
    finally:
        made.close()


def outcome(uid: int, action: str, *arguments: Any) -> Any:
    """Run an action as a user, and return its result."""
    with process(uid, action, *arguments) as made:
        return made.result()


@contextmanager
def shared_folder() -> Iterator[Path]:
    """Yield a directory like /tmp, in which all users may make files, and remove only their own."""
    with tempfile.TemporaryDirectory(prefix="flexkv-test-", dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o1777)
        yield folder


def home_in(shared: Path) -> Path:
    """Return a new directory of the owner's that others may read."""
    folder = shared / "home"
    folder.mkdir()
    folder.chmod(0o755)
    os.chown(folder, OWNER, OWNER)
    return folder


def settings_at(address: str, home: Path, **changes: Any) -> Settings:
    """Return settings with the SSD tier and the trace in a directory."""
    more = {"enable_trace": True, "trace_file_path": str(home / "trace.log"), **changes}
    cache = settings_in(home / "ssd", **more).cache_config
    return Settings(server_recv_port=address, cache_config=cache)


def answers(settings: Settings, uid: int = OWNER) -> bool:
    """Return whether a user's server answers the user's operator."""
    return "instances" in outcome(uid, "speak", settings)["operator"]
