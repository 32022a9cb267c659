"""Starts a server in a process of its own, which ends when ours does."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from typing import Any

from pydantic import BaseModel, Secret, SecretStr

from flexkv.common.config import ModelConfig, Settings
from flexkv.common.errors import ConfigError
from flexkv.logs import get_logger

log = get_logger(__name__)

LISTENING = b"listening\n"
"""What the server says on stdout once the address is its own; before it takes memory."""
END_S = 90.0
"""How long it may take to end: it writes what is not on SSD yet."""


class Launched:
    """A server of ours."""

    def __init__(self, model: ModelConfig, settings: Settings) -> None:
        """Start it; when this returns the address is its own.

        Raises:
            ConfigError: it could not begin: its reason is on stderr, and in the error.
        """
        command = [sys.executable, "-m", "flexkv.cli.main", "--log-level", settings.log_level,
                   "serve", "--with-parent"]  # fmt: skip
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        told = {"model": told_of(model), "settings": told_of(settings)}
        with suppress(BrokenPipeError):  # it has ended: it says why below
            self._process.stdin.write(json.dumps(told).encode() + b"\n")
            self._process.stdin.flush()
        said = self._process.stdout.readline()
        if said != LISTENING:
            self.close()
            why = said.decode(errors="replace").strip() or "the server did not start: see its log"
            raise ConfigError("server_recv_port", settings.server_recv_port, why)
        log.info("server launched", pid=self._process.pid, path=settings.server_recv_port)

    @property
    def pid(self) -> int:
        """Give its process id."""
        return self._process.pid

    @property
    def exit_status(self) -> int | None:
        """Give how it ended; None while it runs."""
        return self._process.poll()

    @property
    def has_ended(self) -> bool:
        """Tell whether it has."""
        return self._process.poll() is not None

    def close(self) -> None:
        """Let it end, and wait until it has. Idempotent."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            log.warning("server killed", pid=process.pid, reason=f"not ended in {END_S} s")
            process.kill()
            process.wait()
        # Only now: told twice, it would be killed by the signal when it has just ended.
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()


def told_of(config: BaseModel) -> dict[str, Any]:
    """Give a configuration as JSON values, secrets in clear: for a pipe, not for a log."""
    dumped = config.model_dump(exclude_defaults=True)
    told: dict[str, Any] = json.loads(json.dumps(dumped, default=_plain))
    return told


def _plain(value: object) -> object:
    if isinstance(value, Secret | SecretStr):
        return value.get_secret_value()
    return str(value)
