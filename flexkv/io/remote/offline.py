"""Looks at a store without an engine: which pools it has, and whether objects are what they say."""

from __future__ import annotations

import select
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise

import msgspec
import numpy as np
from numpy.typing import NDArray

from flexkv.common.decoding import decoded
from flexkv.common.errors import MalformedError
from flexkv.common.terms import BLOCK_KEY_BYTES, BlockKey
from flexkv.index.keys import leaf_salt
from flexkv.io.checksums.sums import PoolChecksummer
from flexkv.io.memory.arena import Arena
from flexkv.io.ports import Sums
from flexkv.io.remote.names import DESCRIPTION, Pool, PoolDescription
from flexkv.io.remote.requests import Requests
from flexkv.io.remote.seal import SEAL_BYTES, BlockName, sealed_blocks, sums_in
from flexkv.io.remote.until import Until

PAGE_S = 60.0
_DECODER = msgspec.json.Decoder(PoolDescription)
_HEX = set("0123456789abcdef")
_KEYS = slice(16, 48)
"""Where a seal has its block's key and that of the block before it."""


@dataclass
class FoundPool:
    """A pool of a store.

    Attributes:
        name: what its objects' names begin with.
        pool: its names and description; None if it has no description that can be read.
        spans, nbytes: how many, and their bytes.
        oldest_s, newest_s: when spans were last modified.
        leased_s: when an engine has last taken or renewed the lease to collect it; 0 if none has.
        latest: the latest generation that an object below this pool's name stands for.
    """

    name: str
    pool: Pool | None = None
    spans: int = 0
    nbytes: int = 0
    oldest_s: float = float("inf")
    newest_s: float = 0.0
    leased_s: float = 0.0
    latest: int = 0

    @property
    def blocks(self) -> int:
        """Return how many blocks the spans have; 0 if the pool has no description."""
        return 0 if self.pool is None else self.spans * self.pool.description.span_blocks


@dataclass
class FoundPools:
    """All pools of a store, by name."""

    pools: dict[str, FoundPool] = field(default_factory=dict)

    def latest(self, found: FoundPool) -> int:
        """Return the number of the latest generation of a pool; 0 if it is not described."""
        if found.pool is None:
            return 0
        base = self.pools.get(base_of(found.pool).name)
        return 0 if base is None else base.latest


def base_of(pool: Pool) -> Pool:
    """Return the first generation of a pool, below which the others are numbered."""
    return Pool(msgspec.structs.replace(pool.description, generation=0))


def span_of(name: str) -> tuple[str, BlockKey] | None:
    """Return the pool and the key of a span's object; None if an object is something else."""
    parts = name.split("/")
    if len(parts) != 3 or len(parts[2]) != 2 * BLOCK_KEY_BYTES or parts[1] != parts[2][:2]:
        return None
    with suppress(ValueError):
        return parts[0], bytes.fromhex(parts[2])
    return None


async def pools_of(requests: Requests, seen: Callable[[int], object]) -> FoundPools:
    """Return the pools of a store, all of which is listed.

    Args:
        requests: the store's.
        seen: called with the number of objects of each page.

    Raises:
        RemoteError: the store failed, or did not answer in time.
    """
    found = FoundPools()
    described: list[str] = []
    async for page in requests.pages("", PAGE_S):
        for each in page:
            pool_name, _, rest = each.name.partition("/")
            if not rest or len(pool_name) != 32 or not _HEX.issuperset(pool_name):
                continue
            pool = found.pools.setdefault(pool_name, FoundPool(pool_name))
            if rest == DESCRIPTION:
                described.append(pool_name)
            elif rest.startswith("generations/") and rest[12:].isdecimal():
                pool.latest = max(pool.latest, int(rest[12:]))
            elif rest.startswith("gc/") and rest[3:].isdecimal():
                pool.leased_s = max(pool.leased_s, each.modified_s)
            elif span_of(each.name) is not None:
                pool.spans, pool.nbytes = pool.spans + 1, pool.nbytes + each.size_bytes
                pool.oldest_s = min(pool.oldest_s, each.modified_s)
                pool.newest_s = max(pool.newest_s, each.modified_s)
        seen(len(page))
    for name in described:
        found.pools[name].pool = await _described(requests, name)
    return found


async def _described(requests: Requests, name: str) -> Pool | None:
    """Return a pool by its description; None if that is not the one of a pool of this name."""
    try:
        content = await requests.store.read(f"{name}/{DESCRIPTION}")
        pool = Pool(decoded(_DECODER, content))
    except (FileNotFoundError, MalformedError):
        return None
    return pool if pool.name == name else None


class SpanProver:
    """Proves that an object is the span that its name says. Its calls take milliseconds."""

    def __init__(self, description: PoolDescription) -> None:
        """Allocate memory for one span.

        Raises:
            ConfigError: there is too little memory.
        """
        self._span_blocks, self._block_bytes = description.span_blocks, description.block_bytes
        self._arena = Arena.open(self._span_blocks, max(self._block_bytes))
        self._checksummer = PoolChecksummer(self._arena, block_bytes=self._block_bytes)

    def fault(self, key: BlockKey, content: bytes) -> str:
        """Return what is wrong with the object of a span, or an empty text if it is right."""
        if not (groups := self._groups_of(len(content))):
            return f"it has {len(content)} bytes, which no span of this pool has"
        faults = [self._fault_in(group, key, content) for group in groups]
        return "" if "" in faults else faults[0]

    def _fault_in(self, group: int, key: BlockKey, content: bytes) -> str:
        """Return what is wrong with the object of a span of this KV group."""
        block_bytes = self._block_bytes[group]
        records = np.frombuffer(content, np.uint8).reshape(-1, block_bytes + SEAL_BYTES)
        seals = records[:, block_bytes:]
        names = [
            BlockName(both[:BLOCK_KEY_BYTES], both[BLOCK_KEY_BYTES:])
            for both in (seal[_KEYS].tobytes() for seal in seals)
        ]
        if fault := _chain_fault(names, key, group):
            return fault
        if (sealed := sealed_blocks(seals, names, block_bytes)) < len(seals):
            return f"the seal of its block {sealed} is damaged"
        wrong = np.flatnonzero(self._sums(records[:, :block_bytes], group) != sums_in(seals))
        if len(wrong):
            return f"the bytes of its block {wrong[0]} are not those that were stored"
        return ""

    def _groups_of(self, nbytes: int) -> list[int]:
        """Return the KV groups that an object may be of by its size."""
        counts = [self._span_blocks] + [1] * (len(self._block_bytes) - 1)
        sizes = zip(counts, self._block_bytes, strict=True)
        return [
            group
            for group, (count, size) in enumerate(sizes)
            if nbytes == count * (size + SEAL_BYTES)
        ]

    def _sums(self, blocks: NDArray[np.uint8], group: int) -> Sums:
        self._arena.array[: len(blocks), : blocks.shape[1]] = blocks
        ended = select.poll()
        ended.register(self._checksummer.fileno(), select.POLLIN)
        self._checksummer.submit(0, np.arange(len(blocks)), urgent=False, group=group)
        ended.poll()
        self._checksummer.reap()
        return self._checksummer.sums[: len(blocks)].copy()

    def close(self) -> None:
        """Release the memory."""
        self._checksummer.close()
        self._arena.close()


def _chain_fault(names: list[BlockName], key: BlockKey, group: int) -> str:
    """Return why blocks are not those of a span, or an empty text if they are."""
    if names[-1].key != key:
        return "it is another span's"
    if group:
        parent = (np.frombuffer(key, np.uint64) ^ leaf_salt(group)).tobytes()
        return "" if names[0].parent == parent else "its seal names another parent"
    for number, (before, name) in enumerate(pairwise(names)):
        if name.parent != before.key:
            return f"its block {number + 1} does not follow its block {number}"
    return ""


async def fault_of(
    requests: Requests, prover: SpanProver, name: str, key: BlockKey, until: Until
) -> tuple[int, str, bool]:
    """Read an object, a second time if it is wrong: the first answer may be at fault.

    Returns:
        Its size in bytes, what is wrong with it (an empty text if it is right), and whether both
        answers were the same, which proves that the object is wrong.

    Raises:
        FileNotFoundError: it is not there.
        RemoteError: the store failed, or did not answer in time.
    """

    async def read() -> bytes:
        content = await requests.tried("get", lambda: requests.store.read(name), until)
        requests.counting.other["read_bytes"] += len(content)
        return content

    content = await read()
    if not prover.fault(key, content):
        return len(content), "", True
    again = await read()
    return len(again), prover.fault(key, again), content == again
