"""A request of a manager whose engine is in a server's process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

import numpy as np

from flexkv.actors.supervisor import Supervisor
from flexkv.common.errors import ClosedError, FlexKVError, TransferError, error_from
from flexkv.common.request import KVResponse, KVResponseStatus, Operation, Request
from flexkv.engine.runner import ALONE, RequestOwner
from flexkv.server.leaves import leaf_ids
from flexkv.server.wire import Done, Start


class Sends(Protocol):
    """What sends requests to a server: an `EngineClient`."""

    @property
    def supervisor(self) -> Supervisor:
        """Return what owns the tasks."""
        ...

    @property
    def epoch(self) -> int:
        """Return what identifies the state of the devices now."""
        ...

    @property
    def orders_all(self) -> bool:
        """Return whether the devices of all ranks are in this process."""
        ...

    def ready(self, ticket: RemoteTicket, slot_mapping: Any) -> RemoteTicket:
        """Return a ticket with its slots."""
        ...

    def send(self, ticket: RemoteTicket, start: Start) -> None:
        """Send a request; its ticket is told when it has ended."""
        ...

    def cancel(self, numbers: Sequence[int]) -> None:
        """Cancel requests, whose ends are reported all the same."""
        ...

    def release(self, number: int) -> None:
        """End the hold of a prepared get."""
        ...

    async def settle(self, number: int) -> None:
        """Return once no device of this process touches the blocks of a request."""
        ...

    async def flush(self) -> object:
        """Return once what was put before is on stable storage."""
        ...


class RemoteTicket:
    """A request whose arguments were checked: see `flexkv.engine.tickets.Ticket`.

    Attributes:
        request: what is asked for; its id is the number by which the server knows it.
        response: None before there is one.
        order: the element order of the devices' blocks for which its keys were derived.
    """

    def __init__(
        self,
        door: Sends,
        request: Request,
        order: str,
        generation: int | None = None,
        holds: bool = False,
    ) -> None:
        """Make the ticket of a request.

        Args:
            door: sends it.
            request: what is asked for.
            order: the element order of the devices' blocks for which its keys were derived.
            generation: the server's when a put was prepared; a later clear voids the put.
            holds: whether a match under the request's id keeps what it found from eviction.
        """
        self.request, self.order = request, order
        self.response: KVResponse | None = None
        self._door, self._generation, self._holds = door, generation, holds
        self._over = asyncio.Event()
        self._done = Done(request.request_id, "failed", 0)
        self._error: FlexKVError | None = None
        self._epoch: int | None = None
        why = "it was not finished in time"
        self._write_error: FlexKVError | None = TransferError(0, "write-behind", 0, why)

    def with_request(self, request: Request) -> RemoteTicket:
        """Return the ticket of the same request with more fields set; it takes over the hold."""
        return RemoteTicket(self._door, request, self.order, self._generation, self._holds)

    def with_slots(self, slot_mapping: Any) -> RemoteTicket:
        """Return the ticket of a prepared request with its slots.

        Raises:
            ConfigError: the slots break a rule.
        """
        return self._door.ready(self, slot_mapping)

    def begin(self) -> None:
        """Bind the request to the devices for which its slots were checked; `run` sends it.

        A task that is cancelled before its first step has sent nothing, so it has nothing to undo.
        """
        if self._epoch is None:
            self._epoch = self._door.epoch

    def _send(self) -> None:
        request, ids = self.request, self.request.device_ids
        start = Start(
            request.request_id,
            request.operation.label,
            request.keys,
            min(request.span.first_block, request.block_count),  # no whole block is selected
            b"" if ids is None else ids.tobytes(),
            self._epoch or 0,
            when_ready=ids is not None and self._door.orders_all,
            held=request.request_id if self._holds else 0,
            namespace_hash=request.namespace_hash,
            generation=self._generation,
            leaves=leaf_ids(request.leaves),
            drop=request.drop,
        )
        self._holds = False  # the server ends the hold
        self._door.send(self, start)

    def ended(self, done: Done) -> None:
        """Take the end of the request."""
        self._done = done
        self._error = error_from(done.cause, done.error) if done.error else None
        self._over.set()

    async def run(self, turn: RequestOwner = ALONE) -> KVResponse:
        """Take the request to its response, and return that.

        Cancellation: the request is cancelled, and CancelledError raised once no device of this
        process touches its slots any more; their content is undefined then.
        """
        self.begin()
        if self.response is not None:
            return self.response
        self._send()
        try:
            await self._over.wait()
        except asyncio.CancelledError:
            self._door.cancel((self.request.request_id,))
            while not self._over.is_set():
                with suppress(asyncio.CancelledError):
                    await self._over.wait()
            raise
        finally:
            if isinstance(self._error, ClosedError):  # perhaps the server is gone: ask the devices
                await self._settled()
        self.response = _response(self.request, self._done, self._error)
        return self.response

    async def _settled(self) -> None:
        """Return once no device of this process touches the request's blocks, cancelled or not.

        Cancellation: CancelledError is raised after that.
        """
        settling = self._door.supervisor.spawn("settle", self._door.settle(self.request.request_id))
        cancelled: asyncio.CancelledError | None = None
        while not settling.done():
            try:
                await asyncio.wait([settling])
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled

    def release(self) -> None:
        """End the hold on the blocks that a prepared ticket has found."""
        if self._holds:
            self._holds = False
            self._door.release(self.request.request_id)

    def end(self) -> None:
        """Release what the ticket holds. Idempotent."""
        self.release()

    async def wait_written(self) -> None:
        """Return once everything is on stable storage: a server does not report single writes."""
        if self.request.operation is Operation.PUT:
            try:
                await self._door.flush()
            except FlexKVError as error:
                self._write_error = error
                return
        self._write_error = None

    def write_error(self) -> FlexKVError | None:
        """Return why something is not on stable storage; None if all of it is."""
        return self._write_error


def _response(request: Request, done: Done, error: FlexKVError | None) -> KVResponse:
    """Return the response for the end of a request, as the server has reported it."""
    first, last, *_ = request.span
    blocks = np.zeros(last - first, np.bool_)
    if done.moved_bits:
        bits = np.unpackbits(np.frombuffer(done.moved_bits, np.uint8))[: last - first]
        blocks[: len(bits)] = bits
    else:
        blocks[: done.moved] = True
    mask = np.zeros(request.token_count, np.bool_)
    per_block = request.tokens_per_block
    mask[first * per_block : last * per_block] = np.repeat(blocks, per_block)
    return KVResponse(KVResponseStatus(done.status), request.request_id, mask, error)
