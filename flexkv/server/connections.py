"""The connections of a server: how many there may be, and which one is ended for a new one.

    arrive ─▶ stranger ─Hello─▶ client, agent, control
                 │                               │
                 └─ too many: the oldest ends    └─ too many: the one idle for longest ends

Some descriptors are kept in reserve, so that the engine can open files however many connections
there are. If there are too few for a newcomer, one that is silent ends instead: a stranger, else an
agent that has lent no device, else an operator. If only clients and agents are left, the newcomer
ends.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Coroutine, Iterator
from typing import Any

from flexkv.actors.supervisor import Supervisor
from flexkv.common.errors import ConfigError
from flexkv.links.link import Link
from flexkv.observe.logs import get_logger
from flexkv.process.descriptors import limit, raise_limit
from flexkv.server.wire import ToServer

log = get_logger(__name__)

STRANGERS_MAX = 256
"""Limit of connections that have not said who they are, with agents that have lent no device."""
CONTROLS_MAX = 32
"""Limit of operators' connections."""
INSTANCES_MAX = 256
"""Limit of instances that are connected or have requests under way."""
RESERVE = 24
"""Descriptors left to the engine, besides those that were open at the server's start."""
CONNECTIONS_MIN = 8
"""How many connections are served even if there are too few descriptors."""


class Connection:
    """One connection.

    Attributes:
        kind: "stranger", "lending" (an agent that has lent no device yet), or its role.
        link: the link over `peer`, which closes it; None until `Hello` was accepted.
        heard_s: when it was last known to be active.
        is_busy: whether it waits for an answer of ours.
        settling: tasks that will answer its `Settle` messages.
    """

    def __init__(self, peer: socket.socket) -> None:
        self.peer = peer
        self.kind = "stranger"
        self.link: Link[ToServer] | None = None
        self.task: asyncio.Task[None] | None = None
        self.heard_s = time.monotonic()
        self.is_busy = False
        self.settling: set[asyncio.Task[None]] = set()

    def leave(self) -> None:
        """End the connection by cancelling its task."""
        if self.task is not None:
            self.task.cancel()


class Connections:
    """All connections of a server, oldest first."""

    def __init__(self, supervisor: Supervisor) -> None:
        """Count the descriptors that are open now; `supervisor` will run the sessions."""
        self._supervisor = supervisor
        self._connections: dict[Connection, None] = {}
        self._in_use = len(os.listdir("/proc/self/fd"))
        self._idle = asyncio.Event()
        raise_limit()

    def __len__(self) -> int:
        return len(self._connections)

    @property
    def room(self) -> int:
        """Return how many connections there are descriptors for."""
        return max(CONNECTIONS_MIN, limit() - self._in_use - RESERVE)

    def arrive(self, connection: Connection, session: Coroutine[Any, Any, None]) -> None:
        """Serve a new connection by its session; end a less useful one if there are too many."""
        self._connections[connection] = None
        connection.task = self._supervisor.spawn_session("session", session)
        connection.task.add_done_callback(lambda _: self._gone(connection))
        strangers = [each for each in self._connections if each.kind in ("stranger", "lending")]
        if len(strangers) > STRANGERS_MAX:
            self._dismiss(strangers[0], f"more than {STRANGERS_MAX} connections are not set up yet")
        elif len(self._connections) > self.room:
            self._dismiss(self._least(connection), "too few file descriptors are left")

    def take_role(self, connection: Connection, kind: str) -> None:
        """Record what a connection is for; a new operator may end the one idle for longest.

        Raises:
            ConfigError: there are too many operators, and all of them are busy.
        """
        connection.kind, connection.heard_s = kind, time.monotonic()
        if kind != "control":
            return
        controls = [each for each in self._connections if each.kind == "control"]
        if len(controls) > CONTROLS_MAX:
            idle = [each for each in controls if not each.is_busy and each is not connection]
            if not idle:
                why = f"at most {CONTROLS_MAX} operators at once, and all of them are busy"
                raise ConfigError("control", f"{len(controls)} connections", why)
            longest = min(idle, key=lambda each: each.heard_s)
            self._dismiss(longest, f"more than {CONTROLS_MAX} operators; this one was idle longest")

    def all(self) -> Iterator[Connection]:
        """Return an iterator over the connections of now."""
        return iter(list(self._connections))

    async def wait_none(self) -> None:
        """Return once there are no connections."""
        while self._connections:
            self._idle.clear()
            await self._idle.wait()

    # -- inside ---------------------------------------------------------------------------------

    def _least(self, newcomer: Connection) -> Connection:
        """Return the least useful connection, never a client or an agent; else the newcomer."""
        for kind in ("stranger", "lending", "control"):
            of_kind = [
                each
                for each in self._connections
                if each.kind == kind and each is not newcomer and not each.is_busy
            ]
            if of_kind:
                return min(of_kind, key=lambda each: each.heard_s)
        return newcomer

    def _dismiss(self, connection: Connection, why: str) -> None:
        log.warning(
            "peer_dismissed", kind=connection.kind, reason=why, connections=len(self._connections)
        )
        del self._connections[connection]
        connection.leave()

    def _gone(self, connection: Connection) -> None:
        self._connections.pop(connection, None)
        if connection.link is None:
            connection.peer.close()  # its session may end before its first step
        self._idle.set()
