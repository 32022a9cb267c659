"""How bytes from a store get into host memory, and are summed there.

    a body      store ──▶ memory of its own ──copy threads: copy and sum──▶ arena
    a file      file ──▶ arena, seals aside ──copy threads: sum──▶

A block of a body may lie in several chunks; the copy threads take it as a device block in as many
pieces. Only our own threads write to the arena, and `close` waits for them. So neither a request
that was given up nor a library can write there later.
"""

from __future__ import annotations

import asyncio
from asyncio import Future
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from itertools import accumulate, count
from typing import NamedTuple, Protocol

import numpy as np
from typing_extensions import Buffer

from flexkv._ext import TO_HOST, CopyPool, PageMap
from flexkv.common.errors import ClosedError
from flexkv.common.terms import BlockIds
from flexkv.io.checksums.sums import sum_maps
from flexkv.io.memory.arena import Arena
from flexkv.io.ports import Sums
from flexkv.io.remote.body import Body
from flexkv.io.remote.requests import Requests
from flexkv.io.remote.seal import SEAL_BYTES, Seals
from flexkv.io.remote.spans import SpanPart
from flexkv.io.remote.store import BodyStore, FileStore, Store
from flexkv.io.remote.until import Until
from flexkv.process import forks
from flexkv.process.background import in_background


class HostBlocks(NamedTuple):
    """The host memory of the blocks.

    Attributes:
        arena: their places.
        sums: their checksums, uint64[host blocks].
        block_bytes: the bytes of a block of each KV group.
    """

    arena: Arena
    sums: Sums
    block_bytes: tuple[int, ...]

    def views(self, host_ids: BlockIds, group: int) -> list[memoryview]:
        """Return the bytes of some blocks."""
        stride, size, buffer = self.arena.block_stride_bytes, self.block_bytes[group], self.buffer
        return [buffer[at * stride : at * stride + size] for at in host_ids.tolist()]

    @property
    def buffer(self) -> memoryview:
        """Return the bytes of the arena."""
        return self.arena.buffer


class Arrival(NamedTuple):
    """What a store has answered.

    Attributes:
        nbytes: how many bytes.
        seals: of the whole records among them.
        land: returns once so many leading blocks are in the arena, with their sums.
    """

    nbytes: int
    seals: Seals
    land: Callable[[int], Awaitable[None]]


class Landing(Protocol):
    """Brings a part of a span from a store."""

    async def fetch(self, part: SpanPart, name: str, until: Until) -> Arrival:
        """Ask for a part's records, and return what the store answered.

        Raises:
            FileNotFoundError: there is no such object.
            RemoteError: the store failed, or did not answer in time.
        """
        ...

    def close(self) -> None:
        """Release the arena; nothing may be on its way."""
        ...


class OpenStore(Store, Protocol):
    """A store that knows how its bytes get into the arena."""

    def landing(self, requests: Requests, host: HostBlocks, copier: Copier) -> Landing:
        """Return the landing that brings spans from it."""
        ...


class Copier:
    """Copy threads whose jobs can be awaited. They yield to those that copy for devices."""

    def __init__(self, threads: int) -> None:
        self._pool: CopyPool | None = in_background(lambda: CopyPool(threads))
        self._numbers = count()
        self._jobs: dict[int, Callable[[], None]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        forks.on_fork(self._let_go_in_child)

    def connect(self) -> None:
        """Attach to the running loop."""
        assert self._pool is not None
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._pool.fileno(), self._reap)

    async def copy(self, blocks: Sequence[PageMap], host_ids: BlockIds) -> None:
        """Copy block 0 of each of these maps to a host block, and sum it.

        Cancellation: the copies go on, until `close` at the latest.
        """
        ends = []
        for at, pages in enumerate(blocks):
            ended = asyncio.get_running_loop().create_future()
            number, own = next(self._numbers), host_ids[at : at + 1]
            self._open_pool().submit(number, pages, TO_HOST, np.zeros(1, np.int64), own, True)
            self._jobs[number] = partial(_settle, ended)
            ends.append(ended)
        for ended in ends:
            await ended

    def start_copy(self, pages: PageMap, host_ids: BlockIds, ended: Callable[[], None]) -> None:
        """Start to copy blocks 0 to n of a map to n host blocks, and to sum them.

        `ended` is called on the loop's thread when it is done.
        """
        number = next(self._numbers)
        blocks = np.arange(len(host_ids))
        self._open_pool().submit(number, pages, TO_HOST, blocks, host_ids, True)
        self._jobs[number] = ended

    async def checksum(self, pages: PageMap, host_ids: BlockIds) -> None:
        """Sum host blocks; for the rest see `copy`."""
        ended = asyncio.get_running_loop().create_future()
        self.start_checksum(pages, host_ids, partial(_settle, ended))
        await ended

    def start_checksum(self, pages: PageMap, host_ids: BlockIds, ended: Callable[[], None]) -> None:
        """Start to sum host blocks; `ended` is called on the loop's thread when it is done."""
        number = next(self._numbers)
        self._open_pool().checksum(number, pages, host_ids, True)
        self._jobs[number] = ended

    def _open_pool(self) -> CopyPool:
        if self._pool is None or self._loop is None:
            raise ClosedError("the copy threads have ended, or are not connected")
        return self._pool

    def _reap(self) -> None:
        assert self._pool is not None
        for number in self._pool.reap():
            self._jobs.pop(number)()

    def _let_go_in_child(self) -> None:
        if self._pool is not None:
            forks.replace(self._pool.fileno())

    def close(self) -> None:
        """Detach from the loop, and join the threads: nothing is copied any more. Idempotent."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        if self._loop is not None:
            self._loop.remove_reader(pool.fileno())
        pool.close()


def _settle(ended: Future[None]) -> None:
    if not ended.done():
        ended.set_result(None)


class BodyLanding:
    """Brings spans from a store that returns bodies."""

    def __init__(
        self, store: BodyStore, requests: Requests, host: HostBlocks, copier: Copier
    ) -> None:
        self._store, self._requests, self._host, self._copier = store, requests, host, copier

    async def fetch(self, part: SpanPart, name: str, until: Until) -> Arrival:
        """Ask for a part's records, and return what the store answered."""
        block_bytes = self._host.block_bytes[part.group]
        record_bytes = block_bytes + SEAL_BYTES
        first = part.first_record * record_bytes
        extent = first, first + part.blocks * record_bytes
        body = await self._requests.get(self._store, name, extent, until)
        begins = range(0, min(body.nbytes, extent[1] - first) - record_bytes + 1, record_bytes)
        seals = b"".join(body.read(at + block_bytes, at + record_bytes) for at in begins)

        async def land(blocks: int) -> None:
            pages = [self._pages(body, at, block_bytes) for at in begins[:blocks]]
            await self._copier.copy(pages, part.host_ids[:blocks])

        return Arrival(body.nbytes, np.frombuffer(seals, np.uint8).reshape(-1, SEAL_BYTES), land)

    def _pages(self, body: Body, first: int, block_bytes: int) -> PageMap:
        """Return the block that begins at a byte of a body, as the copy threads take it."""
        pieces = body.pieces(first, first + block_bytes)
        sizes = [size for _, size in pieces]
        rows = zip(pieces, accumulate(sizes, initial=0), strict=False)
        host = self._host
        return PageMap(
            np.array([[address, size, size, offset] for (address, size), offset in rows]),
            1,
            host.buffer,
            host.arena.block_stride_bytes,
            body,
            host.sums,
            self._store.shares_bodies,
        )

    def close(self) -> None:
        """Do nothing: the arena is held during copies only."""


class FileLanding:
    """Brings spans from a store that reads into the arena."""

    def __init__(
        self, store: FileStore, requests: Requests, host: HostBlocks, copier: Copier
    ) -> None:
        self._store, self._requests, self._host, self._copier = store, requests, host, copier
        self._pages = sum_maps(host.arena, host.sums, host.block_bytes)

    async def fetch(self, part: SpanPart, name: str, until: Until) -> Arrival:
        """Read a part's records: the blocks to their places in the arena, the seals elsewhere."""
        record_bytes = self._host.block_bytes[part.group] + SEAL_BYTES
        seals = np.zeros((part.blocks, SEAL_BYTES), np.uint8)
        buffers = [
            view
            for block, own in zip(self._host.views(part.host_ids, part.group), seals, strict=True)
            for view in (block, own.data)
        ]
        first = part.first_record * record_bytes
        nbytes = await self._requests.read_into(self._store, name, first, buffers, until)

        async def land(blocks: int) -> None:
            await self._copier.checksum(self._pages[part.group], part.host_ids[:blocks])

        return Arrival(nbytes, seals[: nbytes // record_bytes], land)

    def close(self) -> None:
        """Release the arena."""
        self._pages = []


def buffers_of(part: SpanPart, host: HostBlocks, seals: list[bytes]) -> list[Buffer]:
    """Return the content of a span's object: each block, and behind it its seal."""
    blocks = host.views(part.host_ids, part.group)
    return [buffer for pair in zip(blocks, seals, strict=True) for buffer in pair]
