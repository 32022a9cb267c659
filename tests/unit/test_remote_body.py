"""A store's answers come in chunks, and what they bring does not depend on where these are cut."""

from __future__ import annotations

import asyncio
from asyncio import Future
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexkv.io.memory.arena import Arena
from flexkv.io.memory.copier import Copier
from flexkv.io.memory.host_blocks import HostBlocks
from flexkv.io.remote.body import Body
from flexkv.io.remote.landing import BodyLanding
from flexkv.io.remote.options import RemoteOptions
from flexkv.io.remote.requests import Requests, Until
from flexkv.io.remote.seal import SEAL_BYTES, BlockName
from flexkv.io.remote.spans import SpanPart

BLOCK_BYTES, BLOCKS = 520 << 10, 3
"""More than the 512 KiB of which a checksum is made up."""
RECORD_BYTES = BLOCK_BYTES + SEAL_BYTES
CONTENT = np.random.default_rng(1).integers(0, 256, BLOCKS * RECORD_BYTES, np.uint8).tobytes()
cuts = st.lists(st.integers(0, len(CONTENT)), max_size=8).map(sorted)


def chunks_of(content: bytes, at: list[int]) -> list[bytes]:
    """Return content cut at some places: a place that is named twice makes an empty chunk."""
    ends = [0, *at, len(content)]
    return [content[begin:end] for begin, end in pairwise(ends)]


@given(cuts, st.integers(0, len(CONTENT)), st.integers(0, len(CONTENT)))
def test_bytes_are_found_across_chunks(at: list[int], one: int, other: int) -> None:
    """A range of a body has the same bytes however it is cut, and its pieces are as long."""
    body, (first, last) = Body(chunks_of(CONTENT, at)), sorted((one, other))
    assert body.nbytes == len(CONTENT)
    assert body.read(first, last) == CONTENT[first:last]
    assert sum(size for _, size in body.pieces(first, last)) == last - first


class CutStore:
    """A store whose answers come in chunks that a test cuts."""

    kind = where = "cut"
    shares_bodies = False

    def __init__(self) -> None:
        self.chunks: list[bytes] = []

    def get(self, name: str, first: int, last: int) -> Future[Any]:
        """Return the chunks."""
        future: Future[Any] = asyncio.get_running_loop().create_future()
        future.set_result(self.chunks)
        return future


@pytest.fixture(scope="module")
def host() -> Iterator[HostBlocks]:
    """Yield host memory for the blocks."""
    arena = Arena.open(BLOCKS, BLOCK_BYTES)
    yield HostBlocks(arena, np.zeros(BLOCKS, np.uint64), (BLOCK_BYTES,))
    arena.close()


def landed(host: HostBlocks, chunks: list[bytes]) -> tuple[int, bytes, bytes, bytes]:
    """Return how many bytes came, the seals, and the blocks and sums in host memory."""
    host.arena.array[:], host.sums[:] = 0, 0
    store: Any = CutStore()
    store.chunks = chunks
    names, ids = [BlockName(b"k" * 16, b"p" * 16)] * BLOCKS, np.arange(BLOCKS)
    part = SpanPart(b"k" * 16, 0, True, names, ids, ids, 0, 0)

    async def land() -> tuple[int, bytes]:
        copier = Copier(2)
        copier.connect()
        landing = BodyLanding(store, Requests(store, RemoteOptions()), host, copier)
        until = Until(asyncio.get_running_loop().time() + 60)
        nbytes, seals, into_host = await landing.fetch(part, "name", until)
        await into_host(len(seals))
        copier.close()
        return nbytes, seals.tobytes()

    nbytes, seals = asyncio.run(land())
    blocks = host.arena.array[:, :BLOCK_BYTES].tobytes()
    return nbytes, seals, blocks, host.sums.tobytes()


@given(at=cuts)
@settings(max_examples=30)
def test_blocks_land_whole_however_the_answer_is_cut(host: HostBlocks, at: list[int]) -> None:
    """Blocks, seals and checksums are those of an answer in one piece."""
    records = np.frombuffer(CONTENT, np.uint8).reshape(BLOCKS, RECORD_BYTES)
    whole = landed(host, [CONTENT])
    assert whole[1:3] == (records[:, BLOCK_BYTES:].tobytes(), records[:, :BLOCK_BYTES].tobytes())
    assert landed(host, chunks_of(CONTENT, at)) == whole


@pytest.mark.parametrize("nbytes", [0, 1, BLOCK_BYTES, RECORD_BYTES - 1, RECORD_BYTES, 1_100_000])
def test_only_whole_records_of_a_short_answer_land(host: HostBlocks, nbytes: int) -> None:
    """Only whole records land of an answer that is too short, and no more of one too long."""
    got, seals, blocks, _ = landed(host, chunks_of(CONTENT[:nbytes], [nbytes // 2]))
    count = nbytes // RECORD_BYTES
    assert (got, len(seals)) == (nbytes, count * SEAL_BYTES)
    assert blocks[: count * BLOCK_BYTES] == b"".join(
        CONTENT[n * RECORD_BYTES : n * RECORD_BYTES + BLOCK_BYTES] for n in range(count)
    )
    assert not any(blocks[count * BLOCK_BYTES :])
    assert len(landed(host, [CONTENT, CONTENT])[1]) == BLOCKS * SEAL_BYTES
