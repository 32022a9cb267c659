"""Somebody who reaches the port of a node, but does not know the secret of its cluster.

Connections by seed say what the protocol says, with lies in it, and anything else. Whatever they
say, a node may tell them its version and a random number, and nothing else.
"""

from __future__ import annotations

import hashlib
import hmac
import random
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from itertools import count

from flexkv.cluster.handshake import HELLO_BYTES, NONCE_BYTES, PROOF_BYTES, VERSION
from flexkv.cluster.wire import Introduction, Ping, Purpose, SnapshotWanted, Want, framed
from flexkv.io.peer.frames import Read

MAGIC = b"FlexKV\xf1\n"
VERSION_BYTES = len(MAGIC) + 4
OPEN_MAX = 200
"""How many connections it keeps open and silent."""
PATIENCE_S = 20.0
RESETS = struct.pack("ii", 1, 0)


class StrangerHeardError(AssertionError):
    """A node told a stranger more than it may."""


class Stranger:
    """The connections of one seed.

    Attributes:
        frames: how many were sent.
        connections: how many were made.
        heard_bytes: how many bytes the node has said.
        refused: how many connections were not accepted.
    """

    def __init__(self, connect: Callable[[], socket.socket], seed: int) -> None:
        """Connect to nobody yet."""
        self._connect, self._random = connect, random.Random(seed)
        self.frames = self.connections = self.heard_bytes = self.refused = 0
        self._begins = [self._hello(VERSION)]
        self._recorded = list(self._begins)
        self._open: list[tuple[socket.socket, bytes]] = []
        self._numbers = count(1)

    def run(self, frames: int, going_on: Callable[[], bool] = lambda: True) -> None:
        """Send at least so many frames, as long as `going_on` returns true."""
        until = self.frames + frames
        while self.frames < until and going_on():
            try:
                connection = self._connect()
            except OSError:  # the backlog is full
                self.refused += 1
                continue
            self.connections += 1
            connection.settimeout(PATIENCE_S)
            self._talk(connection)

    def close(self) -> None:
        """Close the connections that are open still."""
        for connection, heard in self._open:
            self._end(connection, heard)
        self._open.clear()

    # -- one connection -------------------------------------------------------------------------

    def _talk(self, connection: socket.socket) -> None:
        """Say something, and check what is said."""
        chance, heard = self._random, b""
        with suppress(OSError):  # it is closed by the node at any time
            if chance.random() < 0.6:
                heard = self._handshake(connection)
            for _ in range(chance.randrange(1, 9)):
                self._say(connection, self._frame(heard))
        if chance.random() < 0.1:
            self._open.append((connection, heard))
            if len(self._open) > OPEN_MAX:
                self._end(*self._open.pop(chance.randrange(OPEN_MAX)))
        else:
            self._end(connection, heard)

    def _handshake(self, connection: socket.socket) -> bytes:
        """Begin as a node would, and go on with a proof that is none; return what was heard."""
        chance = self._random
        hello = self._hello(VERSION) if chance.random() < 0.7 else chance.choice(self._begins)
        self._say(connection, hello)
        heard = _received(connection, HELLO_BYTES)
        key, said = chance.randbytes(32), hello + heard
        role = chance.choice([b"reader", b"owner"])
        proof = hmac.digest(key, role + hashlib.sha256(said).digest(), "sha256")
        self._begins = [*self._begins[-50:], hello, hello + proof]
        self._recorded = [*self._recorded[-50:], hello, proof, heard]
        self._say(
            connection, chance.choice([proof, proof, heard[:PROOF_BYTES], bytes(PROOF_BYTES)])
        )
        return heard

    def _frame(self, heard: bytes) -> bytes:
        """Return what to say next."""
        chance = self._random
        node_id, number = chance.randbytes(16), next(self._numbers)
        match chance.randrange(9):
            case 0:
                return chance.randbytes(chance.randrange(1, 2000))
            case 1:
                return self._hello(chance.choice([VERSION, VERSION, 0, chance.getrandbits(32)]))
            case 2:
                return chance.choice(self._recorded)
            case 3:
                return heard or bytes(chance.randrange(1, 200))
            case 4:
                facts: dict[str, int | str] = {"span_blocks": 16}
                purpose: Purpose = "control" if chance.random() < 0.5 else "data"
                life = chance.getrandbits(63)
                return framed(Introduction(node_id, life, purpose, "pool", 0, facts))
            case 5:
                return framed(Want(number, chance.randbytes(16 * 33), 0, 32, 0, 0))
            case 6:
                return framed(SnapshotWanted(number, 0)) + framed(Ping(number))
            case 7:
                blocks = chance.randrange(1, 65)
                return Read(number, chance.randrange(64), blocks, 1 << 18).packed()
            case _:
                return struct.pack(">I", chance.getrandbits(32)) + chance.randbytes(64)

    def _hello(self, version: int) -> bytes:
        return MAGIC + struct.pack("<I", version) + self._random.randbytes(NONCE_BYTES)

    def _say(self, connection: socket.socket, frame: bytes) -> None:
        self.frames += 1
        connection.sendall(frame)

    def _end(self, connection: socket.socket, heard: bytes) -> None:
        """End a connection in one of several ways, after what was said has been heard or not."""
        way = self._random.randrange(3)
        with connection:
            if way == 0:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESETS)
            elif way == 1:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)
                    while more := connection.recv(1 << 16):
                        heard += more
        self._check(heard)

    def _check(self, heard: bytes) -> None:
        """Check that a node has said its version and a nonce at most."""
        self.heard_bytes += len(heard)
        is_version = (MAGIC + struct.pack("<I", VERSION)).startswith(heard[:VERSION_BYTES])
        if not is_version or len(heard) > HELLO_BYTES:
            raise StrangerHeardError(heard.hex())


def _received(connection: socket.socket, nbytes: int) -> bytes:
    """Return so many bytes, or fewer if the connection ends."""
    got = b""
    while len(got) < nbytes and (more := connection.recv(nbytes - len(got))):
        got += more
    return got
