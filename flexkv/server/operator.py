"""An operator's connection to a running server."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

from flexkv.common.errors import BackendUnavailableError, ConfigError
from flexkv.server.address import socket_path
from flexkv.server.handshake import connect, message
from flexkv.server.wire import PROTOCOL_VERSION, Answer, Command, Hello, framed

COMMAND_S = 60.0


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
    try:
        connected = connect(address, Hello(PROTOCOL_VERSION, "control", os.getpid()))
        with connected.socket as peer:
            peer.settimeout(COMMAND_S)
            peer.sendall(framed(Command(1, verb, arguments)))
            answer = message(peer)
    except OSError as error:
        why = f"{error.strerror or error}: is one running? `flexkv serve` starts one"
        raise BackendUnavailableError(f"the server at {_path_of(address)}", why) from error
    assert isinstance(answer, Answer)
    return answer
