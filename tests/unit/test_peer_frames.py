"""The headers of the data protocol: what is sent is what is read, and nothing else is accepted."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from flexkv.common.errors import MalformedError
from flexkv.io.peer.frames import (
    BLOCK_BYTES_MAX,
    BLOCKS_MAX,
    HEADER_BYTES,
    Read,
    Status,
    messages,
    unpack_answer,
    unpack_read,
)

MESSAGE_BYTES = 4 << 20
READ = Read(2**63 + 5, 2**32 - 1, 64, 2 << 20)


def test_headers_are_as_documented() -> None:
    """Headers have 32 bytes, little-endian, in the documented order."""
    assert READ.packed() == struct.pack("<4sIQIIQ", b"FKVR", 0, *READ)
    assert READ.answer(Status.NOT_GRANTED) == struct.pack("<4sIQIIQ", b"FKVA", 2, *READ)
    assert len(READ.packed()) == HEADER_BYTES == 32


@pytest.mark.parametrize("status", Status)
def test_headers_come_back(status: Status) -> None:
    """A READ and its answer are read as they were written; each status has words."""
    assert unpack_read(READ.packed()) == READ
    assert unpack_answer(READ.answer(status), READ) is status
    assert status.why


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (READ.answer(Status.OK), "no READ"),
        (bytes(32), "no READ"),
        (READ.packed()[:4] + b"\1" + READ.packed()[5:], "flags"),
        (READ._replace(blocks=0).packed(), "0 blocks"),
        (READ._replace(blocks=BLOCKS_MAX + 1).packed(), "65 blocks"),
        (READ._replace(block_bytes=0).packed(), "of 0 bytes"),
        (READ._replace(block_bytes=BLOCK_BYTES_MAX + 1).packed(), "bytes"),
    ],
)
def test_malformed_reads_are_refused(header: bytes, why: str) -> None:
    """A READ with another magic, unknown flags, or impossible numbers is malformed."""
    with pytest.raises(MalformedError, match=why):
        unpack_read(header)


@pytest.mark.parametrize("field", Read._fields)
def test_an_answer_answers_its_read(field: str) -> None:
    """An answer that differs from its READ in any field is malformed."""
    other = READ._replace(**{field: 1})
    with pytest.raises(MalformedError, match="instead of"):
        unpack_answer(other.answer(Status.OK), READ)


def test_malformed_answers_are_refused() -> None:
    """An answer with another magic, or an unknown status, is malformed."""
    with pytest.raises(MalformedError, match="no answer"):
        unpack_answer(READ.packed(), READ)
    with pytest.raises(MalformedError, match="status 5"):
        unpack_answer(struct.pack("<4sIQIIQ", b"FKVA", 5, *READ), READ)


@pytest.mark.parametrize("block_bytes", [1, 4096, MESSAGE_BYTES - 1, MESSAGE_BYTES, 21_000_000])
def test_messages_have_whole_blocks(block_bytes: int) -> None:
    """Messages name each block once, in order; only a message of one block may be too large."""
    addresses = np.arange(64, dtype=np.int64) * 7
    found = list(messages(addresses, block_bytes, MESSAGE_BYTES))
    assert np.array_equal(np.concatenate(found)[:, 0], addresses)
    assert all((extents[:, 1] == block_bytes).all() for extents in found)
    assert all(len(e) == 1 or len(e) * block_bytes <= MESSAGE_BYTES for e in found)
    assert all((len(e) + 1) * block_bytes > MESSAGE_BYTES for e in found[:-1])
