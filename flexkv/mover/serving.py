"""The mover's side: takes requests from the engine, and has the store's client carry them out.

main thread ──▶ gets ──▶ a thread, several in one call
            ──▶ puts ──▶ a thread
            ──▶ names ─▶ a thread: whether objects exist, their sizes, removals

Several threads for gets would be slower: ADR 17 has the figures.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
from queue import Empty, SimpleQueue
from typing import Protocol

from flexkv.mover.engine_client import EngineClient
from flexkv.mover.engine_config import EngineConfig
from flexkv.mover.engine_serving import serve_engine
from flexkv.mover.mooncake_client import MooncakeClient
from flexkv.mover.window import mapped
from flexkv.mover.wire import (
    PACKET_BYTES,
    TO_MOVER,
    Begin,
    Done,
    Exist,
    Found,
    Get,
    Put,
    Read,
    Ready,
    Refused,
    Remove,
    Reply,
    Size,
    encode,
)

GETS_AT_ONCE, BYTES_AT_ONCE = 16, 16 << 20
"""The most objects, and bytes of room for them, of one call; a single get may have more. Small
objects arrive faster together. Large ones come one by one, so that each is copied to host memory
while the next arrives."""
LEAVE_S = 2.0
"""How long leaving the store may take."""
_PR_SET_PDEATHSIG = 1


class StoreClient(Protocol):
    """What the mover needs of a store's client: see `MooncakeClient`."""

    def get(self, names: list[str], at: list[int], sizes: list[int]) -> list[int]:
        """Read objects to places in the window."""
        ...

    def put(self, name: str, at: int, size: int, is_kept: bool) -> int:
        """Create an object from bytes in the window."""
        ...

    def exist(self, names: list[str]) -> list[int]:
        """Return which objects are there."""
        ...

    def size(self, name: str) -> int:
        """Return how many bytes an object has."""
        ...

    def remove(self, name: str) -> int:
        """Remove an object."""
        ...

    def close(self) -> None:
        """Leave the store."""
        ...


class Serving:
    """A mover at work."""

    def __init__(self, connection: socket.socket, client: StoreClient) -> None:
        """Start the threads."""
        self._connection, self._client = connection, client
        self._gets: SimpleQueue[Get] = SimpleQueue()
        self._puts: SimpleQueue[Put] = SimpleQueue()
        self._names: SimpleQueue[Exist | Size | Remove] = SimpleQueue()
        self._next: Get | None = None
        """The oldest get, if it was taken from the queue and did not fit in a batch."""
        for work in (self._read, self._write, self._ask):
            threading.Thread(target=work, daemon=True).start()

    def take(self, request: Get | Put | Exist | Size | Remove) -> None:
        """Queue a request; the engine bounds how many there are."""
        match request:
            case Get():
                self._gets.put(request)
            case Put():
                self._puts.put(request)
            case Exist() | Size() | Remove():
                self._names.put(request)

    def _batch(self) -> list[Get]:
        """Return the gets for one call; wait for the first.

        No object is among them twice: Mooncake would fill one place, and report success for both.
        """
        batch: dict[str, Get] = {}
        room = BYTES_AT_ONCE
        while len(batch) < GETS_AT_ONCE:
            if self._next is None:
                try:
                    self._next = self._gets.get(block=not batch)
                except Empty:
                    break
            room -= self._next.size
            if batch and (self._next.name in batch or room < 0):
                break
            batch[self._next.name], self._next = self._next, None
        return list(batch.values())

    def _read(self) -> None:
        while True:
            gets = self._batch()
            codes = self._client.get(
                [each.name for each in gets],
                [each.at for each in gets],
                [each.size for each in gets],
            )
            for each, code in zip(gets, codes, strict=True):
                self._reply(Done(each.number, code))

    def _write(self) -> None:
        while True:
            put = self._puts.get()
            code = self._client.put(put.name, put.at, put.size, put.is_kept)
            self._reply(Done(put.number, code))

    def _ask(self) -> None:
        while True:
            match self._names.get():
                case Exist(number, names):
                    self._reply(Found(number, self._client.exist(names)))
                case Size(number, name):
                    self._reply(Done(number, self._client.size(name)))
                case Remove(number, name):
                    self._reply(Done(number, self._client.remove(name)))

    def _reply(self, reply: Reply) -> None:
        send(self._connection, reply)


def _end_after(raised: threading.ExceptHookArgs) -> None:
    """End the process after an exception in a thread: its requests would never be answered."""
    sys.excepthook(raised.exc_type, raised.exc_value or raised.exc_type(), raised.exc_traceback)
    os._exit(1)


def send(connection: socket.socket, reply: Reply) -> None:
    """Send a reply; without an engine the process ends."""
    try:
        connection.send(encode(reply))
    except OSError:
        os._exit(0)


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however that happens."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def serve(connection: socket.socket, window_fd: int) -> None:
    """Serve one engine until its end of the connection is closed; the process ends then."""
    threading.excepthook = _end_after
    begin = TO_MOVER.decode(connection.recv(PACKET_BYTES))
    assert isinstance(begin, Begin), begin
    window = mapped(window_fd, begin.window_bytes)
    try:
        if isinstance(begin.config, EngineConfig):
            engine = EngineClient(begin.config, window, begin.lent)
            send(connection, Ready(engine.endpoint, engine.address))
            serve_engine(connection, engine)
            return
        client = MooncakeClient(begin.config, window)
    except (ImportError, OSError) as error:
        send(connection, Refused(str(error)))
        return
    send(connection, Ready())
    serve_client(connection, client)


def serve_client(connection: socket.socket, client: StoreClient) -> None:
    """Serve an engine with a client that is connected; the process ends afterwards."""
    serving = Serving(connection, client)
    while packet := connection.recv(PACKET_BYTES):
        request = TO_MOVER.decode(packet)
        assert not isinstance(request, Begin | Read), request
        serving.take(request)
    threading.Timer(LEAVE_S, os._exit, (0,)).start()
    client.close()
    os._exit(0)
