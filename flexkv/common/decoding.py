"""Decoding of bytes that others wrote: one function, which raises one error for any fault.

A decoder that meets hostile or damaged bytes raises more than its own errors: some releases of
msgspec raise UnicodeDecodeError for a string that is not UTF-8, deep nesting raises
RecursionError, and a length that nobody could have written raises OverflowError or MemoryError.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import msgspec

from flexkv.common.errors import MalformedError

Decoded = TypeVar("Decoded", covariant=True)


class Decoder(Protocol[Decoded]):
    """A msgspec decoder, for JSON or MessagePack."""

    def decode(self, data: bytes | bytearray | memoryview, /) -> Decoded:
        """Return what the bytes stand for."""
        ...


def decoded(decoder: Decoder[Decoded], data: bytes | bytearray | memoryview) -> Decoded:
    """Return what `data` stands for.

    Raises:
        MalformedError: the decoder does not accept it, for whatever reason.
    """
    try:
        return decoder.decode(data)
    except (
        msgspec.MsgspecError,
        ValueError,  # UnicodeDecodeError is one
        TypeError,
        OverflowError,
        RecursionError,
        MemoryError,
    ) as error:
        raise MalformedError(len(data), f"{type(error).__name__}: {error}") from error
