"""An operator's connection to a running server."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from flexkv.common.errors import BackendUnavailableError, ClosedError, ConfigError
from flexkv.process.polling import is_readable
from flexkv.server.address import socket_path
from flexkv.server.handshake import connect, message
from flexkv.server.wire import (
    PROTOCOL_VERSION,
    Answer,
    Command,
    Hello,
    ProtocolError,
    framed,
)

COMMAND_S = 60.0
PAUSE_S = 0.1
"""How often a command that may take any time looks whether it is still wanted."""


def _path_of(address: str) -> str:
    """Return the path of an address, or the address itself if it is not valid."""
    with suppress(ConfigError):
        return str(socket_path(address))
    return address


def command(address: str, verb: str, **arguments: Any) -> Any:
    """Have a server perform a command, and return its answer.

    Raises:
        BackendUnavailableError: no server listens there, or it does not answer.
        ConfigError: the server refuses the command.
    """
    answer = ask(address, verb, **arguments)
    if answer.error:
        raise ConfigError("command", verb, answer.error)
    return answer.value


def ask(address: str, verb: str, **arguments: Any) -> Answer:
    """Have a server perform a command, and return its answer, which may be an error.

    Raises:
        BackendUnavailableError: no server listens there, or it does not answer.
        ConfigError: the server refuses us.
    """
    return _answer_to(address, Command(1, verb, arguments), lambda peer: peer.settimeout(COMMAND_S))


def ask_for_long(address: str, verb: str, pause: Callable[[], None]) -> Answer:
    """Do what `ask` does for a command that may take any time.

    Args:
        address: the server's.
        verb: the command, which has no arguments.
        pause: called often while it waits; what it raises ends the wait.
    """

    def wait_answered(peer: socket.socket) -> None:
        while not is_readable(peer, PAUSE_S):
            pause()

    return _answer_to(address, Command(1, verb), wait_answered)


def _answer_to(
    address: str, sent: Command, wait_answered: Callable[[socket.socket], None]
) -> Answer:
    """Send a command, and return its answer, for which `wait_answered` waits."""
    try:
        connected = connect(address, Hello(PROTOCOL_VERSION, "control", os.getpid()))
        with connected.socket as peer:
            peer.sendall(framed(sent))
            wait_answered(peer)
            answer = message(peer)
    except (OSError, ClosedError, ProtocolError) as error:
        reason = getattr(error, "strerror", None) or error
        why = f"{reason}: is one running? `flexkv serve` starts one"
        raise BackendUnavailableError(f"the server at {_path_of(address)}", why) from error
    assert isinstance(answer, Answer)
    return answer
