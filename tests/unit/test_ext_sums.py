"""Checksums of host blocks: the same whether made during a copy or afterwards."""

from __future__ import annotations

import select

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flexkv._ext import TO_DEVICE, TO_HOST, CopyPool, PageMap, copy_now

CHUNK_BYTES = 512 << 10
BLOCKS = 3
IDS = np.array([2, 0])


def sum_of(block: NDArray[np.uint8]) -> int:
    """Return the checksum of a block by the contract, with another implementation of XXH3."""
    parts = (
        xxhash.xxh3_64_intdigest(block[at : at + CHUNK_BYTES].tobytes(), seed=at)
        for at in range(0, len(block), CHUNK_BYTES)
    )
    return sum(parts) % 2**64


class Rig:
    """Device and host memory, their map, and the checksums that the map keeps."""

    def __init__(self, sizes: list[int], padding: int, skew: int = 0) -> None:
        rng = np.random.default_rng(sum(sizes) + padding)
        self.bytes, self.stride = sum(sizes), sum(sizes) + padding
        self.device = rng.integers(0, 256, skew + BLOCKS * sum(sizes), np.uint8)
        memory = rng.integers(0, 256, skew + BLOCKS * self.stride, np.uint8)
        self.host = memory[skew:]
        self.sums = np.full(BLOCKS, 7, np.uint64)
        at = self.device.ctypes.data + skew + BLOCKS * np.cumsum([0, *sizes[:-1]])
        offsets = np.cumsum([0, *sizes[:-1]])
        rows = np.stack([at, sizes, sizes, offsets], axis=1).astype(np.int64)
        self.pages = PageMap(rows, BLOCKS, self.host, self.stride, self.device, self.sums)
        self.pool = CopyPool(2)

    def expected(self) -> list[int]:
        """Return the checksums of all host blocks as they are now, without their padding."""
        return [sum_of(place[: self.bytes]) for place in self.host.reshape(BLOCKS, self.stride)]

    def reap(self) -> None:
        """Wait until one job has ended."""
        assert select.select([self.pool.fileno()], [], [], 30)[0], "nothing ended"
        assert len(self.pool.reap()) == 1

    def close(self) -> None:
        """Close the pool, which joins its threads."""
        self.pool.close()


SIZES = st.lists(
    st.sampled_from([1, 63, 240, 241, 1023, 1024, 1025, 4096, CHUNK_BYTES - 1, CHUNK_BYTES])
    | st.integers(1, 5000),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.sampled_from([0, 1, 4095, CHUNK_BYTES + 1]), st.integers(0, 70), st.booleans())
def test_copies_to_the_host_keep_sums(
    sizes: list[int], padding: int, skew: int, pooled: bool
) -> None:
    """A copy to a host block updates the checksum of its bytes, and no other checksum."""
    rig = Rig(sizes, padding, skew)
    if pooled:
        rig.pool.submit(1, rig.pages, TO_HOST, IDS[::-1].copy(), IDS, True)
        rig.reap()
    else:
        copy_now(rig.pages, TO_HOST, IDS[::-1].copy(), IDS)
    expected = rig.expected()
    assert rig.sums[IDS].tolist() == [expected[2], expected[0]]
    assert rig.sums[1] == 7
    rig.pool.checksum(2, rig.pages, np.arange(BLOCKS), False)
    rig.reap()
    assert rig.sums.tolist() == expected
    rig.close()


@pytest.mark.parametrize("size", [1_100_000, 2 * CHUNK_BYTES, 5 * CHUNK_BYTES + 3])
def test_a_block_of_many_units_has_one_sum(size: int) -> None:
    """The checksums of units that several threads copy add up to the block's, however it is cut."""
    rig = Rig([size // 3, size - size // 3], 100)
    for op_id in range(20):
        rig.pool.submit(op_id, rig.pages, TO_HOST, IDS, IDS, op_id % 2 == 0)
        rig.reap()
        assert rig.sums[IDS].tolist() == [rig.expected()[2], rig.expected()[0]]
    rig.close()


def test_copies_to_the_device_touch_no_sum() -> None:
    """A copy to the device changes no checksum."""
    rig = Rig([100, 200], 0)
    copy_now(rig.pages, TO_DEVICE, IDS, IDS)
    rig.pool.submit(1, rig.pages, TO_DEVICE, IDS, IDS, True)
    rig.reap()
    assert rig.sums.tolist() == [7, 7, 7]
    rig.close()


def test_parts_that_change_places_change_the_sum() -> None:
    """Exchanging two equally long halves of a block changes its checksum."""
    rig = Rig([2 * CHUNK_BYTES], 0)
    rig.pool.checksum(1, rig.pages, IDS, False)
    rig.reap()
    before = rig.sums[0]
    block = rig.host.reshape(BLOCKS, 2, CHUNK_BYTES)[0]
    block[:] = block[::-1].copy()
    rig.pool.checksum(2, rig.pages, IDS, False)
    rig.reap()
    assert rig.sums[0] != before
    rig.close()


def test_sums_that_cannot_be_kept_are_refused() -> None:
    """Checksum arrays of a wrong size, unaligned or read-only, and pieces with gaps are refused."""
    host, row = bytearray(128), np.array([[64, 8, 8, 0]])

    def mapped(sums: object, rows: NDArray[np.int64] = row) -> PageMap:
        return PageMap(rows, 2, host, 64, None, sums)  # type: ignore[arg-type]

    for bad in (np.zeros(1, np.uint64), np.zeros(3, np.uint64), np.zeros(17, np.uint8)[1:]):
        with pytest.raises(ValueError, match="sums has"):
            mapped(bad)
    with pytest.raises(BufferError):
        mapped(bytes(16))
    with pytest.raises(ValueError, match="piece 0: with sums, pieces may leave no gaps"):
        mapped(np.zeros(2, np.uint64), np.array([[64, 8, 8, 8]]))
    pool = CopyPool(1)
    with pytest.raises(ValueError, match="made without sums"):
        pool.checksum(1, PageMap(row, 2, host, 64, None), np.arange(1), True)
    with pytest.raises(ValueError, match="host_ids"):
        pool.checksum(1, mapped(np.zeros(2, np.uint64)), np.array([2]), True)
    assert pool.in_flight == 0
    pool.close()
