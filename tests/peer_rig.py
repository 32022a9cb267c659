"""Both ends of data sockets over real connections, and owners that do not keep to the protocol."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import numpy as np

from flexkv.common.terms import BlockIds
from flexkv.io.memory.arena import Arena
from flexkv.io.memory.copier import Copier
from flexkv.io.memory.host_blocks import HostBlocks
from flexkv.io.peer.checked_reads import CheckedReads
from flexkv.io.peer.frames import HEADER_BYTES, Read, Status, unpack_read
from flexkv.io.peer.receiver import Receiver
from flexkv.io.peer.sender import Granted, Sender
from flexkv.io.peer.sockets import SocketRing
from flexkv.io.peer.transport import Fetched

BLOCK_BYTES, STRIDE_BYTES, BLOCKS = 40_000, 40_960, 96
NUMBER = 7
PATIENCE_S = 60.0


def connected(kind: str = "tcp") -> tuple[socket.socket, socket.socket]:
    """Return both ends of a connection, which do not block."""
    if kind == "unix":
        ends = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            one = socket.create_connection(listening.getsockname())
            ends = one, listening.accept()[0]
    for end in ends:
        end.setblocking(False)
    return ends


@dataclass
class Node:
    """A node's host memory, its ring, and the threads that sum.

    Attributes:
        pins: how many blocks are being sent.
    """

    seed: int
    arena: Arena = field(init=False)
    pins: int = 0

    def __post_init__(self) -> None:
        self.arena = Arena.open(BLOCKS, STRIDE_BYTES)
        rng = np.random.default_rng(self.seed)
        self.arena.array[:] = rng.integers(0, 256, (BLOCKS, STRIDE_BYTES), np.uint8)
        self.copier = Copier(2)
        self.copier.connect()
        self.host = HostBlocks(self.arena, np.zeros(BLOCKS, np.uint64), (BLOCK_BYTES,))
        self.reads = CheckedReads(self.host, self.copier)
        self.ring = SocketRing([self.arena.buffer], 4)
        self.ring.connect()

    async def sum_all(self) -> None:
        """Sum all blocks."""
        await self.copier.checksum(self.reads._pages[0], np.arange(BLOCKS))

    def blocks(self, ids: BlockIds) -> list[bytes]:
        """Return the bytes of blocks."""
        return [bytes(self.arena.array[at, :BLOCK_BYTES]) for at in ids.tolist()]

    def lookup(self, read: Read) -> Granted | Status:
        """Grant block n at position n, to those who know the number."""
        if read.number != NUMBER:
            return Status.NO_GRANT
        if read.block_bytes != BLOCK_BYTES:
            return Status.OTHER_SIZE
        if read.first + read.blocks > BLOCKS:
            return Status.NOT_GRANTED
        ids = np.arange(read.first, read.first + read.blocks)
        self.pins += len(ids)

        def ended() -> None:
            self.pins -= len(ids)

        return Granted(self.arena.address + ids * STRIDE_BYTES, self.host.sums[ids], ended)

    def answer(self, read: Read) -> bytes:
        """Return what an honest owner sends."""
        ids = np.arange(read.first, read.first + read.blocks)
        sums = self.host.sums[ids].astype("<u8").tobytes()
        return read.answer(Status.OK) + sums + b"".join(self.blocks(ids))

    def close(self) -> None:
        """Release everything."""
        self.ring.close()
        self.copier.close()
        self.reads.close()
        assert self.arena.close()


@asynccontextmanager
async def nodes() -> AsyncIterator[tuple[Node, Node]]:
    """Yield an owner and a reader."""
    owner, reader = Node(1), Node(2)
    try:
        await owner.sum_all()
        yield owner, reader
    finally:
        for node in (owner, reader):
            node.close()


@asynccontextmanager
async def serving(
    owner: Node, reader: Node, kind: str = "tcp", stall_s: float = PATIENCE_S
) -> AsyncIterator[Receiver]:
    """Yield a receiver, while a sender serves the other end of its socket."""
    ours, theirs = connected(kind)
    receiver = Receiver(reader.ring, reader.ring.add(ours), "owner", stall_s)
    index = owner.ring.add(theirs)
    ours.close()
    theirs.close()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(Sender(owner.ring, stall_s).serve(index, owner.lookup))
        yield receiver
        await reader.ring.remove(receiver.index)
        with suppress(OSError, EOFError):
            await task
    await owner.ring.remove(index)
    assert owner.pins == 0


Fault = Callable[[socket.socket], None]


def close(end: socket.socket) -> None:
    """End the stream. A socket that is closed with READs unread would reset the connection."""
    end.shutdown(socket.SHUT_WR)


def reset(end: socket.socket) -> None:
    """Abort the connection."""
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()


def nothing(_: socket.socket) -> None:
    """Leave the connection as it is, and send no more."""


class FaultyOwner:
    """An owner that sends what it should, up to a byte, in pieces; then something happens.

    Attributes:
        stalled: set when it has sent all that it sends by itself.
    """

    def __init__(self, owner: Node, end: socket.socket, piece_bytes: Callable[[], int]) -> None:
        self._owner, self._end, self._piece_bytes = owner, end, piece_bytes
        self.stalled = asyncio.Event()

    async def run(self, cut_at: int, flip_at: int, fault: Fault) -> None:
        """Answer READs, flip a bit of byte `flip_at`, and stop before byte `cut_at`."""
        loop, at = asyncio.get_running_loop(), 0
        with suppress(OSError):
            while at < cut_at:
                header = b""
                while len(header) < HEADER_BYTES:
                    some = await loop.sock_recv(self._end, HEADER_BYTES - len(header))
                    if not some:
                        return
                    header += some
                answer = bytearray(self._owner.answer(unpack_read(header)))
                if at <= flip_at < at + len(answer):
                    answer[flip_at - at] ^= 16
                for begin in self._pieces(min(len(answer), cut_at - at)):
                    await loop.sock_sendall(self._end, begin(answer))
                at += len(answer)
        self.stalled.set()
        fault(self._end)

    def _pieces(self, nbytes: int) -> list[Callable[[bytearray], bytes]]:
        pieces, at = [], 0
        while at < nbytes:
            end = min(nbytes, at + self._piece_bytes())
            pieces.append(lambda answer, at=at, end=end: bytes(answer[at:end]))
            at = end
        return pieces


def flood(end: socket.socket) -> None:
    """Send rubbish until the other end refuses it, or it is not taken any more."""
    with suppress(OSError):
        while True:
            end.send(b"\xee" * (1 << 20))


async def fetch(reader: Node, receiver: Receiver, first: int, ids: BlockIds) -> Fetched:
    """Read blocks from position `first` on into host blocks."""
    return await reader.reads.fetch(receiver, NUMBER, first, ids)
