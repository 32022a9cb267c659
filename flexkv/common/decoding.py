"""Decoding of bytes that somebody else wrote: any fault raises the same error.

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
        """Return the decoded value."""
        ...


def decoded(decoder: Decoder[Decoded], data: bytes | bytearray | memoryview) -> Decoded:
    """Return the value that `data` encodes.

    Raises:
        MalformedError: the decoder rejects `data`, for whatever reason.
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
