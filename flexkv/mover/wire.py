"""What an engine and its mover say to each other: one MessagePack message a packet.

    engine ──▶ mover    Begin, once; then requests
    mover  ──▶ engine   Ready or Refused, once; then a Done or Found for each request, in any order

Gets, puts and questions about names are for a store. A Read is for another node's engine.

Numbers below 0 in `Done` and `Found` are Mooncake's error codes.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from flexkv.mover.engine_config import EngineConfig
from flexkv.mover.store_config import StoreConfig

PACKET_BYTES = 1 << 17
"""The largest packet."""
NAMES_MAX = 1000
"""The most names in one request."""


class Lent(msgspec.Struct, frozen=True, array_like=True):
    """Memory that other nodes may read: bytes of a file, by its descriptor in the mover."""

    fd: int
    offset: int
    nbytes: int


class Begin(msgspec.Struct, frozen=True, tag="begin", array_like=True):
    """Connect to a store, or start an engine. `window_bytes` is the size of the window."""

    config: StoreConfig | EngineConfig
    window_bytes: int
    lent: Lent | None = None


class Get(msgspec.Struct, frozen=True, tag="get", array_like=True):
    """Read an object to the window, from byte `at` on, where it may take `size` bytes."""

    number: int
    name: str
    at: int
    size: int


class Put(msgspec.Struct, frozen=True, tag="put", array_like=True):
    """Create an object of `size` bytes, which are in the window from byte `at` on.

    One that `is_kept` is never evicted.
    """

    number: int
    name: str
    at: int
    size: int
    is_kept: bool


class Exist(msgspec.Struct, frozen=True, tag="exist", array_like=True):
    """Ask which objects are there."""

    number: int
    names: list[str]


class Size(msgspec.Struct, frozen=True, tag="size", array_like=True):
    """Ask how many bytes an object has."""

    number: int
    name: str


class Remove(msgspec.Struct, frozen=True, tag="remove", array_like=True):
    """Remove an object."""

    number: int
    name: str


class Read(msgspec.Struct, frozen=True, tag="read", array_like=True):
    """Read blocks of another node to the window, one behind the other, from byte `at` on."""

    number: int
    endpoint: str
    addresses: list[int]
    at: int
    block_bytes: int


class Ready(msgspec.Struct, frozen=True, tag="ready", array_like=True):
    """The mover is connected to the store, or its engine answers others.

    Other nodes reach the engine at `endpoint`, and what it lends begins at `address`.
    """

    endpoint: str = ""
    address: int = 0


class Refused(msgspec.Struct, frozen=True, tag="refused", array_like=True):
    """The mover cannot be used."""

    why: str


class Done(msgspec.Struct, frozen=True, tag="done", array_like=True):
    """A request has ended: with the number of the object's bytes, 0, or an error code."""

    number: int
    code: int


class Found(msgspec.Struct, frozen=True, tag="found", array_like=True):
    """An `Exist` has ended: 1 for an object that is there, 0 if it is not, an error if unknown."""

    number: int
    each: list[int]


Request: TypeAlias = Get | Put | Exist | Size | Remove | Read
Reply: TypeAlias = Ready | Refused | Done | Found

encode = msgspec.msgpack.Encoder().encode
TO_MOVER = msgspec.msgpack.Decoder(Begin | Get | Put | Exist | Size | Remove | Read)
TO_ENGINE = msgspec.msgpack.Decoder(Reply)
