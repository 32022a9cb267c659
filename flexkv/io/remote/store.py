"""What the remote tier needs of a store: a few requests, each of which ends or is cancelled.

Two kinds of stores differ in how a get ends. A `BodyStore` returns the bytes in memory of its own,
so a get that is given up can do no harm. A `FileStore` reads straight into the caller's memory,
which it may write to until the call has returned.

Names are relative to the prefix that a store was opened with. A store raises FileNotFoundError for
an object that is not there, and RemoteError for anything else; it repeats nothing itself.
"""

from __future__ import annotations

from asyncio import Future
from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple, Protocol

from typing_extensions import Buffer

from flexkv.common.errors import RemoteError


class Listed(NamedTuple):
    """An object, as a listing or a head reports it."""

    name: str
    size_bytes: int
    modified_s: float
    """When it was last written or touched, by the store's own clock: seconds since the epoch.
    0 from a store that does not say."""


class Store(Protocol):
    """The requests that all stores have.

    Attributes:
        kind: "s3", "gs", "az", "memory", "directory" or "mooncake".
        where: names it in errors and logs; without credentials.
    """

    kind: str
    where: str

    async def put(self, name: str, buffers: Sequence[Buffer]) -> bool:
        """Create an object whose bytes are the buffers' in turn; return False if it exists.

        The object appears whole or not at all, and one that exists stays as it is. The buffers
        are lent until the call has returned.
        """
        ...

    async def read(self, name: str) -> bytes:
        """Return a small object's bytes."""
        ...

    async def head(self, name: str) -> Listed:
        """Return an object's size and age."""
        ...

    def pages(self, prefix: str) -> AsyncIterator[list[Listed]]:
        """Yield the objects whose names begin with `prefix`, which ends in a slash, by pages."""
        ...

    async def delete(self, name: str) -> None:
        """Delete an object; one that is not there is no error."""
        ...

    async def touch(self, name: str) -> None:
        """Make an object as new as if it were written now."""
        ...

    async def sweep(self, prefix: str, age_s: float) -> int:
        """Remove what puts below `prefix` left behind when their process was killed.

        Args:
            prefix: as for `pages`.
            age_s: what is younger by the store's clock may belong to a put under way.

        Returns:
            How many things were removed.
        """
        ...

    async def leave(self) -> None:
        """End what is under way, without blocking the loop, for a few seconds at most.

        Nothing is asked of the store any more; `close` follows. Without this before it, `close`
        releases what can be released at once.
        """
        ...

    def close(self) -> None:
        """Release everything. Idempotent."""
        ...


class BodyStore(Store, Protocol):
    """A store that returns what it reads in memory of its own.

    Attributes:
        shares_bodies: whether other processes may write to that memory.
    """

    shares_bodies: bool

    def get(self, name: str, first: int, last: int) -> Future[Sequence[Buffer]]:
        """Begin to read the bytes from `first` to `last` (exclusive) of an object, in chunks.

        Cancelling the future ends the request. What it raises is for `error_of` only.
        """
        ...

    def error_of(
        self, raised: BaseException, what: str
    ) -> RemoteError | FileNotFoundError | EOFError:
        """Return the error of a get that raised: EOFError if it begins behind the end."""
        ...


class FileStore(Store, Protocol):
    """A store that reads into the caller's memory."""

    async def read_into(self, name: str, first: int, buffers: Sequence[memoryview]) -> int:
        """Read the bytes of an object from `first` on into buffers in turn; return how many.

        Fewer than the buffers hold means that the object ends there.

        Cancellation: CancelledError is raised once nothing uses the buffers any more: soon, unless
        the file system hangs.
        """
        ...
