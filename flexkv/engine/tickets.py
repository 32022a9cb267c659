"""The one door for requests: `await`, task ids and a server's jobs all run tickets.

RequestSpec ──Engine.submit──▶ Ticket ──run──▶ KVResponse
Request made elsewhere ──Engine.ticket──▶┘
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from flexkv.actors.flight import Flight
from flexkv.common.request import KVResponse, Operation, Request
from flexkv.common.terms import LayerWatch
from flexkv.engine.runner import ALONE, RequestOwner
from flexkv.index.keys import Namespace


class RequestSpec(msgspec.Struct, frozen=True):
    """A request as a caller states it. Arguments are those of `KVManager.get`."""

    operation: Operation
    token_ids: Any
    slot_mapping: Any = None
    token_mask: Any = None
    namespace: Namespace = None
    watch: LayerWatch | None = None
    """Follows the request layer by layer, if given."""


class Ticket:
    """A request whose arguments were checked. It is run at most once.

    Attributes:
        request: what is asked for; a get or put moves the blocks that its device ids name.
        flight: the request under way, or what became of it; None before it was planned.
        response: None before there is one. A ticket that no device can serve has one at once.
    """

    __slots__ = ("_perform", "flight", "request", "response")

    def __init__(
        self,
        request: Request,
        perform: Callable[[Request, RequestOwner], Coroutine[Any, Any, Flight]],
        response: KVResponse | None = None,
    ) -> None:
        self.request, self.response = request, response
        self.flight: Flight | None = None
        self._perform = perform

    async def run(self, turn: RequestOwner = ALONE) -> KVResponse:
        """Take the request to its response, and return that.

        Raises:
            FlexKVError: it was not admitted, or `turn.check` refused it.

        Cancellation: the request is cancelled, and CancelledError raised once no hardware touches
        its device slots any more; their content is undefined then.
        """
        if self.response is None:
            self.flight = await self._perform(self.request, turn)
            self.response = self.flight.response
            assert self.response is not None
        return self.response
