"""How bytes from a store get into host memory, and are summed there.

    a body      store ──▶ memory of its own ──copy threads: copy and sum──▶ arena
    a file      file ──▶ arena, seals aside ──copy threads: sum──▶

A block of a body may lie in several chunks; the copy threads take it as a device block in as many
pieces. Only our own threads write to the arena, and `close` waits for them. So neither a request
that was given up nor a library can write there later.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np
from typing_extensions import Buffer

from flexkv._ext import PageMap
from flexkv.io.checksums.sums import sum_maps
from flexkv.io.memory.copier import Copier
from flexkv.io.memory.host_blocks import HostBlocks
from flexkv.io.remote.body import Body
from flexkv.io.remote.requests import Requests
from flexkv.io.remote.seal import SEAL_BYTES, Seals
from flexkv.io.remote.spans import SpanPart
from flexkv.io.remote.store import BodyStore, FileStore, Store
from flexkv.io.remote.until import Until


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
