"""What a cluster needs of the store through which its nodes know of each other.

The store has a registry of nodes, a bounded log in a few streams, and the cluster's generation. It
may fail, be slow, or lose everything: nodes then go on with what they know. Nothing in it names a
block by its key, and nothing is written for a block that does not change.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

from flexkv.cluster.generations import GenerationStore, Heard
from flexkv.cluster.records import Beat, NodeRecord
from flexkv.common.errors import FlexKVError

Positions = tuple[bytes, ...]
"""For each stream, the id of an entry; a read returns what comes behind it."""
BEGIN = b"0-0"
"""The position before the first entry of a stream."""


class ClusterStoreError(FlexKVError):
    """The cluster's store did not do what it was asked to do, or did not answer in time.

    The text has no password.
    """

    def __init__(self, where: str, what: str, why: str) -> None:
        super().__init__(f"{where}: {what} failed: {why}")
        self.where, self.what, self.why = where, what, why


class Registry(NamedTuple):
    """What the store has registered.

    Attributes:
        beats: of the nodes, as far as they can be decoded.
        expired: ids whose TTL is over.
        ends: for each stream, the id of its last entry.
        log_bytes: what the streams take in the store's memory.
    """

    beats: Sequence[Beat]
    expired: Sequence[bytes]
    ends: Positions
    log_bytes: int


class LogPage(NamedTuple):
    """What was read from the log.

    Attributes:
        entries: the encoded entries of each stream, in order.
        positions: where to go on.
        is_at_end: for each stream, whether nothing more was there.
        heard: what the store says of the cluster's generation.
    """

    entries: Sequence[Sequence[bytes]]
    positions: Positions
    is_at_end: Sequence[bool]
    heard: Heard


class ClusterStore(GenerationStore, Protocol):
    """A store. Each call ends within a bounded time, and raises `ClusterStoreError`.

    Attributes:
        where: names it, without credentials.
    """

    where: str

    async def register(self, beat: Beat, over: int | None) -> Beat | None:
        """Register a node until its TTL is over.

        Args:
            beat: what to register.
            over: the life that may be registered under the node's id now; None: no life may.

        Returns:
            What stays registered because it is of another life; None if the node is registered.
        """
        ...

    async def leave(self, node: NodeRecord) -> None:
        """Remove a node from the registry, unless another life has taken its id."""
        ...

    async def forget(self, ids: Collection[bytes]) -> None:
        """Remove ids from the registry whose TTL is over."""
        ...

    async def registry(self) -> Registry:
        """Return what is registered."""
        ...

    async def append(self, stream: int, entries: Sequence[bytes]) -> None:
        """Append encoded entries to a stream; old ones are removed if it is too large."""
        ...

    async def read(self, positions: Positions, wait_s: float) -> LogPage:
        """Return what the log has behind some positions; wait a time if there is nothing."""
        ...

    async def close(self) -> None:
        """Close all connections."""
        ...
