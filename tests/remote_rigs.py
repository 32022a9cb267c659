"""Real stores for one contract suite, and the remote tier's port over them."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from obstore.exceptions import BaseError

from flexkv.common.terms import (
    BLOCK_KEY_BYTES,
    BlockKey,
    BlockNames,
    Positions,
    Route,
    Tier,
    Transfer,
    positions_of,
)
from flexkv.index.keys import leaf_keys
from flexkv.io.checksums.sums import PoolChecksummer
from flexkv.io.memory.arena import Arena
from flexkv.io.memory.host_blocks import HostBlocks
from flexkv.io.ports import Completion
from flexkv.io.remote.landing import OpenStore
from flexkv.io.remote.names import Pool, PoolDescription
from flexkv.io.remote.open import open_mooncake, open_store
from flexkv.io.remote.options import RemoteOptions
from flexkv.io.remote.port import RemotePort, SpanNews
from flexkv.io.remote.requests import Requests
from flexkv.io.remote.seal import SEAL_BYTES
from tests.servers import Servers

BLOCK_BYTES = (70_000, 4096)
"""Of the chain, more than what is copied inline, and no multiple of anything; and of the leaves."""
STRIDE_BYTES = 73_728
HOST_BLOCKS = 40
SPAN_BLOCKS = 4
RECORD_BYTES = BLOCK_BYTES[0] + SEAL_BYTES
MOONCAKE_OBJECT_BYTES = 1 << 20
PATIENCE_S = 20.0
OPTIONS = RemoteOptions(deadline_s=5.0)
POOL = Pool(PoolDescription({"model": "test", "key_secret_digest": "0"}, BLOCK_BYTES, SPAN_BLOCKS))

_RANDOM = np.random.default_rng(7)
PROMPT = _RANDOM.integers(0, 256, (1 + 5 * SPAN_BLOCKS, BLOCK_KEY_BYTES), np.uint8).tobytes()
"""The root and the keys of a prompt of five spans."""


def memory_store(_: Path, __: Servers, options: RemoteOptions) -> OpenStore:
    """Return an empty store in the memory of this process."""
    return open_store("memory://", {}, options)


def s3_store(_: Path, servers: Servers, options: RemoteOptions) -> OpenStore:
    """Return an empty bucket of a real server."""
    s3 = servers.s3
    return open_store(f"s3://{s3.new_bucket()}/some/prefix/", s3.custom, options)


def directory_store(folder: Path, _: Servers, options: RemoteOptions) -> OpenStore:
    """Return a directory that does not exist yet."""
    return open_store(f"file://{folder}/shared/kv", {}, options)


def mooncake_store(folder: Path, servers: Servers, options: RemoteOptions) -> OpenStore:
    """Return an empty part of a real Mooncake Store."""
    store = open_mooncake(servers.mooncake.file(folder), options, MOONCAKE_OBJECT_BYTES)
    store.prefix = f"{secrets.token_hex(8)}/"
    return store


MakeStore: TypeAlias = Callable[[Path, Servers, RemoteOptions], OpenStore]
LISTED_STORES: dict[str, MakeStore] = {
    "memory": memory_store,
    "s3": s3_store,
    "directory": directory_store,
}
STORES = {**LISTED_STORES, "mooncake": mooncake_store}


def span_key(span: int) -> BlockKey:
    """Return the key of a span of the prompt."""
    at = BLOCK_KEY_BYTES * (span + 1) * SPAN_BLOCKS
    return PROMPT[at : at + BLOCK_KEY_BYTES]


def content(position: int, group: int = 0) -> NDArray[np.uint8]:
    """Return the right bytes of the block at a position of the prompt."""
    random = np.random.default_rng((position, group))
    return random.integers(0, 256, BLOCK_BYTES[group], np.uint8)


class PortRig:
    """A connected port over a store, with its own host memory.

    Attributes:
        news: what the port has told, in order: ("noted" or "missing", key of a span).
    """

    def __init__(self, store: OpenStore, options: RemoteOptions = OPTIONS, seed: int = 1) -> None:
        self.arena = Arena.open(HOST_BLOCKS, STRIDE_BYTES)
        self.sums = np.zeros(HOST_BLOCKS, np.uint64)
        self.host = HostBlocks(self.arena, self.sums, BLOCK_BYTES)
        self.requests = Requests(store, options, Random(seed))
        self.news: list[tuple[str, BlockKey]] = []
        news = SpanNews(
            lambda key: self.news.append(("noted", key)),
            lambda key: self.news.append(("missing", key)),
        )
        self.port = RemotePort(self.requests, POOL, self.host, options, news)
        self.port.spawn = self._spawn
        self.woken = asyncio.Event()
        self.tasks: list[asyncio.Task[None]] = []
        self._numbers = itertools.count()
        self.port.connect(self.woken.set)

    def _spawn(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self.tasks.append(task)
        return task

    # -- transfers ------------------------------------------------------------------------------

    def get(self, first: int, last: int, at: int = 0) -> Transfer:
        """Return a transfer of a range of the prompt to consecutive places from `at` on."""
        places = np.arange(at, at + last - first)
        names = BlockNames(PROMPT, Positions(first, last - first))
        route = Route(Tier.REMOTE, Tier.HOST)
        return Transfer(next(self._numbers), 0, route, places + 500, places, names=names)

    def put(self, span: int, at: int = 0) -> Transfer:
        """Return a transfer of a whole span, whose blocks are in places from `at` on."""
        begin = BLOCK_KEY_BYTES * span * SPAN_BLOCKS
        keys = PROMPT[begin : begin + BLOCK_KEY_BYTES * (SPAN_BLOCKS + 1)]
        places = np.arange(at, at + SPAN_BLOCKS)
        names = BlockNames(keys, Positions(0, SPAN_BLOCKS))
        route = Route(Tier.HOST, Tier.REMOTE)
        return Transfer(next(self._numbers), 0, route, places, places + 500, names=names)

    def leaves(self, positions: list[int], to_host: bool, at: int = 0) -> Transfer:
        """Return a transfer of leaves of group 1, from or to places from `at` on."""
        places = np.arange(at, at + len(positions))
        names = BlockNames(leaf_keys(PROMPT, 1), positions_of(np.array(positions)))
        route = Route(Tier.REMOTE, Tier.HOST) if to_host else Route(Tier.HOST, Tier.REMOTE)
        return Transfer(next(self._numbers), 0, route, places, places, names=names, group=1)

    async def fill(self, *places: tuple[int, int], group: int = 0) -> None:
        """Write the right bytes of (position, place), and their checksums, to host memory."""
        for position, place in places:
            self.arena.array[place, : BLOCK_BYTES[group]] = content(position, group)
        summer = PoolChecksummer(self.arena, sums=self.sums, block_bytes=BLOCK_BYTES)
        summer.submit(0, np.array([place for _, place in places]), True, group)
        summer.close()

    async def run(self, *transfers: Transfer) -> list[Completion]:
        """Submit transfers, and return their ends in the order of the transfers."""
        for transfer in transfers:
            self.port.submit(transfer)
        ended = await self.ended(len(transfers))
        by_op = {end.op_id: end for end in ended}
        return [by_op[transfer.op_id] for transfer in transfers]

    async def ended(self, count: int) -> list[Completion]:
        """Return the ends of so many transfers in flight."""
        ended = self.port.reap()
        async with asyncio.timeout(PATIENCE_S):
            while len(ended) < count:
                await self.woken.wait()
                self.woken.clear()
                ended += self.port.reap()
        return ended

    async def store_spans(self, *spans: int) -> None:
        """Put whole spans of the prompt, from the last places."""
        at = HOST_BLOCKS - SPAN_BLOCKS
        for span in spans:
            blocks = range(SPAN_BLOCKS)
            await self.fill(*((span * SPAN_BLOCKS + each, at + each) for each in blocks))
            (end,) = await self.run(self.put(span, at))
            assert end.error is None, end.error

    def right(self, first: int, last: int, at: int = 0, group: int = 0) -> list[bool]:
        """Return for each position whether its block is where `get` brings it, byte for byte."""
        found = self.arena.array[:, : BLOCK_BYTES[group]]
        return [
            np.array_equal(found[at + number], content(position, group))
            for number, position in enumerate(range(first, last))
        ]

    def sums_are_right(self, blocks: int, at: int = 0) -> bool:
        """Return whether the sums of consecutive blocks of the chain are those of their bytes."""
        summer = PoolChecksummer(self.arena, block_bytes=BLOCK_BYTES)
        summer.submit(0, np.arange(at, at + blocks), True)
        summer.close()
        return np.array_equal(summer.sums[at : at + blocks], self.sums[at : at + blocks])

    async def close(self) -> None:
        """Close the port, and check that its tasks are over, and that nothing holds the arena."""
        if self.tasks:
            await asyncio.wait(self.tasks)
        for task in self.tasks:
            assert task.cancelled() or task.exception() is None, task.exception()
        self.tasks.clear()
        await self.requests.store.leave()
        self.port.close()
        assert self.arena.close(), "something still holds on to host memory"


@asynccontextmanager
async def rig_over(store: OpenStore, options: RemoteOptions = OPTIONS) -> AsyncIterator[PortRig]:
    """Yield a port over a store, and close it afterwards."""
    rig = PortRig(store, options)
    try:
        yield rig
    finally:
        await rig.close()


async def names_in(store: OpenStore) -> set[str]:
    """Return the names of the spans of the prompt that are in a store, and of any others."""
    found = {each.name async for page in store.pages(f"{POOL.name}/") for each in page}
    if store.kind == "mooncake":  # it lists nothing
        leaves = leaf_keys(PROMPT, 1)
        size = BLOCK_KEY_BYTES
        keys = [leaves[at : at + size] for at in range(size, len(leaves), size)]
        for key in [span_key(span) for span in range(5)] + keys:
            with suppress(FileNotFoundError):
                found.add((await store.head(POOL.object_name(key))).name)
    return found - {POOL.description_name}


async def fetched(store: Any, name: str, first: int, last: int) -> bytes:
    """Return bytes of an object, by the way that its kind of store has for them."""
    if hasattr(store, "read_into"):
        buffer = bytearray(last - first)
        half = memoryview(buffer)[: (last - first) // 2], memoryview(buffer)[(last - first) // 2 :]
        return bytes(buffer[: await store.read_into(name, first, half)])
    try:
        return b"".join(map(bytes, await store.get(name, first, last)))
    except (FileNotFoundError, BaseError) as error:
        raise store.error_of(error, "get") from None


def pages_of(count: int) -> Iterator[str]:
    """Yield names of spans in the shard 0 of the pool."""
    for number in range(count):
        yield POOL.object_name(bytes([0]) + number.to_bytes(15, "big"))
