"""Names of objects: a pool, a shard of it, and the key of a span.

    <prefix>/<pool>/pool.json            what the blocks of the pool are, in clear
    <prefix>/<pool>/<aa>/<span key>      one span; <aa> is the first byte of the key
    <prefix>/<pool>/generations/<n>      a later generation, below the pool of generation 0
    <prefix>/<pool>/gc/…                 the lease of the engine that collects the pool

Pools, shards and keys are in hexadecimal. A pool is named by a digest of its description, so
engines with other models, secrets, block sizes or span lengths use other pools of the same store.
The 256 shards can be listed side by side, and spread the requests over the store.
"""

from __future__ import annotations

import hashlib
import re
from functools import cached_property
from typing import Annotated, Any, Protocol

import msgspec

from flexkv.common.decoding import decoded
from flexkv.common.errors import ConfigError, MalformedError
from flexkv.common.terms import BLOCK_KEY_BYTES, BlockKey

FORMAT_VERSION = 1
DESCRIPTION = "pool.json"
SHARDS = 256
_OBJECT = re.compile(r"([0-9a-f]{32})/([0-9a-f]{2})/([0-9a-f]{32})")

_Count = Annotated[int, msgspec.Meta(ge=1)]


class PoolDescription(msgspec.Struct, frozen=True):
    """What the objects of a pool are. Engines share a pool only if every field is equal."""

    block_identity: dict[str, Any] = msgspec.field(name="blocks_are")
    """Model, tokens per block, version of the keys, digest of the secret."""
    block_bytes: tuple[_Count, ...]
    """Bytes of a block of each KV group."""
    span_blocks: _Count
    """Blocks of the chain in one object; a leaf has an object of its own."""
    generation: int = 0
    """Each clear begins another one."""
    version: int = FORMAT_VERSION


_DECODER = msgspec.json.Decoder(PoolDescription)


class CurrentPool(Protocol):
    """The pool that an engine uses: see `SharedPool`."""

    @property
    def current(self) -> Pool | None:
        """Return the pool; None while nothing may be read or written."""
        ...

    async def joined(self) -> Pool:
        """Return the pool, once there is one."""
        ...


class Pool:
    """The names of one pool's objects.

    Attributes:
        description: what its blocks are.
        name: what its objects' names begin with.
    """

    def __init__(self, description: PoolDescription) -> None:
        self.description = description
        encoded = msgspec.json.encode(description, order="deterministic")
        self.name = hashlib.blake2b(encoded, digest_size=16, person=b"flexkv pool").hexdigest()

    @property
    def span_blocks(self) -> int:
        """Return how many blocks of the chain an object has."""
        return self.description.span_blocks

    @property
    def current(self) -> Pool:
        """Return itself: a port may use a pool that never changes."""
        return self

    @property
    def clears(self) -> int:
        """Return 0."""
        return 0

    @property
    def failure(self) -> None:
        """Return nothing: it needs no store to be known."""
        return

    async def joined(self) -> Pool:
        """Return itself."""
        return self

    @cached_property
    def description_name(self) -> str:
        """Return the name of the object that describes the pool."""
        return f"{self.name}/{DESCRIPTION}"

    @cached_property
    def generations(self) -> str:
        """Return the prefix of the objects whose names are the numbers of generations."""
        return f"{self.name}/generations/"

    @cached_property
    def encoded(self) -> bytes:
        """Return the content of the object that describes the pool."""
        return msgspec.json.format(msgspec.json.encode(self.description))

    def object_name(self, span_key: BlockKey) -> str:
        """Return the name of the object of a span."""
        return f"{self.shard(span_key[0])}{span_key.hex()}"

    def shard(self, number: int) -> str:
        """Return what the names of a shard's objects begin with; shards count from 0 to 255."""
        return f"{self.name}/{number:02x}/"

    def span_key(self, name: str) -> BlockKey | None:
        """Return the key of the span that an object is; None if it is something else."""
        found = _OBJECT.fullmatch(name)
        if found is None or found[1] != self.name or not found[3].startswith(found[2]):
            return None
        key = bytes.fromhex(found[3])
        assert len(key) == BLOCK_KEY_BYTES
        return key

    def check(self, found: bytes, field: str = "remote_cache_path") -> None:
        """Check that a description in a store is this pool's.

        Raises:
            ConfigError: it is not; the error names the fields that differ.
        """
        try:
            other = decoded(_DECODER, found)
        except MalformedError as error:
            raise ConfigError(field, self.description_name, str(error)) from error
        if differing := differences(other, self.description):
            why = f"the blocks there are others: {'; '.join(differing)}"
            raise ConfigError(field, self.description_name, why)


def differences(found: PoolDescription, wanted: PoolDescription) -> list[str]:
    """Return a text for each field that differs, with the found and the wanted value."""
    before, now = _flat(found), _flat(wanted)
    return [
        f"{name} is {before.get(name)!r} there and {now.get(name)!r} here"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def _flat(description: PoolDescription) -> dict[str, Any]:
    fields = msgspec.structs.asdict(description)
    del fields["block_identity"]
    return {**description.block_identity, **fields}
