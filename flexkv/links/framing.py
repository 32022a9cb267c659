"""How a protocol puts its messages on a stream of bytes.

A frame is four bytes of length, little-endian, and a message in MessagePack. Between machines there
are eight bytes of its checksum before the message.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from flexkv import _ext
from flexkv.common.decoding import decoded
from flexkv.common.errors import ConfigError, FlexKVError, MalformedError

T = TypeVar("T")

LENGTH_BYTES, SUM_BYTES = 4, 8
_ENCODER = msgspec.msgpack.Encoder()


class Framing:
    """The frames of one protocol.

    Attributes:
        bytes_max: the length of its longest message.
        head_bytes: how many bytes precede a message.
    """

    def __init__(self, bytes_max: int, error: type[FlexKVError], has_sums: bool = False) -> None:
        """Take what the protocol is like.

        Args:
            bytes_max: the length of its longest message.
            error: of a peer that breaks its rules.
            has_sums: whether messages have checksums, since bits may flip on their way.
        """
        self.bytes_max, self._error, self._has_sums = bytes_max, error, has_sums
        self.head_bytes = LENGTH_BYTES + (SUM_BYTES if has_sums else 0)

    def framed(self, message: msgspec.Struct) -> bytes:
        """Return a message as a frame.

        Raises:
            ConfigError: the message is longer than any peer accepts.
        """
        body = _ENCODER.encode(message)
        if len(body) > self.bytes_max:
            raise ConfigError("message", f"{len(body)} bytes", f"must be {self.bytes_max} or less")
        return self.head_of(body) + body

    def head_of(self, body: bytes | bytearray) -> bytes:
        """Return what precedes the bytes of a message."""
        head = len(body).to_bytes(LENGTH_BYTES, "little")
        return head + _ext.hash128(body)[:SUM_BYTES] if self._has_sums else head

    def length_of(self, head: bytes | bytearray, bytes_max: int | None = None) -> int:
        """Return the length of the message that follows a frame's head.

        Raises the protocol's error if it is more than `bytes_max`, or than any message may have.
        """
        length = int.from_bytes(head[:LENGTH_BYTES], "little")
        if length > (most := self.bytes_max if bytes_max is None else bytes_max):
            raise self._error(f"a frame of {length} bytes, more than {most}")
        return length

    def check(self, head: bytes | bytearray, body: bytes | bytearray) -> None:
        """Raise the protocol's error if a message is not what was sent after this head."""
        if self._has_sums and head != self.head_of(body):
            raise self._error(f"a frame of {len(body)} bytes with another checksum")

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
