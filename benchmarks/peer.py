"""Reads of another node's blocks against plain sockets and Mooncake's TransferEngine, on loopback.

64 blocks of 2 MiB come over 2 sockets. The ring's reads end when the blocks are in the arena and
their sums are compared with the sender's. `recv_into` is called by one thread for each socket; its
bytes are not checked, or summed afterwards by two threads. TransferEngine reads the blocks as one
batch over TCP, unchecked. Each sender is a process of its own, and so is TransferEngine's reader.
The Mooncake path is what the port makes of it: reads of 8 MiB into a mover's window, from where
two threads copy them to the arena and sum them.

All of it competes for the same CPUs, and a ring that checks has more to do than plain sockets. So
compare the seconds of CPU, too.
"""

from __future__ import annotations

import asyncio
import math
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import numpy as np
import psutil

from benchmarks.harness import Figures, Options, alternate, median_ratio
from benchmarks.peer_nodes import HOST, MOVER, STALL_S, filled, started, summed
from flexkv.common.errors import BackendUnavailableError
from flexkv.io.memory.arena import Arena
from flexkv.io.memory.copier import Copier
from flexkv.io.memory.host_blocks import HostBlocks
from flexkv.io.peer.checked_reads import CheckedReads
from flexkv.io.peer.mooncake import MooncakeTransport
from flexkv.io.peer.port import read_blocks
from flexkv.io.peer.receiver import Receiver
from flexkv.io.peer.sockets import SocketRing
from flexkv.io.peer.transport import Fetched, Part, Places
from flexkv.mover.installed import check_installed
from flexkv.mover.life import MoverSizes
from flexkv.mover.mover import Mover

BLOCK_BYTES, SOCKETS, READS_AT_ONCE, READ_BLOCKS = 2 << 20, 2, 2, 16
CPU = "CPU s/GiB"


def measure(options: Options) -> Figures:
    """Return the figures of the case; without Mooncake, a line says what was not measured."""
    blocks = 8 if options.quick else 64
    with ExitStack() as stack:
        arena = Arena.open(blocks, BLOCK_BYTES)
        stack.callback(arena.close)
        ring = stack.enter_context(closing(_Ring(arena)))
        plain = stack.enter_context(closing(_Sockets(arena)))
        contestants: dict[str, _Contestant] = {
            "ring": _here(ring.get_all, ring.node),
            "recv_into": _here(plain.get_all, plain.node),
            "recv_into, summed": _here(lambda: (plain.get_all(), summed(arena)), plain.node),
        }
        try:
            check_installed()
        except BackendUnavailableError as error:
            missing: Figures = {"ring / TransferEngine": f"not measured: {error}"}
        else:
            engine = stack.enter_context(closing(_Engine(blocks)))
            contestants["TransferEngine"] = engine.get_all
            mooncake = stack.enter_context(closing(_Mooncake(arena)))
            contestants["Mooncake path"] = _here(mooncake.get_all, mooncake.node, mooncake.pid)
            missing = {}
        ends: dict[str, list[_End]] = {name: [] for name in contestants}

        def noted(name: str) -> Callable[[], float]:
            def work() -> float:
                ends[name].append(contestants[name]())
                return ends[name][-1][0]

            return work

        took = alternate({name: noted(name) for name in contestants}, options.repeats)
    gib = blocks * BLOCK_BYTES / 2**30
    others = [name for name in contestants if name != "ring"]
    if "Mooncake path" in took:
        raw = median_ratio(took["TransferEngine"], took["Mooncake path"])
        missing["Mooncake path / TransferEngine"] = raw
    cpu_s = {
        name: [statistics.fmean(end[side] for end in own[1:]) / gib for side in (1, 2)]
        for name, own in ends.items()
    }
    return {
        **{f"ring / {name}": median_ratio(took[name], took["ring"]) for name in others},
        **{f"ring / {name}, reader's CPU": cpu_s["ring"][0] / cpu_s[name][0] for name in others},
        **{f"{name}, MiB/s": gib * 1024 / statistics.median(s) for name, s in took.items()},
        **{f"{name}, reader's {CPU}": cpu_s[name][0] for name in contestants},
        **{f"{name}, sender's {CPU}": cpu_s[name][1] for name in contestants},
        "load average": os.getloadavg()[0],
        **missing,
    }


_End = tuple[float, float, float]
"""The seconds that reading all blocks took, those of CPU of the reader, and of the sender."""
_Contestant = Callable[[], _End]


class _Node:
    """Another process of the benchmark."""

    def __init__(self, role: str, *arguments: object) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.peer_nodes", role, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
        )
        self._usage = psutil.Process(self._process.pid)

    def tell(self) -> list[str]:
        """Return the words of the next line that it prints."""
        assert self._process.stdout is not None
        return self._process.stdout.readline().split()

    def ask(self) -> list[str]:
        """Have it do its work once, and return what it prints."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        return self.tell()

    def cpu_s(self) -> float:
        """Return the seconds of CPU that it has used."""
        return sum(map(_cpu_s, [self._usage, *self._usage.children()]))

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _here(work: Callable[[], object], node: _Node, pid: int | None = None) -> _Contestant:
    """Return work of this process, which reads from a node, as a contestant.

    What another process with `pid` uses is counted as this one's.
    """
    helper = None if pid is None else psutil.Process(pid)

    def used_s() -> float:
        return time.process_time() + (0.0 if helper is None else _cpu_s(helper))

    def measured() -> _End:
        begin_s, begin_cpu_s, sender_s = time.perf_counter(), used_s(), node.cpu_s()
        work()
        ended_s, ended_cpu_s = time.perf_counter(), used_s()
        return ended_s - begin_s, ended_cpu_s - begin_cpu_s, node.cpu_s() - sender_s

    return measured


class _Ring:
    """Checked reads by the ring."""

    def __init__(self, arena: Arena) -> None:
        self.node = _Node("sender", arena.num_blocks, BLOCK_BYTES)
        port = int(self.node.tell()[0])
        self._copier, self._runner = Copier(2), asyncio.Runner()
        sums = np.zeros(arena.num_blocks, np.uint64)
        self._reads = CheckedReads(HostBlocks(arena, sums, (BLOCK_BYTES,)), self._copier)
        self._blocks, self._ring = arena.num_blocks, SocketRing([arena.buffer], SOCKETS)
        self._receivers = []
        for _ in range(SOCKETS):
            with socket.create_connection((HOST, port)) as own:
                index = self._ring.add(own)
            self._receivers.append(Receiver(self._ring, index, HOST, STALL_S))
        self._runner.run(self._connect())

    async def _connect(self) -> None:
        self._ring.connect()
        self._copier.connect()

    def get_all(self) -> None:
        """Read all blocks."""
        self._runner.run(self._get_all())

    async def _get_all(self) -> None:
        count = min(READ_BLOCKS, self._blocks // SOCKETS)
        firsts = list(reversed(range(0, self._blocks, count)))

        async def some(receiver: Receiver) -> None:
            while firsts:
                first = firsts.pop()
                places = np.arange(first, first + count)
                assert await self._reads.fetch(receiver, 0, first, places) == Fetched(count, None)

        async with asyncio.TaskGroup() as group:
            for receiver in self._receivers * READS_AT_ONCE:
                group.create_task(some(receiver))

    def close(self) -> None:
        """Release everything."""
        self._runner.run(self._disconnect())
        self._runner.close()
        self._reads.close()
        self.node.close()

    async def _disconnect(self) -> None:
        self._ring.close()
        self._copier.close()


class _Sockets:
    """Blocking sockets in threads."""

    def __init__(self, arena: Arena) -> None:
        self.node = _Node("sockets", arena.num_blocks, BLOCK_BYTES, SOCKETS)
        port = int(self.node.tell()[0])
        self._sockets = [socket.create_connection((HOST, port)) for _ in range(SOCKETS)]
        self._arena, self._threads = arena, ThreadPoolExecutor(SOCKETS)

    def get_all(self) -> None:
        """Read all blocks."""
        for _ in self._threads.map(self._get_some, range(SOCKETS)):
            pass

    def _get_some(self, number: int) -> None:
        connection, share = self._sockets[number], len(self._arena.buffer) // SOCKETS
        with self._arena.buffer[number * share : (number + 1) * share] as left:
            connection.sendall(bytes([number]))
            at = 0
            while at < share:
                at += connection.recv_into(left[at:])

    def close(self) -> None:
        """Close the connections, and end the threads."""
        self._threads.shutdown()
        for connection in self._sockets:
            connection.close()
        self.node.close()


class _Mooncake:
    """Reads as the port makes them, by a mover at each end."""

    def __init__(self, arena: Arena) -> None:
        self.node = _Node("lender", arena.num_blocks, BLOCK_BYTES)
        endpoint, begin = self.node.tell()
        expected = filled(arena.num_blocks, BLOCK_BYTES)
        addresses = int(begin) + np.arange(arena.num_blocks) * BLOCK_BYTES
        self._places = Places(endpoint, addresses, summed(expected), math.inf)
        expected.close()
        self._copier, self._runner = Copier(2), asyncio.Runner()
        self._blocks, self._at_once = arena.num_blocks, read_blocks(BLOCK_BYTES)
        host = HostBlocks(arena, np.zeros(arena.num_blocks, np.uint64), (BLOCK_BYTES,))
        self.pid = self._runner.run(self._start(host))

    async def _start(self, host: HostBlocks) -> int:
        self._copier.connect()
        self._mover = Mover(MOVER, MoverSizes(20, self._at_once * BLOCK_BYTES, STALL_S))
        self._transport = MooncakeTransport(self._mover, host, self._copier, STALL_S)
        return (await started(self._mover)).pid

    def get_all(self) -> None:
        """Read all blocks."""
        self._runner.run(self._get_all())

    async def _get_all(self) -> None:
        async def some(first: int) -> None:
            ids = np.arange(first, min(first + self._at_once, self._blocks))
            part = Part(1, 0, first, ids, 0, 0, self._places.at(first, len(ids), 1))
            assert await self._transport.fetch(part) == Fetched(len(ids), None)

        async with asyncio.TaskGroup() as group:
            for first in range(0, self._blocks, self._at_once):
                group.create_task(some(first))

    def close(self) -> None:
        """Release everything."""
        self._runner.run(self._disconnect())
        self._runner.close()
        self.node.close()

    async def _disconnect(self) -> None:
        self._transport.close()
        self._copier.close()


class _Engine:
    """Mooncake's TransferEngine, both ends in processes of their own."""

    def __init__(self, blocks: int) -> None:
        self._owner = _Node("owner", blocks, BLOCK_BYTES)
        self._reader = _Node("reader", blocks, BLOCK_BYTES, *self._owner.tell())

    def get_all(self) -> _End:
        """Read all blocks."""
        before_s = self._owner.cpu_s()
        took_s, cpu_s = map(float, self._reader.ask())
        return took_s, cpu_s, self._owner.cpu_s() - before_s

    def close(self) -> None:
        """End both."""
        self._reader.close()
        self._owner.close()
