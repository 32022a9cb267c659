"""How a protocol puts its messages on a stream of bytes.

A frame is four bytes of length, little-endian, and a message in MessagePack.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from flexkv.common.decoding import decoded
from flexkv.common.errors import ConfigError, FlexKVError, MalformedError

T = TypeVar("T")

LENGTH_BYTES = 4
_ENCODER = msgspec.msgpack.Encoder()


class Framing:
    """The frames of one protocol."""

    def __init__(self, bytes_max: int, error: type[FlexKVError]) -> None:
        """Take the length of its longest message, and the error of a peer that breaks its rules."""
        self.bytes_max, self._error = bytes_max, error

    def framed(self, message: msgspec.Struct) -> bytes:
        """Return a message as a frame.

        Raises:
            ConfigError: the message is longer than any peer accepts.
        """
        body = _ENCODER.encode(message)
        if len(body) > self.bytes_max:
            raise ConfigError("message", f"{len(body)} bytes", f"must be {self.bytes_max} or less")
        return len(body).to_bytes(LENGTH_BYTES, "little") + body

    def length_of(self, head: bytes | bytearray, bytes_max: int | None = None) -> int:
        """Return the length of the message that follows a frame's head.

        Raises the protocol's error if it is more than `bytes_max`, or than any message may have.
        """
        length = int.from_bytes(head, "little")
        if length > (most := self.bytes_max if bytes_max is None else bytes_max):
            raise self._error(f"a frame of {length} bytes, more than {most}")
        return length

    def understood(
        self, decoder: msgspec.msgpack.Decoder[T], body: bytes | bytearray | memoryview
    ) -> T:
        """Return the message that a peer sent.

        Raises the protocol's error if the bytes are not such a message, for whatever reason.
        """
        try:
            return decoded(decoder, body)
        except MalformedError as error:
            raise self._error(str(error)) from error
