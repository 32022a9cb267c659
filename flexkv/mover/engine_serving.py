"""The mover's side for an engine: it carries out reads of other nodes.

    main thread ──▶ reads of one node ──▶ a thread, one batch after the other
                ──▶ reads of another  ──▶ a thread

A read blocks for as long as its node is silent, so each node has a thread of its own.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Sequence
from queue import Empty, SimpleQueue
from typing import Protocol

from flexkv.mover.wire import PACKET_BYTES, TO_MOVER, Done, Read, encode

IDLE_S = 60.0
"""A thread ends when its node was not read from for so long."""


class Engine(Protocol):
    """What the mover needs of an engine: see `EngineClient`."""

    def read(self, endpoint: str, addresses: Sequence[int], at: int, block_bytes: int) -> int:
        """Read blocks of another node to the window."""
        ...


class EngineServing:
    """An engine at work."""

    def __init__(self, connection: socket.socket, engine: Engine) -> None:
        """Start no thread yet."""
        self._connection, self._engine = connection, engine
        self._nodes: dict[str, SimpleQueue[Read]] = {}
        self._lock = threading.Lock()

    def take(self, read: Read) -> None:
        """Queue a read; the engine's process bounds how many there are."""
        with self._lock:
            reads = self._nodes.get(read.endpoint)
            if reads is not None:
                reads.put(read)
                return
            reads = self._nodes[read.endpoint] = SimpleQueue()
            reads.put(read)
        threading.Thread(target=self._work, args=(read.endpoint, reads), daemon=True).start()

    def _work(self, endpoint: str, reads: SimpleQueue[Read]) -> None:
        while True:
            try:
                read = reads.get(timeout=IDLE_S)
            except Empty:
                with self._lock:
                    if not reads.empty():
                        continue
                    del self._nodes[endpoint]
                return
            code = self._engine.read(endpoint, read.addresses, read.at, read.block_bytes)
            self._reply(Done(read.number, code))

    def _reply(self, done: Done) -> None:
        try:
            self._connection.send(encode(done))
        except OSError:  # there is no engine any more
            os._exit(0)


def serve_engine(connection: socket.socket, engine: Engine) -> None:
    """Carry out reads until the other end of the connection is closed; the process ends then."""
    serving = EngineServing(connection, engine)
    while packet := connection.recv(PACKET_BYTES):
        request = TO_MOVER.decode(packet)
        assert isinstance(request, Read), request
        serving.take(request)
    os._exit(0)
