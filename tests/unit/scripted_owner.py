"""A node that reads from an owner which answers as a test says, on a virtual clock."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any

from flexkv.cluster.handshake import Identity, introduce_to_reader, prove_to_reader
from flexkv.cluster.link import control_link
from flexkv.cluster.peer import PeerTimes
from flexkv.cluster.peers import PeerHooks, Peers
from flexkv.cluster.wire import (
    TO_OWNER,
    Grant,
    Message,
    PeerId,
    PeerProtocolError,
    Ping,
    Pong,
    Release,
    ToOwner,
    Want,
)
from flexkv.links.link import Link
from flexkv.testing.virtual_time import run_virtual
from tests.cluster_rigs import (
    FACTS,
    KEY,
    ClusterNode,
    FakeNode,
    Network,
    keys_of,
    open_descriptors,
    pair,
    tasks_of,
    turns,
)

TIMES = PeerTimes(data_s=2.0, part_s=4.0)
KEYS = keys_of(1, 4)
ADDRESS = "192.0.2.9:1"


class ScriptedOwner:
    """An owner that answers as a test says.

    Attributes:
        heard: everything that readers sent, with the time.
        answer: returns the answers to a message.
        is_away: whether connections are refused.
        is_silent: whether it answers nothing at all, not even handshakes.
    """

    def __init__(self) -> None:
        self.heard: list[tuple[float, ToOwner]] = []
        self.dialed_s: list[float] = []
        self.answer: Callable[[ToOwner], list[Message]] = answered
        self.is_away = self.is_silent = False
        self.links: list[Link[ToOwner]] = []
        self.identity = Identity(PeerId(b"o" * 16, 5), "pool", FACTS, lambda: 0)
        self.node = FakeNode(*self.identity.peer_id, ADDRESS)
        self._tasks: list[asyncio.Task[None]] = []
        self._held: list[socket.socket] = []

    async def dial(self, address: str) -> socket.socket:
        """Connect to the owner."""
        assert address == ADDRESS
        self.dialed_s.append(asyncio.get_running_loop().time())
        if self.is_away:
            raise ConnectionRefusedError(111, "refused")
        ours, theirs = pair()
        if self.is_silent:
            self._held.append(theirs)
        else:
            self._tasks.append(asyncio.ensure_future(self._serve(theirs)))
        return ours

    async def _serve(self, peer: socket.socket) -> None:
        try:
            await prove_to_reader(peer, KEY)
            await introduce_to_reader(peer, self.identity.introduction("control"))
        except (OSError, PeerProtocolError, asyncio.CancelledError):
            peer.close()
            return
        link = await control_link(peer, TO_OWNER)
        self.links.append(link)
        while (message := await link.receive()) is not None:
            self.heard.append((asyncio.get_running_loop().time(), message))
            for each in self.answer(message):
                link.send(each)

    def wanted(self) -> list[int]:
        """Return the numbers of the Wants that arrived."""
        return [each.number for _, each in self.heard if isinstance(each, Want)]

    def released(self) -> list[int]:
        """Return the numbers of the Releases that arrived."""
        return [each.number for _, each in self.heard if isinstance(each, Release)]

    async def stop(self) -> None:
        """Close everything."""
        for link in self.links:
            link.abort()
        for each in self._tasks:
            each.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for held in self._held:
            held.close()


def answered(message: ToOwner) -> list[Message]:
    """Return the answers of an owner that has everything."""
    match message:
        case Want():
            return [Grant(message.number, message.first, message.last - message.first)]
        case Ping():
            return [Pong(message.number)]
    return []


def pongs(message: ToOwner) -> list[Message]:
    """Return the answers of an owner that is alive and answers nothing else."""
    return [Pong(message.number)] if isinstance(message, Ping) else []


class Reading:
    """A node that reads from a scripted owner, which has number 1."""

    def __init__(self, seed: int = 0) -> None:
        self.owner = ScriptedOwner()
        self.node = ClusterNode(Network(), 1)
        self.changes: list[tuple[float, bool]] = []
        hooks = PeerHooks(
            lambda holder: self.owner.node if holder == 1 else None,
            self._changed,
            self.node.supervisor.spawn,
            self.owner.dial,
        )
        self.peers = Peers(KEY, self.node.identity, hooks, Random(seed), TIMES)

    def _changed(self, node: Any, is_up: bool) -> None:
        self.changes.append((self.now_s, is_up))

    @property
    def now_s(self) -> float:
        """Return the virtual time."""
        return asyncio.get_running_loop().time()

    async def want(self) -> Grant:
        """Ask for everything."""
        return await self.peers.want(1, KEYS, 0, 4)


def reading(work: Callable[[Reading], Coroutine[Any, Any, None]], seed: int = 0) -> None:
    """Run a test on a virtual clock; afterwards no task and no descriptor may be left."""

    async def main() -> None:
        rig = Reading(seed)
        await rig.node.start()
        await work(rig)
        await rig.peers.close()
        assert tasks_of(rig.node.supervisor) == 0
        await rig.owner.stop()
        await rig.node.stop()
        await turns()

    before = open_descriptors()
    run_virtual(main())
    assert open_descriptors() == before
