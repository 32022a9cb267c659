"""A proxy between nodes that spoils what they say to each other at any byte, by a seed.

    reader ──up──▶ FaultyTcp ──▶ node
           ◀─────           ◀─down──

A fault is armed for connections of a purpose and for a direction. It strikes when so many bytes
have passed there. So it strikes in the middle of whatever goes on then. An *event* is a fault that
does something elsewhere at this byte: it calls what the test has named.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from random import Random
from typing import NamedTuple

from flexkv.cluster.tcp import address_of, parts_of
from flexkv.io.peer.frames import ANSWER_MAGIC, HEADER_BYTES, SUM_BYTES

CONNECT, GREETING, CONTROL, DATA = "connect", "greeting", "control", "data"
"""What a connection is used for: it is made, then the nodes prove who they are, and then it has one
of the two purposes."""
_PIECES_BYTES = (700, 5000, 1 << 16)
"""How many bytes a connection passes on at once."""
_RECEIVED_BYTES = 64 << 10
"""What a node sends waits there beyond about this, while a fault holds it up."""
_WANT, _FIELDS_BYTES = b"\xa4want", range(5, 14)
"""How a Want begins, and where its positions, group and generation are about, from its end."""
_ANSWER = struct.Struct("<IIQIIQ")
_NO_LINGER = struct.pack("ii", 1, 0)


class Fault(NamedTuple):
    """Something that is to happen.

    Attributes:
        name: in `FAULTS`, or of an event.
        purpose: of the connections where it may strike.
        is_up: whether it strikes what readers send.
        after_bytes: how many bytes pass before.
        seed: for what is left to chance.
    """

    name: str
    purpose: str
    is_up: bool
    after_bytes: int
    seed: int


class _Begun(NamedTuple):
    """Where in some bytes an answer begins, and the answer before it."""

    at: int
    last: bytes


class _Answers:
    """Finds where the answers begin that a node sends over a data connection."""

    def __init__(self) -> None:
        self._last = b""
        self._own = bytearray()
        self._bytes = HEADER_BYTES
        self._has_begun = False

    def feed(self, chunk: bytes) -> _Begun | None:
        """Take what passes; return where in it an answer begins that is not the first one."""
        found, at = None, 0
        self._has_begun = self._has_begun or chunk.startswith(ANSWER_MAGIC.to_bytes(4, "little"))
        while self._has_begun and at < len(chunk):
            if not self._own and self._last and found is None:
                found = _Begun(at, self._last)
            some = chunk[at : at + self._bytes - len(self._own)]
            self._own += some
            at += len(some)
            if len(self._own) == HEADER_BYTES:
                _, status, _, _, count, block_bytes = _ANSWER.unpack(self._own)
                self._bytes += 0 if status else count * (SUM_BYTES + block_bytes)
            if len(self._own) == self._bytes:
                self._last, self._own, self._bytes = bytes(self._own), bytearray(), HEADER_BYTES
        return found


class _Call:
    """One connection between a reader and a node."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self.near, self.far = near, far
        self.purpose = GREETING
        self.answers = _Answers()
        self.is_frozen = False
        self._said = b""

    def heard(self, chunk: bytes) -> None:
        """Take what the reader says, until it has said what the connection is for."""
        if self.purpose is GREETING:
            self._said += chunk
            for purpose in (CONTROL, DATA):
                if bytes([0xA0 + len(purpose)]) + purpose.encode() in self._said:
                    self.purpose = purpose

    def reset(self) -> None:
        """Have both ends find that the connection was reset, once it is closed."""
        for end in (self.near, self.far):
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)


class _Stream:
    """One direction of a connection.

    Attributes:
        is_deaf: whether what arrives is dropped.
        drips: whether it is passed on in small pieces, slowly.
    """

    def __init__(self, call: _Call, is_up: bool) -> None:
        self.call, self.is_up = call, is_up
        ends = call.near, call.far
        self.source, self.target = ends if is_up else reversed(ends)
        self.is_deaf = self.drips = False

    async def send(self, chunk: bytes) -> None:
        """Pass bytes on."""
        if not self.is_deaf and chunk:
            await asyncio.get_running_loop().sock_sendall(self.target, chunk)

    def end(self) -> None:
        """Have the receiver find that nothing more comes."""
        with suppress(OSError):
            self.target.shutdown(socket.SHUT_WR)


class _Hit(NamedTuple):
    """What a fault may use: bytes that arrived, and at which of them it strikes."""

    wire: FaultyTcp
    stream: _Stream
    before: bytes
    after: bytes
    begun: _Begun | None
    random: Random


class FaultyTcp:
    """A proxy in front of each node.

    Attributes:
        events: what else may happen at a byte, by name.
        on_stall: is called when something is held up in the middle.
        met: how often each fault struck.
    """

    def __init__(self, random: Random) -> None:
        """Spoil nothing yet; `random` cuts what passes into pieces."""
        self.events: dict[str, Callable[[Random], None]] = {}
        self.on_stall: Callable[[Random], None] = lambda _: None
        self.met: Counter[str] = Counter()
        self._random = random
        self._armed: list[tuple[Fault, int]] = []
        self._healed = asyncio.Event()
        self._listening: list[socket.socket] = []
        self._serving: set[asyncio.Task[None]] = set()

    def before(self, address: str) -> str:
        """Return an address at which a node is reached through the proxy."""
        listening = socket.create_server(("127.0.0.1", 0), backlog=64)
        listening.setblocking(False)
        self._listening.append(listening)
        loop = asyncio.get_running_loop()
        loop.add_reader(listening, self._accept, listening, address)
        return address_of(*listening.getsockname()[:2])

    def arm(self, fault: Fault) -> None:
        """Have something happen later."""
        self._armed.append((fault, fault.after_bytes))

    def heal(self) -> None:
        """Disarm all that has not happened; pass on what was held up."""
        self._armed.clear()
        healed, self._healed = self._healed, asyncio.Event()
        healed.set()

    async def until_healed(self) -> None:
        """Return when the wire is healed."""
        await self._healed.wait()

    async def close(self) -> None:
        """Reset every connection."""
        loop = asyncio.get_running_loop()
        for each in self._listening:
            loop.remove_reader(each)
            each.close()
        while self._serving:
            for task in self._serving:
                task.cancel()
            await asyncio.wait(self._serving)

    # -- connections ----------------------------------------------------------------------------

    def _accept(self, listening: socket.socket, address: str) -> None:
        with suppress(OSError):
            near, _ = listening.accept()
            near.setblocking(False)
            task = asyncio.get_running_loop().create_task(self._serve(near, address))
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)
            task.add_done_callback(lambda _: near.close())

    async def _serve(self, near: socket.socket, address: str) -> None:
        """Carry one connection until it ends."""
        fault = self._due(CONNECT, True, 0)
        if fault is not None:
            self.met[fault.name] += 1
            if fault.name == "refuse":
                return
            await self.until_healed()
        far = socket.socket()
        far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVED_BYTES)
        far.setblocking(False)
        with far, suppress(OSError):
            await asyncio.get_running_loop().sock_connect(far, parts_of(address))
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            call = _Call(near, far)
            try:
                await self._carry_both(call)
            except asyncio.CancelledError:
                call.reset()
                raise

    async def _carry_both(self, call: _Call) -> None:
        """Pass on what both ends say, until both have ended or the connection broke."""
        size = self._random.choice(_PIECES_BYTES)
        try:
            async with asyncio.TaskGroup() as group:
                for is_up in (True, False):
                    group.create_task(self._carry(_Stream(call, is_up), size))
        except* OSError:
            call.reset()

    async def _carry(self, stream: _Stream, size: int) -> None:
        """Pass on what one end says until it ends."""
        loop, call = asyncio.get_running_loop(), stream.call
        while chunk := await loop.sock_recv(stream.source, size):
            begun = None
            if stream.is_up:
                call.heard(chunk)
            elif call.purpose is DATA:
                begun = call.answers.feed(chunk)
            if call.is_frozen:
                await self.until_healed()
            if not await self._struck(stream, chunk, begun):
                await (_drip(self, stream, chunk) if stream.drips else stream.send(chunk))
        stream.end()

    async def _struck(self, stream: _Stream, chunk: bytes, begun: _Begun | None) -> bool:
        """Have a fault strike that is due in a chunk; return whether the chunk is passed on."""
        fault = self._due(stream.call.purpose, stream.is_up, len(chunk))
        if fault is None:
            return False
        random = Random(fault.seed)
        if (event := self.events.get(fault.name)) is not None:
            self.met[fault.name] += 1
            event(random)
            return False
        at = random.randrange(len(chunk))
        hit = _Hit(self, stream, chunk[:at], chunk[at:], begun, random)
        strike = FAULTS[fault.name]
        if (strike is _replay and begun is None) or (strike is _garble and _WANT not in chunk):
            self._armed.append((fault, 0))
            return False
        self.met[fault.name] += 1
        await strike(hit)
        return True

    def _due(self, purpose: str, is_up: bool, nbytes: int) -> Fault | None:
        """Return the first fault that strikes within bytes that pass now; count them for others."""
        due = None
        for number, (fault, left) in enumerate(self._armed):
            if (fault.purpose, fault.is_up) != (purpose, is_up):
                continue
            if left <= nbytes and due is None:
                due = number
            else:
                self._armed[number] = fault, max(0, left - nbytes)
        return None if due is None else self._armed.pop(due)[0]


async def _drip(wire: FaultyTcp, stream: _Stream, chunk: bytes) -> None:
    """Pass bytes on slowly until the wire is healed."""
    healed = wire._healed
    step = 1 + len(chunk) // 8
    for at in range(0, len(chunk), step):
        await stream.send(chunk[at : at + step])
        if not healed.is_set():
            await asyncio.sleep(0.5)
    stream.drips = not healed.is_set()


# -- faults: each passes on what it leaves of the bytes -------------------------------------------


async def _cut(hit: _Hit) -> None:
    """End the connection in both directions."""
    await hit.stream.send(hit.before)
    for is_up in (True, False):
        _Stream(hit.stream.call, is_up).end()
    hit.stream.is_deaf = True


async def _half(hit: _Hit) -> None:
    """End one direction; the other one goes on."""
    await hit.stream.send(hit.before)
    hit.stream.end()
    hit.stream.is_deaf = True


async def _reset(hit: _Hit) -> None:
    await hit.stream.send(hit.before)
    raise ConnectionResetError


async def _lose(hit: _Hit) -> None:
    """Pass nothing on any more, in one direction, though the connection lasts."""
    await hit.stream.send(hit.before)
    hit.stream.is_deaf = True


async def _stall(hit: _Hit) -> None:
    """Hold one direction up until the wire is healed."""
    await hit.stream.send(hit.before)
    hit.wire.on_stall(hit.random)
    await hit.wire.until_healed()
    await hit.stream.send(hit.after)


async def _freeze(hit: _Hit) -> None:
    """Hold both directions up until the wire is healed."""
    hit.stream.call.is_frozen = True
    await _stall(hit)
    hit.stream.call.is_frozen = False


async def _delay(hit: _Hit) -> None:
    await hit.stream.send(hit.before)
    hit.wire.on_stall(hit.random)
    await asyncio.sleep(hit.random.uniform(0, 4))
    await hit.stream.send(hit.after)


async def _slow(hit: _Hit) -> None:
    """Let one direction drip until the wire is healed."""
    hit.stream.drips = True
    await _drip(hit.wire, hit.stream, hit.before + hit.after)


async def _flip(hit: _Hit) -> None:
    chunk = bytearray(hit.before + hit.after)
    chunk[len(hit.before)] ^= 1 << hit.random.randrange(8)
    await hit.stream.send(bytes(chunk))


async def _garble(hit: _Hit) -> None:
    """Flip a bit in what is wanted: positions, group or generation, which follow the keys."""
    chunk = bytearray(hit.before + hit.after)
    chunk[-hit.random.choice(_FIELDS_BYTES)] ^= 1 << hit.random.randrange(2)
    await hit.stream.send(bytes(chunk))


async def _drop(hit: _Hit) -> None:
    """Leave some bytes out."""
    await hit.stream.send(hit.before)
    await hit.stream.send(hit.after[hit.random.choice((1, 8, 32, 100_000)) :])


async def _insert(hit: _Hit) -> None:
    """Add some bytes."""
    await hit.stream.send(hit.before)
    await hit.stream.send(hit.random.randbytes(hit.random.choice((1, 8, 32, 1000))))
    await hit.stream.send(hit.after)


async def _repeat(hit: _Hit) -> None:
    """Send some bytes twice, often a whole message."""
    chunk = hit.before + hit.after
    begin = hit.random.choice((0, 0, len(hit.before)))
    await hit.stream.send(chunk + chunk[begin:])


async def _swallow(hit: _Hit) -> None:
    """Drop what has arrived together, often a whole message."""


async def _replay(hit: _Hit) -> None:
    """Send an answer again, before the next one."""
    assert hit.begun is not None
    chunk, (at, last) = hit.before + hit.after, hit.begun
    await hit.stream.send(chunk[:at] + last + chunk[at:])


FAULTS: dict[str, Callable[[_Hit], Awaitable[None]]] = {
    "cut": _cut,
    "half": _half,
    "reset": _reset,
    "lose": _lose,
    "stall": _stall,
    "freeze": _freeze,
    "delay": _delay,
    "slow": _slow,
    "flip": _flip,
    "garble": _garble,
    "drop": _drop,
    "insert": _insert,
    "repeat": _repeat,
    "swallow": _swallow,
    "replay": _replay,
}
"""What can happen to bytes, by name."""
SPOILS = {"flip", "garble", "drop", "insert", "repeat", "swallow", "replay"}
"""Those after which a node receives something else than was sent."""
