"""When a client tries to reach its server, and how often."""

from __future__ import annotations

import time
from collections.abc import Callable

from flexkv.common.errors import ClosedError, ConfigError
from flexkv.observe.logs import get_logger
from flexkv.server.handshake import Connected, connect
from flexkv.server.wire import Hello

log = get_logger(__name__)

RETRY_S, RETRY_S_MAX = 0.5, 30.0
"""Pause between two attempts to connect; doubled by each failure other than an absent server."""


class Reconnects:
    """The attempts of one client to connect to the server at an address."""

    def __init__(self, address: str, answer_s: float, hello: Callable[[], Hello]) -> None:
        """Make no attempt yet; `hello` returns the client's first message."""
        self._address, self._answer_s, self._hello = address, answer_s, hello
        self._due_s, self._pause_s = 0.0, RETRY_S
        self._is_stopped = False

    def now(self) -> Connected:
        """Connect, whether or not an attempt is due.

        Raises:
            OSError: nobody listens at the address, or nobody answers in time.
            ConfigError: the server refuses us, or is another user's.
            ClosedError: the server is closing, or `stop` was called, perhaps meanwhile.
        """
        connected = connect(self._address, self._hello(), self._answer_s)
        if self._is_stopped:  # such as by a signal handler
            connected.socket.close()
            raise ClosedError("the client is closed")
        self._pause_s = RETRY_S
        return connected

    def if_due(self) -> Connected | None:
        """Connect if an attempt is due; return None if it is not, or fails, which is logged."""
        if self._is_stopped or time.monotonic() < self._due_s:
            return None
        try:
            return self.now()
        except ConfigError as error:
            log.warning("refused_by_server", path=self._address, reason=str(error))
        except (ConnectionRefusedError, FileNotFoundError) as error:
            # The server may be starting. Another attempt costs microseconds.
            log.debug("no_server", path=self._address, reason=str(error))
            self._due_s = time.monotonic() + RETRY_S
            return None
        except (OSError, ClosedError) as error:
            log.warning("no_server", path=self._address, reason=str(error))
        self.back_off()
        return None

    def back_off(self) -> None:
        """Postpone the next attempt; each failure doubles the pause."""
        self._due_s = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, RETRY_S_MAX)

    def stop(self) -> None:
        """Make no more attempts."""
        self._is_stopped = True
