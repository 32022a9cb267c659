"""Block keys and block ids of the extension, against python-xxhash and plain loops."""

from __future__ import annotations

from array import array

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from flexkv._ext import block_slots, chain_keys, features, hash128, prefault

PARENT = bytes(range(16))


def reference_keys(tokens: NDArray[np.int64], tokens_per_block: int, parent: bytes) -> bytes:
    """Give the parent, and chain the keys of the whole blocks with python-xxhash."""
    keys = [parent]
    for end in range(tokens_per_block, len(tokens) + 1, tokens_per_block):
        numbers = tokens[end - tokens_per_block : end]
        block = numbers.astype("<u4" if numbers.max() < 2**32 else "<i8").tobytes()
        parent = xxhash.xxh3_128_digest(parent + block)
        keys.append(parent)
    return b"".join(keys)


@given(st.binary(max_size=2000), st.integers(0, 2**64 - 1))
def test_hash128_is_xxh3(data: bytes, seed: int) -> None:
    """The digest is that of python-xxhash for any bytes and seed."""
    assert hash128(data, seed) == xxhash.xxh3_128_digest(data, seed)
    assert hash128(data=data) == xxhash.xxh3_128_digest(data)


def test_hash128_of_much_data_is_xxh3() -> None:
    """A buffer so long that the GIL is released gives the same digest."""
    data = np.random.default_rng(0).bytes(1 << 20)
    assert hash128(data) == xxhash.xxh3_128_digest(data)


@given(
    st.lists(st.integers(0, 2**63 - 1), max_size=200),
    st.integers(1, 70),
    st.binary(min_size=16, max_size=16),
)
def test_keys_are_chained_xxh3(tokens: list[int], tokens_per_block: int, parent: bytes) -> None:
    """Every whole block has the digest of its parent's key and its tokens; a tail has none."""
    array_ = np.array(tokens, np.int64)
    expected = reference_keys(array_, tokens_per_block, parent)
    assert chain_keys(array_, tokens_per_block, parent) == expected


def test_keys_of_a_long_prompt_are_chained_xxh3() -> None:
    """A prompt so long that the GIL is released gives the same keys."""
    tokens = np.random.default_rng(0).integers(0, 1 << 40, 50_001)
    assert chain_keys(tokens, 16, PARENT) == reference_keys(tokens, 16, PARENT)


@given(st.lists(st.integers(-3, 100), min_size=1, max_size=80), st.integers(1, 20))
def test_the_first_negative_token_is_named(tokens: list[int], tokens_per_block: int) -> None:
    """A negative token anywhere, the tail included, raises its index and value."""
    first = next((i for i, token in enumerate(tokens) if token < 0), None)
    if first is None:
        chain_keys(array("q", tokens), tokens_per_block, PARENT)
        return
    with pytest.raises(ValueError, match=str(first)) as raised:
        chain_keys(array("q", tokens), tokens_per_block, PARENT)
    assert raised.value.args == (first, tokens[first])


@pytest.mark.parametrize("code", ["q", "l", "Q", "L"])
def test_every_8_byte_integer_format_is_read(code: str) -> None:
    """The four formats of 8-byte integers give the same keys, and so do unaligned items."""
    expected = reference_keys(np.arange(32), 16, PARENT)
    assert chain_keys(array(code, range(32)), 16, PARENT) == expected
    unaligned = np.frombuffer(b"x" + array(code, range(32)).tobytes(), np.int64, offset=1)
    assert chain_keys(unaligned, 16, PARENT) == expected


@pytest.mark.parametrize("kind", [np.int32, np.float64, np.uint8])
def test_other_items_are_refused(kind: type[np.generic]) -> None:
    """Items that are not 8-byte integers raise TypeError, never a wrong key."""
    items = np.zeros(32, kind)
    with pytest.raises(TypeError, match="8-byte integers"):
        chain_keys(items, 16, PARENT)
    with pytest.raises(TypeError, match="8-byte integers"):
        block_slots(items, 16, 4)


def test_bad_arguments_are_refused() -> None:
    """Strides, a block of no tokens, a parent of another length and unknown names raise."""
    tokens = np.arange(64)
    with pytest.raises((BufferError, ValueError)):
        chain_keys(tokens[::2], 16, PARENT)
    with pytest.raises(ValueError, match="tokens_per_block"):
        chain_keys(tokens, 0, PARENT)
    with pytest.raises(ValueError, match="15 bytes"):
        chain_keys(tokens, 16, PARENT[:15])
    with pytest.raises(TypeError, match="parent"):
        chain_keys(tokens, 16)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected"):
        chain_keys(tokens, 16, PARENT, salt=1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="overflows"):
        block_slots(tokens, 2**40, 2**40)


def reference_slots(slots: list[int], per_block: int, blocks: int) -> list[int] | tuple[int, str]:
    """Give the block ids, or the index and reason of the slot that breaks a rule first."""
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
    """Draw slots that are right, but for up to two of them."""
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
    """Range comes before alignment before contiguity, and the first of its kind is named."""
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
    """The ends of int64 wrap into nothing that looks valid."""
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
    """The build says what it runs on."""
    told = features()
    assert told.keys() == {"simd", "liburing", "xxhash"}
    assert told["simd"] in {"avx512", "avx2", "none"}
