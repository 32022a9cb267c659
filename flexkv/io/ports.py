"""The port that every transfer adapter implements, and the three verbs of its protocol.

An adapter moves blocks between host memory and one other place:

    submit(transfer)   the adapter owns the transfer's buffers from here on; never blocks
    wake()             the adapter calls this, on the loop's thread, when reap has something
    reap()             every transfer that ended since the last reap, each exactly once

Buffers are lent from `submit` until the completion is reaped, even when nobody waits for it any
more. An adapter bounds nothing and orders nothing: its actor does, by what it submits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from flexkv.common.errors import TransferError
from flexkv.common.layout import PagedLayout
from flexkv.common.terms import Transfer


class Completion(NamedTuple):
    """The end of one transfer: every byte is there (`error is None`), or it failed."""

    op_id: int
    error: TransferError | None


class TransferPort(Protocol):
    """What a transfer actor needs of a device or tier."""

    @property
    def block_bytes(self) -> int:
        """Bytes moved for one block."""
        ...

    @property
    def arrived_bytes(self) -> int:
        """Bytes that came from the device or tier, of transfers that have not ended yet.

        A window, which is there to keep the device busy and no busier, does not count them.
        """
        ...

    def connect(self, wake: Callable[[], None]) -> None:
        """Attach to the running event loop; `wake` is called on it when `reap` has something."""
        ...

    def submit(self, transfer: Transfer) -> None:
        """Start one transfer. Never blocks, never raises for what the device does later.

        Raises:
            ClosedError: after `close`.
            InvariantError: ids out of the pool's range, or of unequal length.
        """
        ...

    def reap(self) -> list[Completion]:
        """Give every transfer that ended since the last call, each exactly once."""
        ...

    def close(self) -> None:
        """Detach from the loop and release everything. Only legal with nothing in flight."""
        ...


class DevicePort(TransferPort, Protocol):
    """A transfer port to an engine's KV caches."""

    @property
    def num_blocks(self) -> int:
        """Blocks of the device, as it was registered or resumed last."""
        ...

    @property
    def failure(self) -> TransferError | None:
        """What broke the device, if anything did: every transfer fails with it."""
        ...

    def order_after(self, to_device: bool) -> None:
        """Let later copies one way wait for what the calling thread's stream has queued by now.

        From any thread; a device without streams does nothing.

        Raises:
            DeviceError: the driver refused.
        """
        ...

    def suspend(self) -> None:
        """Let go of the KV caches. Only legal with nothing in flight."""
        ...

    def resume(self, layout: PagedLayout, owner: object) -> None:
        """Take KV caches again, with blocks of as many bytes; `owner` keeps them alive."""
        ...


class DurablePort(TransferPort, Protocol):
    """A transfer port whose writes can be made to survive."""

    async def sync(self) -> None:
        """Return once every completed write is on stable storage.

        Raises:
            StorageError: the device refused.
        """
        ...
