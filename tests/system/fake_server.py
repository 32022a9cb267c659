"""A server whose every message comes from the test, to see how clients and agents react."""

from __future__ import annotations

import os
import queue
import socket
import threading
from contextlib import suppress
from typing import Any

from flexkv.common.config import Settings
from flexkv.io.memory.arena import Arena
from flexkv.links.framing import LENGTH_BYTES
from flexkv.server.handshake import read
from flexkv.server.wire import (
    PROTOCOL_VERSION,
    TO_SERVER,
    Hello,
    State,
    Welcome,
    framed,
    length_of,
    understood,
)

from .serving import ORDER

HOST_BLOCKS, STRIDE_BYTES = 16, 4096


class FakeServer:
    """A server that welcomes every connection, and leaves the rest of it to the test.

    Attributes:
        welcome: what the next connection is sent; None for a correct welcome.
        gives_memory: whether agents get the descriptor of host memory.
    """

    def __init__(self, settings: Settings) -> None:
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(settings.server_recv_port.removeprefix("ipc://"))
        self._listening.listen()
        self._arena = Arena.open(HOST_BLOCKS, STRIDE_BYTES, shared=True)
        self._peers: queue.Queue[socket.socket] = queue.Queue()
        self._accepted: list[socket.socket] = []
        self.welcome: Welcome | None = None
        self.gives_memory = True
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                peer, _ = self._listening.accept()
                peer.settimeout(10)
                self._accepted.append(peer)
                with suppress(Exception):
                    self._greet(peer)

    def _greet(self, peer: socket.socket) -> None:
        hello = self.hear(peer)
        assert isinstance(hello, Hello)
        arena = self._arena
        truth = Welcome(
            PROTOCOL_VERSION,
            os.getpid(),
            None,
            (),
            HOST_BLOCKS,
            STRIDE_BYTES,
            arena.fd_offset_bytes,
        )
        assert arena.fd is not None
        fds = [arena.fd] if hello.role == "agent" and self.gives_memory else []
        socket.send_fds(peer, [framed(self.welcome or truth)], fds)
        if hello.role == "client":
            peer.sendall(framed(State(True, 64, ORDER, 1)))
        self._peers.put(peer)

    def next_peer(self, within_s: float = 10.0) -> socket.socket:
        """Return the next connection that was welcomed.

        Raises:
            queue.Empty: there was none in time.
        """
        return self._peers.get(timeout=within_s)

    @staticmethod
    def hear(peer: socket.socket) -> Any:
        """Return the next message of a peer."""
        return understood(TO_SERVER, read(peer, length_of(read(peer, LENGTH_BYTES))))

    @staticmethod
    def say(peer: socket.socket, said: Any) -> None:
        """Send a message, or a frame with these bytes in it."""
        if isinstance(said, bytes):
            peer.sendall(len(said).to_bytes(LENGTH_BYTES, "little") + said)
        else:
            peer.sendall(framed(said))

    def close(self) -> None:
        """Close every connection, and free the host memory."""
        self._listening.close()
        for peer in self._accepted:
            peer.close()
        self._arena.close()
