"""The extension's block keys and block ids, compared with plain Python."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from flexkv._ext import block_slots, chain_keys, features, hash128, pack_int64, prefault
from tests.unit.xxh3 import PUBLIC_SECRET, xxh3_128

PARENT = bytes(range(16))
SECRET = bytes(range(7, 199))
SIZES = [1, 2, 4, 16, 28, 29, 32, 56, 57, 64, 128, 300]
"""Tokens per block: inputs of 20 to 1,216 bytes, on and between all code paths of the hash."""


def reference_keys(
    tokens: NDArray[np.int64], tokens_per_block: int, parent: bytes, secret: bytes = SECRET
) -> bytes:
    """Return the parent's key and the chained keys of the whole blocks, made in plain Python."""
    keys = [parent]
    for end in range(tokens_per_block, len(tokens) + 1, tokens_per_block):
        block = tokens[end - tokens_per_block : end].astype("<u4").tobytes()
        parent = xxh3_128(parent + block, secret)
        keys.append(parent)
    return b"".join(keys)


@given(st.binary(min_size=17, max_size=2000))
def test_the_plain_hash_is_that_of_another_implementation(data: bytes) -> None:
    """Under the public constants, the plain Python hash equals that of python-xxhash."""
    assert xxh3_128(data) == xxhash.xxh3_128_digest(data)


@given(st.binary(max_size=2000), st.integers(0, 2**64 - 1))
def test_hash128_is_xxh3(data: bytes, seed: int) -> None:
    """`hash128` equals python-xxhash for any bytes and seed."""
    assert hash128(data, seed) == xxhash.xxh3_128_digest(data, seed)
    assert hash128(data=data) == xxhash.xxh3_128_digest(data)


def test_hash128_of_much_data_is_xxh3() -> None:
    """`hash128` equals python-xxhash on a buffer so long that the GIL is released."""
    data = np.random.default_rng(0).bytes(1 << 20)
    assert hash128(data) == xxhash.xxh3_128_digest(data)


@given(
    st.lists(st.integers(0, 2**32 - 1), max_size=200),
    st.integers(1, 70),
    st.binary(min_size=16, max_size=16),
    st.binary(min_size=136, max_size=256),
)
def test_keys_are_chained_xxh3(
    tokens: list[int], tokens_per_block: int, parent: bytes, secret: bytes
) -> None:
    """A whole block's key hashes its parent's key and its tokens; a partial block has none."""
    array_ = np.array(tokens, np.int64)
    expected = reference_keys(array_, tokens_per_block, parent, secret)
    assert chain_keys(array_, tokens_per_block, parent, secret) == expected
    assert chain_keys(tokens, tokens_per_block, parent, secret) == expected


@pytest.mark.parametrize("tokens_per_block", SIZES)
def test_keys_on_every_path_of_the_hash(tokens_per_block: int) -> None:
    """Keys are right on each code path of the hash and at its limits, under any secret."""
    tokens = np.random.default_rng(0).integers(0, 2**32, 5 * tokens_per_block + 1)
    for secret in (SECRET, PUBLIC_SECRET):
        expected = reference_keys(tokens, tokens_per_block, PARENT, secret)
        assert chain_keys(tokens, tokens_per_block, PARENT, secret) == expected


def test_keys_of_a_long_prompt_are_chained_xxh3() -> None:
    """Keys are right for a prompt so long that the GIL is released."""
    tokens = np.random.default_rng(0).integers(0, 1 << 32, 50_001)
    assert chain_keys(tokens, 16, PARENT, SECRET) == reference_keys(tokens, 16, PARENT)


OUT_OF_RANGE = st.sampled_from([-1, -(2**63), 2**32, 2**40, 2**63 - 1])


@given(st.lists(st.integers(0, 100) | OUT_OF_RANGE, min_size=1, max_size=80), st.integers(1, 20))
def test_the_first_token_out_of_range_is_named(tokens: list[int], tokens_per_block: int) -> None:
    """The error has index and value of the first token beyond 32 bits, also in a partial block."""
    first = next((i for i, token in enumerate(tokens) if not 0 <= token < 2**32), None)
    for each in (array("q", tokens), tokens):
        if first is None:
            chain_keys(each, tokens_per_block, PARENT, SECRET)
            continue
        with pytest.raises(ValueError, match=str(first)) as raised:
            chain_keys(each, tokens_per_block, PARENT, SECRET)
        assert raised.value.args == (first, tokens[first])


@pytest.mark.parametrize("huge", [2**63, 2**64, -(2**70), 10**100])
def test_an_integer_of_more_than_64_bits_is_named(huge: int) -> None:
    """A list's integer of more than 64 bits is an error with its index and value."""
    with pytest.raises(ValueError, match=str(huge)) as raised:
        chain_keys([1, 2, huge, -1], 16, PARENT, SECRET)
    assert raised.value.args == (2, huge)


def test_a_list_that_changes_as_it_is_read_does_no_harm() -> None:
    """An item whose __index__ empties the list causes an error, not a crash."""

    class Emptying:
        def __index__(self) -> int:
            items.clear()
            return 2**70

    items: list[Any] = [1, Emptying(), 3]
    with pytest.raises(ValueError, match="1"):
        chain_keys(items, 16, PARENT, SECRET)


@pytest.mark.parametrize("code", ["q", "l", "Q", "L"])
def test_every_8_byte_integer_format_is_read(code: str) -> None:
    """All four formats of 8-byte integers give the same keys, and so do unaligned items."""
    expected = reference_keys(np.arange(32), 16, PARENT)
    assert chain_keys(array(code, range(32)), 16, PARENT, SECRET) == expected
    unaligned = np.frombuffer(b"x" + array(code, range(32)).tobytes(), np.int64, offset=1)
    assert chain_keys(unaligned, 16, PARENT, SECRET) == expected


@pytest.mark.parametrize("kind", [np.int32, np.float64, np.uint8])
def test_other_items_are_refused(kind: type[np.generic]) -> None:
    """Items that are not 8-byte integers raise TypeError, never a wrong key."""
    items = np.zeros(32, kind)
    with pytest.raises(TypeError, match="8-byte integers"):
        chain_keys(items, 16, PARENT, SECRET)
    with pytest.raises(TypeError, match="8-byte integers"):
        block_slots(items, 16, 4)


def test_bad_arguments_are_refused() -> None:
    """Strides, wrong sizes and types, missing and unknown arguments raise."""
    tokens = np.arange(64)
    with pytest.raises((BufferError, ValueError)):
        chain_keys(tokens[::2], 16, PARENT, SECRET)
    with pytest.raises(ValueError, match="tokens_per_block"):
        chain_keys(tokens, 0, PARENT, SECRET)
    with pytest.raises(ValueError, match="15 bytes"):
        chain_keys(tokens, 16, PARENT[:15], SECRET)
    with pytest.raises(ValueError, match="135 bytes"):
        chain_keys(tokens, 16, PARENT, SECRET[:135])
    with pytest.raises(TypeError, match="secret"):
        chain_keys(tokens, 16, PARENT)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        chain_keys(tokens, 16, PARENT, bytearray(SECRET))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected"):
        chain_keys(tokens, 16, PARENT, SECRET, salt=1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="overflows"):
        block_slots(tokens, 2**40, 2**40)


def reference_slots(slots: list[int], per_block: int, blocks: int) -> list[int] | tuple[int, str]:
    """Return the block ids, or the index and reason of the first fault."""
    whole = len(slots) // per_block * per_block
    for index, slot in enumerate(slots):
        if not 0 <= slot < per_block * blocks:
            return index, "range"
    for index in range(0, whole, per_block):
        if slots[index] % per_block:
            return index, "alignment"
    for index in range(whole):
        if slots[index] != slots[index - index % per_block] + index % per_block:
            return index, "contiguity"
    return [slots[index] // per_block for index in range(0, whole, per_block)]


@st.composite
def slot_mappings(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """Draw slots of which up to two are wrong."""
    per_block, blocks = draw(st.integers(1, 20)), draw(st.integers(1, 10))
    ids = draw(st.lists(st.integers(0, blocks - 1), max_size=8))
    slots = [block * per_block + i for block in ids for i in range(per_block)]
    slots = slots[: draw(st.integers(0, len(slots)))]
    wrong = st.integers(-2, per_block * blocks + 2)
    for index in draw(st.lists(st.integers(0, max(len(slots) - 1, 0)), max_size=2)):
        if slots:
            slots[index] = draw(wrong)
    return slots, per_block, blocks


@given(slot_mappings())
def test_slots_give_ids_or_the_first_fault(drawn: tuple[list[int], int, int]) -> None:
    """Slots give block ids, or the first fault: range before alignment before contiguity."""
    slots, per_block, blocks = drawn
    expected = reference_slots(slots, per_block, blocks)
    mapping = np.array(slots, np.int64)
    if isinstance(expected, list):
        ids = np.frombuffer(block_slots(mapping, per_block, blocks), np.int64)
        assert ids.tolist() == expected
        return
    index, why = expected
    with pytest.raises(ValueError, match=why) as raised:
        block_slots(mapping, per_block, blocks)
    assert raised.value.args == (index, slots[index], why)


@pytest.mark.parametrize("slot", [-(2**63), 2**63 - 1])
def test_extreme_slots_are_out_of_range(slot: int) -> None:
    """The smallest and the largest int64 are out of range, and do not wrap into valid slots."""
    with pytest.raises(ValueError, match="range") as raised:
        block_slots(np.array([slot]), 1, 2**63 - 1)
    assert raised.value.args == (0, slot, "range")


def test_prefault_keeps_the_content() -> None:
    """Touching pages changes no byte, wherever in a page the buffer starts or ends."""
    memory = bytearray(range(256)) * 64
    before = bytes(memory)
    prefault(memoryview(memory)[3:-5])
    prefault(bytearray())
    assert memory == before
    with pytest.raises(BufferError):
        prefault(before)


def test_features_name_the_kernel_and_libraries() -> None:
    """`features` names the SIMD kernel and the libraries of the build."""
    told = features()
    assert told.keys() == {"simd", "liburing", "xxhash"}
    assert told["simd"] in {"avx512", "avx2", "none"}


def test_a_list_of_integers_is_packed_as_numpy_would() -> None:
    """`pack_int64` packs a list as numpy would; too large an integer, or no integer, raises."""
    values = [0, 1, -1, 2**63 - 1, -(2**63), 7]
    assert pack_int64(values) == np.array(values, np.int64).tobytes()
    assert pack_int64([]) == b""
    with pytest.raises(ValueError, match=r"\(1, 9223372036854775808\)"):
        pack_int64([0, 2**63])
    for wrong in ((1, 2), [1.5], ["1"], b"12345678"):
        with pytest.raises(TypeError):
            pack_int64(wrong)  # type: ignore[arg-type]
