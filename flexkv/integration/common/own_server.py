"""The server that an engine's scheduler launches, and launches again when it has ended.

If the first one cannot start, neither does the engine, and the error says why. Later ones are
started without waiting, since a step of the scheduler must not wait until a server has its memory.
If servers end young or cannot be started several times in a row, none is launched any more:
something on the machine is wrong, and the engine goes on without the cache.
"""

from __future__ import annotations

import time

from flexkv.common.config import ModelConfig, Settings
from flexkv.common.errors import FlexKVError
from flexkv.observe.logs import get_logger
from flexkv.server.launch import LaunchedServer

log = get_logger(__name__)

RELAUNCH_S, RELAUNCH_S_MAX = 10.0, 300.0
"""Pause between two launches; doubled each time while servers end young."""
YOUNG_S = 120.0
"""A server that ended sooner than this after its launch has ended young."""
YOUNG_MAX = 5
"""After this many in a row that ended young, none is launched any more."""


class OwnServer:
    """The server of one engine, through all its launches."""

    def __init__(self, model: ModelConfig, settings: Settings) -> None:
        """Launch the first server, and return once it accepts connections.

        Raises:
            ConfigError, BackendUnavailableError: it cannot start.
        """
        self._model, self._settings = model, settings
        self._server = LaunchedServer(model, settings)
        self._launched_s = time.monotonic()
        self._pause_s, self._young = RELAUNCH_S, 0
        self._is_ended = self._is_given_up = False
        self._reason = ""

    @property
    def pid(self) -> int:
        """Return the process id of the latest server."""
        return self._server.pid

    def look(self) -> None:
        """Launch another server if that is due. Does not wait for it."""
        if self._is_given_up:
            return
        if not self._is_ended:
            self._look_at_it()
        if self._is_ended and time.monotonic() >= self._launched_s + self._pause_s:
            self._launch()

    def _look_at_it(self) -> None:
        """Record that the server has ended, and why, if it has."""
        try:
            self._server.look()
            if not self._server.has_ended:
                return
            self._reason = "it ended: see its log"
        except FlexKVError as error:
            self._reason = str(error)
        except OSError as error:  # no descriptor is left to look with: the next step looks again
            log.warning("server_not_checked", reason=str(error))
            return
        self._is_ended = True
        if time.monotonic() - self._launched_s >= YOUNG_S:
            self._young, self._pause_s = 0, RELAUNCH_S
        else:
            self._ended_young(self._young > 0)

    def _ended_young(self, waits_longer: bool) -> None:
        """Count a server that ended young, and give up after `YOUNG_MAX`."""
        self._young += 1
        if waits_longer:
            self._pause_s = min(2 * self._pause_s, RELAUNCH_S_MAX)
        if self._young >= YOUNG_MAX:
            self._is_given_up = True
            log.error("server_given_up", reason=self._reason, launches=self._young)

    def _launch(self) -> None:
        """Launch another server; a failure is only logged, so that the scheduler's step goes on."""
        log.warning("server_relaunched", reason=self._reason, ended_young=self._young)
        self._launched_s = time.monotonic()
        try:
            self._server.close()
            self._server = LaunchedServer(
                self._model, self._settings, waits=False, is_awaited=False
            )
        except (OSError, ValueError, FlexKVError) as error:  # no memory, process or descriptor
            self._reason = f"it cannot be started: {error}"
            self._ended_young(waits_longer=True)
        else:
            self._is_ended = False

    def close(self) -> None:
        """End the server, and wait until it has ended."""
        self._server.close()
