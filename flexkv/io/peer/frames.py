"""What two nodes say on a data socket: the reader asks for blocks, the owner sends them.

    reader ─▶ owner   READ    magic u32, flags u32 (0), number u64, first u32, count u32,
                              block_bytes u64
    owner ─▶ reader   ANSWER  magic u32, status u32, and the rest as it was asked
                              if the status is OK: count sums u64, then count blocks

All little-endian. `number` is that of the grant. `first` is the position of the first block, and
`count` says how many are asked for. A sum is that of `flexkv._ext.PageMap`. There is one answer to
each READ, in order. A header that breaks these rules ends the connection. A reader that closes its
half of it gets no more blocks.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flexkv.common.errors import MalformedError

READ_MAGIC, ANSWER_MAGIC = 0x52564B46, 0x41564B46  # "FKVR", "FKVA"
_HEADER = struct.Struct("<IIQIIQ")
HEADER_BYTES = _HEADER.size
SUM_BYTES = 8
BLOCKS_MAX = 64
"""The most blocks of one READ."""
BLOCK_BYTES_MAX = 1 << 30


class Status(IntEnum):
    """How an owner answers a READ."""

    OK = 0
    NO_GRANT = 1
    NOT_GRANTED = 2
    OTHER_SIZE = 3
    TOO_OFTEN = 4

    @property
    def why(self) -> str:
        """Return what it means, in words."""
        return {
            Status.OK: "the blocks follow",
            Status.NO_GRANT: "there is no such grant, or not any more",
            Status.NOT_GRANTED: "the blocks are not in the grant",
            Status.OTHER_SIZE: "its blocks have another size",
            Status.TOO_OFTEN: "the grant was read too often",
        }[self]


class Read(NamedTuple):
    """What a reader asks for.

    Attributes:
        number: of the grant.
        first: the position of the first block.
        blocks: how many.
        block_bytes: the bytes of each.
    """

    number: int
    first: int
    blocks: int
    block_bytes: int

    def packed(self) -> bytes:
        """Return the READ header."""
        return _HEADER.pack(READ_MAGIC, 0, *self)

    def answer(self, status: Status) -> bytes:
        """Return the ANSWER header."""
        return _HEADER.pack(ANSWER_MAGIC, status, *self)


def unpack_read(header: bytes) -> Read:
    """Return what a READ header asks for.

    Raises:
        MalformedError: it breaks the rules.
    """
    magic, flags, *rest = _HEADER.unpack(header)
    read = Read(*rest)
    if magic != READ_MAGIC:
        raise MalformedError(len(header), "it is no READ")
    if flags:
        raise MalformedError(len(header), f"unknown flags {flags:#x}")
    if not 1 <= read.blocks <= BLOCKS_MAX:
        raise MalformedError(len(header), f"it asks for {read.blocks} blocks")
    if not 1 <= read.block_bytes <= BLOCK_BYTES_MAX:
        raise MalformedError(len(header), f"it asks for blocks of {read.block_bytes} bytes")
    return read


def unpack_answer(header: bytes, read: Read) -> Status:
    """Return the status of the answer to a READ.

    Raises:
        MalformedError: it breaks the rules, or answers something else.
    """
    magic, status, *rest = _HEADER.unpack(header)
    if magic != ANSWER_MAGIC:
        raise MalformedError(len(header), "it is no answer")
    if Read(*rest) != read:
        raise MalformedError(len(header), f"it answers {Read(*rest)} instead of {read}")
    if status not in tuple(Status):
        raise MalformedError(len(header), f"unknown status {status}")
    return Status(status)


def messages(
    addresses: NDArray[np.int64], block_bytes: int, message_bytes: int
) -> Iterator[NDArray[np.int64]]:
    """Yield the blocks at these addresses as extents, int64[n, 2], message by message.

    A message has as many whole blocks as fit in `message_bytes`, and one at least. Each end may cut
    the stream in its own way.
    """
    at_once = max(1, message_bytes // block_bytes)
    for begin in range(0, len(addresses), at_once):
        some = addresses[begin : begin + at_once]
        yield np.stack([some, np.full_like(some, block_bytes)], axis=1)
