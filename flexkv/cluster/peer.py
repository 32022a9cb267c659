"""The reader's end of the control link to one peer: connected on demand, and again after failures.

    nothing ──first request──▶ connecting ──▶ up ──unused for a minute──▶ nothing
                                ▲       │      │
                                │       ▼      ▼ closed, silent, three requests not answered
                                └────── down: requests fail at once, until a trial succeeds

One task connects, receives, and tries again after a pause. Only a life of a node has a peer: when
the node restarts, it is another one.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing
from random import Random
from typing import NamedTuple, Protocol, TypeAlias

from flexkv.actors.deadline_timer import DeadlineTimer
from flexkv.cluster.breaker import PeerBreaker
from flexkv.cluster.handshake import Identity, introduce_to_owner, prove_to_owner
from flexkv.cluster.link import SILENCE_S, control_link
from flexkv.cluster.records import SpanTags
from flexkv.cluster.wants import Wants, Wish
from flexkv.cluster.wire import (
    FROM_OWNER,
    Busy,
    FromOwner,
    Grant,
    PeerId,
    PeerProtocolError,
    Ping,
    Purpose,
    Refused,
)
from flexkv.common.errors import ConfigError, PeerError
from flexkv.links.link import Link
from flexkv.observe.logs import get_logger
from flexkv.process.descriptors import is_lack
from flexkv.process.spawning import Spawn

log = get_logger(__name__)

_FAULTS = (OSError, TimeoutError, ValueError, ConfigError, PeerProtocolError)
"""What an attempt to connect may raise; ValueError is an address that is not valid."""


class Node(Protocol):
    """What has to be known of a node to connect to it."""

    @property
    def id(self) -> bytes:
        """Return which node it is."""
        ...

    @property
    def life(self) -> int:
        """Return which of its lives this is."""
        ...

    @property
    def address(self) -> str:
        """Return where it listens."""
        ...


class PeerTimes(NamedTuple):
    """How long a peer may take.

    Attributes:
        connect_s: for a link with its handshake.
        data_s: for a data connection with its handshake.
        answer_s: for the answer to a request, with the link if there is none yet.
        part_s: for a part of a snapshot, which no load waits for.
        idle_s: how long a link stays open that nobody uses.
    """

    connect_s: float = 3.0
    data_s: float = 3.0
    answer_s: float = 5.0
    part_s: float = 5.0
    idle_s: float = 60.0


Dial: TypeAlias = Callable[[str], Awaitable[socket.socket]]


class Surroundings(NamedTuple):
    """What all peers share.

    Attributes:
        key: that of the cluster.
        identity: who we are.
        spawn: starts a task.
        dial: connects to an address.
        changed: called when a peer goes down, and when it is up again.
        random: spreads the pauses between attempts.
        numbers: returns a new number for each request.
        times: how long peers may take.
    """

    key: bytes
    identity: Identity
    spawn: Spawn
    dial: Dial
    changed: Callable[[Node, bool], None]
    random: Random
    numbers: Iterator[int]
    times: PeerTimes


class Peer:
    """One life of a node, as its reader sees it."""

    def __init__(self, node: Node, shared: Surroundings) -> None:
        """Connect to nobody yet."""
        self._node, self._shared = node, shared
        self._id = PeerId(node.id, node.life)
        self._breaker = PeerBreaker(shared.random)
        self._link: Link[FromOwner] | None = None
        self._wants: Wants | None = None
        self._attempt: asyncio.Future[None] | None = None
        """Done when the attempt to connect that is under way has ended."""
        self._task: asyncio.Task[None] | None = None
        self._why = ""
        """Why there is no link, or why we are closing it."""
        self._busy_until_s = 0.0
        self._is_known_down = self._is_over = False

    @property
    def is_up(self) -> bool:
        """Return whether the peer may be asked."""
        return self._breaker.is_up and not self._is_over

    @property
    def task(self) -> asyncio.Task[None] | None:
        """Return the task that serves the link, if there is one."""
        return self._task

    # -- requests -------------------------------------------------------------------------------

    async def want(self, wish: Wish) -> Grant:
        """Ask for blocks; see `Peers.want`."""
        now_s = asyncio.get_running_loop().time()
        if now_s < self._busy_until_s:
            raise self._busy()
        due_s = now_s + self._shared.times.answer_s
        wants = await self._connected()
        left_s = max(0.0, due_s - asyncio.get_running_loop().time())
        try:
            answer = await wants.want(wish, self._shared.identity.generation(), left_s)
        except TimeoutError:
            within_s = self._shared.times.answer_s
            if left_s < within_s / 2:  # connecting took most of it: the peer is not to blame
                raise self._error("asking", f"no answer in {within_s:g} s") from None
            raise self._unanswered(within_s) from None
        self._breaker.answered()
        if isinstance(answer, Busy):
            self._busy_until_s = asyncio.get_running_loop().time() + answer.after_ms / 1000
            raise self._busy()
        return answer

    def release(self, number: int) -> None:
        """End a grant, if it has not ended yet."""
        if self._wants is not None:
            self._wants.release(number)

    async def parts(self) -> AsyncGenerator[SpanTags, None]:
        """Yield everything that the peer has; see `Peers.parts`."""
        wants = await self._connected()
        generation = self._shared.identity.generation()
        try:
            async with aclosing(wants.parts(generation, self._shared.times.part_s)) as parts:
                async for part in parts:
                    yield part
        except TimeoutError:
            raise self._unanswered(self._shared.times.part_s) from None

    async def data_socket(self) -> socket.socket:
        """Return a new data connection; see `Peers.data_socket`."""
        self._check_up()
        try:
            async with asyncio.timeout(self._shared.times.data_s):
                return await self._greeted("data")
        except _FAULTS as error:
            is_own, address = is_lack(error), self._node.address
            raise PeerError(address, "connecting", _reason(error), is_own=is_own) from error

    def leave(self) -> None:
        """End the link and all requests at once: nobody will ask this peer again."""
        self._is_over = True
        if self._task is not None:
            self._task.cancel()
        self._close("it left the cluster, or this node is closing")
        self._ended()

    # -- inside ---------------------------------------------------------------------------------

    async def _connected(self) -> Wants:
        """Return the open link's requests; connect if there is no link.

        Raises:
            PeerError: the peer is down, or cannot be reached.
        """
        self._check_up()
        if self._wants is None:
            if self._attempt is None:
                self._attempt = asyncio.get_running_loop().create_future()
            if self._task is None:
                self._task = self._shared.spawn("peer link", self._keep())
            # `wait` leaves the future alone when the caller is cancelled.
            await asyncio.wait([self._attempt], timeout=self._shared.times.answer_s)
        if self._wants is None:
            raise self._error("connecting", self._why or "no connection in time")
        return self._wants

    async def _keep(self) -> None:
        """Keep the link until nobody uses it; after failures, try again."""
        while True:
            why = await self._live()
            if why is None:
                self._link = None
                if self._attempt is None:
                    break
                continue  # somebody came while the unused link was being closed
            pause_s = self._breaker.failed(asyncio.get_running_loop().time())
            self._why = why
            self._ended()
            if not self._is_known_down:
                self._is_known_down = True
                log.warning("peer_down", peer=str(self._id), address=self._node.address, reason=why)
                self._shared.changed(self._node, False)
            await asyncio.sleep(pause_s)
        self._task = None

    async def _live(self) -> str | None:
        """Connect, and serve the link to its end; return why it ended, None if it was not used."""
        try:
            async with asyncio.timeout(self._shared.times.connect_s):
                connected = await self._greeted("control")
        except _FAULTS as error:
            return _reason(error)
        link = await control_link(connected, FROM_OWNER)
        self._why = ""
        self._link, self._wants = link, Wants(self._node.address, link.send, self._shared.numbers)
        self._breaker.connected(asyncio.get_running_loop().time())
        self._tell_attempt()
        log.info("peer_up", peer=str(self._id), address=self._node.address)
        if self._is_known_down:
            self._is_known_down = False
            self._shared.changed(self._node, True)
        timer = DeadlineTimer(SILENCE_S, lambda: self._check(link, timer))
        timer.arm()
        try:
            await self._receive(link, self._wants)
        except PeerProtocolError as error:
            self._close(str(error))
        finally:
            timer.close()
            link.abort()
        return None if self._why == _UNUSED else self._why or "it closed the connection"

    async def _receive(self, link: Link[FromOwner], wants: Wants) -> None:
        """Take what the peer sends until the link ends.

        Raises:
            PeerProtocolError: the peer sent something that the protocol does not allow.
        """
        while (message := await link.receive()) is not None:
            if isinstance(message, Refused) and not message.number:
                self._close(f"it refuses {message.field}={message.value}: {message.why}")
            wants.handle(message)

    async def _greeted(self, purpose: Purpose) -> socket.socket:
        """Return a new connection on which both sides know each other.

        Raises:
            OSError: nobody listens there, or the connection broke.
            ValueError: the address is not valid.
            ConfigError: the peer's blocks are not like ours, or it speaks another version.
            PeerProtocolError: it is not the node that it should be.
        """
        peer = await self._shared.dial(self._node.address)
        try:
            await prove_to_owner(peer, self._shared.key)
            ours = self._shared.identity.introduction(purpose)
            await introduce_to_owner(peer, ours, self._id)
        except BaseException:
            peer.close()
            raise
        return peer

    def _check(self, link: Link[FromOwner], timer: DeadlineTimer) -> None:
        """Close a link that is silent or not used; else show that we are alive."""
        now_s, wants = asyncio.get_running_loop().time(), self._wants
        if link.silent_s > SILENCE_S:
            self._close(f"nothing was heard for {link.silent_s:.1f} s")
        elif wants is None or (wants.is_idle and now_s - wants.used_s > self._shared.times.idle_s):
            self._close(_UNUSED)
            self._wants = None
        else:
            link.send(Ping(next(self._shared.numbers)))
            timer.arm()

    def _close(self, why: str) -> None:
        self._why = self._why or why
        if self._link is not None:
            self._link.abort()

    def _ended(self) -> None:
        """Fail what waits: there is no link any more."""
        if self._wants is not None:
            self._wants.end(self._why)
        self._link = self._wants = None
        self._tell_attempt()

    def _tell_attempt(self) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt is not None and not attempt.done():
            attempt.set_result(None)

    def _check_up(self) -> None:
        if not self.is_up:
            raise self._error("asking", self._why)

    def _unanswered(self, within_s: float) -> PeerError:
        """Return the error of a request without an answer; close the link if there were several."""
        if self._breaker.unanswered():
            self._close("it does not answer")
        return self._error("asking", f"no answer in {within_s:g} s")

    def _busy(self) -> PeerError:
        return PeerError(self._node.address, "asking", "it is busy", is_busy=True)

    def _error(self, what: str, why: str) -> PeerError:
        return PeerError(self._node.address, what, why)


_UNUSED = "it was not used"


def _reason(error: BaseException) -> str:
    """Return why no connection was made, without the local address."""
    if isinstance(error, TimeoutError) and not error.args:
        return "no answer in time"
    if is_lack(error):
        return f"this node has no descriptors or memory left: {error}"
    return str(error) or type(error).__name__
