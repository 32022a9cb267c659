"""A server in a thread of this process, with a far tier whose transfers wait for the test.

Others hold blocks whose content is their key (`hold`), or copies of what is in host memory
(`keep_copies`), so that an engine which loads them can tell whether they are right.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, ExitStack
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from flexkv.common.config import ModelConfig, Settings
from flexkv.common.terms import BLOCK_KEY_BYTES, BlockKey, Tier, Transfer
from flexkv.index.keys import block_keys
from flexkv.io.memory.arena import Arena
from flexkv.io.ports import Completion
from flexkv.kvmanager import KVManager
from flexkv.server.address import socket_path
from flexkv.server.backend import ServerBackend
from flexkv.server.listen import Listener
from flexkv.server.server import Server
from flexkv.testing.fake_far import FakeFar, FarPort
from flexkv.testing.faults import FaultPlan
from flexkv.tiers.limits import disk_windows
from flexkv.tiers.parts import TierParts

T = TypeVar("T")
CALL_S = 20.0


class GatedPort(FarPort):
    """Fetches far blocks as soon as the gate lets them pass.

    Attributes:
        passing: how many more transfers may pass; None: all.
        copies: the whole content of blocks, by key, if it is not the key.
    """

    def __init__(self, far: FakeFar, host: NDArray[np.uint8]) -> None:
        super().__init__(far, host, FaultPlan(1, 0.0, 0.0, 0.0))
        self.passing: int | None = None
        self.waiting = deque[Transfer]()
        self.copies: dict[BlockKey, NDArray[np.uint8]] = {}

    def submit(self, transfer: Transfer) -> None:
        """Begin a transfer once the gate lets it pass."""
        self.waiting.append(transfer)
        self.open_for(self.passing)

    def open_for(self, count: int | None) -> None:
        """Let so many of the transfers that wait or come pass, and close the gate again."""
        self.passing = count
        while self.waiting and self.passing != 0:
            if self.passing is not None:
                self.passing -= 1
            super().submit(self.waiting.popleft())

    def _checked(self, end: Completion) -> Completion:
        transfer, _ = self.fetching[end.op_id]
        told = super()._checked(end)
        filled = zip(transfer.block_keys[: told.filled], transfer.target_ids, strict=False)
        for key, host_id in filled:
            if (copied := self.copies.get(key)) is not None:
                self._host[host_id] = copied
        return told

    def close(self) -> None:
        """Refuse transfers from now on, and let go of host memory."""
        super().close()
        self._host = np.zeros((0, 0), np.uint8)


class FarBackend(ServerBackend):
    """A server's memory, and a fake far tier."""

    def __init__(self, model: ModelConfig, settings: Settings, far: FakeFar, has_far: bool) -> None:
        cache = settings.cache_config
        super().__init__(cache, cache.sized(model))
        self.far = far
        self.port: GatedPort | None = None
        if has_far:
            self.catalogue = far
            self._openers.append(self._open_far)

    def _open_far(self, arena: Arena, sums: Any, undo: ExitStack) -> TierParts:
        self.port = GatedPort(self.far, arena.array)
        undo.callback(self.port.close)
        return TierParts(self.far.tier, None, self.port, *disk_windows(self._cache))


class FarServer:
    """The server, and what others hold for it.

    Attributes:
        far: what others hold, and the catalogue of it.
        backend: what the server runs on.
    """

    def __init__(self, model: ModelConfig, settings: Settings, has_far: bool = True) -> None:
        """Start it; its settings must have no SSD, whose checksums a fake does not make."""
        self.far = FakeFar()
        self.backend = FarBackend(model, settings, self.far, has_far)
        self._model, self._settings, self._stack = model, settings, AsyncExitStack()
        self._loop = asyncio.SelectorEventLoop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._run(self._open())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(CALL_S)

    async def _open(self) -> None:
        settings = self._settings
        listener = Listener(socket_path(settings.server_recv_port))
        self._stack.callback(listener.close)
        manager = KVManager(self._model, settings.cache_config, backend=self.backend)
        await self._stack.enter_async_context(manager)
        self.engine = manager.engine
        server = Server(manager.engine, self.backend, listener)
        server.start()
        self._stack.push_async_callback(server.close)

    @property
    def port(self) -> GatedPort:
        """Return the port to the far tier."""
        assert self.backend.port is not None
        return self.backend.port

    def call(self, work: Callable[[], T]) -> T:
        """Run a function on the server's loop, and return its result."""

        async def run() -> T:
            return work()

        return self._run(run())

    def hold(self, keys: bytes, blocks: int | None = None) -> None:
        """Have others hold the first blocks of a prompt, all by default, and say so."""
        self.call(lambda: self.far.hold(block_keys(keys)[:blocks]))

    def keep_copies(self) -> int:
        """Have others hold copies of all blocks in host memory; return how many there are."""

        def copy() -> int:
            residency, array = self.engine.residency, self.backend.arena.array
            records = residency.export(Tier.HOST, np.arange(len(array)))
            there = {n: record[:BLOCK_KEY_BYTES].tobytes() for n, record in enumerate(records)
                     if record.any()}  # fmt: skip
            self.port.copies |= {key: array[host_id].copy() for host_id, key in there.items()}
            self.far.hold(there.values())
            return len(there)

        return self.call(copy)

    def lose(self, keys: bytes, first: int = 0) -> None:
        """Have others drop the blocks of a prompt from `first` on, and say nothing."""
        gone = block_keys(keys)[first:]
        self.call(lambda: self.far.held.difference_update(gone))

    def pass_transfers(self, count: int | None) -> None:
        """Let so many transfers of the far tier pass; None: all."""
        self.call(lambda: self.port.open_for(count))

    def fetched(self, keys: bytes) -> list[int]:
        """Return how often each block of a prompt has arrived."""
        return self.call(lambda: [self.port.fetched.get(key, 0) for key in block_keys(keys)])

    def content(self, host_ids: NDArray[np.int64]) -> list[bytes]:
        """Return the first bytes of host blocks: the key of each that others have held."""

        def read() -> list[bytes]:
            return [row[:BLOCK_KEY_BYTES].tobytes() for row in self.backend.arena.array[host_ids]]

        return self.call(read)

    def idle(self) -> bool:
        """Return whether nothing is held, pinned or being filled."""

        def is_idle() -> bool:
            told = self.engine.statistics()
            host = told.tiers["host"]
            return not (told.claims or told.runs_in_flight or host.reserved_blocks)

        return self.call(is_idle)

    def close(self) -> None:
        """Close it, which checks that nothing is left."""
        if self.backend.port is not None:
            self.pass_transfers(None)
        self._run(self._stack.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CALL_S)
        self._loop.close()
