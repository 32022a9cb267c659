"""The port that every transfer adapter implements, and the three verbs of its protocol.

An adapter moves blocks between host memory and one device or other tier:

    submit(transfer)   lends the transfer's buffers to the adapter; never blocks
    wake()             called by the adapter, on the loop's thread, when a transfer has ended
    reap()             returns every transfer that ended since the last reap, each exactly once

Buffers are lent from `submit` until the completion is reaped, even if nobody waits for it any
more. An adapter need not limit or order transfers: its actor does, by choosing what to submit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from flexkv.common.errors import TransferError
from flexkv.common.layout import PagedLayout
from flexkv.common.terms import BlockIds, Transfer

Sums: TypeAlias = NDArray[np.uint64]
"""Checksums of blocks: uint64[n]."""


class Completion(NamedTuple):
    """The end of one transfer: all bytes have arrived (`error is None`), or it failed."""

    op_id: int
    error: TransferError | None
    filled: int = 0
    """At least this many leading blocks of a failed transfer arrived. A port that cannot tell
    reports 0; the actor adds the pieces that arrived before."""


class TransferPort(Protocol):
    """What a transfer actor needs of a device or tier."""

    def connect(self, wake: Callable[[], None]) -> None:
        """Attach to the running loop, which calls `wake` when `reap` has something to return."""
        ...

    def submit(self, transfer: Transfer) -> None:
        """Start one transfer. Never blocks; `reap` reports what fails later.

        Raises:
            ClosedError: after `close`.
            InvariantError: an id is outside its pool, or the id lists differ in length.
        """
        ...

    def reap(self) -> list[Completion]:
        """Return every transfer that ended since the last call, each exactly once."""
        ...

    def close(self) -> None:
        """Detach from the loop and release everything. Only legal with nothing in flight."""
        ...


class DevicePort(TransferPort, Protocol):
    """A transfer port to an engine's KV caches."""

    @property
    def num_blocks(self) -> int:
        """Return the number of device blocks, as of the last registration or `resume`."""
        ...

    @property
    def failure(self) -> TransferError | None:
        """Return what broke the device, or None; all transfers then fail with it."""
        ...

    def order_after(self, to_device: bool) -> None:
        """Make later copies in one direction wait for the work queued on the caller's stream.

        May be called from any thread. A device without streams does nothing.

        Raises:
            DeviceError: the driver reported an error.
        """
        ...

    def suspend(self) -> None:
        """Release the KV caches. Only legal with nothing in flight."""
        ...

    def resume(self, layouts: Sequence[PagedLayout], owner: object) -> None:
        """Attach KV caches again, with blocks of the same sizes; `owner` keeps them alive."""
        ...


class DurablePort(TransferPort, Protocol):
    """A transfer port that can sync its writes to stable storage."""

    @property
    def block_bytes(self) -> int:
        """Return the bytes moved for one block of any KV group: its whole place."""
        ...

    @property
    def adapter(self) -> str:
        """Name of what moves the bytes, for statistics and logs."""
        ...

    async def sync(self) -> None:
        """Return once every completed write is on stable storage.

        Raises:
            StorageError: the device reported an error.
        """
        ...


class Checksummer(Protocol):
    """Sums host blocks in the background, off the event loop.

    Attributes:
        sums: uint64[host blocks], the sum of each.
    """

    sums: Sums

    def connect(self, wake: Callable[[], None]) -> None:
        """Attach to the running loop, which calls `wake` when `reap` has something to return."""
        ...

    def submit(self, op_id: int, host_ids: BlockIds, urgent: bool, group: int = 0) -> None:
        """Start to sum host blocks into `sums`, which is undefined for them until `reap`.

        Args:
            op_id: identifies the op in `reap`.
            host_ids: int64[n], all different.
            urgent: whether it goes before ops that are not urgent.
            group: the KV group of all these blocks, which says how many bytes they have.

        Raises:
            ValueError: an id is out of range.
        """
        ...

    def reap(self) -> list[int]:
        """Return the ids of the ops that ended since the last call."""
        ...

    def close(self) -> None:
        """Detach from the loop, and end every thread."""
        ...
