"""Laws of decoding: bytes of any origin are decoded, or refused with one kind of error."""

from __future__ import annotations

from random import Random
from typing import Any

import msgspec
import pytest

from flexkv.common.decoding import decoded
from flexkv.common.errors import MalformedError


class Note(msgspec.Struct, array_like=True, tag="note"):
    """A message with fields of every kind."""

    text: str
    raw: bytes
    numbers: list[int]
    rest: dict[str, Any]


NOTE = Note("héé", b"\x00\xff", [1, 2**40], {"a": [None, 1.5, "ß"]})


@pytest.mark.parametrize("module", [msgspec.json, msgspec.msgpack])
def test_what_was_encoded_is_decoded(module: Any) -> None:
    """An encoded message is decoded to an equal one, from any kind of buffer."""
    data = module.encode(NOTE)
    for each in (data, bytearray(data), memoryview(data)):
        assert decoded(module.Decoder(Note), each) == NOTE


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x91\xa5\xff\xfe\xfd\xfc\xfb",
        b"\x95\xa4note\xa2\xff\xfe\xc4\x00\x90\x80",
        b"\xdd\xff\xff\xff\xff",
        b"\x91" * 100_000,
        b"\x95\xa4note\xa0\xc4\x00\x90\x81\xa1a" + b"\x91" * 100_000,
        b"\x95\xa4note\xa0\xc4\x00\x90\x81\x90\x00",
        b"\x95\xa4note\xa0\xc6\xff\xff\xff\xff",
        b"\x95\xa4note\xa0\xc4\x00\xdd\xff\xff\xff\xff",
    ],
)
def test_bad_messagepack_is_malformed(data: bytes) -> None:
    """Bad UTF-8, deep nesting, endless lengths and odd keys in MessagePack are MalformedError."""
    with pytest.raises(MalformedError) as caught:
        decoded(msgspec.msgpack.Decoder(Note), data)
    assert caught.value.length_bytes == len(data)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    "data", [b'{"a": "\xff\xfe"}', b'{"\xff": 1}', b'{"a": ' + b"[" * 100_000, b"\xff", b"{"]
)
def test_bad_json_is_malformed(data: bytes) -> None:
    """Bad UTF-8, deep nesting and truncation in JSON are MalformedError."""
    with pytest.raises(MalformedError):
        decoded(msgspec.json.Decoder(dict[str, Any]), data)


@pytest.mark.parametrize(
    "error",
    [
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
        RecursionError("too deep"),
        OverflowError("too large"),
        MemoryError(),
        TypeError("unhashable"),
        ValueError("not so"),
        msgspec.DecodeError("truncated"),
        msgspec.ValidationError("of another type"),
    ],
)
def test_every_error_of_a_decoder_is_malformed(error: Exception) -> None:
    """Any error that a release of the decoder raises for bad bytes becomes MalformedError."""

    class Raising:
        def decode(self, data: object, /) -> None:
            raise error

    with pytest.raises(MalformedError, match=type(error).__name__) as caught:
        decoded(Raising(), b"x")
    assert caught.value.__cause__ is error


def test_mutated_messages_are_decoded_or_malformed() -> None:
    """A message with changed bytes is decoded or raises MalformedError, nothing else."""
    random = Random(1)
    for module in (msgspec.json, msgspec.msgpack):
        decoder, whole = module.Decoder(Note), module.encode(NOTE)
        for _ in range(5000):
            data = bytearray(whole)
            for _ in range(random.randint(1, 4)):
                data[random.randrange(len(data))] = random.randrange(256)
            del data[random.choice([len(data), random.randrange(len(data))]) :]
            try:
                decoded(decoder, data)
            except MalformedError:
                continue
