"""A CUDA driver without a GPU: its device memory is ordinary memory, its streams are threads.

Work is done in the order of each stream, some time later, and the copies of one call in any order.
It holds work to what the device would: host memory must be registered, tables must be uploaded.
"""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from collections.abc import Callable
from itertools import count
from random import Random

import numpy as np
from numpy.typing import NDArray

from flexkv._ext import notify_address
from flexkv.common.errors import DeviceError
from flexkv.io.cuda.driver import Launch, Runs

ILLEGAL_ADDRESS, OUT_OF_MEMORY = 700, 2
"""CUDA_ERROR_ILLEGAL_ADDRESS breaks a context."""

_NOTIFY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(notify_address())


class _Stream:
    def __init__(self, name: str) -> None:
        self.work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while (work := self.work.get()) is not None:
            work()


class FakeCuda:
    """A driver over the memory of this process."""

    def __init__(
        self, device_memory: list[NDArray[np.generic]], seed: int = 0, delay_max_s: float = 0.0005
    ) -> None:
        """Take the arrays that are the device's memory."""
        self.refuses: dict[str, int] = {}
        """Calls that fail, and the codes that they give."""
        self.takes_s: dict[str, float] = {}
        """How long the work of a call takes more."""
        self.registers_at_most = 1 << 62
        """Bytes of host memory in one go."""
        self.calls: list[str] = []
        self.broken: int | None = None
        """The code of what broke the context: no stream goes on."""
        self._ranges = {array.ctypes.data: array.nbytes for array in device_memory}
        self._tables: dict[int, NDArray[np.int64]] = {}
        self._streams: dict[int, _Stream] = {}
        self._handles = count(1)
        self._random, self._delay_max_s = Random(seed), delay_max_s
        self._held = device_memory

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if code := self.broken or self.refuses.get(name):
            raise DeviceError(name, code)

    def _do(self, stream: int, work: Callable[[], None]) -> None:
        delay_s = self._random.uniform(0.0, self._delay_max_s)
        delay_s += self.takes_s.get(self.calls[-1], 0.0)

        def later() -> None:
            time.sleep(delay_s)
            if self.broken is None:
                work()

        self._streams[stream].work.put(later)

    @property
    def left(self) -> int:
        """Count what was not closed, freed or unregistered."""
        return len(self._streams) + len(self._tables) + len(self._ranges) - len(self._held)

    def open_stream(self, urgent: bool) -> int:
        """Start a thread."""
        self._call("cuStreamCreateWithPriority")
        handle = next(self._handles)
        self._streams[handle] = _Stream(f"fake-cuda-{handle}")
        return handle

    def synchronize(self, stream: int) -> None:
        """Wait for a thread."""
        self._call("cuStreamSynchronize")
        reached = threading.Event()
        self._streams[stream].work.put(reached.set)
        reached.wait()
        if self.broken:
            raise DeviceError("cuStreamSynchronize", self.broken)

    def close_stream(self, stream: int) -> None:
        """Wait for a thread, and join it."""
        found = self._streams.pop(stream)
        found.work.put(None)
        found.thread.join()
        self._call("cuStreamDestroy")

    def register(self, address: int, size: int) -> None:
        """Allow host memory."""
        self._call("cuMemHostRegister")
        if size > self.registers_at_most:
            raise DeviceError("cuMemHostRegister", OUT_OF_MEMORY)
        assert address not in self._ranges, "registered twice"
        self._ranges[address] = size

    def unregister(self, address: int) -> None:
        """Forbid it again."""
        del self._ranges[address]
        self._call("cuMemHostUnregister")

    def upload(self, table: NDArray[np.int64]) -> int:
        """Keep a copy."""
        self._call("cuMemAlloc")
        kept = table.copy()
        self._tables[kept.ctypes.data] = kept
        return int(kept.ctypes.data)

    def allocate(self, size: int) -> int:
        """Give memory."""
        memory = self.upload(np.zeros(-(-size // 8), np.int64))
        self._ranges[memory] = size
        return memory

    def free(self, address: int) -> None:
        """Drop it."""
        del self._tables[address]
        self._ranges.pop(address, None)
        self._call("cuMemFree")

    def copy(self, runs: Runs, stream: int) -> None:
        """Queue copies, shuffled."""
        self._call("cuMemcpyBatchAsync")
        moves = runs.T.tolist()
        self._random.shuffle(moves)
        self._do(stream, lambda: self._move(moves))

    def launch(self, launch: Launch, thread_blocks: int, stream: int) -> None:
        """Queue what the kernel would do; it reads the ids when it runs."""
        self._call("cuLaunchKernel")
        assert thread_blocks >= 1
        pieces = self._tables[launch.pieces].reshape(-1, 4)
        assert len(self._tables[launch.parts]) == launch.piece_count + 1 == len(pieces) + 1

        def run() -> None:
            self._check(launch.ids, 16 * launch.pairs)
            ids = (ctypes.c_int64 * (2 * launch.pairs)).from_address(launch.ids)
            moves = []
            for pair in range(launch.pairs):
                for base, stride, size, offset in pieces.tolist():
                    page = base + ids[pair] * stride
                    block = launch.host + ids[launch.pairs + pair] * launch.host_stride + offset
                    moves.append((block, page, size) if launch.to_host else (page, block, size))
            self._move(moves)

        self._do(stream, run)

    def _move(self, moves: list[tuple[int, int, int]]) -> None:
        for target, source, size in moves:
            if not (self._check(target, size) and self._check(source, size)):
                return
            ctypes.memmove(target, source, size)

    def _check(self, address: int, size: int) -> bool:
        allowed = any(
            begin <= address and address + size <= begin + length
            for begin, length in list(self._ranges.items())
        )
        if not allowed:
            self.broken = ILLEGAL_ADDRESS
        return allowed

    def notify(self, stream: int, eventfd: int) -> None:
        """Queue the call of the function that the driver would call."""
        self._call("cuLaunchHostFunc")
        self._do(stream, lambda: _NOTIFY(eventfd))

    def order(self, stream: int, after: int) -> None:
        """Let one thread wait for another."""
        self._call("cuStreamWaitEvent")
        reached = threading.Event()
        self._streams[after].work.put(reached.set)

        def wait() -> None:
            reached.wait()

        self._streams[stream].work.put(wait)

    def check(self, stream: int) -> None:
        """Say whether the context is broken."""
        self._call("cuStreamQuery")

    def close(self) -> None:
        """Nothing is left to let go of."""
