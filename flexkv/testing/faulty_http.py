"""A proxy between a client and an HTTP server that spoils some answers, by a seed.

What happens to a request follows from the seed, the request, and how often it came before; so a run
with the same requests has the same faults, in whatever order concurrent requests arrive.

    client ──▶ FaultyProxy ──▶ server
           ◀── delayed, cut, flipped, stale, another object, the whole object, an error, nothing
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from random import Random
from typing import NamedTuple, Self

_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
_RANGE = re.compile(rb"(?i)\r\nrange: *[^\r]*")
_END = b"\r\n\r\n"
_TURNS = 10
"""Turns of the loop in which connections appear that were accepted before the listener closed, and
in which transports end."""


class Message(NamedTuple):
    """A request or a response."""

    head: bytes
    """With the empty line at its end."""
    body: bytes

    @property
    def method(self) -> str:
        """Return the method of a request."""
        return self.head.split(b" ", 1)[0].decode()

    @property
    def path(self) -> str:
        """Return the path of a request."""
        return self.head.split(b" ", 2)[1].decode()


class _Exchange(NamedTuple):
    """What a fault may use."""

    request: Message
    ask: Callable[[Message], Awaitable[Message]]
    get: Callable[[str, bytes], Awaitable[Message]]
    """Asks for what is at a path, with the header of a range or without one."""
    random: Random
    others: Sequence[str]
    """Paths of other objects."""


class FaultyProxy:
    """A proxy on a free port of this machine.

    Attributes:
        port: where it listens.
        share: how many of the requests suffer a fault, from 0 to 1.
        faults: which faults, by their names in `FAULTS`.
        met: how often each fault was used.
    """

    def __init__(
        self,
        server_port: int,
        seed: int,
        faults: Sequence[str],
        share: float,
        signed: Callable[[str], str] = lambda path: path,
    ) -> None:
        """Take the server's port on this machine, and what happens to its answers.

        `signed` returns the target of a request that gets what is at a path: a server that checks
        signatures answers nothing else to requests that the proxy makes up.
        """
        self.port = 0
        self.share, self.faults = share, list(faults)
        self.met: Counter[str] = Counter()
        self._server_port, self._seed, self._signed = server_port, seed, signed
        self._before: Counter[tuple[str, str, bytes]] = Counter()
        self._paths: set[str] = set()
        self._listening: asyncio.Server | None = None
        self._serving: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def __aenter__(self) -> Self:
        """Listen."""
        self._listening = await asyncio.start_server(self._begin, "127.0.0.1", 0)
        self.port = self._listening.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Cut every connection."""
        assert self._listening is not None
        self._listening.close()
        for _turn in range(_TURNS):
            for task, writer in self._serving.items():
                task.cancel()
                writer.transport.abort()  # a task that has not begun never does it
            await asyncio.gather(*self._serving, return_exceptions=True)
            await asyncio.sleep(0)

    def _begin(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._serving[task] = writer
        task.add_done_callback(self._serving.pop)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection until a fault or the client ends it."""
        with suppress(OSError, EOFError):
            try:
                while True:
                    request = await _read(reader, is_request=True)
                    if not await self._answer(request, writer):
                        break
            finally:
                writer.transport.abort()

    async def _answer(self, request: Message, writer: asyncio.StreamWriter) -> bool:
        """Answer a request; return whether the connection can be used further."""
        fault = self._fault_of(request)
        exchange = _Exchange(request, self._ask, self._get, *fault[1:])
        response, keep = await FAULTS[fault[0]](exchange) if fault[0] else (
            await self._ask(request), True
        )  # fmt: skip
        if response is not None:
            writer.write(response.head + response.body)
            await writer.drain()
        if not keep:
            writer.write_eof()
            await writer.drain()
        return keep

    def _fault_of(self, request: Message) -> tuple[str, Random, Sequence[str]]:
        """Return the name of what happens to a request (empty: nothing), and its chance."""
        found = _RANGE.search(request.head)
        name = request.path.rpartition("/")[2]
        kind = request.method, name, found[0] if found else b""
        random = Random(repr((self._seed, kind, self._before[kind])))
        self._before[kind] += 1
        others = [path for path in sorted(self._paths) if path != request.path]
        if request.method in ("PUT", "GET") and "?" not in request.path:
            self._paths.add(request.path)
        fault = random.choice(self.faults) if random.random() < self.share else ""
        if fault:
            self.met[fault] += 1
        return fault, random, others

    async def _get(self, path: str, in_range: bytes) -> Message:
        """Return the server's answer to a get that no client has asked for."""
        line, host = f"GET {self._signed(path)} HTTP/1.1", f"Host: 127.0.0.1:{self._server_port}"
        return await self._ask(Message(f"{line}\r\n{host}".encode() + in_range + _END, b""))

    async def _ask(self, request: Message) -> Message:
        """Return the server's answer."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._server_port)
        try:
            head = request.head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
            writer.write(head + request.body)
            return await _read(reader, is_request=False, has_body=request.method != "HEAD")
        finally:
            writer.transport.abort()


async def _read(reader: asyncio.StreamReader, is_request: bool, has_body: bool = True) -> Message:
    head = await reader.readuntil(_END)
    length = _LENGTH.search(head)
    if not has_body or (length is None and is_request):
        return Message(head, b"")
    if length is None:
        return Message(head, await reader.read())
    return Message(head, await reader.readexactly(int(length[1])))


# -- faults: each returns what to answer, and whether the connection goes on after that -----------

_Answer = tuple[Message | None, bool]


async def _delay(at: _Exchange) -> _Answer:
    await asyncio.sleep(at.random.uniform(0, 0.3))
    return await at.ask(at.request), True


async def _hang(at: _Exchange) -> _Answer:
    await asyncio.Event().wait()
    raise AssertionError("nothing sets it")


async def _reset(at: _Exchange) -> _Answer:
    raise ConnectionResetError


async def _lose(at: _Exchange) -> _Answer:
    await at.ask(at.request)
    raise ConnectionResetError


async def _busy(at: _Exchange) -> _Answer:
    return _error("503 Slow Down", "SlowDown"), True


async def _fail(at: _Exchange) -> _Answer:
    return _error("500 Internal Server Error", "InternalError"), True


async def _deny(at: _Exchange) -> _Answer:
    return _error("403 Forbidden", "ExpiredToken"), True


async def _miss(at: _Exchange) -> _Answer:
    """Answer as if the object had not been written yet."""
    return _error("404 Not Found", "NoSuchKey"), True


async def _cut(at: _Exchange) -> _Answer:
    """End the connection somewhere in the body."""
    head, body = await at.ask(at.request)
    return Message(head, body[: at.random.randint(0, max(0, len(body) - 1))]), False


async def _shorten(at: _Exchange) -> _Answer:
    """Answer with fewer bytes, as if there were no more."""
    head, body = await at.ask(at.request)
    if not body:
        return Message(head, body), True
    less = body[: at.random.randint(0, len(body))]
    return Message(_LENGTH.sub(b"\r\nContent-Length: %d" % len(less), head), less), True


async def _lengthen(at: _Exchange) -> _Answer:
    """Answer a range with more bytes than were asked for."""
    head, body = await at.ask(at.request)
    if not body:
        return Message(head, body), True
    more = body + bytes(at.random.randint(1, 4096))
    return Message(_LENGTH.sub(b"\r\nContent-Length: %d" % len(more), head), more), True


async def _flip(at: _Exchange) -> _Answer:
    head, body = await at.ask(at.request)
    if not body:
        return Message(head, body), True
    flipped, bit = bytearray(body), at.random.randrange(8 * len(body))
    flipped[bit // 8] ^= 1 << bit % 8
    return Message(head, bytes(flipped)), True


async def _other(at: _Exchange) -> _Answer:
    """Answer with the bytes of another object."""
    if at.request.method != "GET" or not at.others:
        return await at.ask(at.request), True
    in_range = _RANGE.search(at.request.head)
    return await at.get(at.random.choice(at.others), in_range[0] if in_range else b""), True


async def _whole(at: _Exchange) -> _Answer:
    """Ignore the range, and answer 200 with all bytes."""
    if at.request.method != "GET" or not _RANGE.search(at.request.head):
        return await at.ask(at.request), True
    return await at.get(at.request.path, b""), True


def _error(status: str, code: str) -> Message:
    body = f"<Error><Code>{code}</Code></Error>".encode()
    return Message(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode(), body)


FAULTS: dict[str, Callable[[_Exchange], Awaitable[_Answer]]] = {
    "delay": _delay,
    "hang": _hang,
    "reset": _reset,
    "lose": _lose,
    "busy": _busy,
    "fail": _fail,
    "deny": _deny,
    "miss": _miss,
    "cut": _cut,
    "shorten": _shorten,
    "lengthen": _lengthen,
    "flip": _flip,
    "other": _other,
    "whole": _whole,
}
"""What can happen to a request, by name."""
