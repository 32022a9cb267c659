"""What an object holds: the blocks of a span, and behind each the seal that proves it.

    object    block 0 │ seal │ block 1 │ seal │ … │ block G−1 │ seal
    seal      magic 4 │ version 2 │ flags 2 │ block bytes 8 │ key 16 │ parent 16 │ sum 8 │ check 8

A block and its seal are a *record*. `sum` is the checksum of the block's bytes, `check` that of the
seal's other bytes. So any range of whole records proves itself: that these are the bytes which
somebody stored under these keys, in this order. There is no header, footer or table of offsets.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flexkv import _ext
from flexkv.common.terms import BlockKey
from flexkv.io.ports import Sums

SEAL_BYTES = 64
MAGIC, VERSION, FLAGS = b"FKVs", 1, 0
_IDENTITY = struct.Struct("<4sHHQ16s16s")
"""The part of a seal that follows from the name of its block."""
_SUM = struct.Struct("<Q")
_CHECK_BYTES = 8
_SUMMED_BYTES = SEAL_BYTES - _CHECK_BYTES
_SUM_AT = np.array([_IDENTITY.size, _SUMMED_BYTES])

assert _IDENTITY.size + _SUM.size == _SUMMED_BYTES

Seals = NDArray[np.uint8]
"""uint8[n, SEAL_BYTES]."""


class BlockName(NamedTuple):
    """What identifies a block: its key, and that of the block before it."""

    key: BlockKey
    parent: BlockKey


def seal(name: BlockName, block_bytes: int, block_sum: int) -> bytes:
    """Return the seal of a block whose bytes have the checksum `block_sum`."""
    summed = _identity(name, block_bytes) + _SUM.pack(block_sum)
    return summed + _check(summed)


def sealed_blocks(seals: Seals, names: Sequence[BlockName], block_bytes: int) -> int:
    """Return how many leading seals are whole and belong to the blocks of these names."""
    for number, (found, name) in enumerate(zip(seals, names, strict=False)):
        whole = found.tobytes()
        identity, summed = whole[: _IDENTITY.size], whole[:_SUMMED_BYTES]
        if identity != _identity(name, block_bytes) or whole[_SUMMED_BYTES:] != _check(summed):
            return number
    return min(len(seals), len(names))


def sums_in(seals: Seals) -> Sums:
    """Return the checksums of blocks, as their seals have them."""
    begin, end = _SUM_AT
    return np.ascontiguousarray(seals[:, begin:end]).view("<u8")[:, 0].astype(np.uint64)


def _identity(name: BlockName, block_bytes: int) -> bytes:
    return _IDENTITY.pack(MAGIC, VERSION, FLAGS, block_bytes, name.key, name.parent)


def _check(summed: bytes) -> bytes:
    return _ext.hash128(summed)[:_CHECK_BYTES]
