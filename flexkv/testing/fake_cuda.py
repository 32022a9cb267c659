"""A CUDA driver without a GPU: its device memory is ordinary memory, its streams are threads.

Each stream does its work in order, after a delay, and the copies of one call in any order. The fake
enforces what a device would: host memory must be registered, and tables must be uploaded.
"""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexkv._ext import notify_address
from flexkv.common.errors import DeviceError
from flexkv.io.cuda.driver import Launch
from flexkv.io.cuda.grids import Runs
from flexkv.io.cuda.kernel import part_starts

ILLEGAL_ADDRESS, OUT_OF_MEMORY, ALREADY_REGISTERED = 700, 2, 712
"""Codes of CUDA errors. CUDA_ERROR_ILLEGAL_ADDRESS breaks the context."""

_NOTIFY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(notify_address())


class _Stream:
    def __init__(self, name: str) -> None:
        self.work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while (work := self.work.get()) is not None:
            work()


class FakeTensor:
    """An array with the interface of a tensor on a CUDA device."""

    def __init__(self, array: NDArray[Any], ordinal: int = 0) -> None:
        self.array = array
        self.shape = array.shape
        self.device = SimpleNamespace(type="cuda", index=ordinal)

    def data_ptr(self) -> int:
        """Return the address of the first element."""
        return int(self.array.ctypes.data)

    def stride(self) -> tuple[int, ...]:
        """Return the strides in elements."""
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def element_size(self) -> int:
        """Return the size of an element in bytes."""
        return self.array.itemsize


class FakeCuda:
    """A CUDA driver over the memory of this process."""

    named = "fake"

    def __init__(
        self,
        device_memory: list[NDArray[np.generic]],
        seed: int = 0,
        delay_max_s: float = 0.0005,
        registered: dict[int, int] | None = None,
    ) -> None:
        """Take the arrays that are the device's memory.

        Host memory is registered for all devices of a process, so their fakes share `registered`.
        """
        self.refuses: dict[str, int] = {}
        """Calls that fail, each with the code of its error."""
        self.takes_s: dict[str, float] = {}
        """Additional seconds that the work queued by a call takes."""
        self.calls_take_s: dict[str, float] = {}
        """Seconds that a call itself takes, while other threads go on."""
        self.breaks_at: tuple[str, int] | None = None
        """The call whose work breaks the context, and the code of the error."""
        self.registers_at_most = 1 << 62
        """The most bytes of host memory that one call registers."""
        self.captured: set[int] = set()
        """Streams from which a graph is being captured."""
        self.moved_bytes = 0
        self.calls: list[str] = []
        self._current = threading.local()
        self.broken: int | None = None
        """The code of the error that broke the context; no stream goes on after it."""
        self._memory = {array.ctypes.data: array.nbytes for array in device_memory}
        self._registered = {} if registered is None else registered
        self._tables: dict[int, NDArray[np.int64]] = {}
        self._streams: dict[int, _Stream] = {}
        self._events: dict[int, threading.Event] = {}
        self._handles = count(1)
        self._random, self._delay_max_s = Random(seed), delay_max_s
        self._held = device_memory

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.calls_take_s:
            time.sleep(self.calls_take_s[name])
        if code := self.broken or self.refuses.get(name):
            raise DeviceError(name, code)

    def _do(self, stream: int, work: Callable[[], None]) -> None:
        delay_s = self._random.uniform(0.0, self._delay_max_s)
        delay_s += self.takes_s.get(self.calls[-1], 0.0)
        breaks = self.breaks_at if self.breaks_at and self.breaks_at[0] == self.calls[-1] else None

        def later() -> None:
            time.sleep(delay_s)
            if breaks is not None:
                self.broken = breaks[1]
            if self.broken is None:
                work()

        self._streams[stream].work.put(later)

    @property
    def left(self) -> int:
        """Return the count of streams, events, allocations and registrations that are left."""
        kept = len(self._streams) + len(self._tables) + len(self._events)
        return kept + len(self._registered) + len(self._memory) - len(self._held)

    def open_stream(self, urgent: bool) -> int:
        """Start the thread of a new stream, and return the stream's handle."""
        self._call("cuStreamCreateWithPriority")
        handle = next(self._handles)
        self._streams[handle] = _Stream(f"fake-cuda-{handle}")
        return handle

    def synchronize(self, stream: int) -> None:
        """Return once all work that is queued on a stream has ended."""
        self._call("cuStreamSynchronize")
        reached = threading.Event()
        self._streams[stream].work.put(reached.set)
        reached.wait()
        if self.broken:
            raise DeviceError("cuStreamSynchronize", self.broken)

    def close_stream(self, stream: int) -> None:
        """Wait for a stream to end its work, and join its thread."""
        found = self._streams.pop(stream)
        found.work.put(None)
        found.thread.join()
        self._call("cuStreamDestroy")

    def register(self, address: int, size: int) -> None:
        """Allow the device to use host memory."""
        self._call("cuMemHostRegister")
        if size > self.registers_at_most:
            raise DeviceError("cuMemHostRegister", OUT_OF_MEMORY)
        if address in self._registered:
            raise DeviceError("cuMemHostRegister", ALREADY_REGISTERED)
        self._registered[address] = size

    def unregister(self, address: int) -> None:
        """Forbid the device to use host memory again."""
        del self._registered[address]
        self._call("cuMemHostUnregister")

    def upload(self, table: NDArray[np.int64]) -> int:
        """Keep a copy of a table, and return its address."""
        self._call("cuMemAlloc")
        kept = table.copy()
        self._tables[kept.ctypes.data] = kept
        return int(kept.ctypes.data)

    def allocate(self, size: int) -> int:
        """Return the address of new device memory."""
        memory = self.upload(np.zeros(-(-size // 8), np.int64))
        self._memory[memory] = size
        return memory

    def free(self, address: int) -> None:
        """Free what `upload` or `allocate` returned."""
        del self._tables[address]
        self._memory.pop(address, None)
        self._call("cuMemFree")

    def copy(self, runs: Runs, stream: int) -> None:
        """Queue copies, in random order."""
        self._call("cuMemcpyBatchAsync")
        moves = runs.T.tolist()
        self._random.shuffle(moves)
        self._do(stream, lambda: self._move(moves))

    def launch(self, launch: Launch, thread_blocks: int, stream: int) -> None:
        """Queue the copies that the kernel would make; ids are read when the work runs."""
        self._call("cuLaunchKernel")
        assert thread_blocks >= 1

        def run() -> None:
            pieces = self._table(launch.pieces, 4 * launch.piece_count).reshape(-1, 4)
            parts = self._table(launch.parts, launch.piece_count + 1)
            assert (np.diff(parts) == np.diff(part_starts(pieces[:, 2]))).all()
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

    def _table(self, address: int, count: int) -> NDArray[np.int64]:
        """Return a part of an uploaded table."""
        for begin, table in self._tables.items():
            first = (address - begin) // table.itemsize
            if first >= 0 and first + count <= table.size:
                return table.reshape(-1)[first : first + count]
        raise AssertionError(f"{address} is in no uploaded table")

    def _move(self, moves: list[tuple[int, int, int]]) -> None:
        for target, source, size in moves:
            if not (self._check(target, size) and self._check(source, size)):
                return
            ctypes.memmove(target, source, size)
            self.moved_bytes += size

    def _check(self, address: int, size: int) -> bool:
        allowed = any(
            begin <= address and address + size <= begin + length
            for begin, length in [*self._memory.items(), *self._registered.items()]
        )
        if not allowed:
            self.broken = ILLEGAL_ADDRESS
        return allowed

    def notify(self, stream: int, eventfd: int) -> None:
        """Queue a call of the host function that adds 1 to an eventfd."""
        self._call("cuLaunchHostFunc")
        self._do(stream, lambda: _NOTIFY(eventfd))

    @property
    def current(self) -> int:
        """The stream on which this thread's framework queues work; stream 0 never has any."""
        return getattr(self._current, "stream", 0)

    @current.setter
    def current(self, stream: int) -> None:
        self._current.stream = stream

    def current_stream(self) -> int:
        """Return the stream that a test has set for this thread."""
        return self.current

    def inside(self) -> AbstractContextManager[None]:
        """Return a context manager that does nothing."""
        return nullcontext()

    def is_capturing(self, stream: int) -> bool:
        """Return whether a test has put the stream into `captured`."""
        self._call("cuStreamIsCapturing")
        return stream in self.captured

    def open_event(self) -> int:
        """Return a new event, which counts as reached."""
        self._call("cuEventCreate")
        handle = next(self._handles)
        self._events[handle] = reached = threading.Event()
        reached.set()
        return handle

    def record(self, event: int, stream: int) -> None:
        """Reset an event; the stream sets it when it gets there (stream 0 at once)."""
        self._call("cuEventRecord")
        reached = self._events[event] = threading.Event()
        if stream:
            self._streams[stream].work.put(reached.set)
        else:
            reached.set()

    def wait(self, stream: int, event: int) -> None:
        """Queue a wait for an event, as it was recorded last."""
        self._call("cuStreamWaitEvent")
        reached = self._events[event]

        def wait() -> None:
            reached.wait()

        self._streams[stream].work.put(wait)

    def drop(self, event: int) -> None:
        """Forget an event; streams that wait for it still do."""
        del self._events[event]
        self._call("cuEventDestroy")

    def check(self, stream: int) -> None:
        """Raise DeviceError if the context is broken."""
        self._call("cuStreamQuery")

    def close(self) -> None:
        """Do nothing: a fake holds no context."""
