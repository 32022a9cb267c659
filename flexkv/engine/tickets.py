"""Tickets, the one way to run requests: `await`, task ids and a server's jobs all use them.

RequestSpec ──submit───▶ Ticket ──run──▶ KVResponse
            ──prepare──▶ Ticket ──with_slots──▶ Ticket
"""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, Protocol

import msgspec
import numpy as np

from flexkv.actors.flight import Flight
from flexkv.common.errors import FlexKVError, TransferError
from flexkv.common.request import KVResponse, KVResponseStatus, Operation, Request, TokenMask
from flexkv.common.terms import LayerWatch
from flexkv.engine.runner import ALONE, RequestOwner
from flexkv.index.keys import Namespace

PREPARED = -1
"""The group of the holds of all prepared tickets; the groups of instances are not negative."""


class RequestSpec(msgspec.Struct, frozen=True):
    """A request as a caller states it. Arguments are those of `KVManager.get`."""

    operation: Operation
    token_ids: Any
    slot_mapping: Any = None
    token_mask: Any = None
    namespace: Namespace = None
    watch: LayerWatch | None = None
    """Follows the request layer by layer, if given."""


class Runs(Protocol):
    """What runs the requests of an engine."""

    def perform(self, request: Request, turn: RequestOwner) -> Coroutine[Any, Any, Flight]:
        """Run a request to its answer: see `RequestRunner.perform`."""
        ...

    def ready(self, request: Request, slot_mapping: Any) -> Ticket:
        """Return the ticket of a request with its slots: see `Ticket.with_slots`."""
        ...

    def occupy_device(self, occupies: bool) -> None:
        """Count one more or one less request that may use the device."""
        ...

    def release(self, request: Request) -> None:
        """End the hold of a prepared request, if it has one."""
        ...


class Ticket:
    """A request whose arguments were checked. It is run at most once.

    Attributes:
        request: what is asked for; a get or put moves the blocks that its device ids name.
        flight: the flight of the request, once that is answered; None before.
        response: None before there is one. A ticket that no device can serve has one at once.
    """

    __slots__ = ("_is_begun", "_runs", "flight", "request", "response")

    def __init__(self, request: Request, runs: Runs, response: KVResponse | None = None) -> None:
        self.request, self.response = request, response
        self.flight: Flight | None = None
        self._runs, self._is_begun = runs, False

    def with_slots(self, slot_mapping: Any) -> Ticket:
        """Return the ticket of a prepared request with its slots; `begin` it in the same step.

        Raises:
            ConfigError: the slots break a rule.
        """
        return self._runs.ready(self.request, slot_mapping)

    def begin(self) -> None:
        """Count as a user of the device until `end`; call it in the step that checked the slots."""
        if self.request.device_ids is not None:
            self._is_begun = True
            self._runs.occupy_device(True)

    async def run(self, turn: RequestOwner = ALONE) -> KVResponse:
        """Take the request to its response, and return that.

        Raises:
            FlexKVError: it was not admitted, or `turn.check` refused it.

        Cancellation: the request is cancelled, and CancelledError raised once no hardware touches
        its device slots any more; their content is undefined then.
        """
        if self.response is None:
            self.flight = await self._runs.perform(self.request, turn)
            self.response = self.flight.response
            assert self.response is not None
        return self.response

    def release(self) -> None:
        """End the hold on the blocks that a prepared ticket has found."""
        self._runs.release(self.request)

    def end(self) -> None:
        """Release what the ticket holds; it is over, or will never be run. Idempotent."""
        self.release()
        if self._is_begun:
            self._is_begun = False
            self._runs.occupy_device(False)

    async def wait_written(self) -> None:
        """Return once what the request writes to lower tiers is written, or has failed."""
        if self.flight is not None:
            await self.flight.wait_ended()

    def write_error(self) -> FlexKVError | None:
        """Return why something is not written to a lower tier; None if all of it is."""
        if self.flight is None:
            return None
        run = self.flight.run
        if not run.ended:
            return TransferError(0, "write-behind", 0, "it was not finished in time")
        return run.errors[0] if run.errors else None


def nothing_moved(
    request: Request, status: KVResponseStatus, error: FlexKVError | None = None
) -> KVResponse:
    """Return the response of a request that moved nothing."""
    mask = np.zeros(request.token_count, np.bool_)
    return KVResponse(status, request.request_id, mask, error)


def mask_of(request: Request) -> TokenMask:
    """Return bool[tokens]: the tokens for which a request needs slots."""
    mask = np.zeros(request.token_count, np.bool_)
    mask[request.span.first_token : request.span.last_token] = True
    return mask
