"""Where other nodes connect: one TCP port for control and for data connections.

accept ──▶ unproved ──proofs──▶ unknown ──introductions──▶ control: a session
              │                    │                     ╲
              │ 64 at most,        │ 5 s                  ▶ data: handed over as a bare socket
              │ 5 s each
              ▼
   too many prove nothing: the kernel drops what comes from there, for a while (`strangers`)
"""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from flexkv.cluster import syn_filter, tcp
from flexkv.cluster.handshake import (
    HANDSHAKE_S,
    Identity,
    check_alike,
    introduce_to_reader,
    prove_to_reader,
)
from flexkv.cluster.strangers import Arrival, ShutOut, Strangers, source_of
from flexkv.cluster.wire import Introduction, PeerId, PeerProtocolError, framed, refused
from flexkv.common.errors import ConfigError, MalformedError
from flexkv.observe.logs import get_logger
from flexkv.process import forks
from flexkv.process.descriptors import is_lack, limit
from flexkv.process.spawning import Spawn

log = get_logger(__name__)

BACKLOG = 128
UNPROVED_MAX = 64
"""The most connections that have not proved anything; the oldest one is closed for a new one."""
DATA_CONNECTIONS_MAX = 8
"""The most data connections of one node."""
CONNECTIONS_MAX = 4096
"""The most connections of all nodes."""
DESCRIPTORS_SHARE = 0.5
"""The share of this process's descriptors that they may take: the SSD needs some, too."""
ACCEPTS_A_TURN = 16
LOGGED_S = 1.0
"""Strangers have one log line in this time at most, and so have nodes that are refused: they must
not fill the log, however many there are and however often they try again."""
ACCEPT_PAUSE_S = 0.2
"""How long to wait if the process has no descriptors left."""

Serve = Callable[[socket.socket, Introduction], Awaitable[None]]
"""Serves a connection, and returns once it is over; the listener closes the socket then.

It may raise OSError, EOFError, TimeoutError or MalformedError, which end the connection only.
"""


class ListenerHooks(NamedTuple):
    """What a listener needs of its engine."""

    control: Serve
    data: Serve
    spawn: Spawn


class _Refusals:
    """Log lines about connections that are refused: a few, which say how many others there were."""

    def __init__(self) -> None:
        self._logged_s, self._unlogged = -math.inf, 0

    def log(self, address: str, reason: str) -> None:
        """Log that an address was refused, unless there was a line just now."""
        now_s = asyncio.get_running_loop().time()
        if now_s - self._logged_s < LOGGED_S:
            self._unlogged += 1
            return
        others, self._logged_s, self._unlogged = self._unlogged, now_s, 0
        log.warning("peer_refused", address=address, reason=reason, others_before=others)


class _Connection:
    """One connection, and the task that serves it."""

    def __init__(self, accepted: socket.socket, name: str, arrival: Arrival | None) -> None:
        self.socket, self.name, self.arrival = accepted, name, arrival
        self.is_proved = self.is_dismissed = False
        self.data_of: PeerId | None = None
        self.task: asyncio.Task[None] | None = None


class Listener:
    """The port of a node, and all connections that others made to it.

    Attributes:
        address: what other nodes connect to.
    """

    def __init__(
        self, listening: socket.socket, key: bytes, identity: Identity, hooks: ListenerHooks
    ) -> None:
        """Take over a listening socket; connections are accepted from `listen` on."""
        self._listening, self._key, self._identity, self._hooks = listening, key, identity, hooks
        self._connections: dict[_Connection, None] = {}
        self._idle = asyncio.Event()
        self._is_closed = False
        self._of_strangers, self._of_nodes, self._shutting = _Refusals(), _Refusals(), _Refusals()
        self._strangers, self._shut_out, self._can_filter = Strangers(), ShutOut(), True
        self._opening: asyncio.TimerHandle | None = None
        self.address = ""
        if listening.family in (socket.AF_INET, socket.AF_INET6):
            self.address = tcp.address_of(*listening.getsockname()[:2])
        forks.on_fork(self._let_go_in_child)

    def __len__(self) -> int:
        return len(self._connections)

    def listen(self) -> None:
        """Accept connections from now on, until `close`."""
        if not self._is_closed:
            asyncio.get_running_loop().add_reader(self._listening, self._accept)

    def _accept(self) -> None:
        """Accept a few of the waiting connections; close those of addresses that are shut out."""
        loop = asyncio.get_running_loop()
        for _ in range(ACCEPTS_A_TURN):
            try:
                accepted, address = self._listening.accept()
            except BlockingIOError:
                break
            except OSError as error:
                if is_lack(error):
                    log.warning("peer_not_accepted", reason=str(error))
                    loop.remove_reader(self._listening)
                    loop.call_later(ACCEPT_PAUSE_S, self.listen)
                break
            arrival = self._strangers.arrived(source_of(address[0]), loop.time())
            try:
                if arrival is None:
                    accepted.close()
                    continue
                accepted.setblocking(False)
                tcp.set_options(accepted)
            except OSError:  # it has ended already
                accepted.close()
            else:
                self.arrived(accepted, tcp.address_of(*address[:2]), arrival)
        self._filter()

    def _filter(self) -> None:
        """Have the kernel drop connections from the addresses that are shut out now."""
        loop = asyncio.get_running_loop()
        shut_out, lasts_s = self._strangers.shut_out(loop.time())
        if self._opening is not None:
            self._opening.cancel()
            self._opening = None
        if lasts_s:
            self._opening = loop.call_later(lasts_s, self._filter)
        if shut_out == self._shut_out or self._is_closed:
            return
        self._shut_out = shut_out
        if shut_out != ShutOut():
            self._shutting.log(shut_out.named(), "too many connections from there prove nothing")
        if not self._can_filter:
            return
        try:
            syn_filter.apply(self._listening, shut_out)
        except OSError as error:  # then they are accepted, and closed at once
            self._can_filter = False
            syn_filter.remove(self._listening)
            log.warning("peer_filter_refused", reason=str(error))

    def arrived(self, accepted: socket.socket, name: str, arrival: Arrival | None = None) -> None:
        """Serve a connection, which does not block.

        Args:
            accepted: its socket.
            name: says in logs where it comes from.
            arrival: how it was counted as a stranger's; None if it was not.
        """
        most = min(CONNECTIONS_MAX, int(DESCRIPTORS_SHARE * limit()))
        if self._is_closed or len(self._connections) >= most:
            accepted.close()
            return
        connection = _Connection(accepted, name, arrival)
        self._connections[connection] = None
        connection.task = self._hooks.spawn("peer connection", self._serve(connection))
        connection.task.add_done_callback(lambda _: self._gone(connection))
        unproved = [
            each for each in self._connections if not each.is_proved and not each.is_dismissed
        ]
        if len(unproved) > UNPROVED_MAX:
            self._of_strangers.log(unproved[0].name, f"{len(unproved)} connections are unproved")
            self._dismiss(unproved[0])

    def close(self) -> None:
        """Accept no more, and end every connection."""
        if self._is_closed:
            return
        self._is_closed = True
        asyncio.get_running_loop().remove_reader(self._listening)
        self._listening.close()
        if self._opening is not None:
            self._opening.cancel()
        for connection in list(self._connections):
            self._dismiss(connection)

    async def wait_closed(self) -> None:
        """Return once no connection is left."""
        while self._connections:
            self._idle.clear()
            await self._idle.wait()

    # -- inside ---------------------------------------------------------------------------------

    async def _serve(self, connection: _Connection) -> None:
        try:
            theirs = await self._greeted(connection)
        except (OSError, TimeoutError, PeerProtocolError, ConfigError) as error:
            reason = str(error) or "too slow"
            refusals = self._of_nodes if connection.is_proved else self._of_strangers
            refusals.log(connection.name, reason)
            return
        log.debug(
            "peer_accepted",
            peer=str(theirs.peer_id),
            address=connection.name,
            purpose=theirs.purpose,
        )
        serve = self._hooks.control if theirs.purpose == "control" else self._hooks.data
        try:
            await serve(connection.socket, theirs)
        except (OSError, EOFError, TimeoutError, MalformedError) as error:
            log.info("peer_lost", peer=str(theirs.peer_id), reason=str(error))

    async def _greeted(self, connection: _Connection) -> Introduction:
        """Return who is at the other end, once it has proved that it belongs to the cluster.

        Raises:
            OSError: the connection broke.
            TimeoutError: it took too long.
            PeerProtocolError: it does not belong to the cluster, or does not keep to the protocol.
            ConfigError: its blocks are not like ours, or it has too many connections.
        """
        peer = connection.socket
        async with asyncio.timeout(HANDSHAKE_S):
            await prove_to_reader(peer, self._key)
        connection.is_proved = True
        if connection.arrival is not None:
            self._strangers.proved(connection.arrival, asyncio.get_running_loop().time())
            if self._shut_out != ShutOut():
                self._filter()
        ours = self._identity.introduction("control")
        async with asyncio.timeout(HANDSHAKE_S):
            theirs = await introduce_to_reader(peer, ours)
            try:
                self._check(ours, theirs)
            except ConfigError as error:
                if theirs.purpose == "control":
                    refusal = refused(0, error.field, error.value, error.why)
                    await asyncio.get_running_loop().sock_sendall(peer, framed(refusal))
                raise
        if theirs.purpose == "data":
            connection.data_of = theirs.peer_id
        return theirs

    def _check(self, ours: Introduction, theirs: Introduction) -> None:
        check_alike(ours, theirs)
        peer = theirs.peer_id
        data = sum(each.data_of == peer for each in self._connections)
        if theirs.purpose == "data" and data >= DATA_CONNECTIONS_MAX:
            why = f"a node may have {DATA_CONNECTIONS_MAX} to this one"
            raise ConfigError("data_connections", data + 1, why)

    def _dismiss(self, connection: _Connection) -> None:
        connection.is_dismissed = True
        if connection.task is not None:
            connection.task.cancel()

    def _gone(self, connection: _Connection) -> None:
        """Close a connection's socket: its task is over, and may never have begun."""
        self._connections.pop(connection, None)
        connection.socket.close()
        self._idle.set()

    def _let_go_in_child(self) -> None:
        """Drop the child's copies of all sockets, so that peers notice when the parent ends."""
        forks.replace(self._listening.fileno())
        for connection in self._connections:
            forks.replace(connection.socket.fileno())
