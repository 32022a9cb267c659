"""The owner's ends of control links: one session for each node that reads from this one.

What a node asks costs time of the owner's loop, in proportion to the keys that it sends. So each
node has an allowance of work. A want that is more than what is left of it is answered Busy. If a
node goes on all the same, its session takes its next message only once the debt is paid; what it
sends meanwhile waits in its own socket.
"""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Callable, Generator, Iterator

from flexkv.actors.deadline_timer import DeadlineTimer
from flexkv.cluster.allowance import Account, Allowance
from flexkv.cluster.grants import Grants
from flexkv.cluster.link import SILENCE_S, control_link
from flexkv.cluster.records import TAG_BYTES, SpanTags
from flexkv.cluster.wire import (
    TO_OWNER,
    Introduction,
    Message,
    PeerId,
    PeerProtocolError,
    Ping,
    Pong,
    Release,
    SnapshotPart,
    SnapshotWanted,
    ToOwner,
    Want,
    refused,
)
from flexkv.common.terms import BLOCK_KEY_BYTES
from flexkv.links.link import Link
from flexkv.observe.logs import get_logger

log = get_logger(__name__)

SNAPSHOTS_MAX = 2
"""How many snapshots one node may read at once."""
WORK = Allowance(1 << 18, 1 << 19)
"""What may be done for one node, counted in keys that are looked up: each takes the owner about
0.2 µs, so one node uses a tenth of a core at most."""
MESSAGE_KEYS = 256
"""The cost of taking and answering any message, in keys that are looked up."""
UNREAD_KEYS = 4
"""Receiving this many keys, or sending this many tags, costs as much as looking up one key."""
ACCOUNTS_MAX = 1024
"""Once there are this many accounts, those whose allowance is full are dropped."""


class Sessions:
    """All control links over which other nodes read from this one.

    A node has one: a second one replaces the first, whose end may not have been noticed.
    """

    def __init__(
        self,
        grants: Grants,
        generation: Callable[[], int],
        snapshot: Callable[[], Iterator[SpanTags]],
    ) -> None:
        """Serve nobody yet.

        Args:
            grants: what is granted.
            generation: returns that of our blocks; requests of readers with another are refused.
            snapshot: returns everything that we have, in parts; a generator is closed.
        """
        self.grants, self.generation, self.snapshot = grants, generation, snapshot
        self._sessions: dict[bytes, _Session] = {}
        self._work: dict[bytes, Account] = {}
        """By node: what may be done for it. A new link of it has no new allowance."""

    def __len__(self) -> int:
        return len(self._sessions)

    async def serve(self, connected: socket.socket, introduction: Introduction) -> None:
        """Serve a control link until it ends; then everything that was granted over it ends."""
        peer = introduction.peer_id
        link = await control_link(connected, TO_OWNER)
        session = _Session(peer, link, self, self._account(peer))
        if (before := self._sessions.pop(peer.node_id, None)) is not None:
            log.info("peer_session_replaced", peer=str(peer))
            before.end()
        self._sessions[peer.node_id] = session
        try:
            await session.run()
        except PeerProtocolError as error:
            log.warning("peer_misbehaved", peer=str(peer), reason=str(error))
        finally:
            session.end()
            if self._sessions.get(peer.node_id) is session:
                del self._sessions[peer.node_id]

    def _account(self, peer: PeerId) -> Account:
        """Return the account of a node's work."""
        now_s = asyncio.get_running_loop().time()
        if peer.node_id not in self._work and len(self._work) >= ACCOUNTS_MAX:
            self._work = {each: of for each, of in self._work.items() if not of.is_full(now_s)}
        return self._work.setdefault(peer.node_id, Account(WORK, now_s))

    def close(self) -> None:
        """End every session."""
        for session in list(self._sessions.values()):
            session.end()


class _Session:
    """One control link."""

    def __init__(self, peer: PeerId, link: Link[ToOwner], of: Sessions, work: Account) -> None:
        self._peer, self._link, self._work = peer, link, work
        self._grants, self._generation, self._snapshot = of.grants, of.generation, of.snapshot
        self._snapshots: dict[int, Iterator[SpanTags]] = {}
        self._silence = DeadlineTimer(SILENCE_S, self._check_silence)
        self._has_ended = False

    async def run(self) -> None:
        """Answer until the link ends.

        Raises:
            PeerProtocolError: the reader sent something that the protocol does not allow.
        """
        self._silence.arm()
        while (message := await self._link.receive()) is not None and not self._has_ended:
            self._handle(message)
            owed_s = self._work.lacks_s(0, self._now_s())
            if owed_s > 0 and self._link.is_open:
                await asyncio.sleep(owed_s)

    def end(self) -> None:
        """End the link and what was granted over it."""
        if not self._has_ended:
            self._has_ended = True
            self._silence.close()
            self._link.abort()
            for number in list(self._snapshots):
                self._forget_snapshot(number)
            self._grants.end_peer(self._peer)

    def _check_silence(self) -> None:
        if self._link.silent_s > SILENCE_S:
            log.warning("peer_silent", peer=str(self._peer), silent_s=round(self._link.silent_s, 1))
            self.end()
        else:
            self._silence.arm()

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()

    def _handle(self, message: ToOwner) -> None:
        self._work.take(MESSAGE_KEYS, self._now_s())
        match message:
            case Ping():
                self._send(Pong(message.number))
            case Release():
                self._forget_snapshot(message.number)
                self._grants.release(self._peer, message.number)
            case Want() | SnapshotWanted() if message.generation != self._generation():
                why = f"is {self._generation()} on this node"
                self._send(refused(message.number, "generation", message.generation, why))
            case Want():
                self._want(message)
            case SnapshotWanted():
                self._send_part(message.number)

    def _want(self, want: Want) -> None:
        """Answer a Want, or put it off if it is more work than this node may ask for now."""
        keys, now_s = len(want.keys) // BLOCK_KEY_BYTES, self._now_s()
        self._work.take(keys / UNREAD_KEYS, now_s)
        if self._work.lacks_s(keys, now_s) > 0:
            again_s = self._work.lacks_s(MESSAGE_KEYS + keys / UNREAD_KEYS + keys, now_s)
            self._grants.put_off(want, self._send, math.ceil(again_s * 1000))
        else:
            self._work.take(keys, now_s)
            self._grants.want(self._peer, want, self._send)

    def _send_part(self, number: int) -> None:
        """Send the next part of a snapshot, and begin it if the number is new."""
        if number not in self._snapshots:
            if len(self._snapshots) >= SNAPSHOTS_MAX:
                raise PeerProtocolError(f"more than {SNAPSHOTS_MAX} snapshots at once")
            self._snapshots[number] = self._snapshot()
        part = next(self._snapshots[number])
        if part.is_last:
            self._forget_snapshot(number)
        tags = (len(part.on_host) + len(part.on_disk)) // TAG_BYTES
        self._work.take(tags / UNREAD_KEYS, self._now_s())
        self._send(SnapshotPart(number, *part))

    def _forget_snapshot(self, number: int) -> None:
        parts = self._snapshots.pop(number, None)
        if isinstance(parts, Generator):
            parts.close()

    def _send(self, message: Message) -> None:
        self._link.send(message)
