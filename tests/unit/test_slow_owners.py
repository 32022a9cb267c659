"""Owners that send, but slowly: how long a read of them may take, on a virtual clock."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flexkv.common.errors import PeerError
from flexkv.io.peer.frames import HEADER_BYTES, Read, Status, unpack_read
from flexkv.io.peer.receiver import Receiver
from flexkv.io.peer.sockets import SLOWEST_BYTES_S, STALL_NOTICED, Extents, SocketRing
from flexkv.testing.virtual_time import run_virtual

STALL_S = 2.5
MARGIN_S = 0.01
"""For the bytes that are no blocks."""


class Trickle(SocketRing):
    """A ring without sockets, over whose connection answers arrive at a rate, after a while."""

    def __init__(self, bytes_s: float, wait_s: float) -> None:
        self._bytes_s, self._wait_s = bytes_s, wait_s
        self._asked: deque[Read] = deque()
        self.is_stopped = False

    async def send(self, index: int, extents: Extents, head: bytes = b"") -> None:
        """Take a READ."""
        self._asked.append(unpack_read(head))

    async def receive(
        self, index: int, extents: Extents, head_bytes: int = 0, due_bytes: int = 0
    ) -> bytes:
        """Return the next bytes once they have arrived."""
        now_s = asyncio.get_running_loop().time()
        nbytes = head_bytes + int(extents[:, 1].sum())
        await asyncio.sleep(max(0.0, self._wait_s - now_s) + nbytes / self._bytes_s)
        is_answer = head_bytes == HEADER_BYTES and not len(extents)
        return self._asked.popleft().answer(Status.OK) if is_answer else bytes(head_bytes)

    def stop(self, index: int) -> None:
        """Take note of it."""
        self.is_stopped = True

    def _moved_bytes(self, index: int) -> int:
        return int(max(0.0, asyncio.get_running_loop().time() - self._wait_s) * self._bytes_s)


class End(NamedTuple):
    """How a read has ended.

    Attributes:
        at_s: when.
        limit_s: when it must have.
        error: why it has failed.
    """

    at_s: float
    limit_s: float
    error: PeerError | None


def ends(bytes_s: float, wait_s: float, blocks: list[int], block_bytes: int) -> list[End]:
    """Return how reads of so many blocks each have ended, which were all asked for at once."""
    told = list[End]()

    async def read(receiver: Receiver, count: int, limit_s: float) -> None:
        error, addresses = None, np.arange(count) * block_bytes
        try:
            await receiver.read(Read(1, 0, count, block_bytes), addresses)
        except PeerError as failure:
            error = failure
        told.append(End(asyncio.get_running_loop().time(), limit_s, error))

    async def main() -> None:
        ring, due_bytes = Trickle(bytes_s, wait_s), 0
        receiver = Receiver(ring, 0, "owner", STALL_S)
        async with asyncio.TaskGroup() as tasks:
            for count in blocks:
                due_bytes += count * block_bytes
                limit_s = STALL_NOTICED * STALL_S + due_bytes / SLOWEST_BYTES_S
                tasks.create_task(read(receiver, count, limit_s))
        assert receiver.is_broken == ring.is_stopped == any(end.error for end in told)
        assert receiver._due_bytes == 0

    run_virtual(main())
    return told


@given(
    st.floats(0.01, 4.0),
    st.floats(0, 0.9),
    st.lists(st.integers(1, 64), min_size=1, max_size=12),
    st.sampled_from([1 << 10, 100_000, 1 << 20]),
)
@example(0.13, 0.0, [8] * 12, 1 << 20)
@example(0.01, 0.0, [1] * 12, 1 << 10)
def test_an_owner_that_trickles_is_given_up_in_time_and_a_slow_one_is_not(
    share: float, waits: float, blocks: list[int], block_bytes: int
) -> None:
    """A read ends in 1.5 times the limit of a stall, with the time of the bytes up to its own.

    If they come at the lowest rate that is allowed, it has them, although nothing came for nearly
    as long as a stall may last: the owner may have had to wait for its turn.
    """
    told = ends(share * SLOWEST_BYTES_S, waits * STALL_S, blocks, block_bytes)
    for end in told:
        assert end.at_s <= end.limit_s + MARGIN_S
        if share >= 1:
            assert end.error is None


def test_the_error_says_that_it_was_too_slow() -> None:
    """A slow owner is told from one that has sent nothing for a while."""
    (slow,) = ends(0.5 * SLOWEST_BYTES_S, 0.0, [64], 1 << 20)
    assert slow.error is not None
    assert slow.error.why == f"its blocks took longer than {slow.limit_s:.1f} s"
    assert slow.at_s == pytest.approx(slow.limit_s)
    (silent,) = ends(4 * SLOWEST_BYTES_S, 100.0, [64], 1 << 20)
    assert silent.error is not None
    assert silent.error.why == f"nothing moved for {STALL_S} s"
