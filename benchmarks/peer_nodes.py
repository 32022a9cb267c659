"""The other processes of `benchmarks.peer`, by role. Each ends when its input does.

sender    prints its port; serves data sockets, as an owner of blocks does
sockets   prints its port; for each byte n that a connection sends, sends its nth share of all
owner     prints its address and that of its memory, for Mooncake's TransferEngine
lender    prints the endpoint of its mover, and the address at which that lends its memory
reader    for each line of its input reads all blocks by TransferEngine, as one batch; prints
          the seconds that this took, and the seconds of CPU
"""

from __future__ import annotations

import asyncio
import mmap
import socket
import sys
import threading
import time
from typing import Any

import numpy as np

from flexkv.io.checksums.sums import PoolChecksummer
from flexkv.io.memory.arena import Arena
from flexkv.io.peer.frames import Read
from flexkv.io.peer.sender import Granted, Sender
from flexkv.io.peer.sockets import SocketRing
from flexkv.mover.engine_config import EngineConfig
from flexkv.mover.life import MoverLife, MoverSizes
from flexkv.mover.mover import Mover
from flexkv.mover.wire import Lent
from flexkv.process.polling import is_readable

HOST = "127.0.0.1"
STALL_S = 60.0
MOVER = EngineConfig(HOST, 0, "tcp", "")


def filled(blocks: int, block_bytes: int, is_shared: bool = False) -> Arena:
    """Return host memory of random bytes, the same in each process."""
    arena = Arena.open(blocks, block_bytes, shared=is_shared)
    arena.array[:] = np.random.default_rng(0).integers(0, 256, arena.array.shape, np.uint8)
    return arena


def summed(arena: Arena) -> np.ndarray:
    """Return the sums of all blocks."""
    summer = PoolChecksummer(arena)
    summer.submit(0, np.arange(arena.num_blocks), True)
    while not summer.reap():
        is_readable(summer, STALL_S)
    summer.close()
    return summer.sums


def sender(blocks: int, block_bytes: int) -> None:
    """Serve data sockets."""
    arena = filled(blocks, block_bytes)
    sums = summed(arena)

    def lookup(read: Read) -> Granted:
        ids = np.arange(read.first, read.first + read.blocks)
        return Granted(arena.address + ids * block_bytes, sums[ids], lambda: None)

    async def serve() -> None:
        ring = SocketRing([arena.buffer], 8)
        ring.connect()
        loop = asyncio.get_running_loop()
        with socket.create_server((HOST, 0)) as listening:
            listening.setblocking(False)
            print(listening.getsockname()[1], flush=True)
            async with asyncio.TaskGroup() as group:
                while True:
                    own, _ = await loop.sock_accept(listening)
                    group.create_task(Sender(ring, STALL_S).serve(ring.add(own), lookup))

    asyncio.run(serve())


def sockets(blocks: int, block_bytes: int, connections: int) -> None:
    """Serve plain sockets, each in a thread."""
    memory = filled(blocks, block_bytes).buffer
    share = len(memory) // connections

    def serve(own: socket.socket) -> None:
        while asked := own.recv(1):
            own.sendall(memory[asked[0] * share : (asked[0] + 1) * share])

    with socket.create_server((HOST, 0)) as listening:
        print(listening.getsockname()[1], flush=True)
        while True:
            threading.Thread(target=serve, args=(listening.accept()[0],), daemon=True).start()


def engine_over(memory: mmap.mmap | memoryview, nbytes: int) -> tuple[Any, int]:
    """Return a TransferEngine and the address of the memory that it may use."""
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    assert engine.initialize(HOST, "P2PHANDSHAKE", "tcp", "") == 0
    address = int(np.frombuffer(memory, np.uint8).ctypes.data)
    assert engine.register_memory(address, nbytes) == 0
    return engine, address


def owner(blocks: int, block_bytes: int) -> None:
    """Register memory for others to read."""
    arena = filled(blocks, block_bytes)
    engine, address = engine_over(arena.buffer, blocks * block_bytes)
    print(f"{HOST}:{engine.get_rpc_port()}", address, flush=True)
    sys.stdin.read()


def lender(blocks: int, block_bytes: int) -> None:
    """Have a mover lend memory to others."""
    arena = filled(blocks, block_bytes, is_shared=True)
    assert arena.fd is not None
    lent = Lent(arena.fd, arena.fd_offset_bytes, blocks * block_bytes)

    async def lend() -> None:
        mover = Mover(MOVER, MoverSizes(1, 1 << 20, STALL_S), lent)
        ready = (await started(mover)).ready
        assert ready is not None
        print(ready.endpoint, ready.address, flush=True)
        await asyncio.to_thread(sys.stdin.read)
        mover.close()

    asyncio.run(lend())


async def started(mover: Mover) -> MoverLife:
    """Return the life of a mover, once its engine runs."""
    while mover.ready is None:
        mover.life()
        await asyncio.sleep(0.01)
    return mover.ready


def reader(blocks: int, block_bytes: int, peer: str, address: int) -> None:
    """Read all blocks of a peer for each line of the input."""
    arena = Arena.open(blocks, block_bytes)
    engine, own = engine_over(arena.buffer, blocks * block_bytes)
    steps = range(0, blocks * block_bytes, block_bytes)
    ours, theirs = [own + step for step in steps], [address + step for step in steps]
    sizes = [block_bytes] * blocks
    for _ in sys.stdin:
        begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
        assert engine.batch_transfer_sync_read(peer, ours, theirs, sizes) == 0
        print(time.perf_counter() - begin_s, time.process_time() - begin_cpu_s, flush=True)


def main(role: str, *arguments: str) -> None:
    """Play a role until the input ends."""
    if role in ("sender", "sockets"):
        play = {"sender": sender, "sockets": sockets}[role]
        numbers = map(int, arguments)
        threading.Thread(target=play, args=tuple(numbers), daemon=True).start()
        sys.stdin.read()
    elif role in ("owner", "lender"):
        blocks, block_bytes = map(int, arguments)
        {"owner": owner, "lender": lender}[role](blocks, block_bytes)
    else:
        count, size, peer, address = arguments
        reader(int(count), int(size), peer, int(address))


if __name__ == "__main__":
    main(*sys.argv[1:])
