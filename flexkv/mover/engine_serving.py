"""The mover's side for an engine: it carries out reads of other nodes.

    main thread ──▶ reads of one node ──▶ a thread, one batch after the other
                ──▶ reads of another  ──▶ a thread

A read blocks for as long as its node is silent, so each node has a thread of its own.

When the engine's process closes the connection, reads under way are waited for: cut off in the
middle, they would count as failures of the nodes that are read.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Protocol

from flexkv.mover.wire import PACKET_BYTES, TO_MOVER, Done, Read, encode

IDLE_S = 60.0
"""A thread ends when its node was not read from for so long."""
DRAIN_S = 2.0
"""How long the mover waits at its end for reads that are under way."""


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
        self._read_ended = threading.Condition(self._lock)
        self._reading, self._is_over = 0, False

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
            with self._lock:
                if self._is_over:
                    return
                self._reading += 1
            code = self._engine.read(endpoint, read.addresses, read.at, read.block_bytes)
            self._reply(Done(read.number, code))
            with self._lock:
                self._reading -= 1
                self._read_ended.notify()

    def _reply(self, done: Done) -> None:
        try:
            self._connection.send(encode(done))
        except (BrokenPipeError, ConnectionResetError):
            pass  # the main thread sees the end
        except OSError:  # nobody would hear of this read, nor of later ones of its node
            os._exit(1)

    def drain(self, within_s: float) -> bool:
        """Begin no more reads; return whether those under way have ended in time."""
        with self._lock:
            self._is_over = True
            return self._read_ended.wait_for(lambda: not self._reading, within_s)


def serve_engine(connection: socket.socket, engine: Engine) -> None:
    """Carry out reads until the other end of the connection is closed; the process ends then."""
    serving = EngineServing(connection, engine)
    with suppress(ConnectionResetError):  # it was closed before all was read
        while packet := connection.recv(PACKET_BYTES):
            request = TO_MOVER.decode(packet)
            assert isinstance(request, Read), request
            serving.take(request)
    serving.drain(DRAIN_S)
    os._exit(0)
