"""Starts a server in a process of its own, which ends when ours does.

The server is not our child, and has a session of its own. Whoever ends an engine may kill every
process that descends from it (vLLM does, at once if its `--shutdown-timeout` is 0), and the server
must live on to write what is not on SSD yet. So an intermediate process starts it, and then ends:

    engine ── between: passes on a pidfd of the engine, prints the server's process id, and ends
       ┊         └── server: ends by itself when the engine has ended or closed the pipe to it
       └ pipes to stdin and stdout of the server, and a pidfd of the server

The server prints one line when it listens, or why it cannot, and one line when it has ended.
Where the kernel has no pidfds, the processes are checked once a second instead.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

import psutil
from pydantic import BaseModel, Secret, SecretStr

from flexkv.common.config import ModelConfig, Settings
from flexkv.common.errors import BackendUnavailableError, ConfigError, FlexKVError
from flexkv.observe.logs import get_logger
from flexkv.process.polling import is_readable

log = get_logger(__name__)

LISTENING = b"listening\n"
"""The line that a server prints once it accepts connections; it has its memory and files then."""
REFUSED = b"refused "
"""Start of the line that a server prints if it cannot start; the reason follows, as JSON."""
ENDED = b"ended\n"
"""The last line that a server prints if it ends in good order."""
END_S = 90.0
"""How long a server may take to end: it first writes what is not on SSD yet."""
LOOK_S = 0.05

_BETWEEN = """
import os, sys
engine = os.getppid()
try:
    watched = os.pidfd_open(engine)
    os.set_inheritable(watched, True)
except (AttributeError, OSError):
    watched = -1
if os.getppid() != engine or os.fork():
    os._exit(0)
os.setsid()
os.write(1, b"%d\\n" % os.getpid())
os.execv(sys.argv[1], [*sys.argv[1:], "--parent", str(engine), "--parent-fd", str(watched)])
"""


class ProcessHandle:
    """An observer of the end of a process, which need not be our child.

    Attributes:
        fd: the pidfd, which becomes readable when the process ends; -1 without one.
    """

    def __init__(self, pid: int, fd: int = -1) -> None:
        """Observe process `pid`; a pidfd of it that is open already is closed with this."""
        self.fd = fd
        self._process: psutil.Process | None = None
        try:
            if fd < 0:
                self.fd = os.pidfd_open(pid)
        except (AttributeError, OSError):
            with suppress(psutil.NoSuchProcess):
                self._process = psutil.Process(pid)

    @property
    def has_ended(self) -> bool:
        """Return whether the process has ended, reaped or not."""
        if self.fd >= 0:
            return is_readable(self.fd)
        process = self._process
        with suppress(psutil.NoSuchProcess):
            if process is None or not process.is_running():
                return True
            return bool(process.status() == psutil.STATUS_ZOMBIE)
        return True

    def wait(self, within_s: float) -> bool:
        """Wait for the end of the process; return whether it came within `within_s`."""
        if self.fd >= 0:
            return is_readable(self.fd, within_s)
        until_s = time.monotonic() + within_s
        while not self.has_ended:
            if time.monotonic() > until_s:
                return False
            time.sleep(LOOK_S)
        return True

    def signal(self, number: int) -> None:
        """Send the process a signal, unless it has ended."""
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if self.fd >= 0:
                signal.pidfd_send_signal(self.fd, number)
            elif self._process is not None:
                self._process.send_signal(number)

    def close(self) -> None:
        """Stop observing. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd, self._process = -1, None


class LaunchedServer:
    """A server that this process has started."""

    def __init__(
        self, model: ModelConfig, settings: Settings, waits: bool = True, is_awaited: bool = True
    ) -> None:
        """Start the server, and by default return once it accepts connections.

        Args:
            model: the model that it serves.
            settings: its settings, which are also ours.
            waits: whether it may wait until another server at the address has ended.
            is_awaited: whether to wait until it accepts connections; if not, call `look` later.

        Raises:
            OSError: no process can be started.
            ConfigError: the server could not start because of a key of its configuration, or its
                address; the error names it.
            BackendUnavailableError: the server could not start for another reason.
        """
        command = [sys.executable, "-m", "flexkv.cli.main", "--log-level", settings.log_level,
                   "serve", "--with-parent"]  # fmt: skip
        self._between = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _BETWEEN, *command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        assert self._between.stdin is not None
        assert self._between.stdout is not None
        self._stdin, self._stdout = self._between.stdin, self._between.stdout
        self._path, self._said = settings.server_recv_port, b""
        self._pid: int | None = None
        self._watch: ProcessHandle | None = None
        self._exit_status: int | None = None
        self._listens = False
        told = {"model": told_of(model), "settings": told_of(settings), "waits": waits}
        with suppress(BrokenPipeError):  # it has ended already: `look` says why
            self._stdin.write(json.dumps(told).encode() + b"\n")
            self._stdin.flush()
        if is_awaited:
            self.look(None)

    @property
    def pid(self) -> int:
        """Return the server's process id; 0 until it is known, or if there is no process."""
        return self._pid or 0

    def look(self, wait_s: float | None = 0.0) -> bool:
        """Return whether the server accepts connections by now.

        Args:
            wait_s: how long to wait for that; None waits until it does or has ended.

        Raises:
            ConfigError, BackendUnavailableError: it could not start. It is closed then.
        """
        if self._begun(wait_s) is None or self._listens:
            return self._listens
        if (said := self._line(wait_s)) is not None:
            if said != LISTENING:
                self.close()
                raise _failure(said)
            self._listens = True
            self._between.poll()
            log.info("server_launched", pid=self.pid, path=self._path)
        return self._listens

    def _begun(self, wait_s: float | None = 0.0) -> ProcessHandle | None:
        """Return the server's observer once its id is known, or can never be; else None."""
        if self._pid is None and (said := self._line(wait_s)) is not None:
            self._pid = int(said) if said.strip().isdigit() else 0
        if self._watch is None and self._pid is not None:
            self._watch = ProcessHandle(self._pid)
        self._between.poll()  # so that no zombie is left
        return self._watch

    def _line(self, wait_s: float | None) -> bytes | None:
        """Return the next line of output, or what is left once it has ended; else None."""
        while (end := self._said.find(b"\n")) < 0:
            if not is_readable(self._stdout, wait_s):
                return None
            if not (more := os.read(self._stdout.fileno(), 4096)):
                break
            self._said += more
        end = end + 1 or len(self._said)
        line, self._said = self._said[:end], self._said[end:]
        return line

    @property
    def exit_status(self) -> int | None:
        """Return 0 if the server ended in good order, 1 if it did not; None while it runs."""
        if self._exit_status is None and self.has_ended:
            # All of its output is in the pipe, and nobody else writes to it.
            said = self._said + self._stdout.read()
            self._exit_status = 0 if said.endswith(ENDED) else 1
        return self._exit_status

    @property
    def has_ended(self) -> bool:
        """Return whether the server has ended."""
        if self._exit_status is not None:
            return True
        watch = self._begun()
        return watch is not None and (not self.pid or watch.has_ended)

    def close(self) -> None:
        """End the server, and wait until it has ended. Idempotent."""
        if self._stdout.closed:
            return
        watch = self._begun(END_S)
        if watch is not None and self.pid:
            watch.signal(signal.SIGTERM)
            if not watch.wait(END_S):
                log.warning("server_killed", pid=self.pid, reason=f"not ended after {END_S} s")
                watch.signal(signal.SIGKILL)
                watch.wait(END_S)
        self._end_between()
        if self.exit_status is None:
            self._exit_status = 1  # it hangs in the kernel, or its id never came
        # Last, since the end of its stdin ends a server, too: SIGTERM might then kill it meanwhile.
        with suppress(BrokenPipeError):
            self._stdin.close()
        self._stdout.close()
        self._pid = self._pid or 0
        if watch is not None:
            watch.close()

    def _end_between(self) -> None:
        """Reap the intermediate process, which ends after printing the id; kill it if it hangs.

        A server that it may have started ends by itself, since `close` closes its stdin.
        """
        try:
            self._between.wait(LOOK_S)
        except subprocess.TimeoutExpired:
            reason = f"not ended after {LOOK_S} s"
            log.warning("launcher_killed", pid=self._between.pid, reason=reason)
            self._between.kill()
            self._between.wait()


def refusal_of(error: BaseException) -> bytes:
    """Return the line by which a server reports why it cannot start."""
    if isinstance(error, ConfigError):
        value = error.value
        plain = value if isinstance(value, str | int | float | None) else str(value)
        reason = [error.field, plain, error.why]
    else:
        reason = [str(error) or type(error).__name__]
    return REFUSED + json.dumps(reason).encode() + b"\n"


def _failure(said: bytes) -> FlexKVError:
    """Return the error for a server that printed `said` instead of `LISTENING`."""
    if said.startswith(REFUSED):
        field, *rest = json.loads(said.removeprefix(REFUSED))
        return ConfigError(field, *rest) if rest else BackendUnavailableError("server", field)
    why = said.decode(errors="replace").strip() or (
        "it ended before it listened: see its log, or the kernel's log if memory ran out"
    )
    return BackendUnavailableError("server", why)


def told_of(config: BaseModel) -> dict[str, Any]:
    """Return a configuration as JSON values, with secrets in clear: for a pipe, never for a log."""
    dumped = config.model_dump(exclude_defaults=True)
    told: dict[str, Any] = json.loads(json.dumps(dumped, default=_plain))
    return told


def _plain(value: object) -> object:
    if isinstance(value, Secret | SecretStr):
        return value.get_secret_value()
    return str(value)
