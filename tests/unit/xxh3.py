"""XXH3-128 with a secret, in plain Python, from the specification; and pairs that collide in it.

For inputs of at least 17 bytes, as block keys have. Source: xxHash, doc/xxhash_spec.md.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

M64 = (1 << 64) - 1
P32_1, P32_2, P32_3 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
P64_1, P64_2, P64_3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
P64_4, P64_5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5

PUBLIC_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
"""The public constants of XXH3, its default secret."""
START = 3
"""Offset in the secret for the fifth and later rounds of inputs of 129 to 240 bytes."""


def _u64(data: bytes, at: int) -> int:
    return int(struct.unpack_from("<Q", data, at)[0])


def _fold(a: int, b: int) -> int:
    product = a * b
    return (product & M64) ^ (product >> 64)


def _avalanche(value: int) -> int:
    value ^= value >> 37
    value = value * 0x165667919E3779F9 & M64
    return value ^ (value >> 32)


class Mix(NamedTuple):
    """Offsets of two halves of 16 bytes that are mixed, and of their part of the secret."""

    first: int
    second: int
    secret: int


def mixes(size: int) -> list[Mix]:
    """Return the mixing steps, in order, for an input of 17 to 240 bytes."""
    if size <= 128:
        steps = range((size - 1) // 32, -1, -1)
        return [Mix(16 * i, size - 16 * (i + 1), 32 * i) for i in steps]
    whole = [Mix(32 * i, 32 * i + 16, 32 * i if i < 4 else START + 32 * (i - 4))
             for i in range(size // 32)]  # fmt: skip
    return [*whole, Mix(size - 16, size - 32, 136 - 17 - 16)]


def _mid(data: bytes, secret: bytes) -> tuple[int, int]:
    low, high = len(data) * P64_1 & M64, 0
    for number, (one, two, at) in enumerate(mixes(len(data))):
        if number == 4 and len(data) > 128:
            low, high = _avalanche(low), _avalanche(high)
        a, b, c, d = (_u64(data, place) for place in (one, one + 8, two, two + 8))
        low = low + _fold(a ^ _u64(secret, at), b ^ _u64(secret, at + 8)) & M64
        low ^= c + d & M64
        high = high + _fold(c ^ _u64(secret, at + 16), d ^ _u64(secret, at + 24)) & M64
        high ^= a + b & M64
    mixed = low * P64_1 + high * P64_4 + len(data) * P64_2 & M64
    return _avalanche(low + high & M64), -_avalanche(mixed) & M64


def _merged(lanes: list[int], secret: bytes, at: int, start: int) -> int:
    for i in range(0, 8, 2):
        start += _fold(
            lanes[i] ^ _u64(secret, at + 8 * i), lanes[i + 1] ^ _u64(secret, at + 8 * i + 8)
        )
    return _avalanche(start & M64)


def _long(data: bytes, secret: bytes) -> tuple[int, int]:
    lanes = [P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1]

    def accumulate(at: int, secret_at: int) -> None:
        for lane in range(8):
            value = _u64(data, at + 8 * lane)
            keyed = value ^ _u64(secret, secret_at + 8 * lane)
            lanes[lane ^ 1] = lanes[lane ^ 1] + value & M64
            lanes[lane] = lanes[lane] + (keyed & 0xFFFFFFFF) * (keyed >> 32) & M64

    stripes_of_block = (len(secret) - 64) // 8
    for stripe in range((len(data) - 1) // 64):
        in_block = stripe % stripes_of_block
        accumulate(64 * stripe, 8 * in_block)
        if in_block == stripes_of_block - 1:
            for lane in range(8):
                value = lanes[lane] ^ (lanes[lane] >> 47)
                value ^= _u64(secret, len(secret) - 64 + 8 * lane)
                lanes[lane] = value * P32_1 & M64
    accumulate(len(data) - 64, len(secret) - 64 - 7)
    low = _merged(lanes, secret, 11, len(data) * P64_1 & M64)
    return low, _merged(lanes, secret, len(secret) - 64 - 11, ~(len(data) * P64_2) & M64)


def xxh3_128(data: bytes, secret: bytes = PUBLIC_SECRET) -> bytes:
    """Return the canonical digest of an input of at least 17 bytes."""
    assert len(data) > 16
    assert len(secret) >= 136
    low, high = (_mid if len(data) <= 240 else _long)(data, secret)
    return struct.pack(">QQ", high, low)


def colliding(tokens_per_block: int, secret: bytes) -> tuple[list[int], list[int]]:
    """Return two blocks of tokens with the same key behind any parent, under a known secret.

    If input xor secret is zero in one factor, the product is zero whatever the other factor is.
    Adding to one token what another loses keeps the sums of the input.
    """
    size = 16 + 4 * tokens_per_block
    one, two = bytearray(size), bytearray(size)
    if size <= 240:
        places = [(mix.first, mix.secret) for mix in mixes(size)]
        places += [(mix.second, mix.secret + 16) for mix in mixes(size)]
        at, key_at = next(
            (at, key_at)
            for at, key_at in places
            if at >= 16 and all(each == at or abs(each - at) >= 16 for each, _ in places)
            and [each for each, _ in places].count(at) == 1
        )  # fmt: skip
        first, second = _u64(secret, key_at), _u64(secret, key_at + 8)
        struct.pack_into("<QQ", one, at, first, 5)
        struct.pack_into("<QQ", two, at, first + 5 - second & M64, second)
    else:
        # In one lane of two stripes, choose low halves that make both products zero.
        lane = 2  # after the parent and before the last stripe
        for stripe, (high_one, high_two) in enumerate([(7, 8), (7, 6)]):
            at, key_at = 64 * stripe + 8 * lane, 8 * stripe + 8 * lane
            low = _u64(secret, key_at) & 0xFFFFFFFF
            struct.pack_into("<II", one, at, low, high_one)
            struct.pack_into("<II", two, at, low, high_two)
    unpack = f"<16x{tokens_per_block}I"
    return list(struct.unpack(unpack, one)), list(struct.unpack(unpack, two))
