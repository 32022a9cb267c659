"""Hostile peers of a server, by seed: invalid frames, and odd conversations.

Each session has a random generator of its own, seeded with the run's seed and its number, so what
it sends depends on nothing else. Peers send everything that a process of the same user can send,
except commands that change what others are served (clear, or a trace to a file).
"""

from __future__ import annotations

import os
import random
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec

from flexkv.common.config import ModelConfig, Settings
from flexkv.common.errors import FlexKVError
from flexkv.index.keys import block_identity, key_list, leaf_keys
from flexkv.links.framing import LENGTH_BYTES
from flexkv.server.address import socket_path
from flexkv.server.handshake import Connected, connect
from flexkv.server.wire import (
    FROM_SERVER,
    PROTOCOL_VERSION,
    Cancel,
    Command,
    Copied,
    Copy,
    DeviceReady,
    Forget,
    Hello,
    LeafIds,
    Match,
    Message,
    Ready,
    Release,
    Settle,
    Start,
    State,
    framed,
)

FIRST_INSTANCE, INSTANCES = 1000, 4
"""The instances that hostile peers claim to be; well-behaved ones have smaller numbers."""
READ_S = 0.002
"""How long a peer listens before it sends its next message."""
INTEGERS = (0, 1, 2, 7, 63, 64, 255, 4096, (1 << 31) - 1, 1 << 31, (1 << 63) - 1, 1 << 63)
ODD_INTEGERS = (*INTEGERS, -1, -(1 << 63), (1 << 64) - 1)
ORDER = "kv tokens heads dim"


class Hostile:
    """Hostile peers of one server.

    Attributes:
        frames: how many have been sent.
    """

    def __init__(
        self, settings: Settings, model: ModelConfig, seed: int, order: str = ORDER
    ) -> None:
        """Take the server's settings, its model, and the seed of the run.

        Hostile agents claim that the elements of their blocks are in this order.
        """
        self._settings, self._seed, self._order = settings, seed, order
        cache = settings.cache_config
        secret = cache.key_secret.get_secret_value()
        self._facts = block_identity(model.spaces(cache.tokens_per_block), secret)
        self._open: list[socket.socket] = []
        self.frames = self.sessions = 0

    def run(self, frames: int, going_on: Callable[[], bool] = lambda: True) -> None:
        """Run sessions until `frames` more frames have been sent or `going_on()` returns False."""
        until = self.frames + frames
        while self.frames < until and going_on():
            self.session(self.sessions)
            self.sessions += 1
        self.close()

    def close(self) -> None:
        """Close every connection that is still open."""
        for peer in self._open:
            peer.close()
        self._open.clear()

    def session(self, number: int) -> None:
        """Run one session; its connections are closed on return, or stay open for a while."""
        chance = random.Random(f"{self._seed}:{number}")
        session = chance.choices(
            (self._noise, self._greeting, self._conversation, self._idlers),
            (0.2, 0.2, 0.57, 0.03),
        )[0]
        with suppress(OSError, FlexKVError):
            session(chance)
        while len(self._open) > 96:
            self._open.pop(0).close()

    # -- kinds of sessions ----------------------------------------------------------------------

    def _noise(self, chance: random.Random) -> None:
        """Send frames that are not a greeting."""
        with self._dialled() as peer:
            for _ in range(chance.randrange(1, 4)):
                self._say(peer, _noise(chance), chance)

    def _greeting(self, chance: random.Random) -> None:
        """Greet with fields that may have any values."""
        role: Any = chance.choice(("client", "agent", "control"))
        hello = Hello(
            chance.choice((PROTOCOL_VERSION,) * 4 + (0, -1, 1 << 62)),
            role,
            chance.choice(ODD_INTEGERS),
            chance.choice((self._facts, self._facts, {}, {"key": "value"})),
            chance.choice((self._number(chance), *ODD_INTEGERS)),
            chance.choice((0, 0, *ODD_INTEGERS)),
            chance.choice((64, *ODD_INTEGERS)),
            chance.choice((self._order, self._order, "", "heads", "\ud7ff" * 9, "x" * 5000)),
            chance.random() < 0.3,
        )
        with self._dialled() as peer:
            self._say(peer, _mangled(_body(hello), chance), chance)
            _listen(peer)
            for _ in range(chance.randrange(4)):
                self._say(peer, _anything(chance, 0), chance)

    def _conversation(self, chance: random.Random) -> None:
        """Connect properly, and send what a peer of the role may send, or almost that."""
        instance, roles = self._number(chance), ["control"]
        if chance.random() < 0.9:
            roles = chance.choice((["client"], ["agent"], ["agent", "client"]))
        peers: list[tuple[str, Connected]] = []
        try:
            peers.extend((role, self._welcomed(role, instance, chance)) for role in roles)
            self._talk(peers, chance)
        finally:
            for _, connected in peers:
                if connected.arena_fd is not None:
                    os.close(connected.arena_fd)
                if chance.random() < 0.05:
                    self._open.append(connected.socket)
                else:
                    connected.socket.close()

    def _talk(self, peers: list[tuple[str, Connected]], chance: random.Random) -> None:
        epoch = 0
        asked: list[int] = []
        for _ in range(chance.randrange(2, 40)):
            role, connected = chance.choice(peers)
            for heard in _listen(connected.socket):
                if isinstance(heard, State):
                    epoch = heard.epoch
                elif isinstance(heard, Copy):
                    asked.append(heard.op_id)
            said = _SAYS[role](chance, epoch, asked)
            body = said if isinstance(said, bytes) else _body(said)
            if chance.random() < 0.03:
                body = _mangled(body, chance)
            self._say(connected.socket, body, chance)

    def _idlers(self, chance: random.Random) -> None:
        """Open many connections, and send little or nothing."""
        for _ in range(chance.randrange(1, 40)):
            peer = self._dialled()
            self._open.append(peer)
            if chance.random() < 0.3:
                self._say(peer, _body(Hello(PROTOCOL_VERSION, "control", 1)), chance)

    # -- what they have in common ---------------------------------------------------------------

    def _number(self, chance: random.Random) -> int:
        return FIRST_INSTANCE + chance.randrange(INSTANCES)

    def _dialled(self) -> socket.socket:
        peer = socket.socket(socket.AF_UNIX)
        try:
            peer.settimeout(5.0)
            peer.connect(str(socket_path(self._settings.server_recv_port)))
        except OSError:
            peer.close()
            raise
        return peer

    def _welcomed(self, role: Any, instance: int, chance: random.Random) -> Connected:
        watches = role == "client" and chance.random() < 0.3
        hello = Hello(
            PROTOCOL_VERSION, role, os.getpid(), self._facts, instance, 0, 64, self._order, watches
        )
        connected = connect(self._settings.server_recv_port, hello)
        self.frames += 1
        if role == "agent" and chance.random() < 0.95:
            self._say(connected.socket, _body(DeviceReady()), chance)
        return connected

    def _say(self, peer: socket.socket, body: bytes, chance: random.Random) -> None:
        """Send a frame, now and then with a wrong length or cut short."""
        length = len(body)
        if chance.random() < 0.01:
            length = chance.choice((0, length + 1, 1 << 20, (1 << 32) - 1))
        frame = length.to_bytes(LENGTH_BYTES, "little") + body
        if chance.random() < 0.01:
            frame = frame[: chance.randrange(len(frame) + 1)]
        self.frames += 1
        peer.settimeout(5.0)
        peer.sendall(frame)


def _listen(peer: socket.socket) -> list[Message]:
    """Return the messages that come within `READ_S`; one that is cut short is lost."""
    heard: list[Message] = []
    peer.settimeout(READ_S)
    with suppress(OSError, msgspec.MsgspecError):
        blob = peer.recv(1 << 18)
        while len(blob) >= LENGTH_BYTES:
            end = LENGTH_BYTES + int.from_bytes(blob[:LENGTH_BYTES], "little")
            heard.append(FROM_SERVER.decode(blob[LENGTH_BYTES:end]))
            blob = blob[end:]
    return heard


def _body(message: Message) -> bytes:
    return framed(message)[LENGTH_BYTES:]


def _mangled(body: bytes, chance: random.Random) -> bytes:
    """Return a message with some bytes changed, inserted, removed or repeated."""
    mangled = bytearray(body)
    for _ in range(chance.randrange(0, 4)):
        at = chance.randrange(len(mangled) + 1)
        match chance.randrange(4):
            case 0 if at < len(mangled):
                mangled[at] = chance.randrange(256)
            case 1:
                mangled[at:at] = chance.randbytes(chance.randrange(1, 9))
            case 2:
                del mangled[at : at + chance.randrange(1, 9)]
            case _:
                mangled[at:at] = mangled[at : at + chance.randrange(1, 65)]
    return bytes(mangled)


def _noise(chance: random.Random) -> bytes:
    """Return bytes for a frame that form a valid message only by accident."""
    match chance.randrange(5):
        case 0:
            return b"\x91\xa5\xff\xfe\xfd\xfc\xfb"  # a name that is not UTF-8
        case 1:
            return chance.choice((b"\x91", b"\x81\x01")) * chance.randrange(1, 30_000)
        case 2:
            return b"\x92\xa7release\xdd" + struct.pack(">I", chance.choice((1 << 16, 0xFFFFFFFF)))
        case 3:
            return b"\x93\xa6copied\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00\xa0"  # NaN
        case _:
            return chance.randbytes(chance.choice((0, 1, 7, 100, 4000)))


def _integer(chance: random.Random, end: int = 32) -> int:
    """Return a number, mostly a small one, since an invalid one ends the conversation at once."""
    return chance.choice(INTEGERS) if chance.random() < 0.01 else chance.randrange(end)


def _numbers(chance: random.Random) -> tuple[int, ...]:
    count = chance.choices((1, 3, 50, 5000), (0.6, 0.3, 0.09, 0.01))[0]
    return tuple(_integer(chance) for _ in range(count))


_KINDS = [bytes([kind]) * 16 for kind in range(20)]
_KINDS += key_list(leaf_keys(b"".join(_KINDS[:7]), 1))[1:]  # the keys of some blocks' leaves


def _keys(chance: random.Random) -> bytes:
    """Return keys from a small set in an order that no prompt has, or random bytes."""
    count = chance.choices((0, 1, 4, 9, 300), (0.05, 0.1, 0.4, 0.4, 0.05))[0]
    if chance.random() < 0.7:
        keys = b"".join(chance.sample(_KINDS, min(count, len(_KINDS))))
    else:
        keys = chance.randbytes(16 * count)
    return keys + b"x" * (chance.random() < 0.02)


def _start(chance: random.Random, epoch: int) -> Start:
    keys = _keys(chance)
    first = chance.choice((0, 0, 0, _integer(chance, 4)))
    drop = _drop(chance)
    behind = drop if chance.random() < 0.9 else 0
    wanted = max(0, len(keys) // 16 - 1 - first - behind) % 4096
    ids = chance.choices(range(64), k=wanted) if chance.random() < 0.3 else range(wanted)
    blob = struct.pack(f"<{wanted}q", *ids)
    if chance.random() < 0.1:
        blob = chance.choice(
            (b"", b"1234567", struct.pack("<q", -1) * wanted, chance.randbytes(64))
        )
    prompt, known = _prompt(chance)
    return Start(
        chance.choice((chance.randrange(1 << 40), chance.randrange(32))),
        chance.choice(("get", "put", "put", "prefetch", "", "clear")),
        keys,
        first,
        blob,
        epoch if chance.random() < 0.95 else _integer(chance),
        chance.random() < 0.3,
        chance.randrange(32),
        prompt=prompt,
        known=known,
        by_layer=chance.random() < 0.3,
        leaves=_leaves(chance, len(keys) // 16),
        drop=drop,
    )


def _leaves(chance: random.Random, blocks: int) -> tuple[LeafIds, ...]:
    """Return leaves of a few groups, most of them where leaves can be."""
    if chance.random() < 0.5:
        return ()
    runs = []
    for group in range(1, chance.choice((2, 3, 4, 40))):
        first, count = chance.randrange(max(1, blocks)), chance.choice((0, 1, 1, 2, 5))
        ids = chance.sample(range(64), count)
        blob = struct.pack(f"<{count}q", *ids)
        if chance.random() < 0.05:
            blob = chance.choice((b"", b"1234567", struct.pack("<q", -2), chance.randbytes(64)))
        step = 1 if chance.random() < 0.9 else _integer(chance)
        runs.append(
            LeafIds(group, first if chance.random() < 0.95 else _integer(chance), step, blob)
        )
    if chance.random() < 0.02:
        runs *= 2
    return tuple(runs)


def _drop(chance: random.Random) -> int:
    return chance.choices((0, 1, _integer(chance)), (0.9, 0.08, 0.02))[0]


def _prompt(chance: random.Random) -> tuple[int, int]:
    """Return a prompt's number, and how many of its keys the server is claimed to have."""
    if chance.random() < 0.5:
        return 0, 0
    prompt = _integer(chance, 6)
    return prompt, chance.choices((0, 1, _integer(chance, 9)), (0.8, 0.15, 0.05))[0]


def _client_says(chance: random.Random, epoch: int, _: list[int]) -> Message | bytes:
    match chance.randrange(20):
        case 0:
            return _anything(chance, epoch)
        case number if number < 10:
            return _start(chance, epoch)
        case number if number < 15:
            asked, hold = _integer(chance), chance.random() < 0.7
            first, tell = _integer(chance, 4), chance.random() < 0.3
            prompt, from_first = _prompt(chance), chance.random() < 0.2
            return Match(
                asked, _keys(chance), first, hold, tell, *prompt, from_first, _drop(chance)
            )
        case number if number < 17:
            return Release(_numbers(chance))
        case 17:
            return Forget(_numbers(chance))
        case _:
            return Cancel(_numbers(chance))


def _agent_says(chance: random.Random, epoch: int, asked: list[int]) -> Message | bytes:
    if asked and chance.random() < 0.7:
        op_id = asked.pop(chance.randrange(len(asked)))
        return Copied(op_id, chance.choice(("", "", "", "it cannot")))
    match chance.randrange(20):
        case 0:
            return Copied(_integer(chance))
        case 1:
            return _anything(chance, epoch)
        case number if number < 11:
            layers = chance.choice((None, None, 1, 2, _integer(chance, 9)))
            return Ready(_numbers(chance), layers)
        case _:
            return Settle(_integer(chance), _numbers(chance))


def _control_says(chance: random.Random, *_: Any) -> Message | bytes:
    arguments: dict[str, Any] = chance.choice(
        ({}, {}, {"path": "/dev/null/x"}, {"path": "a\0b"}, {"path": []}, {"tier": {"a": [1]}})
    )
    verb = chance.choice(("status", "status", "flush", "trace_stop", "", "__init__", "perform"))
    if "path" in arguments:
        verb = "trace_start"
    return Command(chance.randrange(32), verb, arguments)


def _anything(chance: random.Random, epoch: int) -> bytes:
    says = chance.choice((_client_says, _agent_says, _control_says, None, None))
    return _noise(chance) if says is None else _as_bytes(says(chance, epoch, []))


def _as_bytes(said: Message | bytes) -> bytes:
    return said if isinstance(said, bytes) else _body(said)


_SAYS: dict[str, Callable[[random.Random, int, list[int]], Message | bytes]] = {
    "client": _client_says,
    "agent": _agent_says,
    "control": _control_says,
}
